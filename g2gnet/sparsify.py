"""Makes any model sparse: replaces its linear layers and convolutions by group-sparse ones."""

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from g2g_kernels.choices import check_choice
from g2gnet.convolution import G2GConv2d, same_padding
from g2gnet.layers import G2GLinear, SparseLayer
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
    """Replaces each ``nn.Linear`` and each convolution in ``model``, in place, by a :class:`G2GLinear` or a
    :class:`G2GConv2d` with the weights that its mask keeps; in a convolution the mask keeps kernels, between channels.

    The remaining weights do not change (``layer.reset_parameters()`` draws new ones, for the smaller fan-in). Make
    the optimizer, and register hooks, afterwards. Code that reads a layer's ``weight`` gets the dense one
    (:attr:`G2GLinear.weight`).

    A layer stays dense, and the logger ``g2gnet`` names it with the reason, if a sparse layer would lose something:
    shared (tied) weights, weight or spectral normalisation, pruning (``G2GLinear.from_linear`` keeps that), hooks, a
    custom ``forward`` or class (as in ``nn.MultiheadAttention``).

    Args:
        p_inter, p_intra: the probability of a unit between and inside groups; a pattern of your own has its own.
        pattern: how neurons, or channels, are grouped: ``"index"`` in contiguous ranges, ``"random"`` by a draw for
            each side of each layer, ``"mixer"`` in contiguous ranges and interleaved in turn; or another sparse model
            of :class:`G2GNet`, by name or as a function.
        num_groups: groups on each side of a layer; on a side with fewer neurons, one per neuron.
        density: ``"uniform"`` or ``"erk"``, as for :class:`G2GNet`; of a convolution by its channels.
        block_size: side of a connection unit, in weights.
        skip: names of layers (as in ``model.named_modules()``) that stay dense.
        generator: source of randomness for the masks, on the CPU (PyTorch's global one if None).

    Returns the model, or the new layer if ``model`` itself is one of these. Raises ValueError, and leaves the model
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
    places = {name: each for name, each in model.named_modules(remove_duplicate=False) if _is_dense(each)}
    if unknown := set(skip) - set(places):
        known = ", ".join(places) or "none"
        raise ValueError(f"skip names {', '.join(sorted(unknown))}; the layers are {known}")
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name)
    chosen: list[Any] = []
    dense: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not _is_dense(module) or any(module is places[skipped] for skipped in skip):
            continue
        if reason := _reason_to_stay(name, module, holders):
            dense.setdefault(reason, []).append(name)
        else:
            chosen.append(module)
    stay = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in dense.items())
    if not chosen:
        raise ValueError(
            "model has no nn.Linear or nn.Conv2d to replace" + (f"; these stay dense: {stay}" if stay else "")
        )
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in chosen]
    probabilities = layer_probabilities(shapes, p_intra, p_inter, num_groups, density)
    sparse: dict[nn.Module, nn.Module] = {}
    for number, layer in enumerate(chosen):
        mask = layer_mask(pattern, number, shapes[number], probabilities[number], num_groups, block_size, generator)
        sparse[layer] = SPARSE_FORMS[type(layer)](layer, mask)
    if stay:
        logger.warning("sparsify: these stay dense: %s", stay)
    for name, layer in places.items():
        if layer not in sparse:
            continue
        if not name:
            return sparse[layer]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, sparse[layer])
    return model


#: of each class of dense layers what makes the sparse one
SPARSE_FORMS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: G2GLinear.from_linear, nn.Conv2d: G2GConv2d.from_conv2d, G2GConv2d: G2GConv2d.from_conv2d
}  # fmt: skip


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, SparseLayer)


def _reason_to_stay(name: str, layer: nn.Module, holders: dict[nn.Parameter, list[str]]) -> str | None:
    if parametrize.is_parametrized(layer):
        return "parametrized, as by weight_norm"
    if type(layer) not in SPARSE_FORMS:
        return f"of the class {type(layer).__name__}"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"with padding_mode={layer.padding_mode!r}"
    if (
        isinstance(layer, nn.Conv2d)
        and layer.padding == "same"
        and any(both % 2 for both in same_padding(layer.kernel_size, layer.dilation))
    ):
        return "with padding='same' that differs between both sides"
    own = (*layer._parameters, *layer._buffers, *layer._modules)
    if more := [each for each in own if each not in ("weight", "bias")]:
        return f"with {', '.join(more)} of its own; from_linear and from_conv2d keep a pruned mask"
    for parameter in layer.parameters():
        if others := [holder for holder in holders[parameter] if holder != name]:
            return f"shares weights with {', '.join(others)}"
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "with hooks on its weights"
    if any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks")):
        return "with hooks; register them afterwards"
    if "forward" in vars(layer):
        return "with a custom forward"
    return None
