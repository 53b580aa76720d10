"""Which blocks of weights exist: the one description of a sparse layer's graph.

Kernels, dynamic sparse training, plots and checkpoints all read a :class:`BlockMask`. It holds indices only; the
weights themselves are *packed*, one [unit_rows, unit_cols] tile per present unit, in a tensor that the caller owns.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from g2g_kernels import graph, packing
from g2g_kernels.groups import GroupLayout, as_integers, check_integers, partners
from g2g_kernels.numbers import PROBABILITY, SIZE
from g2g_kernels.sides import Indices, Side, UnitAxis
from g2g_kernels.tracing import is_traced, on_cpu


class MaskTensors(NamedTuple):
    """The tensors of a :class:`BlockMask` and its sides, for operators; each uses those that it needs.

    ``…_neuron_at`` and ``…_place_of`` are empty where place p holds neuron p.
    """

    unit_row: torch.Tensor
    unit_col: torch.Tensor
    row_ptr: torch.Tensor
    row_slot: torch.Tensor
    col_ptr: torch.Tensor
    col_slot: torch.Tensor
    row_order: torch.Tensor
    row_bounds: torch.Tensor
    row_neuron_at: torch.Tensor
    row_place_of: torch.Tensor
    col_order: torch.Tensor
    col_bounds: torch.Tensor
    col_neuron_at: torch.Tensor
    col_place_of: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.row_order.shape[0], self.col_order.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns) of the unit grid."""
        return self.row_bounds.shape[0] - 1, self.col_bounds.shape[0] - 1


