"""A mask as a row of float32, which is saved and travels wherever parameters do: the sizes of both sides, the block
size, the group of each neuron, ``unit_row``, ``unit_col``, and two checksums, which an average of two rows breaks."""

import torch

from g2g_kernels.mask.groups import ROUNDING, GroupLayout
from g2g_kernels.mask.unit_grid import UnitGrid

#: relative rounding error tolerated per step of an average written in place. An average with a weight of 1e-5 of
#: another wiring moves more per step, so the two are distinguished however often the numbers are read.
DRIFT = 2.0**-22

#: the arguments of :class:`BlockMask`
Wiring = tuple[GroupLayout, GroupLayout, torch.Tensor, torch.Tensor, int]


def encode(units: UnitGrid) -> torch.Tensor:
    """The row that describes some units."""
    # clamp: between to_empty and loading a state, indices are arbitrary
    out_group_of, in_group_of = (
        axis.group_of_unit[axis.unit_of.clamp(0, axis.num_units - 1)] for axis in (units.rows, units.cols)
    )
    sizes = out_group_of.new_tensor([len(out_group_of), len(in_group_of), units.block_size])
    few = [each.to(torch.int32) for each in (sizes, out_group_of, in_group_of)]
    return with_checksums(torch.cat([*few, units.unit_row, units.unit_col]))


def with_checksums(numbers: torch.Tensor) -> torch.Tensor:
    """The row of these numbers, unchecked."""
    return torch.cat([numbers.to(torch.float32), _checksums(numbers).to(torch.float32)])


def decode(row: torch.Tensor, shape: tuple[int, int] | None = None) -> Wiring:
    """The mask that a row describes, on the CPU. Raises ValueError for other rows, and masks of another shape."""
    if not isinstance(row, torch.Tensor):
        raise ValueError(f"wiring must be a tensor, not {type(row).__name__}")
    if row.dim() != 1 or row.is_complex() or len(row) < 5:
        raise ValueError(f"wiring must be a row of numbers, not of shape {tuple(row.shape)} and {row.dtype}")
    if shape is not None and len(row) > 5 + sum(shape) + 2 * shape[0] * shape[1]:
        raise ValueError(f"wiring has {len(row)} numbers, more than {shape} weights need")
    given = row.detach().cpu().double().nan_to_num()
    whole = given.round()
    numbers = whole.long()
    checked = numbers[:-2]
    rounded = (given - whole).abs() <= ROUNDING * whole.abs()
    if not (rounded.all() and torch.equal(_checksums(checked), numbers[-2:])):
        why = "it is an average of networks with different wirings, or damaged"
        if row.is_floating_point() and row.dtype.itemsize < 4:
            why = f"{row.dtype} rounds its numbers; keep mask.wiring in float32, whatever the dtype of the weights"
        raise ValueError(f"wiring and its checksum do not match: {why}")
    (out_size, in_size, block_size), lists = checked[:3].tolist(), checked[3:]
    if shape is not None and (out_size, in_size) != shape:
        raise ValueError(f"the saved mask is {(out_size, in_size)}, this layer is {shape}")
    units, odd = divmod(len(lists) - out_size - in_size, 2)
    if min(out_size, in_size, units) < 0 or odd:
        raise ValueError(f"wiring of {out_size} × {in_size} weights has {len(row)} numbers")
    out_group_of, in_group_of, unit_row, unit_col = lists.split([out_size, in_size, units, units])
    out_layout, in_layout = map(GroupLayout.from_assignment, (out_group_of, in_group_of))
    return out_layout, in_layout, unit_row, unit_col, block_size


def _checksums(numbers: torch.Tensor) -> torch.Tensor:
    """int64 [2], checksums below 2¹² of whole numbers; those of an average are not the average of two."""
    of_places = (torch.arange(1, 10008, device=numbers.device) * 7919 % 10007 + 1).repeat(2)
    total = of_places.new_zeros(())
    for part in numbers.split(len(of_places)):  # which stay in cache
        part = part.to(torch.int64, copy=True)
        total += part.add_(1).mul_(of_places[: len(part)]).remainder_(65521).square_().sum()
    return torch.stack([total % 4096, total // 4096 % 4096])
