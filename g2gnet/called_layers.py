"""Calls the modules of a network one after the other, where hooks or a ``forward`` of their own rule out one call."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as every_module

from g2g_kernels import Activity, SpikingLayer, neurons_step
from g2g_kernels.ops.g2g_stack import Connection, Delay, NeuronState, StackState, Synapses, check_dropped
from g2g_kernels.ops.g2g_stack.delays import LateSpikes
from g2g_kernels.ops.g2g_stack.reference import GraphRun, LayerFunctions, activity_of, graph_of
from g2g_kernels.ops.g2g_stack.schedule import components_of
from g2g_kernels.ops.g2g_stack.synaptic_operations import Received
from g2g_kernels.ops.neurons.checks import check_states
from g2g_kernels.tracing import is_traced, replaced
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons

logger = logging.getLogger("g2gnet")


class Called(NamedTuple):
    """A population as modules: the name, module and size of its neurons, and (name, module, number of the source, delay
    or None) of each connection to them."""

    name: str
    neurons: Any
    size: int
    connections: list[tuple[str, Any, int, Delay | None]]


class _Sizes(NamedTuple):
    """Stands for a mask where modules have the weights."""

    shape: tuple[int, int]


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


def why_called(modules: Mapping[str, Any], populations: Sequence[str]) -> str | None:
    """Why the modules, of which ``populations`` are neurons, must be called each by itself; None if they need not."""
    if (
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return "hooks are registered for every module"
    return _why_each(modules, populations)


def _why_each(modules: Mapping[str, Any], populations: Sequence[str]) -> str | None:
    """What of the modules themselves only a call would run."""
    for name, module in modules.items():
        if (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        ) and _has_hooks(module):
            return f"{name} carries hooks"
        forward = SpikingNeurons.forward if name in populations else G2GLinear.forward
        if type(module).forward is not forward or "forward" in module.__dict__:
            return f"{name} ({type(module).__name__}) has a forward of its own"
    return None


def run_called(
    x: torch.Tensor,
    populations: Sequence[Called],
    dropped: Sequence[torch.Tensor | None] | None,
    scale: float,
    steps: int | None,
    reason: str,
    spikes: bool,
) -> Activity:
    """The activity of populations by calls of their modules; those on a cycle are called at every step. ``dropped`` are
    the neurons that each drops, whose others send ``scale`` times as much; ``reason`` is logged once; ``spikes``:
    whether spikes over time have a gradient. Raises TypeError if a hook on neurons that take steps, or a forward of
    their own, would be left out.
    """
    if not is_traced():
        _say_that_layers_are_called(reason)
    records = _records(populations, dropped)
    stepping = {number for each in components_of(graph_of(records)) if each.period for number in each.members}
    functions = []
    for number, (population, record) in enumerate(zip(populations, records, strict=True)):
        products = [
            partial(_call, name, connection, 1.0 if source < 0 or dropped is None else scale, population.size)
            for name, connection, source, _ in population.connections
        ]
        if number not in stepping:
            functions.append(LayerFunctions(products, partial(_call_neurons, number, population, record.dropped)))
            continue
        if unrun := _why_each({population.name: population.neurons}, [population.name]):
            raise TypeError(
                f"{unrun}, which would not be run: neurons on a cycle take steps. Put hooks on a "
                f"connection, as {population.connections[-1][0]}, or take steps with step(x, state)"
            )
        functions.append(LayerFunctions(products, partial(_step_neurons, population.neurons)))
    trains = GraphRun(x, records, functions, steps).turn().spikes
    activity = activity_of(trains, None, differentiable=spikes)
    return replaced(activity, synapses=_synapses(x, populations, trains, steps))


def _records(
    populations: Sequence[Called],
    dropped: Sequence[torch.Tensor | None] | None,
    states: Sequence[Any] | None = None,
    sent: Sequence[torch.Tensor | None] | None = None,
) -> list[SpikingLayer]:
    """Records of the populations without weights and neurons, which stay in the modules."""
    records = []
    for number, (_, neurons, size, connections) in enumerate(populations):
        first, *more = [
            Connection(None, _Sizes((size, 0)), source, delay, getattr(module, "bias", True))  # type: ignore[arg-type]
            for _, module, source, delay in connections
        ]
        records.append(
            SpikingLayer(
                None,  # type: ignore[arg-type]  # in the modules
                first.mask,
                first.bias,
                getattr(neurons, "population", None),  # type: ignore[arg-type]  # of other modules
                None if dropped is None else dropped[number],
                None if states is None else states[number],
                source=first.source,
                delay=first.delay,
                more=tuple(more),
                sent=None if sent is None else sent[number],
            )
        )
    return records


def _synapses(
    x: torch.Tensor, populations: Sequence[Called], trains: Sequence[torch.Tensor], steps: int | None
) -> Synapses | None:
    """What the synaptic operations of such a run are counted from; None where they cannot be."""
    layers: list[list[Received]] = []
    for population in populations:
        layers.append([])
        for _, connection, source, delay in population.connections:
            if is_traced() or not isinstance(connection, G2GLinear):
                return None
            sent, held = (x, steps) if source < 0 else (trains[source], None)
            late = None if delay is None else LateSpikes(sent, delay, None, held)
            layers[-1].append(Received(*connection.weights(), source, late))
    return Synapses(x, steps, layers)


def step_of_called(
    x: torch.Tensor,
    populations: Sequence[Called],
    states: Sequence[NeuronState | None],
    sent: Sequence[torch.Tensor | None],
    spiking: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], StackState]:
    """One step from ``x`` [B, D] by calls of connections and steps of neurons. ``states`` and ``sent`` are those before
    it, the inputs' at the end; ``spiking``: the last neurons spike, too. Returns the output, the spikes [1, B, N] of
    each population, and the state after the step.
    """
    functions = []
    before = [(each,) if isinstance(each, torch.Tensor) else each for each in states]
    for number, (name, neurons, size, connections) in enumerate(populations, 1):
        _check_steps_of(name, neurons)
        own = before[number - 1]
        if own is not None and isinstance(neurons, SpikingNeurons):  # a sum would broadcast
            check_states(own, neurons.population, (len(x), size))
        step = partial(_step_neurons if spiking or number < len(populations) else _step_silently, neurons)
        functions.append(
            LayerFunctions([partial(_call_at_a_step, connection) for _, connection, _, _ in connections], step)
        )
    turn = GraphRun(x[None], _records(populations, None, before, sent), functions, None, sent[-1]).turn()
    after = [each[0] if isinstance(each, tuple) and len(each) == 1 else each for each in turn.states]
    output = turn.spikes[-1][0] if spiking else turn.states[-1][-1]
    return output, turn.spikes, (*after, *[each for each in turn.sent if each is not None])


def _call_at_a_step(connection: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a connection of inputs [1, B, N], which it sees without the axis of time."""
    return connection(x[0])[None] if x.dim() == 3 else connection(x)


