"""Dale's law: all weights from one neuron have one sign."""

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from g2gnet.layers import G2GLinear
from g2gnet.spiking_network import SpikingNetwork


class KeptSigns:
    """The handle of a call of :func:`keep_signs`. ``signs`` by source, int8 [neurons]: 1, −1, or 0 (both allowed)."""

    _there: ClassVar["weakref.WeakSet[KeptSigns]"] = weakref.WeakSet()

    def __init__(
        self, layers: list[tuple[str, G2GLinear]], signs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        KeptSigns._there.add(self)
        self._layers, self.signs, self._optimizer = layers, signs, optimizer
        self._hook: Any = optimizer.register_step_post_hook(self.apply)
        self.apply()

    @torch.no_grad()
    def apply(self, *_: Any) -> None:
        """Sets every weight of the wrong sign to 0; runs after each step of the optimizer."""
        for source, layer in self._layers:
            layer.values.masked_fill_(layer.values * _of_units(layer, self.signs[source]) < 0, 0)

    @staticmethod
    def release(layers: list[tuple[str, G2GLinear]]) -> None:
        """Ends the constraint of earlier calls on the weights of some layers."""
        released = {layer for _, layer in layers}
        for earlier in KeptSigns._there:
            earlier._layers = [pair for pair in earlier._layers if pair[1] not in released]
            if not earlier._layers:
                earlier.remove()

    def remove(self) -> None:
        """Ends the constraint."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": self._hook is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        KeptSigns._there.add(self)
        # copies of optimizers have no hooks
        self._hook = self._optimizer.register_step_post_hook(self.apply) if state["_hook"] else None


def keep_signs(
    model: nn.Module, optimizer: torch.optim.Optimizer, signs: torch.Tensor | Mapping[str, torch.Tensor] | None = None
) -> KeptSigns:
    """Constrains each weight to the sign of its source neuron (Dale's law) from now on.

    After each ``optimizer.step()`` a weight with the other sign becomes 0; it still exists and may grow again. Weights
    that dynamic sparse training grows begin at 0 and take their neuron's sign. Averages of weights have their signs. A
    checkpoint holds weights, not signs: call this again after loading. A later call replaces an earlier one for the
    model's layers. PyTorch copies optimizers without their hooks: copy or pickle the returned object together with
    network and optimizer.

    Args:
        model: a :class:`G2GLinear`; a :class:`SpikingNetwork`, or a module around one, whose populations are the
            sources (the input has no signs); or another module, whose G2GLinear layers are each a source with the
            layer's name.
        optimizer: trains these weights.
        signs: 1, −1 or 0 (both) for each neuron of the source, [N_src]; for several sources by name, where a source
            that is not named may have any sign. Weights of the other sign are negated. None: each neuron has the sign
            of its weights, 0 if all of them are 0.

    Raises:
        TypeError: if ``optimizer`` is none.
        ValueError: for an optimizer that does not hold the weights; without ``signs`` for a neuron with weights of both
            signs, with its number; for signs of another number of neurons, or of an unknown source.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> layer = G2GLinear(BlockMask.sample(GroupLayout(16), GroupLayout(16), block_size=1))
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> kept = keep_signs(layer, optimizer, torch.tensor([1] * 12 + [-1] * 4))
        >>> layer(torch.rand(4, 16)).sum().backward()
        >>> optimizer.step()
        >>> bool((layer.weight[:, :12] >= 0).all() and (layer.weight[:, 12:] <= 0).all())
        True
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; give the torch.optim.Optimizer of the weights")
    layers = _layers_of(model)
    sizes = {source: layer.in_features for source, layer in layers}
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for source, layer in layers:
        if not layer.has_plain_values:
            raise ValueError(f"the weights from {source} are computed by a parametrization; remove that")
        if layer.values.requires_grad and id(layer.values) not in held:
            raise ValueError(f"the optimizer does not hold the weights from {source}; give the one that trains them")
    if signs is None:
        found = {source: _signs_of(source, layers) for source in sizes}
    else:
        if not isinstance(signs, Mapping):
            if len(sizes) > 1:
                raise ValueError(f"there are several sources; give signs by name, of {', '.join(sizes)}")
            signs = dict.fromkeys(sizes, signs)
        if not signs:
            raise ValueError(f"signs is empty; give those of some of {', '.join(sizes)}")
        for source, each in signs.items():
            if source not in sizes:
                raise ValueError(f"signs of {source!r}: there is no such source, only {', '.join(sizes)}")
            _check_signs(source, each, sizes[source])
        found = {source: each.detach().to(torch.int8).cpu() for source, each in signs.items()}
    KeptSigns.release(layers)
    layers = [(source, layer) for source, layer in layers if source in found]
    with torch.no_grad():
        for source, layer in layers:
            sign = _of_units(layer, found[source])
            layer.values.copy_(torch.where(sign == 0, layer.values, layer.values.abs() * sign))
    return KeptSigns(layers, found, optimizer)


def _layers_of(model: nn.Module) -> list[tuple[str, G2GLinear]]:
    """Each layer whose weights have signs, with the name of its source."""
    if isinstance(model, G2GLinear):
        return [("the layer", model)]
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, G2GLinear)]
    networks = [module for module in model.modules() if isinstance(module, SpikingNetwork)]
    if len(networks) == 1 and len(networks[0].connections()) == len(layers):
        names, connections = list(networks[0].populations), networks[0].connections()
        projections = (each for each in networks[0].projections() if each.source >= 0)
        layers = [(names[each.source], connections[each.name]) for each in projections]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no G2GLinear layer whose weights could have signs")
    return layers


def _check_signs(source: str, signs: Any, size: int) -> None:
    what = f"{signs.dtype} {list(signs.shape)}" if isinstance(signs, torch.Tensor) else type(signs).__name__
    if not isinstance(signs, torch.Tensor) or tuple(signs.shape) != (size,) or signs.dtype == torch.bool:
        raise ValueError(f"the signs of {source} are {what}; give a tensor of {size} numbers 1, −1 or 0")
    if not ((signs == 1) | (signs == -1) | (signs == 0)).all():
        raise ValueError(f"the signs of {source} must be 1, −1 or 0")


def _signs_of(source: str, layers: list[tuple[str, G2GLinear]]) -> torch.Tensor:
    """The sign of each neuron's weights, int8 [neurons]. Raises ValueError for a neuron with both signs."""
    own = [layer for name, layer in layers if name == source]
    positive, negative = (torch.zeros(own[0].in_features, dtype=torch.bool) for _ in range(2))
    for layer in own:
        edges = layer.mask.edges(layer.values)
        assert edges.weight is not None
        for found, there in ((positive, edges.weight > 0), (negative, edges.weight < 0)):
            found[torch.from_numpy(edges.source[there])] = True
    both = (positive & negative).nonzero()
    if len(both):
        first = f"neuron {int(both[0])} of {source} has weights of both signs ({len(both)} neurons do)"
        raise ValueError(f"{first}; give signs, which weights then take")
    return positive.to(torch.int8) - negative.to(torch.int8)


def _of_units(layer: G2GLinear, signs: torch.Tensor) -> torch.Tensor:
    """The signs of the sources of packed weights, [num_units, 1, unit_cols], 0 in padding."""
    axis = layer.mask.cols
    padded = torch.cat([signs, signs.new_zeros(1)]).to(axis.neuron_at.device)[axis.neuron_at]
    return padded.view(axis.num_units, axis.width)[layer.mask.unit_col.long()][:, None, :].to(layer.values)
