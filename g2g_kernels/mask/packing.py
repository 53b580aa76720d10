"""Dense weights to packed units and back, with derivatives; no other module knows how both lie in memory. A unit's tile
is the rectangle of places (:class:`Side`) of one range of rows and one of columns. A weight may be a kernel: both forms
then have its dimensions, [kernel rows, kernel columns], last."""

from typing import NamedTuple

import torch

from g2g_kernels.mask.sides import Side
from g2g_kernels.tracing import is_traced


class Units(NamedTuple):
    """The units that exist: the index tensors of a :class:`BlockMask`, and its two sides."""

    unit_row: torch.Tensor
    unit_col: torch.Tensor
    row_ptr: torch.Tensor
    row_slot: torch.Tensor
    col_ptr: torch.Tensor
    col_slot: torch.Tensor
    rows: Side
    cols: Side


def flat_unit(units: Units) -> torch.Tensor:
    """int64 [num_units], the number of each slot's unit when the grid is counted row by row."""
    return units.unit_row.long() * units.cols.num_units + units.unit_col.long()


def tiles(weight: torch.Tensor, units: Units) -> torch.Tensor:
    """A dense matrix cut into tiles [grid rows, grid columns, unit rows, unit columns], zero in the padding."""
    rows, cols = units.rows, units.cols
    weight = _gathered(_gathered(weight, 0, rows.neuron_at), 1, cols.neuron_at)
    weight = weight.reshape(rows.num_units, rows.width, cols.num_units, cols.width, *weight.shape[2:])
    return weight.permute(0, 2, 1, 3, *range(4, weight.dim()))


def packed(weight: torch.Tensor, units: Units) -> torch.Tensor:
    """The tiles of a dense matrix that exist: [num_units, unit rows, unit columns]."""
    grid = tiles(weight, units).reshape(-1, units.rows.width, units.cols.width, *weight.shape[2:])
    return grid.index_select(0, flat_unit(units))


def unpacked(values: torch.Tensor, units: Units) -> torch.Tensor:
    """The dense matrix of packed values, zero where there is no unit: the inverse of :func:`packed`."""
    grid = no_tiles(values, units)
    grid.index_copy_(0, flat_unit(units), values)
    return assembled(grid, units)


def no_tiles(values: torch.Tensor, units: Units) -> torch.Tensor:
    """Zeros for the tiles of the whole grid: [grid rows · grid columns, unit rows, unit columns]."""
    return values.new_zeros(units.rows.num_units * units.cols.num_units, *values.shape[1:])


def assembled(grid: torch.Tensor, units: Units) -> torch.Tensor:
    """The dense matrix of the tiles of the whole grid, in the form of :func:`no_tiles`."""
    rows, cols = units.rows, units.cols
    weight = grid.view(rows.num_units, cols.num_units, *grid.shape[1:])
    weight = weight.permute(0, 2, 1, 3, *range(4, weight.dim()))
    weight = weight.reshape(rows.num_units * rows.width, cols.num_units * cols.width, *grid.shape[3:])
    return _gathered(_gathered(weight, 0, rows.place_of, rows.holes), 1, cols.place_of, cols.holes)


def _gathered(matrix: torch.Tensor, dim: int, index: torch.Tensor | None, past_the_end: bool = True) -> torch.Tensor:
    """``matrix`` at ``index`` along ``dim``; zeros where the index is ``past_the_end``, if it may be."""
    if index is None:
        return matrix
    if past_the_end:
        shape = list(matrix.shape)
        shape[dim] = 1
        matrix = torch.cat([matrix, matrix.new_zeros(shape)], dim)
    return matrix.index_select(dim, index)


class _Convert(torch.autograd.Function):
    """Packs, or unpacks: each is the other's adjoint and its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, units, packs):
        return packed(tensor, units) if packs else unpacked(tensor, units)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.units, ctx.packs = inputs
        # this index changes whenever another does; PyTorch then refuses the gradient, which would be of other weights
        ctx.save_for_backward(ctx.units.unit_row)
        ctx.save_for_forward(ctx.units.unit_row)  # the same, as a forward mode under vmap asks for

    @staticmethod
    def backward(ctx, gradient):
        _ = ctx.saved_tensors  # raises if the index has changed
        return _Convert.apply(gradient, ctx.units, not ctx.packs), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Convert.apply(tangent, ctx.units, ctx.packs)


def pack(weight: torch.Tensor, units: Units) -> torch.Tensor:
    """:func:`packed`, differentiable."""
    # torch.compile does not trace a Function that has a forward mode; it derives gradients of the operations themselves
    return packed(weight, units) if is_traced() else _Convert.apply(weight, units, True)


def unpack(values: torch.Tensor, units: Units) -> torch.Tensor:
    """:func:`unpacked`, differentiable."""
    return unpacked(values, units) if is_traced() else _Convert.apply(values, units, False)
