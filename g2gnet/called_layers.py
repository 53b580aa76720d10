"""Calls the modules of a network one after the other, where hooks or a ``forward`` of their own rule out one call."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from g2g_kernels import Activity, Connection, neurons_step
from g2g_kernels.dispatch import ANY
from g2g_kernels.ops.g2g_stack import WAYS, Call, StackState, check_dropped
from g2g_kernels.ops.g2g_stack.activity import Synapses
from g2g_kernels.ops.g2g_stack.images import through
from g2g_kernels.ops.g2g_stack.population import components
from g2g_kernels.ops.g2g_stack.reference import GraphRun, PopulationFunctions, activity_of
from g2g_kernels.ops.neurons.checks import check_states
from g2g_kernels.tracing import is_traced, replaced
from g2gnet.base.hooks import has_hooks
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons

if TYPE_CHECKING:
    from g2gnet.spiking_network import SpikingNetwork

logger = logging.getLogger("g2gnet")


class NormedModule(NamedTuple):
    """A convolution and the norm behind it, called one after the other."""

    layer: nn.Module
    norm: nn.Module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))


class CalledModules:
    """Calls the modules of a network in turn; those on a cycle at every step.

    Args:
        net: has the modules.
        why: what only a call of a module runs.
        scale: what the output of neurons that are not dropped is multiplied by.
    """

    def __init__(self, net: "SpikingNetwork", why: str, scale: float) -> None:
        self._net, self.why, self._scale = net, why, scale

    def run(self, call: Call) -> Activity:
        """The activity; TypeError if a hook on neurons that take steps, or a forward of their own, would be left
        out."""
        if not is_traced():
            _say_that_modules_are_called(self.why)
        parts = components(call.populations)
        stepping = {number for each in parts if each.period for number in each.members}
        stepping |= {n for n, of in enumerate(call.populations) if any([each.onto for each in of.connections])}
        functions = []
        for number, (name, neurons) in enumerate(self._net.neurons().items()):
            population, size = call.populations[number], self._net.sizes[number]
            names = [each.name for each in self._net.projections() if each.target == number]
            products = [
                partial(_call, connection, each, 1.0 if each.source < 0 else self._scale, size)
                for connection, each in zip(names, population.connections, strict=True)
            ]
            if number not in stepping:
                run: Any = partial(_call_neurons, number, name, neurons, population.dropped)
            elif unrun := self._net.why_called([name]):
                raise TypeError(
                    f"{unrun}, which would not be run: neurons on a cycle, or with onto='membrane', take steps. Put "
                    f"hooks on a connection, as {names[-1]}, or take steps with step(x, state)"
                )
            else:
                run = partial(_step_neurons, neurons)
            functions.append(PopulationFunctions(size, products, run))
        trains = GraphRun(call, functions).turn().spikes
        activity = activity_of(trains, None, differentiable=call.spikes)
        modules = [each.values for population in call.populations for each in population.connections]
        if is_traced() or not all([isinstance(module, G2GLinear) for module in modules]):
            return activity
        as_run = [of._replace(connections=tuple(map(_with_weights, of.connections))) for of in call.populations]
        return replaced(activity, synapses=Synapses(replaced(call, populations=tuple(as_run)), activity.spikes))


def _with_weights(connection: Connection) -> Connection:
    """A called connection with the weights that its module has, which a hook may have rewritten."""
    values, mask = connection.values.weights()
    return connection._replace(values=values, mask=mask)


WAYS.register(
    ANY,
    lambda call: call.modules.run(call),
    lambda call: "no module has to be called" if call.modules is None else None,
    "modules in turn",
)


def step_of_called(
    call: Call, net: "SpikingNetwork", spiking: bool
) -> tuple[torch.Tensor, list[torch.Tensor], StackState]:
    """One step, x [1, B, D], by calls of connections and steps of neurons; ``spiking``: the last neurons spike, too.
    Returns the output, the spikes [1, B, N] of each population, and the state after the step.
    """
    functions = []
    for (name, neurons), size, population in zip(net.neurons().items(), net.sizes, call.populations):  # noqa: B905
        _check_steps_of(name, neurons)
        states: Any = population.state  # one by one, as steps take them
        if states is not None and isinstance(neurons, SpikingNeurons):  # a sum would broadcast
            check_states(states, neurons.population, (call.x.shape[1], size))
        products = [partial(_call_at_a_step, each) for each in population.connections]
        step = _step_neurons if spiking or name != net.populations[-1] else _step_silently
        functions.append(PopulationFunctions(size, products, partial(step, neurons)))
    turn = GraphRun(call, functions).turn()
    after = [each[0] if isinstance(each, tuple) and len(each) == 1 else each for each in turn.states]
    output = turn.spikes[-1][0] if spiking else turn.states[-1][-1]
    return output, turn.spikes, (*after, *[each for each in turn.sent if each is not None])


def _call_at_a_step(connection: Connection, x: torch.Tensor) -> torch.Tensor:
    """The output of a connection of inputs [1, B, N], which it sees without the axis of time."""
    called = _caller(connection)
    return called(x[0])[None] if x.dim() == 3 else called(x)


def _caller(connection: Connection) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a called connection gives of neurons; its module sees images where its source lies in them."""
    module, images = connection.values, connection.images
    if images is None:
        return module
    return lambda x: through(images, x, module, flat=isinstance(module, G2GLinear))


