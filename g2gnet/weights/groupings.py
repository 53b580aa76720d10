"""The groupings of sparse networks by name: how the neurons on both sides of each layer are grouped."""

import torch

from g2g_kernels import GroupLayout
from g2g_kernels.numbers import COUNT

#: of each grouping, the kinds of groups (:class:`GroupLayout`) of the first, second, third … layer, over and over.
#: ``"mixer"`` takes turns between contiguous ranges (spatial mixing) and interleaved groups (feature mixing).
GROUPINGS = {
    "index": ("index",),
    "random": ("random",),
    "mixer": ("index", "interleaved"),
}


def group_layouts(
    grouping: str, number: int, shape: tuple[int, int], num_groups: int, generator: torch.Generator | None
) -> tuple[GroupLayout, GroupLayout]:
    """The groups of outputs and inputs of layer ``number`` (from 0), whose weight has ``shape`` (out, in): on a side
    with fewer neurons than ``num_groups`` one per neuron. Raises ValueError unless that is a whole number of at least
    1.
    """
    num_groups = COUNT.check("num_groups", num_groups)
    kind = GROUPINGS[grouping][number % len(GROUPINGS[grouping])]
    out, into = (GroupLayout(size, min(num_groups, size), kind, generator) for size in shape)
    return out, into
