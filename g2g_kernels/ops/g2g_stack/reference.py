"""Plain PyTorch ``g2g_stack``: the two operators one after the other, layer by layer. The oracle for every backend.

A recurrent layer needs its own last spikes and takes one step after the other, its product with the inputs excepted;
so does a layer whose membranes over time are wanted.
"""

import itertools
from collections.abc import Callable, Sequence

import torch

from g2g_kernels.ops.checks import mixed_dtypes
from g2g_kernels.ops.g2g_linear.reference import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.neurons.reference import neurons
from g2g_kernels.ops.neurons.step import spikes_of


def refuses(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> str | None:
    """Why these operations cannot serve a call, or None."""
    for layer in layers:
        for values, _ in layer.connections():
            if reason := mixed_dtypes(x, values, layer.bias):
                return reason
    return None


def g2g_stack(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    return activity_of(*in_turn(x, layers, steps, g2g_linear, neurons), differentiable=False)


def in_turn(
    x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, linear: Callable, neurons: Callable
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    """The spikes [T, B, N] of each layer, its last states, and the membranes [T, B, N] that it is to give.

    Args:
        linear, neurons: implementations of the two operators.
    """
    spikes: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    membranes: list[torch.Tensor | None] = []
    for layer in layers:
        current = linear(x, layer.values, layer.mask, layer.bias)
        observer, _ = layer.observers
        if observer is not None:
            current = observer(x, current)
        of_layer = None
        if layer.recurrent is None and not layer.membranes:
            x, last = neurons(current, layer.population, steps, state=layer.state)
            if layer.dropped is not None:
                x = x.masked_fill(layer.dropped, 0)
        else:
            x, last, of_layer = in_steps(current, layer, steps, linear, neurons)
        spikes.append(x)
        states.append(last)
        membranes.append(of_layer)
        steps = None
    return spikes, states, membranes


def in_steps(
    current: torch.Tensor, layer: SpikingLayer, steps: int | None, linear: Callable, neurons: Callable
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A layer step by step, with I_t = W·x_t + b + V·S_{t−1} if it is recurrent.

    Gradients pass through S_{t−1} by the surrogate.

    Args:
        current: W·x_t + b, [T, B, N], or [B, N] held for ``steps`` steps.
        linear, neurons: implementations of the two operators.

    Returns:
        its spikes [T, B, N], its last states, and its membranes [T, B, N], or None if it is not to give them.
    """
    state = layer.state
    before = None
    if layer.recurrent is not None and state is not None:
        before = spikes_of(state[-1], layer.population).to(current.dtype)
        if layer.dropped is not None:
            before = before.masked_fill(layer.dropped, 0)
    spikes: list[torch.Tensor] = []
    membranes: list[torch.Tensor] = []
    for now in current.unbind() if steps is None else itertools.repeat(current, steps):
        if layer.recurrent is not None and before is not None:
            received = linear(before, *layer.recurrent, None)
            _, observer = layer.observers
            if observer is not None:
                received = observer(before, received)
            now = now + received
        train, state = neurons(now[None], layer.population, None, state=state)
        if layer.dropped is not None:
            train = train.masked_fill(layer.dropped, 0)
        before = train[0]
        spikes.append(train)
        if layer.membranes:
            membrane = state[-1]
            membranes.append(membrane if layer.dropped is None else membrane.masked_fill(layer.dropped, 0))
    assert state is not None
    return torch.cat(spikes), state, torch.stack(membranes) if layer.membranes else None


def activity_of(
    spikes: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor] | None,
    membranes: Sequence[torch.Tensor | None] = (None,),
    *,
    differentiable: bool,
) -> Activity:
    """The activity with these spikes, last states and membranes; ``dense()`` has a gradient if requested."""
    return Activity(
        counts=spikes[-1].float().sum(0) if spikes[-1].dtype.itemsize < 4 else spikes[-1].sum(0),
        rates=tuple(s.mean((0, 1), dtype=torch.promote_types(s.dtype, torch.float32)) for s in spikes),
        spikes=tuple(DenseSpikes(each if differentiable else each.detach()) for each in spikes),
        states=None if states is None else tuple(states),
        membranes=None if all(each is None for each in membranes) else tuple(membranes),
    )
