"""What a stack may be made of, and given."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons


def check_layers(layers: Sequence[Sequence[Any]], readout: str) -> None:
    """Raises unless these are the layers of a stack with that readout."""
    if not layers:
        raise ValueError("layers is empty; give at least one pair of a G2GLinear and its neurons")
    for number, (connection, neurons, *recurrent) in enumerate(layers, 1):
        if not hasattr(connection, "in_features"):
            raise TypeError(
                f"fc{number} is a {type(connection).__name__}; a stack joins G2GLinear layers. Put others, as "
                "convolutions, into a module of your own with LIF layers behind them (docs/limits.md)"
            )
        if recurrent:
            _check_recurrent(number, connection.out_features, neurons, recurrent)
    for number, ((lower, *_), (upper, *_)) in enumerate(itertools.pairwise(layers), 1):
        if lower.out_features != upper.in_features:
            raise ValueError(
                f"fc{number} has {lower.out_features} outputs, but fc{number + 1} {upper.in_features} inputs"
            )
    _, neurons, *recurrent = layers[-1]
    if readout != "counts" and recurrent:
        raise ValueError(
            f"readout={readout!r} is of neurons that do not spike, but the last layer is recurrent; leave its "
            "recurrent connection out, or give readout='counts'"
        )
    if readout != "counts" and not isinstance(neurons, SpikingNeurons):
        raise TypeError(
            f"readout={readout!r} is of the membranes of the neurons of g2gnet, and the last are "
            f"{type(neurons).__name__}; give readout='counts'"
        )


def _check_recurrent(number: int, size: int, neurons: nn.Module, recurrent: Sequence[Any]) -> None:
    """Raises unless what follows the neurons of layer ``number`` is one recurrent connection of these neurons."""
    name = f"rec{number}"
    if len(recurrent) > 1 or not isinstance(recurrent[0], G2GLinear):
        what = " and ".join(type(each).__name__ for each in recurrent)
        raise TypeError(f"{name} is {what}; give one G2GLinear from the layer's neurons to themselves")
    (own,) = recurrent
    if (own.out_features, own.in_features) != (size, size):
        raise ValueError(f"{name} joins {own.in_features} neurons to {own.out_features}, but lif{number} has {size}")
    if own.bias is not None:
        raise ValueError(f"{name} has a bias; give G2GLinear(mask, bias=False): fc{number} has the layer's bias")
    if not isinstance(neurons, SpikingNeurons):
        raise TypeError(
            f"lif{number} is a {type(neurons).__name__}; a recurrent layer takes steps of the neurons of g2gnet"
        )


def check_input(x: object) -> None:
    """Raises TypeError unless the input of a stack is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"the input is a {type(x).__name__}, not a tensor")


def check_state_form(state: Any, depth: int) -> None:
    """Raises unless there is one entry per layer, each a tensor, several or None."""
    if type(state) not in (tuple, list):
        raise TypeError(
            f"state is a {type(state).__name__}, not a tuple of the layers' states; give activity.state of a run, "
            "or what step(x, state) returned"
        )
    if len(state) != depth:
        raise ValueError(f"state is of {len(state)} layers, this stack has {depth}")
    for number, before in enumerate(state):
        tensors = before if type(before) in (tuple, list) else (before,)
        if before is not None and not all(isinstance(each, torch.Tensor) for each in tensors):
            raise TypeError(f"state of layer {number} is a {type(before).__name__}, not a tensor or several")
