"""The wirings of sparse networks by name: how the neurons on both sides of each layer are grouped."""

import torch

from g2g_kernels import GroupLayout

#: of each wiring, the kinds of groups (:class:`GroupLayout`) of the first, second, third … layer, over and over.
#: ``"mixer"`` takes turns between contiguous ranges (spatial mixing) and interleaved groups (feature mixing).
GROUPINGS = {
    "index": ("index",),
    "random": ("random",),
    "mixer": ("index", "interleaved"),
}


def group_layouts(
    wiring: str, number: int, shape: tuple[int, int], num_groups: int, generator: torch.Generator | None
) -> tuple[GroupLayout, GroupLayout]:
    """The groups of the outputs and of the inputs of layer ``number`` (from 0), whose weight has ``shape`` (out, in).

    Raises:
        ValueError: if a side has fewer neurons than groups.
    """
    kinds = GROUPINGS[wiring]
    out_size, in_size = shape
    out_layout = GroupLayout(out_size, num_groups, kinds[number % len(kinds)], generator)
    return out_layout, GroupLayout(in_size, num_groups, kinds[number % len(kinds)], generator)
