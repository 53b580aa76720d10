"""A recurrent population over all time steps in one call, for weights stored as lists, on the compiled CPU kernels:
operators ``g2g::loop_forward`` (with its autograd formula) and ``g2g::loop_backward``. The forward pass keeps the
states of every step, float32, as ``csrc/list_loop.h`` lays them out.
"""

from collections.abc import Callable, Sequence
from ctypes import Structure
from functools import partial
from typing import NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu import plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run
from g2g_kernels.cpu.plans import Plan, in_lists, lists_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.dispatch import forced_backend
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.g2g_linear import reference as linear
from g2g_kernels.ops.g2g_linear.cpu import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity
from g2g_kernels.ops.g2g_stack.call import contiguous
from g2g_kernels.ops.g2g_stack.checks import check_ends
from g2g_kernels.ops.g2g_stack.cpu import in_float32, refuses_call
from g2g_kernels.ops.g2g_stack.graph import READ
from g2g_kernels.ops.g2g_stack.population import (
    ONE_STEP,
    Call,
    Connection,
    Population,
    components,
    expected_of,
    state_shape,
    unread,
)
from g2g_kernels.ops.g2g_stack.reference import in_turn
from g2g_kernels.ops.neurons.cpu import neuron_arguments, neurons
from g2g_kernels.ops.neurons.models import MODELS
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output, opened
from g2g_kernels.tracing import replaced

#: The lanes of a group of samples are padded to a multiple of it, and a range has a multiple of it of neurons: both are
#: whole vectors.
_STRETCH = 64
#: targets of a range at most: the currents of 8 samples are about a megabyte then, and stay in L2
RANGE = 40960


