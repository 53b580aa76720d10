"""Makes any model sparse: replaces its linear layers by group-sparse ones."""

import logging
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.utils import parametrize

from g2g_kernels.choices import check_choice
from g2gnet.layers import G2GLinear
from g2gnet.network_settings import NetworkSettings
from g2gnet.weights.densities import layer_probabilities
from g2gnet.weights.patterns import SPARSE, Pattern, layer_mask

logger = logging.getLogger("g2gnet")


def sparsify(
    model: nn.Module,
    p_inter: float = NetworkSettings.p_inter,
    pattern: str | Pattern = NetworkSettings.model,
    *,
    p_intra: float = NetworkSettings.p_intra,
    num_groups: int = NetworkSettings.num_groups,
    density: str = NetworkSettings.density,
    block_size: int = NetworkSettings.block_size,
    skip: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replaces each ``nn.Linear`` in ``model``, in place, by a :class:`G2GLinear` with the weights that its mask keeps.

    The remaining weights do not change (``layer.reset_parameters()`` draws new ones, for the smaller fan-in). Make
    the optimizer, and register hooks, afterwards. Code that reads a layer's ``weight`` gets the dense one
    (:attr:`G2GLinear.weight`).

    A layer stays dense, and the logger ``g2gnet`` names it with the reason, if a sparse layer would lose something:
    shared (tied) weights, weight or spectral normalisation, pruning (``G2GLinear.from_linear`` keeps that), hooks, a
    custom ``forward`` or class (as in ``nn.MultiheadAttention``).

    Args:
        p_inter, p_intra: the probability of a unit between and inside groups; a pattern of your own has its own.
        pattern: how neurons are grouped: ``"index"`` in contiguous ranges, ``"random"`` by a draw for each side of each
            layer, ``"mixer"`` in contiguous ranges and interleaved in turn; or another sparse model of
            :class:`G2GNet`, by name or as a function.
        num_groups: groups on each side of a layer; on a side with fewer neurons, one per neuron.
        density: ``"uniform"`` or ``"erk"``, as for :class:`G2GNet`.
        block_size: side of a connection unit, in weights.
        skip: names of layers (as in ``model.named_modules()``) that stay dense.
        generator: source of randomness for the masks, on the CPU (PyTorch's global one if None).

    Returns the model, or the new layer if ``model`` itself is an ``nn.Linear``. Raises ValueError, and leaves the model
    unchanged, for an option out of range, an unknown name in ``skip``, or a model without a layer to replace.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> model = sparsify(model, p_inter=0.15, block_size=4)
        >>> type(model[0]).__name__, model[0].mask.num_units < 8 * 16
        ('G2GLinear', True)
    """
    if not callable(pattern):
        check_choice("pattern", pattern, SPARSE, "give a pattern")
    elif density != "uniform":
        raise ValueError(f"density={density!r} has no effect on a pattern of your own; leave it out")
    # a layer that is used in two places has two names
    places = {name: each for name, each in model.named_modules(remove_duplicate=False) if isinstance(each, nn.Linear)}
    if unknown := set(skip) - set(places):
        known = ", ".join(places) or "none"
        raise ValueError(f"skip names {', '.join(sorted(unknown))}; the linear layers are {known}")
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    chosen: list[nn.Linear] = []
    dense: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(module is places[skipped] for skipped in skip):
            continue
        if reason := _reason_to_stay(name, module, holders):
            dense.setdefault(reason, []).append(name)
        else:
            chosen.append(module)
    stay = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in dense.items())
    if not chosen:
        raise ValueError("model has no nn.Linear to replace" + (f"; these stay dense: {stay}" if stay else ""))
    shapes = [(linear.out_features, linear.in_features) for linear in chosen]
    probabilities = layer_probabilities(shapes, p_intra, p_inter, num_groups, density)
    sparse: dict[nn.Module, G2GLinear] = {}
    for number, linear in enumerate(chosen):
        mask = layer_mask(pattern, number, shapes[number], probabilities[number], num_groups, block_size, generator)
        sparse[linear] = G2GLinear.from_linear(linear, mask)
    if stay:
        logger.warning("sparsify: these stay dense: %s", stay)
    for name, linear in places.items():
        if linear not in sparse:
            continue
        if not name:
            return sparse[linear]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse[linear])
    return model


def _reason_to_stay(name: str, linear: nn.Linear, holders: dict[nn.Parameter, list[str]]) -> str | None:
    if parametrize.is_parametrized(linear):
        return "parametrized, as by weight_norm"
    if type(linear) is not nn.Linear:
        return f"of the class {type(linear).__name__}"
    own = (*linear._parameters, *linear._buffers, *linear._modules)
    if more := [each for each in own if each not in ("weight", "bias")]:
        return f"with {', '.join(more)} of its own; G2GLinear.from_linear keeps a pruned mask"
    for parameter in linear.parameters():
        if others := [holder for holder in holders[parameter] if holder != name]:
            return f"shares weights with {', '.join(others)}"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "with hooks on its weights"
    if any(hooks for name, hooks in vars(linear).items() if name.endswith("_hooks")):
        return "with hooks; register them afterwards"
    if "forward" in vars(linear):
        return "with a custom forward"
    return None
