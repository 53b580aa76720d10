"""A recurrent population over all time steps in one call, for weights stored as lists, on the compiled CPU kernels:
operators ``g2g::loop_forward`` (with its autograd formula) and ``g2g::loop_backward``. All neurons have one delay. The
forward pass keeps spikes as bits, and the states of every step, float32, as ``csrc/list_loop.h`` lays them out.
"""

from collections.abc import Callable, Collection, Sequence
from ctypes import Structure
from functools import partial
from typing import Any, NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu import plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run
from g2g_kernels.cpu.plans import in_lists, lists_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.dispatch import forced_backend
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.g2g_linear import reference as linear
from g2g_kernels.ops.g2g_linear.cpu import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, Spikes, unpacked_bits
from g2g_kernels.ops.g2g_stack.call import contiguous
from g2g_kernels.ops.g2g_stack.checks import check_ends
from g2g_kernels.ops.g2g_stack.cpu import in_float32, refuses_call
from g2g_kernels.ops.g2g_stack.graph import READ
from g2g_kernels.ops.g2g_stack.population import (
    Call,
    Connection,
    Population,
    components,
    expected_of,
    reaches,
    state_shape,
    total_steps,
    unread,
)
from g2g_kernels.ops.g2g_stack.reference import in_turn
from g2g_kernels.ops.neurons.cpu import neuron_arguments, neurons
from g2g_kernels.ops.neurons.models import MODELS
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output, opened
from g2g_kernels.tracing import is_traced, replaced

#: neurons of a word of spikes
_WORD = 64
#: lanes of a row backward, samples times steps of a window, at most
LANES = 16


class SpikeBits(Spikes):
    """Spikes of one population of ``size`` neurons as bits, int64 ``words`` [T, B, N / 64, rounded up]; ``like`` has
    the dtype of :meth:`dense`. Few spikes are kept as the words that are not 0."""

    def __init__(self, words: torch.Tensor, size: int, like: torch.Tensor) -> None:
        few = not is_traced() and 8 * int(words.count_nonzero()) < words.numel()
        self._words, self._size, self._like = words.to_sparse() if few else words, size, like

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        return unpacked_bits(self._words.to_dense(), self._size).to(self._like.dtype)

    def events(self) -> torch.Tensor:
        """int64 [spikes, 3], as :meth:`Spikes.events`."""
        return unpacked_bits(self._words.to_dense(), self._size).nonzero()


