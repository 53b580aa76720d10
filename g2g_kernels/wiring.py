"""A mask as a row of float32: what travels wherever parameters and buffers do, between processes and into averages.

The numbers are whole: the group of each neuron on both sides, ``unit_row``, ``unit_col``, the block size, and a
checksum, so that an average of two wirings is no wiring.
"""

from typing import NamedTuple

import torch

from g2g_kernels.groups import GroupLayout
from g2g_kernels.unit_grid import UnitGrid


class Wiring(NamedTuple):
    """What a mask is made of (the arguments of :class:`BlockMask`)."""

    out_layout: GroupLayout
    in_layout: GroupLayout
    unit_row: torch.Tensor
    unit_col: torch.Tensor
    block_size: int


def row_of(units: UnitGrid) -> torch.Tensor:
    """The row that describes some units."""
    # clamp: between to_empty and loading a state, indices are arbitrary
    groups = [axis.group_of_unit[axis.unit_of.clamp(0, axis.num_units - 1)] for axis in (units.rows, units.cols)]
    size = units.unit_row.new_full((1,), units.block_size)
    numbers = torch.cat([*groups, units.unit_row.long(), units.unit_col.long(), size])
    return torch.cat([numbers, _check_sum(numbers)]).to(torch.float32)


def read_row(row: torch.Tensor, shape: tuple[int, int]) -> Wiring | None:
    """What a row on the CPU says of a weight matrix of ``shape``, or None if it is not the row of a mask."""
    numbers = row.nan_to_num().long()
    units, odd = divmod(len(numbers) - 2 - sum(shape), 2)
    if units < 0 or odd or not torch.equal(numbers.float(), row):
        return None
    if not torch.equal(_check_sum(numbers[:-1]), numbers[-1:]):
        return None
    out_group_of, in_group_of, unit_row, unit_col = numbers[:-2].split([*shape, units, units])
    try:
        layouts = GroupLayout.from_assignment(out_group_of), GroupLayout.from_assignment(in_group_of)
    except ValueError:
        return None
    return Wiring(*layouts, unit_row, unit_col, int(numbers[-2]))


def _check_sum(numbers: torch.Tensor) -> torch.Tensor:
    """int64 [1], a checksum below 2²⁰ of whole numbers. That of an average is not the average of two."""
    place = torch.arange(1, len(numbers) + 1, device=numbers.device)
    return (numbers * (place * 7919 % 10007) % 65521).square().sum(0, keepdim=True) % (1 << 20)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
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