def _call(name: str, connection: Connection, scale: float, size: int, x: torch.Tensor) -> torch.Tensor:
    """The output of a connection, which has ``size``, of inputs times ``scale``."""
    module = connection.values
    output = _caller(connection)(x if scale == 1 else x * scale)
    return _checked_output(name, module, output, (*x.shape[:-1], size))


def _call_neurons(
    number: int,
    name: str,
    neurons: nn.Module,
    silent: torch.Tensor | None,
    current: torch.Tensor,
    steps: int | None,
    state: None,
) -> tuple[torch.Tensor, None]:
    if steps is not None:
        current = current.expand(steps, *current.shape)
    if silent is not None:
        check_dropped(f" of population {number}", silent, tuple(current.shape[1:]))
        current = current.masked_fill(silent, 0)  # hooks of the neurons see them silent
    return _output_of(name, neurons, current, current.shape), None


def _step_neurons(
    neurons: SpikingNeurons, current: torch.Tensor, steps: int | None, state: Any, **own: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    """The spikes [T, B, N] of neurons that take steps, and their states as a tuple."""
    spikes = []
    for t in range(len(current) if steps is None else steps):
        now, *onto = [each if steps else each[t] for each in (current, *own.values())]
        out, state = neurons.step(now, state[0] if isinstance(state, tuple) and len(state) == 1 else state, *onto)
        state = (state,) if isinstance(state, torch.Tensor) else state
        spikes.append(out)
    return torch.stack(spikes), state


def _step_silently(
    neurons: SpikingNeurons, current: torch.Tensor, steps: int | None, state: Any, **own: torch.Tensor
) -> tuple[torch.Tensor, Any]:
    # a current that is held has no axis of time
    current, *onto = [each[0] if steps is None else each for each in (current, *own.values())]
    spikes, states = neurons_step(current, state, neurons.population.integrating(), *onto)
    return torch.zeros_like(spikes)[None], states


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
    if has_hooks(neurons) and not is_traced():
        _say_that_steps_pass_by(name)


def _output_of(name: str, module: nn.Module, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The output of a module of the network; raises TypeError unless it is a tensor of that shape."""
    return _checked_output(name, module, module(x), shape)


def _checked_output(name: str, module: Any, output: Any, shape: Sequence[int]) -> torch.Tensor:
    is_tensor = isinstance(output, torch.Tensor)
    if is_tensor and tuple(output.shape) == tuple(shape):
        return output
    what = f"a tensor {list(output.shape)}" if is_tensor else f"a {type(output).__name__}"
    wanted = f"a tensor {list(shape)}"
    raise TypeError(f"{name} ({type(module).__name__}) returned {what}; in a stack it must return {wanted}")


@cache
def _say_that_modules_are_called(why: str) -> None:
    logger.warning("a network calls its modules in turn, which is slower than one call for all: %s", why)


@cache
def _say_that_steps_pass_by(name: str) -> None:
    logger.warning("hooks on %s are not run by a network's step, which calls its step; simulate runs them", name)
