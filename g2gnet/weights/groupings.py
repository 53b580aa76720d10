"""The groupings of sparse networks by name: how the neurons on both sides of each layer are grouped."""

#: of each grouping, the kinds of groups (:class:`GroupLayout`) of the first, second, third … layer, over and over.
#: ``"mixer"`` takes turns between contiguous ranges (spatial mixing) and interleaved groups (feature mixing).
GROUPINGS = {
    "index": ("index",),
    "random": ("random",),
    "mixer": ("index", "interleaved"),
}
