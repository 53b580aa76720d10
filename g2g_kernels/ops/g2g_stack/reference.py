"""Plain PyTorch ``g2g_stack``: the two operators one after the other, layer by layer. The oracle for every backend.

A recurrent layer needs its own last spikes and takes one step after the other, its product with the inputs excepted;
so does a layer whose membranes over time are wanted.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops.checks import mixed_dtypes
from g2g_kernels.ops.g2g_linear.reference import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes
from g2g_kernels.ops.g2g_stack.layer import Observer, SpikingLayer
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


class Parts(NamedTuple):
    """A layer as functions, which are called one after the other.

    Attributes:
        product: of its inputs [..., in], gives its current [..., N] (with their bias).
        recurrent: of its spikes in one step [B, N], gives what they add to the current of the next; or None.
        neurons: of the current [T, B, N], or [B, N] held for a number of steps, that number or None, and the states
            before, gives spikes [T, B, N] and the states after.
    """

    product: Callable[[torch.Tensor], torch.Tensor]
    recurrent: Callable[[torch.Tensor], torch.Tensor] | None
    neurons: Callable[[torch.Tensor, int | None, Any], tuple[torch.Tensor, Any]]


#: the spikes [T, B, N] of each layer, its last states, and the membranes [T, B, N] that it is to give
Turn = tuple[list[torch.Tensor], list[Any], list[torch.Tensor | None]]


def in_turn(
    x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, linear: Callable, neurons: Callable
) -> Turn:
    """What the layers do by two operators, ``linear`` and ``neurons``."""
    return in_parts(x, layers, [_parts_of(layer, linear, neurons) for layer in layers], steps)


def _parts_of(layer: SpikingLayer, linear: Callable, neurons: Callable) -> Parts:
    of_inputs, of_recurrent = layer.observers
    recurrent = None
    if layer.recurrent is not None:
        recurrent = partial(_product, linear, *layer.recurrent, None, of_recurrent)
    product = partial(_product, linear, layer.values, layer.mask, layer.bias, of_inputs)
    return Parts(product, recurrent, partial(_neurons, neurons, layer))


def _product(
    linear: Callable, values: torch.Tensor, mask: Any, bias: Any, observer: Observer | None, x: torch.Tensor
) -> torch.Tensor:
    y = linear(x, values, mask, bias)
    return y if observer is None else observer(x, y)


def _neurons(neurons: Callable, layer: SpikingLayer, current: torch.Tensor, steps: int | None, state: Any) -> Any:
    return neurons(current, layer.population, steps, state=state)


def in_parts(x: torch.Tensor, layers: Sequence[SpikingLayer], parts: Sequence[Parts], steps: int | None) -> Turn:
    """What the layers do by their parts; of ``layers`` it reads what is not in them."""
    spikes: list[torch.Tensor] = []
    states: list[Any] = []
    membranes: list[torch.Tensor | None] = []
    for layer, part in zip(layers, parts, strict=True):
        current = part.product(x)
        of_layer = None
        if part.recurrent is None and not layer.membranes:
            x, last = part.neurons(current, steps, layer.state)
            if layer.dropped is not None:
                x = x.masked_fill(layer.dropped, 0)
        else:
            x, last, of_layer = _in_steps(current, layer, part, steps)
        spikes.append(x)
        states.append(last)
        membranes.append(of_layer)
        steps = None
    return spikes, states, membranes


def _in_steps(
    current: torch.Tensor, layer: SpikingLayer, part: Parts, steps: int | None
) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
    """A layer step by step, with I_t = W·x_t + b + V·S_{t−1} if it is recurrent: its spikes, last states, membranes.

    Gradients pass through S_{t−1} by the surrogate.
    """
    state = layer.state
    before = None
    if part.recurrent is not None and state is not None:
        before = spikes_of(state[-1], layer.population).to(current.dtype)
        if layer.dropped is not None:
            before = before.masked_fill(layer.dropped, 0)
    spikes: list[torch.Tensor] = []
    membranes: list[torch.Tensor] = []
    for now in current.unbind() if steps is None else itertools.repeat(current, steps):
        if part.recurrent is not None and before is not None:
            now = now + part.recurrent(before)
        train, state = part.neurons(now[None], None, state)
        if layer.dropped is not None:
            train = train.masked_fill(layer.dropped, 0)
        before = train[0]
        spikes.append(train)
        if layer.membranes:
            membrane = state[-1]
            membranes.append(membrane if layer.dropped is None else membrane.masked_fill(layer.dropped, 0))
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
