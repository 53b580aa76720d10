"""Which blocks of weights exist: the one description of a sparse layer's wiring, for kernels, dynamic sparse training,
plots and checkpoints. A :class:`BlockMask` holds indices only; the weights themselves are *packed*, one [unit_rows,
unit_cols] tile per present unit, in a tensor that the caller owns.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from g2g_kernels.mask import conversions, packing
from g2g_kernels.mask.groups import GroupLayout
from g2g_kernels.mask.sampling import sample_units
from g2g_kernels.mask.sides import UnitAxis
from g2g_kernels.mask.unit_grid import UnitGrid
from g2g_kernels.mask.wiring import decode, encode
from g2g_kernels.numbers import PROBABILITY, SIZE
from g2g_kernels.tracing import on_cpu, version

#: the coordinates of no unit
_NONE = torch.zeros(0, dtype=torch.int64, device="cpu")


class BlockMask(UnitGrid):
    """The units (blocks of weights) that a sparse [out, in] weight matrix has.

    A unit is a block of at most ``block_size`` × ``block_size`` weights in group-sorted order that never crosses a
    group's edge (:class:`UnitAxis`). Each present unit has a *slot*, its place in the packed values [num_units,
    unit_rows, unit_cols]. A unit that is one neuron shorter than others is padded; the padding is ignored.

    The mask is an ``nn.Module``, so it moves, copies, pickles and saves with the layer that owns it. Its one buffer,
    and all of its ``state_dict``, is ``wiring``, which describes the mask in floats (``mask/wiring.py``). The mask
    writes that buffer and never reads it; its owner reads what arrives there (as ``g2gnet`` does).

    Args:
        out_layout, in_layout: the groups of the output and input neurons.
        unit_row, unit_col: the coordinates of each slot's unit, integer [num_units].
        block_size: the longest side of a unit, in weights.

    Attributes:
        rows, cols: :class:`UnitAxis` of the output and the input side.
        changes: a new object whenever units change, or the mask is copied.
        own_wiring: the buffer of this mask. Inside ``torch.func.functional_call``, ``wiring`` may be another tensor.
        written: its version (``g2g_kernels.tracing.version``) when the mask wrote it last.
        unit_row, unit_col: int32 [num_units], the coordinates of the unit in each slot.
        row_ptr, row_slot: int32 [rows.num_units + 1], int32 [num_units]: the slots of block row r, by column, are
            ``row_slot[row_ptr[r] : row_ptr[r + 1]]``.
        col_ptr, col_slot: the same for block columns (the transposed index), by row.

    Raises:
        ValueError: for coordinates outside the grid, or a unit given twice.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> mask = BlockMask.sample(GroupLayout(32), GroupLayout(64), p_inter=0.15, block_size=4, generator=draw)
        >>> mask
        BlockMask(32×64, 8 groups (index), block_size=4, 32 of 128 units, density=0.2500, device=cpu)
        >>> print(mask.to_string())
        ██░░░░░░█░░░░░█░
        ░███░░░░░░░░█░░░
        █░░░██░░░░█░░░░░
        ░░░░░░███░░█░░░░
        █░█░░░░░██░░░░░░
        ░░░░░█░█░░██░░░░
        █░░█░░░░░░░░██░░
        █░░█░░░░░░░░░░██
    """

    wiring: torch.Tensor
    own_wiring: torch.Tensor
    written: int

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
        self.changes = object()
        self._set_units(unit_row, unit_col)

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
        *,
        density: float | None = None,
    ) -> "BlockMask":
        """Draws random units: inside a group with probability ``p_intra``, between groups ``p_inter``, or everywhere
        ``density``, which replaces both. Block rows have equal work. ``g2g_kernels.mask.groups.partners`` defines which
        groups of the two sides count as one."""
        if density is not None:
            p_intra = p_inter = PROBABILITY.check("density", density)
        PROBABILITY.check("p_intra", p_intra)
        PROBABILITY.check("p_inter", p_inter)
        mask = cls(out_layout, in_layout, _NONE, _NONE, block_size)
        mask._set_units(*sample_units(mask.rows, mask.cols, p_intra, p_inter, generator))
        return mask

    @classmethod
    @on_cpu
    def full(cls, out_layout: GroupLayout, in_layout: GroupLayout, block_size: int = 64) -> "BlockMask":
        """Every unit present: a dense layer in the packed form."""
        mask = cls(out_layout, in_layout, _NONE, _NONE, block_size)
        mask._set_units(*torch.ones(mask.grid).nonzero(as_tuple=True))
        return mask

    @classmethod
    @on_cpu
    def from_dense(cls, mask: torch.Tensor, block_size: int = 1) -> "BlockMask":
        """The mask whose dense form is ``mask``, bool [out, in], with each side in one group. Raises ValueError if a
        unit is only partly true, since a unit is present as a whole."""
        if not isinstance(mask, torch.Tensor):
            raise TypeError(
                f"mask is a {type(mask).__name__}, not a tensor; give torch.as_tensor(mask) of an array, or "
                "G2GLinear.from_scipy(…) of a SciPy matrix"
            )
        if mask.dim() != 2:
            raise ValueError(f"mask must be a matrix [out, in], not of shape {tuple(mask.shape)}")
        dense = mask.detach().to("cpu", torch.bool).to_dense()
        result = cls(GroupLayout(dense.shape[0], 1), GroupLayout(dense.shape[1], 1), _NONE, _NONE, block_size)
        active = packing.tiles(dense.float(), result._units()).sum((2, 3))
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

    def with_units(self, unit_row: torch.Tensor, unit_col: torch.Tensor) -> "BlockMask":
        """A new mask of these sides with the units of these coordinates; raises as the constructor."""
        mask = copy.deepcopy(self)
        mask._set_units(unit_row, unit_col)
        return mask

    def _register_units(self, unit_row: torch.Tensor, unit_col: torch.Tensor) -> bool:
        in_order = super()._register_units(unit_row, unit_col)
        self._publish()
        return in_order

    def relabel_(self, slots: torch.Tensor, unit_row: torch.Tensor, unit_col: torch.Tensor) -> None:
        """Gives ``slots`` (integer [k]) to these units, in place. The caller ensures that no unit is named twice."""
        self.unit_row[slots] = unit_row.to(torch.int32)
        self.unit_col[slots] = unit_col.to(torch.int32)
        self._build_index()
        self._changed()

    def keep_(self, kept: torch.Tensor) -> None:
        """Keeps the units of slots that are ``kept``, bool [num_units], in their order; all indices are new."""
        self._register_units(self.unit_row[kept], self.unit_col[kept])
        self.changes = object()

    def become_(self, other: "BlockMask") -> None:
        """Takes over the units and slots of another mask of the same ``shape``: in place if both have equal numbers of
        units and ranges, and operators read the same tensors of both. The buffer stays if the packed shape does."""
        sides = (self.rows, other.rows), (self.cols, other.cols)
        mine, theirs = (
            [*mask.tensors()[:6], *(getattr(axis, name) for axis in (mask.rows, mask.cols) for name in axis.INDICES)]
            for mask in (self, other)
        )
        alike = self.block_size == other.block_size and all(axis.in_order == new.in_order for axis, new in sides)
        if alike and all(a.shape == b.shape for a, b in zip(mine, theirs, strict=True)):
            for a, b in zip(mine, theirs, strict=True):
                a.copy_(b)
            for axis, new in sides:
                axis.layout = new.layout
            self._changed()
            return
        stays = (self.num_units, *self.unit_shape) == (other.num_units, *other.unit_shape)
        self.replace_by_(copy.deepcopy(other).to(self.unit_row.device), self.own_wiring if stays else None)

    def replace_by_(self, other: "BlockMask", wiring: torch.Tensor | None = None) -> None:
        """Takes over the tensors of another mask of the same ``shape``, and their device; ``other`` is used up. Its
        buffer is then ``wiring``, which is written, or a new one (None)."""
        self.block_size, self.rows, self.cols = other.block_size, other.rows, other.cols
        self._register_units(other.unit_row, other.unit_col)
        self.changes = object()
        if wiring is not None:
            self.wiring = wiring
            self._own_wiring()
            self.write_wiring()

    def equals(self, other: "BlockMask") -> bool:
        """Whether both have the same units in the same slots, and the same groups. Waits for the device."""
        return self.describes(encode(other))

    @property
    def writes(self) -> int:
        """How often something else wrote into the buffer since the mask did."""
        return version(self.own_wiring) - self.written

    def _changed(self) -> None:
        self.changes = object()
        self._tensors = None
        self.write_wiring()

    def write_wiring(self) -> None:
        """Writes the mask into the buffer."""
        with torch.no_grad():
            self.own_wiring.copy_(encode(self))
        self.note_wiring()

    def note_wiring(self) -> None:
        """Notes that the buffer describes the mask."""
        self.written = version(self.own_wiring)

    def _publish(self) -> None:
        self.register_buffer("wiring", encode(self))
        self._own_wiring()

    def _own_wiring(self) -> None:
        self.__dict__["own_wiring"] = self.wiring  # no second buffer, even if it is an nn.Buffer
        self.note_wiring()

    def _apply(self, fn: Callable, recurse: bool = True) -> "BlockMask":
        own = self.own_wiring
        super()._apply(fn, recurse)
        if self.wiring.device != own.device:
            self._publish()
        elif self.wiring is not own:
            self.wiring = own  # whole numbers, whatever the dtype of weights
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_wiring()

    edges = conversions.edges
    to_scipy = conversions.to_scipy
    to_networkx = conversions.to_networkx
    to_csr = conversions.to_csr
    to_bsr = conversions.to_bsr
    to_string = conversions.to_string

    def _repr_html_(self) -> str:
        return conversions.to_html(self)

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

    @classmethod
    @on_cpu
    def from_state(cls, state: Mapping[str, torch.Tensor], shape: tuple[int, int] | None = None) -> "BlockMask":
        """The mask of that ``state_dict`` (``wiring``), on the CPU; ValueError for none, or another shape (out, in)."""
        return cls(*decode(state["wiring"], shape))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        *_, missing_keys, _, error_msgs = rest
        wiring = state_dict.get(prefix + "wiring")
        if wiring is None:
            missing_keys.append(prefix + "wiring")
            return
        if isinstance(wiring, torch.Tensor) and self.describes(wiring):
            return
        try:
            loaded = BlockMask.from_state({"wiring": wiring}, self.shape)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        if not self.unit_row.is_meta:
            self.become_(loaded.to(self.unit_row.device))

    def describes(self, wiring: torch.Tensor, rounding: float = 0.0) -> bool:
        """Whether a row describes this mask: exactly but for its checksums, or with them within a relative
        ``rounding``; false on the device ``meta``."""
        own = encode(self)
        if own.is_meta or wiring.is_meta or own.shape != wiring.shape:
            return False
        own, given = own.cpu(), wiring.detach().cpu()
        exact = (own.long() == given)[:-2].all()
        return bool(exact or ((given - own).abs() <= rounding * own).all())