class LoopCall(NamedTuple):
    """What the forward pass takes: the contiguous ``current`` [T, B, N], or [B, N] held for ``steps`` steps (otherwise
    0); and the population, contiguous, with its recurrent connection alone, whose ``source`` is 0, and ``sent``
    [1, B, N], the step before the first.
    """

    current: torch.Tensor
    population: Population
    steps: int

    @property
    def recurrent(self) -> Connection:
        """The connection."""
        return self.population.connections[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the spikes: [T, B, N]."""
        return (self.steps, *self.current.shape) if self.steps else tuple(self.current.shape)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the states: [states, B, N]."""
        return state_shape(self.population, self.shape[1])

    def expected(self) -> Expected:
        """What the kernels take for granted."""
        steps, samples, size = self.shape
        check_ends([self.population], None)
        if len(self.population.connections) > 1 or self.recurrent.source:
            raise ValueError("the population needs its recurrent connection alone, with the source 0")
        yield "current", self.current, ((samples, size) if self.steps else (steps, samples, size)), torch.float32
        yield "row_order", self.recurrent.mask.row_order, (size,), torch.int64
        yield "sent", self.population.sent, (1, samples, size), torch.float32
        yield from expected_of([self.population], samples)


TYPES["LoopCall"] = LoopCall


def loop_of(number: int, population: Population, backend: str | None = "cpu") -> Callable | None:
    """The function that runs population ``number`` with its recurrent connection, as in
    :class:`g2g_kernels.ops.g2g_stack.reference.PopulationFunctions`; None if these kernels do not take that from
    lists."""
    own = [each for each in population.connections if each.source == number]
    if population.membranes or len(own) != 1 or own[0].delay != ONE_STEP or own[0].bias is not None:
        return None
    if own[0].images is not None:
        return None
    (recurrent,) = own
    if forced_backend(backend) not in (None, "cpu") or cpu_library.unavailable():
        return None
    tensors, _ = opened((recurrent, population.neurons.parameters, population.state))
    if any([(tensor.is_floating_point() and tensor.dtype != torch.float32) or not tensor.is_cpu for tensor in tensors]):
        return None
    lists = in_lists(recurrent.mask.grid, recurrent.values.shape, "recurrent")
    return partial(_run, population, recurrent) if lists else None


def _run(
    population: Population,
    recurrent: Connection,
    current: torch.Tensor,
    steps: int | None,
    state: torch.Tensor | None,
    sent: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if recurrent.observer is not None and torch.is_grad_enabled():
        # its product is inside the operator, but has the gradient of the current: before that is formed, a first run
        # tells what the connection receives
        with torch.no_grad():
            spikes, _ = _run(population, recurrent, current, steps, state, sent)
        before = torch.zeros_like(spikes[:1]) if sent is None else sent[None]
        current, steps = current.expand(spikes.shape), None
        current = current if current.requires_grad else current.detach().requires_grad_()
        current = recurrent.observer(torch.cat([before, spikes[:-1]]), current)
    mask = recurrent.mask if isinstance(recurrent.mask, MaskTensors) else recurrent.mask.tensors()
    joined = Connection("linear", recurrent.values.contiguous(), mask, 0)
    own = contiguous(replaced(population, state=state), [joined], None if sent is None else sent[None])
    spikes, last, _ = FORWARD(LoopCall(current.float().contiguous(), own, steps or 0))
    return spikes.to(current.dtype), last


def _group(call: LoopCall) -> tuple[int, int]:
    """The samples of a group, and its lanes."""
    _, samples, size = call.shape
    # a visit of a row of a group costs about as much as eight of its floats
    width = min((16, 8, 4, 2, 1), key=lambda each: -(-samples // each) * (8 + each))
    return width, -(-size * width // _STRETCH) * _STRETCH


def _kept_shape(call: LoopCall) -> tuple[int, ...]:
    steps, samples, _ = call.shape
    width, padded = _group(call)
    return -(-samples // width), steps, len(MODELS[call.population.neurons.model].states), padded


def _arguments(call: LoopCall, grads: Sequence[torch.Tensor | None] = ()) -> tuple[Structure, Plan]:
    """The arguments of a kernel, and the lists that must outlive it."""
    population, recurrent = call.population, call.recurrent
    (steps, samples, size), threads = call.shape, torch.get_num_threads()
    ranges = max(-(-size // RANGE), min(threads, -(-size // _STRETCH)))
    ranges = -(-ranges // threads) * threads  # as many for each thread
    lists = lists_for(recurrent.mask, recurrent.values, "cols", -(-size // (ranges * _STRETCH)) * _STRETCH)
    width, padded = _group(call)
    arguments = structures.ListLoop(
        neurons=neuron_arguments(population.neurons, grads),
        by_cols=lists.address,
        values=pointer(recurrent.values),
        weights=recurrent.values.numel(),
        current=pointer(call.current),
        sent=pointer(population.sent),
        dropped=pointer(population.dropped),
        state=pointer(population.state),
        samples=samples,
        size=size,
        steps=steps,
        width=width,
        padded=padded,
        threads=threads,
        held=call.steps > 0,
    )
    return arguments, lists


def _forward(call: LoopCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments, _lists = _arguments(call)
    spikes, last = workspace.empty(call.shape), workspace.empty(call.state_shape)
    kept = workspace.empty(_kept_shape(call) if keep else (0,))
    arguments.spikes, arguments.last = spikes.data_ptr(), last.data_ptr()
    arguments.kept = kept.data_ptr() if keep else None
    run(library().g2g_list_loop, arguments)
    return spikes, last, kept


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, (kept,), (grad_spikes, grad_last), _ = given
    constant = grad_spikes is not None and grad_spikes.stride(0) == 0
    grads, to = given.made(workspace.alike)
    grad_last = grad_last if grad_last is None else grad_last.contiguous()
    arguments, _lists = _arguments(call, to.population.neurons.parameters)
    arguments.kept, arguments.grad_spikes, arguments.grad_last = pointer(kept), pointer(grad_spikes), pointer(grad_last)
    arguments.grad_held = constant
    arguments.grad_current, arguments.grad_values = pointer(to.current), pointer(to.recurrent.values)
    arguments.grad_sent, arguments.grad_state = pointer(to.population.sent), pointer(to.population.state)
    run(library().g2g_list_loop, arguments, backward=True)
    return grads


def _outputs(call: LoopCall, keep: bool) -> list[Output]:
    return [Output(call.shape), Output(call.state_shape), Output(_kept_shape(call) if keep else (0,))]


def _plain(call: LoopCall) -> tuple[torch.Tensor, torch.Tensor]:
    population, recurrent, spikes = call.population, call.recurrent, []
    sent, state = None if population.sent is None else population.sent[0], population.state
    for t in range(call.shape[0]):
        current = call.current if call.steps else call.current[t]
        if sent is not None:
            current = current + linear.g2g_linear(sent, recurrent.values, recurrent.mask, None)
        now, state = in_steps(current[None], population.neurons, None, state)
        sent = now[0] if population.dropped is None else now[0].masked_fill(population.dropped, 0)
        spikes.append(sent)
    assert state is not None
    return torch.stack(spikes), state


def _prepared(grad: torch.Tensor) -> torch.Tensor:
    """A gradient in memory; that of counts is the same for all steps, [B, N] there."""
    return grad[0].contiguous().expand(grad.shape) if grad.dim() == 3 and grad.stride(0) == 0 else grad.contiguous()


RESULTS = "(Tensor spikes, Tensor last, Tensor kept)"
FORWARD = Differentiable("loop", RESULTS, 2, _forward, _backward, _outputs, _plain, prepared=_prepared)


# --- populations with weights in lists --------------------------------------------------------------------------

#: fields that these kernels do not read
UNREAD = unread([*READ, "observer"])


def refuses(call: Call) -> str | None:
    """Why the CPU's kernels cannot serve a call population by population, each over all steps, or None."""
    if reason := refuses_call(call, UNREAD):
        return reason
    lists = False
    for population in call.populations:
        for each in population.connections:
            lists = lists or any([in_lists(each.mask.grid, each.values.shape, use) for use in ("stack", "recurrent")])
            if reason := plans.refuses(each.mask, each.values, "linear"):
                return reason
    if not lists:
        return "no weights lie in lists"
    for component in components(call.populations):
        number = component.members[0]
        if component.period and (len(component.members) > 1 or loop_of(number, call.populations[number]) is None):
            names = " and ".join(map(str, sorted(component.members)))
            return (
                f"what population {names} sends comes back, but not by one recurrent connection in lists with a delay "
                f"of one step: {component.period} steps at a time take turns"
            )
    return None


def g2g_lists(call: Call) -> Activity:
    """``g2g_stack`` population by population."""
    return in_turn(call, {"linear": g2g_linear}, partial(in_float32, neurons), loop_of)
