"""How a connection joins the groups of its two sides, from its :class:`BlockMask`, without any activity."""

import math

import torch

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.mask.groups import partners


def group_density(mask: BlockMask, values: torch.Tensor | None = None) -> torch.Tensor:
    """The share of the weights between each pair of groups that exist: float64 [groups out, groups in], 0 to 1. With
    packed ``values`` [num_units, unit_rows, unit_cols] it is their mean ``|w|``, where absent weights count as 0.

    Example:
        >>> group_density(BlockMask.sample(GroupLayout(8, 2), GroupLayout(8, 2), p_inter=0.0, block_size=2))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    row_group, col_group = _groups_of_units(mask)
    out_sizes, in_sizes = mask.rows.layout.sizes, mask.cols.layout.sizes
    of_units = mask.unit_sizes if values is None else _strength(values).sum((1, 2))
    total = torch.zeros(len(out_sizes) * len(in_sizes), dtype=torch.float64)
    total.index_add_(0, row_group * len(in_sizes) + col_group, of_units.cpu().double())
    return total.view(len(out_sizes), len(in_sizes)) / (out_sizes[:, None] * in_sizes)


def cross_group_share(mask: BlockMask) -> torch.Tensor:
    """The share of each output group's inputs that come from other input groups than its own
    (``g2g_kernels.mask.groups.partners``): float64 [groups], 0 to 1; NaN for a group without inputs.

    Example:
        >>> cross_group_share(BlockMask.full(GroupLayout(8, 2), GroupLayout(8, 2), block_size=2))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    inputs = group_density(mask) * mask.cols.layout.sizes
    return 1 - (inputs * partners(*inputs.shape)).sum(1) / inputs.sum(1)


def input_group_entropy(mask: BlockMask, values: torch.Tensor | None = None) -> torch.Tensor:
    """How evenly a neuron draws on the input groups, the mean over each output group: float64 [groups], 0 to 1.

    H_i = −Σ_h p_ih·ln p_ih / ln G with p_ih = d_ih / Σ_h d_ih, where d_ih is the share of the weights from input group
    h to neuron i that exist, or with packed ``values`` [num_units, unit_rows, unit_cols] their mean ``|w|``. 0: all
    inputs come from one group; 1: equally from every group, as in a dense layer. Neurons without inputs are skipped;
    NaN where no neuron is left, and for a single input group.

    Example:
        >>> input_group_entropy(BlockMask.full(GroupLayout(8, 2), GroupLayout(8, 2), block_size=2))
        tensor([1., 1.], dtype=torch.float64)
    """
    strength = (mask.valid() if values is None else _strength(values)).sum(2).cpu().double()
    row, (_, col_group) = mask.unit_row.long().cpu(), _groups_of_units(mask)
    in_sizes = mask.cols.layout.sizes
    share = torch.zeros(mask.rows.num_units, len(in_sizes), mask.rows.width, dtype=torch.float64)
    share.index_put_((row, col_group), strength, accumulate=True)
    share = share.transpose(1, 2).reshape(-1, len(in_sizes))[mask.rows.place_of.cpu()] / in_sizes
    p = share / share.sum(1, keepdim=True)
    entropy = torch.special.entr(p).sum(1) / (math.log(len(in_sizes)) or math.nan)
    return torch.stack([entropy[mask.rows.layout.group_of == g].nanmean() for g in range(mask.rows.layout.num_groups)])


def of_pixels(layout: GroupLayout, neurons: int) -> GroupLayout:
    """The groups of the neurons of an image, those of their channels; of a list of neurons the ``layout`` itself.

    Example:
        >>> of_pixels(GroupLayout(4, 2), 8).group_of
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    if neurons == layout.size:
        return layout
    return GroupLayout.from_assignment(layout.group_of.repeat_interleave(neurons // layout.size))


def _strength(values: torch.Tensor) -> torch.Tensor:
    """``|w|`` of packed weights [num_units, unit_rows, unit_cols], of kernels their sum."""
    return values.detach().abs().flatten(3).sum(3) if values.dim() > 3 else values.detach().abs()


def _groups_of_units(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the input group of the unit in each slot, int64 [num_units] each, on the CPU."""
    row_group = mask.rows.group_of_unit[mask.unit_row.long()]
    col_group = mask.cols.group_of_unit[mask.unit_col.long()]
    return row_group.cpu(), col_group.cpu()