class BlockMask(Indices):
    """The units (blocks of weights) that a sparse [out, in] weight matrix has.

    A unit is a block of at most ``block_size`` × ``block_size`` weights in group-sorted order that never crosses a
    group's edge: each group is cut into as few ranges as possible, of nearly equal length (:class:`UnitAxis`). Each
    present unit has a *slot*, its place in the packed values [num_units, unit_rows, unit_cols]. A unit that is one
    neuron shorter than others is padded; the padding is ignored.

    The mask is an ``nn.Module``, so it moves, copies, pickles and saves with the layer that owns it. Its indices are
    not buffers, so weight averages leave them alone. :meth:`relabel_` gives slots to other units in place: shapes and
    addresses never change.

    Its one buffer, ``wiring``, describes the mask in floats, so the mask travels wherever parameters and buffers do.
    :meth:`received` is a description that was copied into it: DistributedDataParallel broadcasts buffers when it is
    created, so networks that were drawn differently become equal. :meth:`current` reads one that stands in its place
    for a while: ``torch.func.functional_call`` with the parameters and buffers of another network.

    Args:
        out_layout, in_layout: the groups of the output and input neurons.
        unit_row, unit_col: integer tensors [num_units], the unit coordinates of each slot.
        block_size: the longest side of a unit, in weights.

    Attributes:
        rows, cols: :class:`UnitAxis` of the output and the input side.
        changes: the number of changes of units so far.
        unit_row, unit_col: int32 [num_units], the coordinates of the unit in each slot.
        row_ptr, row_slot: int32 [rows.num_units + 1], int32 [num_units]: the slots of block row r, by column, are
            ``row_slot[row_ptr[r] : row_ptr[r + 1]]``.
        col_ptr, col_slot: the same for block columns (the transposed index), by row.

    Raises:
        ValueError: for coordinates outside the grid, or a unit given twice.
    """

    INDICES = ("unit_row", "unit_col", "row_ptr", "row_slot", "col_ptr", "col_slot")

    unit_row: torch.Tensor
    unit_col: torch.Tensor
    row_ptr: torch.Tensor
    row_slot: torch.Tensor
    col_ptr: torch.Tensor
    col_slot: torch.Tensor
    wiring: torch.Tensor

    @on_cpu
    def __init__(
        self,
        out_layout: GroupLayout,
        in_layout: GroupLayout,
        unit_row: torch.Tensor,
        unit_col: torch.Tensor,
        block_size: int = 64,
    ) -> None:
        super().__init__()
        self.block_size = SIZE.check("block_size", block_size)
        self.rows = UnitAxis(out_layout, self.block_size)
        self.cols = UnitAxis(in_layout, self.block_size)
        self.changes = 0
        self._set_units(unit_row, unit_col)

    # --- construction -------------------------------------------------------------------------------------------

    @classmethod
    @on_cpu
    def sample(
        cls,
        out_layout: GroupLayout,
        in_layout: GroupLayout,
        p_intra: float = 1.0,
        p_inter: float = 0.15,
        block_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> "BlockMask":
        """Draws a random graph: units inside a group with probability ``p_intra``, between groups ``p_inter``.

        Each block row gets ⌊p·n⌋ or ⌈p·n⌉ of its n candidate units of either sort (randomised rounding, so that
        the probability of each unit is exactly p), at uniformly drawn places, so rows have equal work.

        ``g2g_kernels.groups.partners`` defines which groups of the two sides count as one.
        """
        for name, p in (("p_intra", p_intra), ("p_inter", p_inter)):
            PROBABILITY.check(name, p)
        empty = torch.zeros(0, dtype=torch.int64)
        mask = cls(out_layout, in_layout, empty, empty, block_size)
        own = partners(out_layout.num_groups, in_layout.num_groups)
        same_group = own[mask.rows.group_of_unit][:, mask.cols.group_of_unit]
        present = torch.zeros_like(same_group)
        for candidates, p in ((same_group, p_intra), (~same_group, p_inter)):
            rounding = torch.rand(mask.rows.num_units, generator=generator, dtype=torch.float64)
            count = torch.floor(candidates.sum(1).double() * p + rounding).long()
            # candidates in uniformly random order first, the others behind them
            key = torch.rand(candidates.shape, generator=generator).masked_fill_(~candidates, 2.0)
            rank = torch.empty_like(key, dtype=torch.int64)
            rank.scatter_(1, key.argsort(dim=1), torch.arange(key.shape[1]).expand_as(rank))
            present |= candidates & (rank < count[:, None])
        mask._set_units(*present.nonzero(as_tuple=True))
        return mask

    @classmethod
    @on_cpu
    def full(cls, out_layout: GroupLayout, in_layout: GroupLayout, block_size: int = 64) -> "BlockMask":
        """Every unit present: a dense layer in the packed form."""
        empty = torch.zeros(0, dtype=torch.int64)
        mask = cls(out_layout, in_layout, empty, empty, block_size)
        mask._set_units(*torch.ones(mask.grid).nonzero(as_tuple=True))
        return mask

    def filled(self) -> "BlockMask":
        """The mask with every unit of the same grid; slot u holds the unit whose ``flat_unit`` is u.

        It shares this mask's axes. Creating it does not wait for the device.
        """
        full = BlockMask.__new__(BlockMask)
        nn.Module.__init__(full)
        full.block_size, full.rows, full.cols, full.changes = self.block_size, self.rows, self.cols, 0
        unit = torch.arange(self.rows.num_units * self.cols.num_units, device=self.unit_row.device)
        full._register_units(unit // self.cols.num_units, unit % self.cols.num_units)
        return full

    @classmethod
    @on_cpu
    def from_dense(cls, mask: torch.Tensor, block_size: int = 1) -> "BlockMask":
        """The mask whose dense form is ``mask``, bool [out, in], with each side in one group (cut as any group is).

        Raises:
            ValueError: if a unit is only partly true, since a unit is present as a whole.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask must be a matrix [out, in], not of shape {tuple(mask.shape)}")
        dense = mask.detach().to("cpu", torch.bool)
        empty = torch.zeros(0, dtype=torch.int64)
        result = cls(GroupLayout(dense.shape[0], 1), GroupLayout(dense.shape[1], 1), empty, empty, block_size)
        active = packing.tiles(dense.float(), result._view()).sum((2, 3))
        size = result.rows.lengths[:, None] * result.cols.lengths[None, :]
        partial = ((active > 0) & (active < size)).nonzero()
        if len(partial):
            row, col = partial[0].tolist()
            raise ValueError(
                f"unit ({row}, {col}) of {block_size} × {block_size} weights is only partly present "
                f"({len(partial)} such units); use a smaller block_size, 1 always works"
            )
        result._set_units(*(active > 0).nonzero(as_tuple=True))
        return result

    def _set_units(self, unit_row: torch.Tensor, unit_col: torch.Tensor) -> None:
        """Checks and stores the coordinates and rebuilds both indices (shapes may change)."""
        device = self.rows.order.device
        check_integers("unit_row", unit_row)
        check_integers("unit_col", unit_col)
        if unit_row.shape != unit_col.shape or unit_row.dim() != 1:
            raise ValueError(f"unit_row {tuple(unit_row.shape)} and unit_col {tuple(unit_col.shape)} must match, 1-D")
        if unit_row.numel() > self.rows.num_units * self.cols.num_units:
            raise ValueError(f"unit_row names {unit_row.numel()} units, but there are only {self.grid} in the grid")
        unit_row = unit_row.detach().to(device, torch.int64)
        unit_col = unit_col.detach().to(device, torch.int64)
        for name, coordinate, limit in (
            ("unit_row", unit_row, self.rows.num_units),
            ("unit_col", unit_col, self.cols.num_units),
        ):
            if coordinate.numel() and (coordinate.min() < 0 or coordinate.max() >= limit):
                raise ValueError(f"{name} must lie in 0 … {limit - 1}, not {coordinate.min()} … {coordinate.max()}")
        if torch.unique(unit_row * self.cols.num_units + unit_col).numel() != unit_row.numel():
            raise ValueError("the mask names a unit twice")
        self._register_units(unit_row, unit_col)

    def _register_units(self, unit_row: torch.Tensor, unit_col: torch.Tensor) -> None:
        self.unit_row, self.unit_col = unit_row.to(torch.int32), unit_col.to(torch.int32)
        self.row_ptr, self.col_ptr = (unit_row.new_zeros(n + 1, dtype=torch.int32) for n in self.grid)
        self.row_slot, self.col_slot = (torch.zeros_like(self.unit_row) for _ in range(2))
        self._build_index()
        self._publish()

    def _build_index(self) -> None:
        """Sorts the slots by (row, column) and by (column, row), into the existing buffers."""
        row, col = self.unit_row.long(), self.unit_col.long()
        for major, minor, num_major, num_minor, ptr, slot in (
            (row, col, self.rows.num_units, self.cols.num_units, self.row_ptr, self.row_slot),
            (col, row, self.cols.num_units, self.rows.num_units, self.col_ptr, self.col_slot),
        ):
            order = torch.argsort(major * num_minor + minor, stable=True)
            slot.copy_(order)
            ptr.copy_(torch.searchsorted(major[order], torch.arange(num_major + 1, device=major.device)))

    def relabel_(self, slots: torch.Tensor, unit_row: torch.Tensor, unit_col: torch.Tensor) -> None:
        """Gives ``slots`` (integer [k]) to the units at these coordinates, in place; the count stays.

        The caller ensures that no unit is named twice (a check would wait for an accelerator).
        """
        self.unit_row[slots] = unit_row.to(torch.int32)
        self.unit_col[slots] = unit_col.to(torch.int32)
        self._build_index()
        self._changed()

    def become_(self, other: "BlockMask") -> None:
        """Takes over the units of another mask of the same ``shape``, and their slots.

        This happens in place if both have the same numbers of units and ranges, so a captured graph that holds these
        tensors sees the new units.
        """
        mine, theirs = (
            [*mask.tensors()[:6], *(getattr(axis, name) for axis in (mask.rows, mask.cols) for name in axis.INDICES)]
            for mask in (self, other)
        )
        if all(a.shape == b.shape for a, b in zip(mine, theirs, strict=True)):
            for a, b in zip(mine, theirs, strict=True):
                a.copy_(b)
            for axis, new in ((self.rows, other.rows), (self.cols, other.cols)):
                axis.layout, axis.trivial = new.layout, new.trivial
            self.block_size = other.block_size
            self._changed()
            return
        device = self.unit_row.device
        self.replace_by_(copy.deepcopy(other).to(device))

    def replace_by_(self, other: "BlockMask") -> None:
        """Takes over the tensors of another mask of the same ``shape``, and their device; ``other`` is used up."""
        self.block_size, self.rows, self.cols = other.block_size, other.rows, other.cols
        self._register_units(other.unit_row, other.unit_col)
        self.changes += 1

    def equals(self, other: "BlockMask") -> bool:
        """Whether both have the same units in the same slots, and the same groups. Waits for the device."""
        mine, theirs = self._wiring(), other._wiring()
        return mine.shape == theirs.shape and torch.equal(mine.cpu(), theirs.cpu())

    # --- what others send ---------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self.changes += 1
        with torch.no_grad():
            self._own.copy_(self._wiring())
        self._seen = version(self._own)

    def _publish(self) -> None:
        self.register_buffer("wiring", self._wiring(), persistent=False)
        self._see()

    def _see(self) -> None:
        #: the buffer of this mask itself; another one stands in its place inside ``torch.func.functional_call``
        self._own = self.wiring
        #: the version of it that was checked last, and whether it had been changed from outside
        self._seen, self._received = version(self.wiring), False
        #: another buffer, its version, and what it describes
        self._visitor: tuple[torch.Tensor, int, BlockMask] | None = None

    def _wiring(self) -> torch.Tensor:
        """float32, whole numbers: group of each neuron on both sides, unit_row, unit_col, block size, sum."""
        # clamp: between to_empty and loading a state, indices are arbitrary
        groups = [axis.group_of_unit[axis.unit_of.clamp(0, axis.num_units - 1)] for axis in (self.rows, self.cols)]
        size = self.unit_row.new_full((1,), self.block_size)
        numbers = torch.cat([*groups, self.unit_row.long(), self.unit_col.long(), size])
        return torch.cat([numbers, _check_sum(numbers)]).to(torch.float32)

    def received(self) -> "BlockMask | None":
        """The mask that was copied into ``wiring``, if any; content that describes no mask is ignored.

        Data-parallel processes broadcast the same buffers at every step. Checking a change waits for the device, so in
        training mode only the first one is checked.
        """
        if version(self._own) == self._seen or (self._received and self.training):
            return None
        self._seen, self._received = version(self._own), True
        sent = self._own.detach().cpu()
        return None if torch.equal(sent, self._wiring().cpu()) else self._described(sent)

    def current(self) -> "BlockMask":
        """This mask; or while the buffer of another mask stands in place of ``wiring``, what that one describes.

        Raises:
            ValueError: if it describes no mask (two wirings were averaged, say), or under ``torch.func.vmap`` several.
        """
        wiring = self.wiring
        if wiring is self._own:
            return self
        rows = _unwrapped(wiring).detach()
        if self._visitor is None or self._visitor[0] is not rows or self._visitor[1] != version(rows):
            sent = rows.reshape(-1, rows.shape[-1]).cpu()
            if not (sent == sent[:1]).all():
                raise ValueError(
                    "networks with different wirings cannot run in one torch.func.vmap, whose networks share their "
                    "indices; call them one by one"
                )
            mask = self._described(sent[0])
            if mask is None:
                raise ValueError(
                    "the buffer in place of mask.wiring describes no mask of this layer: it comes from a layer of "
                    "another size, or is an average of two wirings; pass parameters and buffers of one network"
                )
            self._visitor = (rows, version(rows), mask.to(wiring.device))
        return self._visitor[2]

    def _described(self, sent: torch.Tensor) -> "BlockMask | None":
        """The mask of this shape that a copy of ``wiring`` on the CPU describes, or None if it describes none."""
        numbers = sent.nan_to_num().long()
        units, odd = divmod(len(numbers) - 2 - sum(self.shape), 2)
        if units < 0 or odd or not torch.equal(numbers.float(), sent):
            return None
        if not torch.equal(_check_sum(numbers[:-1]), numbers[-1:]):
            return None
        parts = numbers[:-2].split([*self.shape, units, units])
        try:
            out_layout, in_layout = (GroupLayout.from_assignment(part) for part in parts[:2])
            return BlockMask(out_layout, in_layout, parts[2], parts[3], int(numbers[-2]))
        except ValueError:
            return None

    def _apply(self, fn: Callable, recurse: bool = True) -> "BlockMask":
        super()._apply(fn, recurse)
        self._publish()  # whole numbers, whatever the dtype of weights
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._see()

    # --- what is in it ------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.rows.size, self.cols.size

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns) of the unit grid."""
        return self.rows.num_units, self.cols.num_units

    @property
    def unit_shape(self) -> tuple[int, int]:
        """(rows, columns) of a packed tile, the sides of the largest unit."""
        return self.rows.width, self.cols.width

    @property
    def num_units(self) -> int:
        """The number of present units (the number of slots)."""
        return self.unit_row.numel()

    @property
    def has_padding(self) -> bool:
        """True if some units are shorter than others."""
        return self.rows.ragged or self.cols.ragged

    @property
    def is_full(self) -> bool:
        """True if every unit is present."""
        return self.num_units == self.rows.num_units * self.cols.num_units

    @property
    def unit_sizes(self) -> torch.Tensor:
        """int64 [num_units], the number of weights in the unit of each slot."""
        return self.rows.lengths[self.unit_row.long()] * self.cols.lengths[self.unit_col.long()]

    @property
    def density(self) -> float:
        """The share of the [out, in] weights that exist, 0 to 1."""
        return int(self.unit_sizes.sum()) / (self.rows.size * self.cols.size)

    def sparsity(self) -> float:
        """The share of the [out, in] weights that do not exist, 1 − density."""
        return 1.0 - self.density

    def valid(self) -> torch.Tensor:
        """bool [num_units, unit_rows, unit_cols], false in the padding of shorter units."""
        place_row = torch.arange(self.rows.width, device=self.unit_row.device)
        place_col = torch.arange(self.cols.width, device=self.unit_row.device)
        row_ok = place_row < self.rows.lengths[self.unit_row.long()][:, None]
        col_ok = place_col < self.cols.lengths[self.unit_col.long()][:, None]
        return row_ok[:, :, None] & col_ok[:, None, :]

    def fan_in(self) -> torch.Tensor:
        """int64 [out], the number of present weights of each output neuron, in neuron order."""
        per_row = torch.zeros(self.rows.num_units, dtype=torch.int64, device=self.unit_row.device)
        per_row.index_add_(0, self.unit_row.long(), self.cols.lengths[self.unit_col.long()])
        return per_row[self.rows.unit_of]

    # --- dense and packed weights -------------------------------------------------------------------------------

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The present units of a dense [out, in] weight: [num_units, unit_rows, unit_cols]; differentiable."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, this mask describes {self.shape}")
        return _pack(weight, self._view())

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """The dense [out, in] weight of packed ``values``, zero where there is no unit; differentiable."""
        self.check_values(values)
        return _unpack(values, self._view())

    def check_values(self, values: torch.Tensor) -> None:
        """Raises ValueError unless ``values`` has this mask's packed shape."""
        packed = (self.num_units, *self.unit_shape)
        if tuple(values.shape) != packed:
            raise ValueError(f"values have shape {tuple(values.shape)}, this mask's packed weights {packed}")

    def to_dense(self) -> torch.Tensor:
        """bool [out, in] in neuron order, true where a weight exists."""
        ones = torch.ones(self.num_units, *self.unit_shape, device=self.unit_row.device)
        return self.unpack(ones) > 0

    def flat_unit(self) -> torch.Tensor:
        """int64 [num_units], the number of each slot's unit when the grid is counted row by row."""
        return packing.flat_unit(self._view())

    def present(self) -> torch.Tensor:
        """bool [block rows, block columns], true where a unit exists."""
        grid = torch.zeros(self.grid[0] * self.grid[1], dtype=torch.bool, device=self.unit_row.device)
        grid[self.flat_unit()] = True
        return grid.view(self.grid)

    def tensors(self) -> MaskTensors:
        """What operators take."""
        index = self.unit_row, self.unit_col, self.row_ptr, self.row_slot, self.col_ptr, self.col_slot
        return MaskTensors(*index, *self.rows.tensors(), *self.cols.tensors())

    def _view(self) -> "_View":
        return _View(self.unit_row, self.unit_col, self.rows.side, self.cols.side)

    # --- other libraries' graphs ----------------------------------------------------------------------------------

    edges = graph.edges
    to_scipy = graph.to_scipy
    to_networkx = graph.to_networkx
    to_csr = graph.to_csr
    to_bsr = graph.to_bsr

    # --- pictures -----------------------------------------------------------------------------------------------

    def to_string(self, max_cells: int = 64) -> str:
        """A picture of the unit grid, one character per cell: ``█`` all units of the cell present, ``░`` none.

        A grid larger than ``max_cells`` in either direction is drawn with several units per cell; ``▒`` means up to
        half of them present, ``▓`` more than half.
        """
        grid = self.present().cpu().float()[None, None]
        if max(self.grid) > max_cells:
            height, width = (min(side, max_cells) for side in self.grid)
            grid = nn.functional.adaptive_avg_pool2d(grid, (height, width))

        def character(present: float) -> str:
            return "░" if present == 0 else "█" if present == 1 else "▒" if present <= 0.5 else "▓"

        return "\n".join("".join(map(character, line)) for line in grid[0, 0].tolist())

    def _repr_html_(self) -> str:
        return graph.to_html(self)

    def _repr_png_(self) -> bytes:
        return graph.to_png(self)

    def __repr__(self) -> str:
        kinds = self.rows.layout.kind
        if self.cols.layout.kind != kinds:
            kinds = f"{kinds} ← {self.cols.layout.kind}"
        density = "unknown" if self.unit_row.is_meta else f"{self.density:.4f}"
        return (
            f"BlockMask({self.rows.size}×{self.cols.size}, {self.rows.layout.num_groups} groups ({kinds}), "
            f"block_size={self.block_size}, {self.num_units} of {self.grid[0] * self.grid[1]} units, "
            f"density={density}, device={self.unit_row.device})"
        )

    # --- saving -------------------------------------------------------------------------------------------------

    #: the tensors of a mask's ``state_dict``
    STATE = ("block_size", "out_group_of", "in_group_of", "unit_row", "unit_col", "row_bounds", "col_bounds")

    @classmethod
    @on_cpu
    def from_state(cls, state: Mapping[str, torch.Tensor], shape: tuple[int, int] | None = None) -> "BlockMask":
        """The mask with that ``state_dict`` (the tensors :data:`STATE`), on the CPU.

        Raises:
            ValueError: if they describe no mask, if its groups are cut into other ranges than here, or if its shape
                (out, in) is not ``shape``.
        """
        if "row_bounds" not in state and "col_bounds" not in state:
            raise ValueError(
                "the mask was saved by a version whose groups could end in a short unit; now all units have nearly the "
                "same size, and it does not fit. Train the network again; or save dense_weight() of each layer with "
                "that version and pass BlockMask.from_dense(weight != 0), units of single weights, to "
                "G2GLinear.from_linear"
            )
        state = {name: as_integers(name, state[name]) for name in cls.STATE}
        saved = (state["out_group_of"].numel(), state["in_group_of"].numel())
        if shape is not None and saved != shape:
            raise ValueError(f"the saved mask is {saved}, this layer is {shape}")
        if state["block_size"].numel() != 1:
            raise ValueError(f"block_size has shape {tuple(state['block_size'].shape)}, expected one number")
        mask = cls(
            GroupLayout.from_assignment(state["out_group_of"]),
            GroupLayout.from_assignment(state["in_group_of"]),
            state["unit_row"].cpu(),
            state["unit_col"].cpu(),
            int(state["block_size"]),
        )
        for name, axis in (("row_bounds", mask.rows), ("col_bounds", mask.cols)):
            if not torch.equal(state[name].cpu().long(), axis.bounds.long()):
                raise ValueError(f"{name} do not match groups cut into units of at most {mask.block_size}")
        return mask

    @property
    def out_group_of(self) -> torch.Tensor:
        """int64 [out] on the CPU, the group of each output neuron."""
        return self.rows.layout.group_of

    @property
    def in_group_of(self) -> torch.Tensor:
        """int64 [in] on the CPU, the group of each input neuron."""
        return self.cols.layout.group_of

    @property
    def row_bounds(self) -> torch.Tensor:
        """``rows.bounds``."""
        return self.rows.bounds

    @property
    def col_bounds(self) -> torch.Tensor:
        """``cols.bounds``."""
        return self.cols.bounds

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # every name is that of an attribute, which torch.distributed.checkpoint asks for
        for name in self.STATE:
            value = getattr(self, name)
            # copies: some averages write into what they find here
            destination[prefix + name] = value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        state = {name: state_dict[prefix + name] for name in self.STATE if prefix + name in state_dict}
        absent = [name for name in self.STATE if name not in state]
        if absent and absent != ["row_bounds", "col_bounds"]:
            missing_keys += [prefix + name for name in absent]
            return
        try:
            loaded = BlockMask.from_state(state, self.shape)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        if not self.unit_row.is_meta and not self.equals(loaded):
            self.become_(loaded.to(self.unit_row.device))


def _check_sum(numbers: torch.Tensor) -> torch.Tensor:
    """int64 [1], a checksum below 2²⁰ of whole numbers. That of an average is not the average of two."""
    place = torch.arange(1, len(numbers) + 1, device=numbers.device)
    return (numbers * (place * 7919 % 10007) % 65521).square().sum(0, keepdim=True) % (1 << 20)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside the wrappers of ``torch.func``; a dimension of ``vmap`` comes first."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        batched = functorch.is_batchedtensor(tensor)
        place = functorch.maybe_get_bdim(tensor) if batched else 0
        tensor = functorch.get_unwrapped(tensor)
        tensor = tensor.movedim(place, 0) if batched else tensor
    return tensor


def version(tensor: torch.Tensor) -> int:
    """A number that grows whenever the tensor is written to; −1 for one created in inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


# --- dense and packed weights ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _View:
    """What one pass uses of a mask; the tensors are the mask's own.

    A pass saves them for its backward pass, so PyTorch refuses the gradient if the mask has changed in place in the
    meantime: it would be the gradient of other weights.
    """

    unit_row: torch.Tensor
    unit_col: torch.Tensor
    rows: Side
    cols: Side

    @property
    def tensors(self) -> list[torch.Tensor]:
        sides = self.rows.neuron_at, self.rows.place_of, self.cols.neuron_at, self.cols.place_of
        return [self.unit_row, self.unit_col, *(tensor for tensor in sides if tensor is not None)]


class _Linear(torch.autograd.Function):
    """Base of the two, each of which is the other's adjoint and its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.view = inputs[1]
        ctx.save_for_backward(*ctx.view.tensors)
        ctx.save_for_forward(*ctx.view.tensors)  # the same, as a forward mode under vmap asks for


class _Pack(_Linear):
    @staticmethod
    def forward(weight, view):
        return packing.packed(weight, view)

    @staticmethod
    def backward(ctx, grad_values):
        _ = ctx.saved_tensors  # raises if one of them has changed
        return _Unpack.apply(grad_values, ctx.view), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Pack.apply(tangent, ctx.view)


class _Unpack(_Linear):
    @staticmethod
    def forward(values, view):
        return packing.unpacked(values, view)

    @staticmethod
    def backward(ctx, grad_weight):
        _ = ctx.saved_tensors
        return _Pack.apply(grad_weight, ctx.view), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Unpack.apply(tangent, ctx.view)


def _pack(weight: torch.Tensor, view: _View) -> torch.Tensor:
    # torch.compile does not trace a Function that has a forward mode; it derives gradients of the operations themselves
    return packing.packed(weight, view) if is_traced() else _Pack.apply(weight, view)


def _unpack(values: torch.Tensor, view: _View) -> torch.Tensor:
    return packing.unpacked(values, view) if is_traced() else _Unpack.apply(values, view)
