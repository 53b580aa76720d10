"""Any model made sparse: its linear layers replaced by group-sparse ones."""

from collections.abc import Collection

import torch
from torch import nn

from g2g_kernels import BlockMask
from g2gnet.grouping import GROUPINGS, group_layouts
from g2gnet.layers import G2GLinear


def sparsify(
    model: nn.Module,
    p_inter: float = 0.15,
    kind: str = "index",
    *,
    p_intra: float = 1.0,
    num_groups: int = 8,
    block_size: int = 64,
    skip: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replaces each ``nn.Linear`` in ``model``, in place, by a :class:`G2GLinear` of the weights that its mask keeps.

    The weights that stay are not changed (``layer.reset_parameters()`` draws them anew, for the smaller fan-in). Make
    the optimizer afterwards. Subclasses of ``nn.Linear`` are left alone, since whoever brings one along reads its
    weight (``nn.MultiheadAttention`` does); so does ``nn.TransformerEncoderLayer`` in evaluation mode with its own,
    unless ``torch.backends.mha.set_fastpath_enabled(False)``.

    Args:
        p_inter, p_intra: the probability of a unit between and inside groups.
        kind: how neurons are grouped: ``"index"`` in contiguous ranges, ``"random"`` by a draw for each side of each
            layer, ``"mixer"`` in contiguous ranges and interleaved in turn.
        num_groups: groups on each side of a layer.
        block_size: side of a connection unit, in weights.
        skip: names of layers (as in ``model.named_modules()``) that stay dense.
        generator: source of randomness for the masks, on the CPU (PyTorch's global one if None).

    Returns:
        The model; the new layer, if ``model`` itself is an ``nn.Linear``.

    Raises:
        ValueError: for an option out of range, a name in ``skip`` that is no linear layer's, a layer with fewer neurons
            than groups, or a model without a linear layer to replace. The model is then as it was.
    """
    if kind not in GROUPINGS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(GROUPINGS)}")
    # a layer that is used in two places has two names
    places = {name: module for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear}
    unknown = set(skip) - set(places)
    if unknown:
        raise ValueError(
            f"skip names {', '.join(sorted(unknown))}; the linear layers are {', '.join(places) or 'none'}"
        )
    kept_dense = {places[name] for name in skip}
    sparse: dict[nn.Module, G2GLinear] = {}
    for name, linear in places.items():
        if linear in sparse or linear in kept_dense:
            continue
        try:
            shape = linear.out_features, linear.in_features
            layouts = group_layouts(kind, len(sparse), shape, num_groups, generator)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or skip={name!r} to leave it dense") from error
        mask = BlockMask.sample(*layouts, p_intra, p_inter, block_size, generator)
        sparse[linear] = G2GLinear.from_linear(linear, mask)
    if not sparse:
        raise ValueError("model has no nn.Linear to replace")
    for name, linear in places.items():
        if linear not in sparse:
            continue
        if not name:
            return sparse[linear]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse[linear])
    return model