def _call(name: str, connection: nn.Module, scale: float, size: int, x: torch.Tensor) -> torch.Tensor:
    """The output of a connection, which has ``size``, of inputs times ``scale``."""
    return _output_of(name, connection, x if scale == 1 else x * scale, (*x.shape[:-1], size))


def _call_neurons(
    number: int, called: Called, silent: torch.Tensor | None, current: torch.Tensor, steps: int | None, state: None
) -> tuple[torch.Tensor, None]:
    if steps is not None:
        current = current.expand(steps, *current.shape)
    if silent is not None:
        check_dropped(f" of layer {number}", silent, tuple(current.shape[1:]))
        current = current.masked_fill(silent, 0)  # hooks of the neurons see them silent
    return _output_of(called.name, called.neurons, current, current.shape), None


def _step_neurons(
    neurons: SpikingNeurons, current: torch.Tensor, steps: int | None, state: Any
) -> tuple[torch.Tensor, Any]:
    """The spikes [T, B, N] of neurons that take steps, and their states as a tuple."""
    spikes = []
    for now in current.unbind() if steps is None else [current] * steps:
        out, state = neurons.step(now, state[0] if isinstance(state, tuple) and len(state) == 1 else state)
        state = (state,) if isinstance(state, torch.Tensor) else state
        spikes.append(out)
    return torch.stack(spikes), state


def _step_silently(
    neurons: SpikingNeurons, current: torch.Tensor, steps: int | None, state: Any
) -> tuple[torch.Tensor, Any]:
    current = current[0] if steps is None else current  # a current that is held has no axis of time
    spikes, states = neurons_step(current, state, neurons.population.integrating())
    return torch.zeros_like(spikes)[None], states


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


def _output_of(name: str, module: nn.Module, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The output of a module of the network; raises TypeError unless it is a tensor of that shape."""
    output = module(x)
    is_tensor = isinstance(output, torch.Tensor)
    if is_tensor and tuple(output.shape) == tuple(shape):
        return output
    what = f"a tensor {list(output.shape)}" if is_tensor else f"a {type(output).__name__}"
    wanted = f"a tensor {list(shape)}"
    raise TypeError(f"{name} ({type(module).__name__}) returned {what}; in a stack it must return {wanted}")


@cache
def _say_that_layers_are_called(reason: str) -> None:
    logger.warning("a network calls its modules in turn, which is slower than one call for all: %s", reason)


@cache
def _say_that_steps_pass_by(name: str) -> None:
    logger.warning("hooks on %s are not run by a network's step, which calls its step; simulate runs them", name)
