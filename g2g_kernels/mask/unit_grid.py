"""The units of a sparse weight matrix: their coordinates, both indices of them, and their weights, packed or dense."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from g2g_kernels.mask import packing
from g2g_kernels.mask.groups import check_integers
from g2g_kernels.mask.sides import Indices, UnitAxis, side_of
from g2g_kernels.numbers import INT32
from g2g_kernels.tracing import is_traced


class _MaskTensors(NamedTuple):
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


class MaskTensors(_MaskTensors):
    """The tensors of a :class:`BlockMask` and its sides, for operators; ``…_neuron_at`` and ``…_place_of`` are empty
    where place p holds neuron p. Backends keep what they derive as attributes (``vars(mask)``): the tensors may change
    in place, but are never replaced."""

    #: copies of ``row_order`` and ``row_bounds`` from before the mask changed
    rows_then: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight matrix."""
        return self.row_order.shape[0], self.col_order.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(block rows, block columns) of the unit grid."""
        return self.row_bounds.shape[0] - 1, self.col_bounds.shape[0] - 1

    @property
    def units(self) -> packing.Units:
        """The same tensors by side."""
        return packing.Units(*self[:6], side_of(*self[6:10]), side_of(*self[10:]))

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """The dense [out, in] weight of packed ``values``, as :meth:`BlockMask.unpack`."""
        return packing.unpack(values, self.units)


class UnitGrid(Indices):
    """The geometry of a :class:`BlockMask`, whose base it is."""

    INDICES = ("unit_row", "unit_col", "row_ptr", "row_slot", "col_ptr", "col_slot")

    rows: UnitAxis
    cols: UnitAxis
    block_size: int

    def _set_units(self, unit_row: torch.Tensor, unit_col: torch.Tensor) -> None:
        """Checks and stores the coordinates and rebuilds both indices (shapes may change)."""
        device = self.rows.order.device
        unit_row, unit_col = check_integers("unit_row", unit_row), check_integers("unit_col", unit_col)
        if unit_row.shape != unit_col.shape or unit_row.dim() != 1:
            raise ValueError(f"unit_row {tuple(unit_row.shape)} and unit_col {tuple(unit_col.shape)} must match, 1-D")
        grid = self.rows.num_units, self.cols.num_units
        if unit_row.numel() > grid[0] * grid[1]:
            raise ValueError(f"unit_row names {unit_row.numel()} units, but there are only {grid} in the grid")
        unit_row, unit_col = (each.detach().to(device, torch.int64) for each in (unit_row, unit_col))
        for name, coordinate, limit in (("unit_row", unit_row, grid[0]), ("unit_col", unit_col, grid[1])):
            if coordinate.numel() and (coordinate.min() < 0 or coordinate.max() >= limit):
                raise ValueError(f"{name} must lie in 0 … {limit - 1}, not {coordinate.min()} … {coordinate.max()}")
        if not self._register_units(unit_row, unit_col):
            in_order = self.sorted_units()
            if (in_order[1:] == in_order[:-1]).any():
                raise ValueError("the mask names a unit twice")

    def _register_units(self, unit_row: torch.Tensor, unit_col: torch.Tensor) -> bool:
        """Stores coordinates and builds both indices; whether the units' numbers ascend, as those of most new masks."""
        self.shape = self.rows.size, self.cols.size  #: (out, in) of the weight matrix
        self.grid = self.rows.num_units, self.cols.num_units  #: (block rows, block columns) of the unit grid
        self.unit_shape = self.rows.width, self.cols.width  #: of a packed tile, the sides of the largest unit
        self._tensors = None
        self.unit_row, self.unit_col = unit_row.to(torch.int32), unit_col.to(torch.int32)
        self.row_ptr, self.col_ptr = (unit_row.new_zeros(n + 1, dtype=torch.int32) for n in self.grid)
        self.row_slot, self.col_slot = (torch.zeros_like(self.unit_row) for _ in range(2))
        key = self.flat_unit()
        in_order = bool((key[1:] > key[:-1]).all())
        self._build_index(in_order)
        return in_order

    def _build_index(self, in_order: bool = False) -> None:
        """Sorts the slots by (row, column), unless they are ``in_order``, and by (column, row), into the existing
        buffers."""
        rows, cols, device = self.unit_row, self.unit_col, self.unit_row.device
        if in_order:
            by_row = torch.arange(len(rows), dtype=torch.int32, device=device)
        else:
            key = self.flat_unit()
            by_row = torch.argsort(key.int() if self.grid[0] * self.grid[1] <= INT32[1] else key, stable=True)
            rows, cols = rows[by_row], cols[by_row]
        # a stable order by column of what is in the order of rows
        cols, by_col = torch.sort(cols, stable=True)
        for major, ptr, slot, order in (
            (rows, self.row_ptr, self.row_slot, by_row),
            (cols, self.col_ptr, self.col_slot, by_col if in_order else by_row[by_col]),
        ):
            slot.copy_(order)
            ptr.copy_(torch.searchsorted(major, torch.arange(len(ptr), device=device, dtype=torch.int32)))

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
    def num_weights(self) -> int:
        """The weights that exist; reading it waits for an accelerator."""
        return int(self.unit_sizes.sum())

    @property
    def density(self) -> float:
        """The share of the [out, in] weights that exist, 0 to 1."""
        return self.num_weights / (self.rows.size * self.cols.size)

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

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The present units of a dense [out, in] weight: [num_units, unit_rows, unit_cols]; differentiable. Both may
        have more dimensions, those of a kernel."""
        if tuple(weight.shape[:2]) != self.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, this mask describes {self.shape}")
        return packing.pack(weight, self._units())

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """The dense [out, in] weight of packed ``values``, zero where there is no unit; differentiable. Both may have
        more dimensions, those of a kernel."""
        self.check_values(values, values.shape[3:])
        return packing.unpack(values, self._units())

    def check_values(self, values: torch.Tensor, kernel: Sequence[int] = ()) -> None:
        """Raises ValueError unless ``values`` has this mask's packed shape, followed by that of a ``kernel``."""
        packed = (self.num_units, *self.unit_shape, *kernel)
        if values.shape != packed:
            raise ValueError(f"values have shape {tuple(values.shape)}, this mask's packed weights {packed}")

    def to_dense(self) -> torch.Tensor:
        """bool [out, in] in neuron order, true where a weight exists."""
        ones = torch.ones(self.num_units, *self.unit_shape, device=self.unit_row.device)
        return self.unpack(ones) > 0

    def flat_unit(self) -> torch.Tensor:
        """int64 [num_units], the number of each slot's unit, counted row by row."""
        return self.unit_row.long().mul_(self.grid[1]).add_(self.unit_col.long())

    def sorted_units(self) -> torch.Tensor:
        """The same numbers in ascending order, that of ``row_slot``."""
        return self.flat_unit()[self.row_slot.long()]

    def present(self) -> torch.Tensor:
        """bool [block rows, block columns], true where a unit exists."""
        grid = torch.zeros(self.grid[0] * self.grid[1], dtype=torch.bool, device=self.unit_row.device)
        grid[self.flat_unit()] = True
        return grid.view(self.grid)

    def tensors(self) -> MaskTensors:
        """The mask in the operators' form; the same object until the mask changes."""
        if is_traced():  # an attribute would be a side effect, and traces would differ
            return self._as_tensors()
        if self._tensors is None:
            self._tensors = made = self._as_tensors()
            if not torch._C._len_torch_dispatch_stack():  # fake copies would stay
                made.rows_then = made.row_order.clone(), made.row_bounds.clone()
        return self._tensors

    def _as_tensors(self) -> MaskTensors:
        index = self.unit_row, self.unit_col, self.row_ptr, self.row_slot, self.col_ptr, self.col_slot
        return MaskTensors(*index, *self.rows.tensors(), *self.cols.tensors())

    def _units(self) -> packing.Units:  # without MaskTensors: torch.compile of PyTorch 2.6 cannot trace its properties
        index = self.unit_row, self.unit_col, self.row_ptr, self.row_slot, self.col_ptr, self.col_slot
        return packing.Units(*index, self.rows.side, self.cols.side)