class LoopCall(NamedTuple):
    """What the forward pass takes: the contiguous ``current`` [T, B, N], or [B, N] held for all ``steps``; the
    population, contiguous, with its recurrent connection alone, whose ``source`` is 0, with a delay of D ≥ 1 steps, and
    ``sent`` [D, B, N], the steps before the first; what goes onto the membrane, over time or held as well; and
    whether spikes are given summed over the steps, [1, B, N].
    """

    current: torch.Tensor
    population: Population
    steps: int
    to_membrane: torch.Tensor | None = None
    summed: bool = False

    @property
    def recurrent(self) -> Connection:
        """The connection."""
        return self.population.connections[0]

    @property
    def delay(self) -> int:
        """D."""
        return self.recurrent.delay.least if self.recurrent.delay else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the spikes: [T, B, N]."""
        return self.steps, *self.current.shape[-2:]

    @property
    def of_spikes(self) -> tuple[int, ...]:
        """The shape in which spikes are given."""
        return 1 if self.summed else self.steps, *self.shape[1:]

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
        if self.delay < 1:
            raise ValueError(f"the recurrent connection has the delay {self.delay}, and needs 1 or more")
        for name, tensor in (("current", self.current), ("to_membrane", self.to_membrane)):
            held = tensor is not None and tensor.dim() == 2
            yield name, tensor, (samples, size) if held else (steps, samples, size), torch.float32
        yield "row_order", self.recurrent.mask.row_order, (size,), torch.int64
        yield "sent", self.population.sent, (self.delay, samples, size), torch.float32
        yield from expected_of([self.population], samples)


TYPES["LoopCall"] = LoopCall


def loop_of(
    number: int,
    population: Population,
    backend: str | None = "cpu",
    note: Callable[[int, torch.Tensor], None] = lambda number, words: None,
    summed: Collection[int] = (),
) -> Callable | None:
    """The function that runs population ``number`` with its recurrent connection, as in
    :class:`g2g_kernels.ops.g2g_stack.reference.PopulationFunctions`; None if these kernels do not take that from
    lists. A run calls ``note`` with the number and the spikes as bits; what populations in ``summed`` give is summed
    over the steps, [1, B, N]."""
    own = [each for each in population.connections if each.source == number]
    if population.membranes or len(own) != 1:
        return None
    (recurrent,) = own
    delay = recurrent.delay
    if delay is None or not 1 <= delay.least == delay.most or delay.learned is not None:
        return None
    if recurrent.bias is not None or recurrent.images is not None or recurrent.onto is not None:
        return None
    if forced_backend(backend) not in (None, "cpu") or cpu_library.unavailable():
        return None
    tensors, _ = opened((recurrent, population.neurons.parameters, population.state))
    if any([(tensor.is_floating_point() and tensor.dtype != torch.float32) or not tensor.is_cpu for tensor in tensors]):
        return None
    lists = in_lists(recurrent.mask.grid, recurrent.values.shape, "recurrent")
    return partial(_run, population, recurrent, partial(note, number), number in summed) if lists else None


def _run(
    population: Population,
    recurrent: Connection,
    note: Callable[[torch.Tensor], None],
    summed: bool,
    current: torch.Tensor,
    steps: int,
    state: torch.Tensor | None,
    sent: torch.Tensor | None,
    to_membrane: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if recurrent.observer is not None and torch.is_grad_enabled():
        # its product is inside the operator, but has the gradient of the current: before that is formed, a first run
        # tells what the connection receives
        with torch.no_grad():
            spikes, _ = _run(population, recurrent, note, False, current, steps, state, sent, to_membrane)
        delay = 0 if recurrent.delay is None else recurrent.delay.least
        before = spikes.new_zeros(delay, *spikes.shape[1:]) if sent is None else sent
        current = current.expand(spikes.shape)
        current = current if current.requires_grad else current.detach().requires_grad_()
        current = recurrent.observer(torch.cat([before, spikes])[: len(spikes)], current)
    mask = recurrent.mask if isinstance(recurrent.mask, MaskTensors) else recurrent.mask.tensors()
    joined = Connection("linear", recurrent.values.contiguous(), mask, 0, recurrent.delay)
    own = contiguous(replaced(population, state=state), [joined], sent)
    to_membrane = to_membrane if to_membrane is None else to_membrane.float().contiguous()
    spikes, last, words, _ = FORWARD(LoopCall(current.float().contiguous(), own, steps, to_membrane, summed))
    note(words)
    return spikes if summed else spikes.to(current.dtype), last  # counts have not the bits of spikes


def _row(call: LoopCall) -> tuple[int, int]:
    """The samples and the steps of a row of lanes, powers of 2."""
    _, samples, _ = call.shape
    # a visit of a row costs about as much as eight of its floats
    width = min((16, 8, 4, 2, 1), key=lambda each: -(-samples // each) * (8 + each))
    return width, min(LANES // width, 1 << call.delay.bit_length() - 1)


def _kept_shapes(call: LoopCall, keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of spikes as bits and of the states of every step, if these are kept."""
    steps, samples, size = call.shape
    words = -(-size // _WORD)
    states = steps, samples, len(MODELS[call.population.neurons.model].states), _WORD * words
    return (steps, samples, words), states if keep else (0,)


def _arguments(call: LoopCall, grads: Sequence[torch.Tensor | None] = ()) -> tuple[Structure, list[Any]]:
    """The arguments of a kernel, and what must outlive it."""
    population, recurrent = call.population, call.recurrent
    steps, samples, size = call.shape
    lists = lists_for(recurrent.mask, recurrent.values, "cols")
    weights = lists.ordered(recurrent.values)
    width, window = _row(call)
    arguments = structures.ListLoop(
        neurons=neuron_arguments(population.neurons, grads),
        by_cols=lists.address,
        weights=weights.data_ptr(),
        values=recurrent.values.numel(),
        current=pointer(call.current),
        to_membrane=pointer(call.to_membrane),
        sent=pointer(population.sent),
        dropped=pointer(population.dropped),
        state=pointer(population.state),
        samples=samples,
        size=size,
        steps=steps,
        delay=call.delay,
        width=width,
        window=window,
        threads=torch.get_num_threads(),
        held=call.current.dim() == 2,
        membrane_held=call.to_membrane is not None and call.to_membrane.dim() == 2,
    )
    return arguments, [lists, weights]


def _forward(call: LoopCall, keep: bool) -> tuple[torch.Tensor, ...]:
    arguments, _outlive = _arguments(call)
    spikes, (last,) = workspace.empty(call.of_spikes), workspace.exactly([call.state_shape])
    of_words, of_states = _kept_shapes(call, keep)
    words, kept = workspace.empty(of_words, torch.int64), workspace.empty(of_states)
    arguments.spikes, arguments.last, arguments.words = spikes.data_ptr(), last.data_ptr(), words.data_ptr()
    arguments.kept, arguments.summed = kept.data_ptr() if keep else None, call.summed
    run(library().g2g_list_loop, arguments)
    return spikes, last, words, kept


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, (words, kept), (grad_spikes, grad_last), _ = given
    constant = call.summed or (grad_spikes is not None and grad_spikes.stride(0) == 0)
    grads, to = given.made(workspace.alike)
    grad_last = grad_last if grad_last is None else grad_last.contiguous()
    arguments, _outlive = _arguments(call, to.population.neurons.parameters)
    arguments.words, arguments.kept = pointer(words), pointer(kept)
    arguments.grad_spikes, arguments.grad_last, arguments.grad_held = pointer(grad_spikes), pointer(grad_last), constant
    arguments.grad_current, arguments.grad_membrane = pointer(to.current), pointer(to.to_membrane)
    arguments.grad_values = pointer(to.recurrent.values)
    arguments.grad_sent, arguments.grad_state = pointer(to.population.sent), pointer(to.population.state)
    run(library().g2g_list_loop, arguments, backward=True)
    return grads


def _outputs(call: LoopCall, keep: bool) -> list[Output]:
    words, states = _kept_shapes(call, keep)
    return [Output(call.of_spikes), Output(call.state_shape), Output(words, torch.int64), Output(states)]


def _now(given: torch.Tensor, t: int) -> torch.Tensor:
    """Of a current [T, B, N], or [B, N] that is held."""
    return given if given.dim() == 2 else given[t]


def _plain(call: LoopCall) -> tuple[torch.Tensor, torch.Tensor]:
    population, recurrent, state = call.population, call.recurrent, call.population.state
    sent, spikes = [None] * call.delay if population.sent is None else [*population.sent], []
    for t in range(call.shape[0]):
        arriving = sent[t]
        current, to_membrane = _now(call.current, t), call.to_membrane
        to_membrane = None if to_membrane is None else _now(to_membrane, t)[None]
        if arriving is not None:
            current = current + linear.g2g_linear(arriving, recurrent.values, recurrent.mask, None)
        now, state = in_steps(current[None], population.neurons, None, state, to_membrane=to_membrane)
        spikes.append(now[0] if population.dropped is None else now[0].masked_fill(population.dropped, 0))
        sent.append(spikes[-1])
    assert state is not None
    trains = torch.stack(spikes)
    return trains.sum(0, keepdim=True) if call.summed else trains, state


def _prepared(grad: torch.Tensor) -> torch.Tensor:
    """A gradient in memory; that of counts is the same for all steps, [B, N] there."""
    return grad[0].contiguous().expand(grad.shape) if grad.dim() == 3 and grad.stride(0) == 0 else grad.contiguous()


RESULTS = "(Tensor spikes, Tensor last, Tensor words, Tensor kept)"
FORWARD = Differentiable("loop", RESULTS, 2, _forward, _backward, _outputs, _plain, prepared=_prepared)


# --- populations with weights in lists --------------------------------------------------------------------------

#: fields that these kernels do not read
UNREAD = unread([*READ, "observer", "onto"])


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
        loops = len(component.members) == 1 and loop_of(number, call.populations[number]) is not None
        if component.period and not loops:
            names = " and ".join(map(str, sorted(component.members)))
            return (
                f"what population {names} sends comes back, but not by one recurrent connection in lists with one "
                f"delay for all neurons: {component.period} steps at a time take turns"
            )
        if not loops and any([each.onto for each in call.populations[number].connections]):
            return f"population {number} takes currents onto its membrane, and has no recurrent connection in lists"
    return None


def g2g_lists(call: Call) -> Activity:
    """``g2g_stack`` population by population."""
    words: dict[int, torch.Tensor] = {}
    summed = _summed(call)
    loops = partial(loop_of, note=words.__setitem__, summed=summed)
    activity = in_turn(call, {"linear": g2g_linear}, partial(in_float32, neurons), loops)
    rates, spikes = list(activity.rates), list(activity.spikes)
    for number, of in words.items():
        spikes[number] = SpikeBits(of, len(rates[number]), rates[number].new_empty(0))
        if number in summed:
            rates[number] = rates[number] / total_steps(call)
    return replaced(activity, rates=tuple(rates), spikes=tuple(spikes))


def _summed(call: Call) -> set[int]:
    """The populations of which no spike of a single step is read but by their own loop: floats [T, B, N] of a whole
    brain take as much memory as its states, and longer than these to write."""
    numbered = list(enumerate(call.populations))
    read = {each.source for own, of in numbered for each in of.connections if each.source != own}
    reach = reaches(call.populations)
    return set() if call.spikes else {own for own, _ in numbered if own not in read and not reach[own]}
