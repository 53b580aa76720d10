"""Layers of a stack that are called as modules: what only a call would run is not left out.

Hooks on a layer (which also rewrite its weights), a ``forward`` of its own, another module in its place: a
:class:`g2gnet.SpikingStack` that carries any of these calls its layers one after the other.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module

from g2g_kernels import SpikingLayer, neurons_step
from g2g_kernels.ops.g2g_stack import Border, NeuronState, StackState, Synapses, check_dropped
from g2g_kernels.ops.g2g_stack.reference import Parts, in_parts
from g2g_kernels.ops.neurons.checks import check_states
from g2g_kernels.ops.neurons.step import spikes_of
from g2g_kernels.tracing import is_traced
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons

logger = logging.getLogger("g2gnet")

#: (connection, neurons, recurrent connection or None) of a layer
Triple = tuple[Any, Any, Any]


class OwnHook:
    """A hook that needs no call of its module, and is dropped when that is copied or pickled: a stack that carries only
    such hooks runs in one call."""

    def __init__(self, function: Callable[..., None], *first: Any) -> None:
        self._function, self._first = function, first

    def __call__(self, *arguments: Any) -> None:
        self._function(*self._first, *arguments)

    def __reduce__(self) -> tuple:
        return OwnHook, (_nothing,)


def _nothing(*arguments: Any) -> None:
    pass


def why_called(layers: Sequence[Triple]) -> str | None:
    """What would be left out unless the layers are called; None: nothing."""
    if (
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return "hooks are registered for every module"
    for number, (connection, neurons, recurrent) in enumerate(layers, 1):
        if reason := _why_call(connection, G2GLinear.forward):
            return f"fc{number} {reason}"
        if reason := _why_call(neurons, SpikingNeurons.forward):
            return f"lif{number} {reason}"
        if recurrent is not None and (reason := _why_call(recurrent, G2GLinear.forward)):
            return f"rec{number} {reason}"
    return None


def _why_call(module: nn.Module, forward: Callable) -> str | None:
    """What of a module only a call would run; ``forward`` is the one that needs none."""
    if (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) and _has_hooks(module):
        return "carries hooks"
    if type(module).forward is not forward or "forward" in module.__dict__:
        return f"({type(module).__name__}) has a forward of its own"
    return None


def spikes_of_called(
    x: torch.Tensor,
    layers: Sequence[Triple],
    dropped: Sequence[torch.Tensor | None] | None,
    scale: float,
    steps: int | None,
    reason: str,
) -> list[torch.Tensor]:
    """The spikes [T, B, N] of each layer by calls of its modules, of which the recurrent ones are called at every step.

    Args:
        dropped: the neurons that each layer drops; what the others send is multiplied by ``scale``.
        reason: why they are called, which is logged once.

    Raises:
        TypeError: if a hook on neurons that take steps, or a forward of their own, would be left out.
    """
    if not is_traced():
        _say_that_layers_are_called(reason)
    records, parts = [], []
    for number, (connection, neurons, recurrent) in enumerate(layers, 1):
        silent = None if dropped is None else dropped[number - 1]
        records.append(SpikingLayer(None, None, None, None, silent))  # type: ignore[arg-type]  # the rest is in modules
        of_inputs = partial(_call, f"fc{number}", connection, 1.0 if number == 1 or dropped is None else scale, None)
        if recurrent is None:
            parts.append(Parts(of_inputs, None, partial(_call_neurons, number, neurons, silent)))
            continue
        if unrun := _why_call(neurons, SpikingNeurons.forward):
            raise TypeError(
                f"lif{number} {unrun}, which would not be run: the neurons of a recurrent layer take steps. Use "
                f"rec{number} for hooks, or take steps with SpikingStack.step"
            )
        joined = partial(_call, f"rec{number}", recurrent, 1.0 if silent is None else scale, connection.out_features)
        parts.append(Parts(of_inputs, joined, partial(_step_neurons, neurons)))
    return in_parts(x, records, parts, steps)[0]


def synapses_of_called(
    x: torch.Tensor, layers: Sequence[Triple], trains: Sequence[torch.Tensor], steps: int | None
) -> Synapses | None:
    """What the synaptic operations of such a run are counted from; None where they cannot be."""
    weights, borders = [], []
    for train, (connection, _, recurrent) in zip(trains, layers, strict=True):
        if is_traced() or not isinstance(connection, G2GLinear):
            return None
        weights.append([each.weights() for each in (connection, recurrent) if each is not None])
        last = train.detach()[-1]
        borders.append(None if recurrent is None else Border(None, last, torch.zeros_like(last[0])))
    return Synapses(x, steps, weights, borders)


def step_of_called(
    x: torch.Tensor, layers: Sequence[Triple], befores: Sequence[NeuronState | None], spiking: bool
) -> tuple[torch.Tensor, list[torch.Tensor], StackState]:
    """One step by calls of connections and steps of neurons.

    Args:
        x: [B, D].
        befores: the states of each layer before the step.
        spiking: whether the last neurons spike, too.

    Returns:
        the output, the spikes [B, N] of each layer, and the states after the step.
    """
    trains: list[torch.Tensor] = []
    afters: list[NeuronState] = []
    for number, ((connection, neurons, recurrent), before) in enumerate(zip(layers, befores, strict=True), 1):
        _check_steps_of(f"lif{number}", neurons)
        current = connection(x)
        states = (before,) if isinstance(before, torch.Tensor) else before
        if recurrent is not None and states is not None:
            check_states(states, neurons.population, tuple(current.shape))  # a sum would broadcast
            current = current + recurrent(spikes_of(states[-1], neurons.population).to(current.dtype))
        if number == len(layers) and not spiking:
            _, last = neurons_step(current, states, neurons.population.integrating())
            x, after = last[-1], last[0] if len(last) == 1 else last
            trains.append(torch.zeros_like(x))
        else:
            x, after = neurons.step(current, before)
            trains.append(x)
        afters.append(after)
    return x, trains, tuple(afters)


def _call(name: str, connection: nn.Module, scale: float, size: int | None, x: torch.Tensor) -> torch.Tensor:
    """The output of a connection, which has ``size`` (None: any number), of inputs times ``scale``."""
    return _output_of(name, connection, x if scale == 1 else x * scale, (*x.shape[:-1], size))


def _call_neurons(
    number: int, neurons: nn.Module, silent: torch.Tensor | None, current: torch.Tensor, steps: int | None, state: None
) -> tuple[torch.Tensor, None]:
    """The spikes of the neurons of a layer, which are called."""
    if steps is not None:
        current = current.expand(steps, *current.shape)
    if silent is not None:
        check_dropped(f" of layer {number - 1}", silent, tuple(current.shape[1:]))
        current = current.masked_fill(silent, 0)  # hooks of the neurons see them silent
    return _output_of(f"lif{number}", neurons, current, current.shape), None


def _step_neurons(
    neurons: SpikingNeurons, current: torch.Tensor, steps: None, state: NeuronState | None
) -> tuple[torch.Tensor, NeuronState]:
    """The spikes [1, B, N] of the neurons of a recurrent layer, which take one step."""
    spikes, state = neurons.step(current[0], state)
    return spikes[None], state


def _has_hooks(module: nn.Module) -> bool:
    every = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(not isinstance(hook, OwnHook) for hooks in every for hook in hooks.values())


def _check_steps_of(name: str, neurons: nn.Module) -> None:
    """Raises TypeError unless a step of these neurons is one of their run, and says what hooks do not see."""
    kind = type(neurons)
    step = getattr(kind, "step", None)
    if step is None:
        raise TypeError(f"{name} ({kind.__name__}) has no step(current, state); give it one, or call simulate")
    if step is SpikingNeurons.step and (kind.forward is not SpikingNeurons.forward or "forward" in neurons.__dict__):
        raise TypeError(
            f"{name} ({kind.__name__}) has a forward of its own, but not a step that follows it; give it a "
            "step(current, state), or call simulate"
        )
    if _has_hooks(neurons) and not is_traced():
        _say_that_steps_pass_by(name)


def _output_of(name: str, module: nn.Module, x: torch.Tensor, shape: Sequence[int | None]) -> torch.Tensor:
    """The output of a module of the stack; raises TypeError unless it is a tensor of that shape (None: any size)."""
    output = module(x)
    is_tensor = isinstance(output, torch.Tensor)
    if is_tensor and len(output.shape) == len(shape):
        sizes = zip(output.shape, shape, strict=True)
        if all([expected is None or size == expected for size, expected in sizes]):
            return output
    what = f"a tensor {list(output.shape)}" if is_tensor else f"a {type(output).__name__}"
    sides = ", ".join("N" if size is None else str(size) for size in shape)
    raise TypeError(f"{name} ({type(module).__name__}) returned {what}; in a stack it must return a tensor [{sides}]")


@cache
def _say_that_layers_are_called(reason: str) -> None:
    logger.warning("a SpikingStack calls its layers in turn, which is slower than one call for all: %s", reason)


@cache
def _say_that_steps_pass_by(name: str) -> None:
    logger.warning("hooks on %s are not run by SpikingStack.step, which calls its step; simulate runs them", name)
