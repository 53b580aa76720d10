"""Dale's law: all weights from one neuron have one sign."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from g2gnet.layers import G2GLinear
from g2gnet.spiking_network import SpikingNetwork


class KeptSigns:
    """What :func:`keep_signs` returns; ``signs`` by source, int8 [neurons]: 1, −1, or 0 where either is allowed."""

    def __init__(
        self, groups: Mapping[str, list[G2GLinear]], signs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self._groups, self.signs, self._optimizer = groups, signs, optimizer
        self._hook: Any = optimizer.register_step_post_hook(self.apply)
        self.apply()

    @torch.no_grad()
    def apply(self, *_: Any) -> None:
        """Sets every weight of the wrong sign to 0, as after each step of the optimizer."""
        for name, layers in self._groups.items():
            for layer in layers:
                sign = _of_units(layer, self.signs[name]).to(layer.values)
                layer.values.masked_fill_(layer.values * sign < 0, 0)

    def remove(self) -> None:
        """Lets the weights have any sign again."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hook": self._hook is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # copies of optimizers have no hooks
        self._hook = self._optimizer.register_step_post_hook(self.apply) if state["_hook"] else None


def keep_signs(
    model: nn.Module, optimizer: torch.optim.Optimizer, signs: torch.Tensor | Mapping[str, torch.Tensor] | None = None
) -> KeptSigns:
    """Has weights keep the sign of the neuron that they come from (Dale's law), from now on.

    After each ``optimizer.step()`` a weight that has the other sign becomes 0; it exists still, and may grow again.
    Weights that dynamic sparse training grows begin at 0 and take their neuron's sign. Averages of weights have their
    signs. A checkpoint holds weights, not signs: give these again after loading. PyTorch copies optimizers without what
    follows their steps: copy or pickle the returned object together with network and optimizer.

    Args:
        model: a :class:`G2GLinear`; a :class:`SpikingNetwork`, or a module around one, whose populations are the
            sources (the input has no signs); or another module, each of whose G2GLinear layers is a source of its own,
            by its name.
        optimizer: what trains these weights.
        signs: of the source's neurons, 1, −1 or 0 (either), [N_src]; of several sources by name, and of those that are
            not named any sign is allowed. Weights of the other sign take the given one, −w for w. None: each neuron has
            the sign of its weights, and 0 if all of them are 0.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for an optimizer that does not hold the weights; without ``signs`` for a neuron with weights of both
            signs, whose number the error gives; for signs of another number of neurons, or of an unknown source.

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
    groups = _sources(model)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for name, layers in groups.items():
        for layer in layers:
            if not layer.has_plain_values:
                raise ValueError(f"the weights from {name} are computed by a parametrization; remove that")
            if layer.values.requires_grad and id(layer.values) not in held:
                raise ValueError(f"the optimizer does not hold the weights from {name}; give the one that trains them")
    if signs is None:
        return KeptSigns(groups, {name: _signs_of(name, layers) for name, layers in groups.items()}, optimizer)
    if not isinstance(signs, Mapping):
        if len(groups) > 1:
            raise ValueError(f"there are several sources; give signs by name, of {', '.join(groups)}")
        signs = dict.fromkeys(groups, signs)
    if not signs:
        raise ValueError(f"signs is empty; give those of some of {', '.join(groups)}")
    for name, each in signs.items():
        _check_signs(name, each, groups)
    groups = {name: groups[name] for name in signs}
    found = {name: each.detach().to(torch.int8).cpu() for name, each in signs.items()}
    with torch.no_grad():
        for name, layers in groups.items():
            for layer in layers:
                sign = _of_units(layer, found[name]).to(layer.values)
                layer.values.copy_(torch.where(sign == 0, layer.values, layer.values.abs() * sign))
    return KeptSigns(groups, found, optimizer)


def _sources(model: nn.Module) -> dict[str, list[G2GLinear]]:
    if isinstance(model, G2GLinear):
        return {"the layer": [model]}
    groups: dict[str, list[G2GLinear]] = {}
    layers = [module for module in model.modules() if isinstance(module, G2GLinear)]
    networks = [module for module in model.modules() if isinstance(module, SpikingNetwork)]
    if len(networks) == 1 and len(networks[0].connections()) == len(layers):
        connections: Mapping[str, Any] = networks[0].connections()
        names = list(networks[0].populations)
        for route in networks[0].routes():
            if route.source >= 0:
                groups.setdefault(names[route.source], []).append(connections[route.name])
    else:
        groups = {name: [layer] for name, layer in model.named_modules() if isinstance(layer, G2GLinear)}
    if not groups:
        raise ValueError(f"{type(model).__name__} has no G2GLinear layer whose weights could have signs")
    return groups


def _check_signs(name: str, signs: Any, groups: Mapping[str, list[G2GLinear]]) -> None:
    if name not in groups:
        raise ValueError(f"signs of {name!r}: there is no such source, only {', '.join(groups)}")
    size = groups[name][0].in_features
    what = f"{signs.dtype} {list(signs.shape)}" if isinstance(signs, torch.Tensor) else type(signs).__name__
    if not isinstance(signs, torch.Tensor) or tuple(signs.shape) != (size,) or signs.dtype == torch.bool:
        raise ValueError(f"the signs of {name} are {what}; give a tensor of {size} numbers 1, −1 or 0")
    if not ((signs == 1) | (signs == -1) | (signs == 0)).all():
        raise ValueError(f"the signs of {name} must be 1, −1 or 0")


def _signs_of(name: str, layers: list[G2GLinear]) -> torch.Tensor:
    """The sign of each neuron's weights; raises ValueError for one that has both."""
    size = layers[0].in_features
    positive, negative = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    for layer in layers:
        edges = layer.mask.edges(layer.values)
        assert edges.weight is not None
        for found, there in ((positive, edges.weight > 0), (negative, edges.weight < 0)):
            found[torch.from_numpy(edges.source[there])] = True
    both = (positive & negative).nonzero()
    if len(both):
        first = f"neuron {int(both[0])} of {name} has weights of both signs ({len(both)} neurons do)"
        raise ValueError(f"{first}; give signs, which weights then take")
    return positive.to(torch.int8) - negative.to(torch.int8)


def _of_units(layer: G2GLinear, signs: torch.Tensor) -> torch.Tensor:
    """The signs of the sources of packed weights: [num_units, 1, unit_cols], 0 in padding."""
    axis = layer.mask.cols
    padded = torch.cat([signs, signs.new_zeros(1)]).to(axis.neuron_at.device)[axis.neuron_at]
    return padded.view(axis.num_units, axis.width)[layer.mask.unit_col.long()][:, None, :]
