"""Plain PyTorch ``g2g_stack``: the two operators one after the other, layer by layer. The oracle for every backend."""

from collections.abc import Callable, Sequence

import torch

from g2g_kernels.ops.checks import mixed_dtypes
from g2g_kernels.ops.g2g_linear.reference import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.neurons.reference import neurons


def refuses(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> str | None:
    """Why these operations cannot serve a call, or None."""
    return next(filter(None, (mixed_dtypes(x, layer.values, layer.bias) for layer in layers)), None)


def g2g_stack(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    return activity_of(*in_turn(x, layers, steps, g2g_linear, neurons), differentiable=False)


def in_turn(
    x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, linear: Callable, neurons: Callable
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The spikes [T, B, N] of each layer and its last states, by these implementations of the two operators."""
    spikes: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    for layer in layers:
        current = linear(x, layer.values, layer.mask, layer.bias)
        x, last = neurons(current, layer.neurons, steps, state=layer.state)
        if layer.dropped is not None:
            x = x.masked_fill(layer.dropped, 0)
        spikes.append(x)
        states.append(last)
        steps = None
    return spikes, states


def activity_of(
    spikes: Sequence[torch.Tensor], states: Sequence[torch.Tensor] | None, differentiable: bool
) -> Activity:
    """The activity with these spikes and last states of each layer; ``dense()`` has a gradient if requested."""
    return Activity(
        counts=spikes[-1].float().sum(0) if spikes[-1].dtype.itemsize < 4 else spikes[-1].sum(0),
        rates=tuple(s.mean((0, 1), dtype=torch.promote_types(s.dtype, torch.float32)) for s in spikes),
        spikes=tuple(DenseSpikes(each if differentiable else each.detach()) for each in spikes),
        states=None if states is None else tuple(states),
    )
