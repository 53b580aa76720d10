"""Populations whose connections are lists, over all steps in one call, on the compiled CPU kernels: operators
``g2g::events_forward`` (with its autograd formula) and ``g2g::events_backward``. A spike costs the weights that it
visits, and spikes stay lists (``csrc/list_network.h``). They take float32 or float64.

Gradients are computed of ``cubalif`` neurons whose surrogate is compact, by gradient events: the steps in which a
neuron's surrogate derivative is not 0. The forward pass keeps these with that derivative, and spikes, but no states
(``csrc/list_gradients.h``).
"""

import os
from collections.abc import Sequence
from ctypes import addressof
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run, too_large
from g2g_kernels.cpu.plans import in_lists, lists_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Spikes
from g2g_kernels.ops.g2g_stack.call import contiguous
from g2g_kernels.ops.g2g_stack.checks import check_ends
from g2g_kernels.ops.g2g_stack.chunks import SparseSteps, in_chunks
from g2g_kernels.ops.g2g_stack.cpu import delays_pointer, refuses_tensors
from g2g_kernels.ops.g2g_stack.delays import Delay, Train
from g2g_kernels.ops.g2g_stack.population import (
    Call,
    Connection,
    Population,
    components,
    expected_of,
    reaches,
    refuses_kernels,
    sent_before,
    size_of,
    state_shape,
    total_steps,
    unread,
)
from g2g_kernels.ops.g2g_stack.reference import PRODUCTS, in_turn
from g2g_kernels.ops.neurons.cpu import neuron_arguments
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.ops.record import ANY_LENGTH, TYPES, Backward, Differentiable, Expected, Output, opened
from g2g_kernels.tracing import is_traced, replaced

#: fields that the kernels do not read
UNREAD = unread([name for name in (*Population._fields, *Connection._fields) if name != "images"])
NO_GRADIENT = "gives membranes no gradient; call under torch.no_grad() if none is needed"
#: gradient events whose derivatives are computed at a time, in cache
PART = 1 << 14
#: what ``G2G_CPU_NEURONS`` makes of ``VISIT_COST``
FORCED = {"reached": 0.0, "all": float("inf")}


class InputEvents(NamedTuple):
    """Inputs of which only those that are not 0 are given.

    Attributes:
        counts: int32 [B, T], how many there are of each sample in each step.
        neurons: int32, which inputs they are, in this order.
        size: how many inputs there are.
    """

    counts: torch.Tensor
    neurons: torch.Tensor
    size: int

    @classmethod
    def of(cls, x: torch.Tensor) -> tuple[torch.Tensor, "InputEvents"]:
        """The numbers and the events of a coalesced sparse COO tensor [T, B, in]."""
        (steps, samples, size), numbers = x.shape, x.values()
        step, sample, neuron = x.indices()
        row = sample * steps + step
        order = row.argsort(stable=True)  # coalesced are those of a step in order of samples
        order = order[numbers[order] != 0]
        counts = torch.bincount(row[order], minlength=samples * steps).view(samples, steps).int()
        return numbers[order], cls(counts, neuron[order].int(), size)

    def dense(self, numbers: torch.Tensor) -> torch.Tensor:
        """[T, B, in], with a gradient by the numbers."""
        samples, steps = self.counts.shape
        row = torch.repeat_interleave(torch.arange(samples * steps), self.counts.flatten())
        return numbers.new_zeros(steps, samples, self.size).index_put(
            (row % steps, row // steps, self.neurons), numbers
        )


class EventsCall(NamedTuple):
    """What the operator takes; its tensors are contiguous, and numbers of one dtype.

    Attributes:
        x: [T, B, in], or [B, in] held for all steps; with ``arriving``, the number of each of these.
        before: [D, B, in], the inputs of the D steps before the first; None: nothing.
        populations: the output last.
        steps: T.
        order: the populations in the order in which they receive in a step.
        tails: of each population, the number of last steps whose spikes are wanted with a gradient.
        notes: whether gradient events are noted.
        truncate: as in :class:`Call`; 0: never.
        arriving: inputs as events; None: as x is.
    """

    x: torch.Tensor
    before: torch.Tensor | None
    populations: tuple[Population, ...]
    steps: int
    order: tuple[int, ...]
    tails: tuple[int, ...]
    notes: bool = False
    truncate: int = 0
    arriving: InputEvents | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[-2] if self.arriving is None else len(self.arriving.counts)

    @property
    def inputs(self) -> int:
        """How many there are."""
        return self.x.shape[-1] if self.arriving is None else self.arriving.size

    @property
    def held(self) -> bool:
        """Whether x is held for all steps."""
        return self.x.dim() == 2

    def expected(self) -> Expected:
        """What the kernels take for granted."""
        check_ends(self.populations, self.inputs)
        if sorted(self.order) != [*range(len(self.populations))] or self.steps < 1:
            raise ValueError(f"order={self.order} must name each population once, and steps={self.steps} be above 0")
        if len(self.tails) != len(self.populations) or not all([0 <= tail <= self.steps for tail in self.tails]):
            raise ValueError(f"tails={self.tails} must have a number of steps up to {self.steps} of each population")
        if self.notes and any([population.membranes for population in self.populations]):
            raise ValueError(NO_GRADIENT)
        for number, population in enumerate(self.populations):
            if not all([0 <= each < size_of(population) for each in _watched(population)]):
                raise ValueError(f"membranes of population {number} must be neurons below {size_of(population)}")
        if self.notes and (reason := _refuses_gradients(self.populations)):
            raise ValueError(reason)
        dtype, shape = self.x.dtype, (self.batch, self.inputs)
        if self.arriving is None:
            yield "x", self.x, shape if self.held else (self.steps, *shape), dtype
        else:
            yield "x", self.x, (ANY_LENGTH,), dtype
            yield "counts of inputs", self.arriving.counts, (self.batch, self.steps), torch.int32
            yield "inputs", self.arriving.neurons, (ANY_LENGTH,), torch.int32
        yield "before", self.before, (0 if self.before is None else len(self.before), *shape), dtype
        for name, tensor, of, usual in expected_of(self.populations, self.batch):
            yield name, tensor, of, dtype if usual == torch.float32 else usual


TYPES |= {"EventsCall": EventsCall, "InputEvents": InputEvents}


def refuses(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    if reason := refuses_kernels(call, UNREAD) or refuses_tensors(call, dtype):
        return reason
    if is_traced():
        return "does not run where calls are recorded (torch.compile, torch.export)"
    if call.x.numel() == 0:
        return "needs a batch that is not empty"
    if call.spikes and torch.is_grad_enabled():
        return "gives spikes over time no gradient"
    lists = False
    for each in [each for population in call.populations for each in population.connections]:
        if reason := too_large(**{"weights in a layer": each.values.numel()}):
            return reason
        lists = lists or any([in_lists(each.mask.grid, each.values.shape, use) for use in ("stack", "recurrent")])
    if not lists:
        return "no weights lie in lists"
    if not _wants_gradients(call):
        return None
    if any([population.membranes for population in call.populations]):
        return NO_GRADIENT
    return _refuses_gradients(call.populations)


def _wants_gradients(call: Call) -> bool:
    return call.repeated or (torch.is_grad_enabled() and any([each.requires_grad for each in opened(call)[0]]))


def _watched(population: Population) -> tuple[int, ...]:
    """The neurons whose membranes are wanted."""
    wanted = population.membranes
    return wanted if isinstance(wanted, tuple) else tuple(range(size_of(population))) if wanted else ()


def _refuses_gradients(populations: Sequence[Population]) -> str | None:
    """Why these kernels cannot compute the gradients of populations, or None."""
    for number, population in enumerate(populations):
        neurons, connections, own = population.neurons, population.connections, ""
        if neurons.model != "cubalif":
            own = f"the model {neurons.model!r}"
        elif not SURROGATES[neurons.surrogate].compact:
            own = f"the surrogate {neurons.surrogate!r}, which is not 0 far from the threshold"
        elif any([of.delay and of.delay.learned is not None and of.delay.learned.requires_grad for of in connections]):
            own = "learned delays"
        if own:
            return f"computes no gradients of {own} (population {number}); call under torch.no_grad() if none is needed"
    return None


def visit_cost() -> float:
    """What visits to neurons cost, relative to what the kernels assume."""
    name = os.environ.get("G2G_CPU_NEURONS", "")
    if name and name not in FORCED:
        raise ValueError(f"G2G_CPU_NEURONS={name!r} is unknown; choose one of {', '.join(FORCED)}, or leave it unset")
    return FORCED.get(name, cpu_library.VISIT_COST)


class EventSpikes(Spikes):
    """Spikes of one population of ``size`` neurons one by one: int32 ``counts`` [B, T], and the ``neurons`` of each
    sample and step in this order; ``like`` has the dtype of :meth:`dense`."""

    def __init__(self, counts: torch.Tensor, neurons: torch.Tensor, size: int, like: torch.Tensor) -> None:
        self._counts, self._neurons, self._size, self._like = counts, neurons, size, like

    def _of_samples(self) -> tuple[torch.Tensor, ...]:
        """The neurons of each sample."""
        return self._neurons.split(self._counts.sum(1).tolist())

    def events(self) -> torch.Tensor:
        """int64 [spikes, 3], as :meth:`Spikes.events`."""
        counts, made = self._counts.numpy(), workspace.empty((len(self._neurons), 3), torch.int64)
        rows, (samples, steps) = made.numpy(), counts.shape
        first = counts.T.cumsum().reshape(steps, samples).T - counts.cumsum(1)  # by step, then by sample
        for sample, (of_steps, own) in enumerate(zip(counts, self._of_samples(), strict=True)):  # which stay in cache
            place = np.repeat(first[sample], of_steps) + np.arange(len(own))
            rows[place, 0], rows[place, 1], rows[place, 2] = np.repeat(np.arange(steps), of_steps), sample, own
        return made

    def dense(self, last: int | None = None) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order; of the ``last`` steps, or of all."""
        samples, steps = self._counts.shape
        last = steps if last is None else last
        of_all = torch.repeat_interleave(torch.arange(samples * steps), self._counts.flatten())
        sample, step = of_all // steps, of_all % steps
        late = step >= steps - last
        spikes = self._like.new_zeros(last, samples, self._size)
        spikes[step[late] - (steps - last), sample[late], self._neurons[late].long()] = 1
        return spikes

    def per_neuron(self, of_samples: bool = False) -> torch.Tensor:
        """How many each neuron has sent, [N], or in each sample, [B, N]."""
        each = self._of_samples() if of_samples else [self._neurons]
        counts = torch.stack([torch.bincount(own, minlength=self._size) for own in each])
        return counts.to(self._like.dtype)


class LastEvents(Spikes):
    """What a population sent in the last ``steps`` steps of a run with these spikes, and ``before`` it."""

    def __init__(self, spikes: EventSpikes, steps: int, total: int, before: torch.Tensor | None) -> None:
        self._spikes, self._steps, self._total, self._before = spikes, steps, total, before

    def dense(self) -> torch.Tensor:
        """[D, B, N]."""
        own = self._spikes.dense(min(self._steps, self._total))
        train = Train(own[0], self._before)
        train.append(own)
        return train.window(train.length - self._steps, train.length)


def g2g_events(call: Call) -> Activity:
    """``g2g_stack`` by events."""
    populations, reach, steps = [], reaches(call.populations), total_steps(call)
    for number, population in enumerate(call.populations):
        connections = []
        for each in population.connections:
            bias = None if each.bias is None else each.bias.contiguous()
            delay = each.delay and replaced(each.delay, learned=None)
            own = each.values.contiguous(), each.mask.tensors(), each.source, delay, bias, None, each.onto
            connections.append(Connection("linear", *own))
        sent = sent_before(population, reach[number], call.x.dtype)
        given_population = contiguous(population, connections, sent, call.x.dtype)
        populations.append(replaced(given_population, membranes=population.membranes))
    order = tuple([number for component in components(call.populations) for number in component.members])
    before = None if call.before is None else call.before.contiguous()
    x, arriving = InputEvents.of(call.x) if call.x.is_sparse else (call.x.contiguous(), None)
    notes = _wants_gradients(call)
    tails = tuple([min(each, steps) if notes else 0 for each in reach[:-1]])
    given = EventsCall(x, before, tuple(populations), steps, order, tails, notes, call.truncate or 0, arriving)
    counts, rates, last, sent, shown, kept = OPERATOR(given)
    spikes = [
        EventSpikes(kept[2 * number], kept[2 * number + 1], size_of(population), x.new_empty(0))
        for number, population in enumerate(call.populations)
    ]
    shown_left = iter(shown)
    membranes = [next(shown_left) if population.membranes else None for population in given.populations]
    tails_left, sent_last = iter(sent), list[Spikes | None]()
    for population, own_spikes, of in zip(populations, spikes, reach, strict=False):  # the inputs come last
        if of and notes:
            tail = next(tails_left)
            train = Train(tail[0], population.sent)
            train.append(tail)
            sent_last.append(DenseSpikes(train.window(train.length - of, train.length)))
        else:
            sent_last.append(LastEvents(own_spikes, of, steps, population.sent) if of else None)
    return Activity(
        counts,
        tuple(rates),
        tuple(spikes),
        states=tuple(last),
        membranes=tuple(membranes) if shown else None,
        sent=(*sent_last, _last_inputs(call, reach[-1], steps)),
    )


def _last_inputs(call: Call, reach: int, steps: int) -> Spikes | None:
    """The inputs of the last steps, where a delay reads them."""
    if not reach:
        return None
    if call.x.is_sparse:
        last = SparseSteps(call.x)[max(0, steps - reach) :]
    else:
        last = call.x if call.steps is None else call.x.expand(steps, *call.x.shape)
    train = Train(last[0], call.before)
    train.append(last)
    return DenseSpikes(train.window(len(last) - reach, len(last)))


class _Arguments:
    """The arguments of the kernel, and all that must outlive it; ``to``: a record of the form of ``call`` with the
    tensors for its gradients."""

    def __init__(self, call: EventsCall, to: EventsCall | None = None) -> None:
        if (arriving := call.arriving) is not None:
            _check_listed("the inputs", call.inputs, *arriving[:2], call.x)
        of = [(number, each) for number, population in enumerate(call.populations) for each in population.connections]
        grads = [None] * len(of) if to is None else [each for part in to.populations for each in part.connections]
        self.lists = [lists_for(each.mask, each.values, "cols") for _, each in of]
        self.weights = [lists.ordered(each.values) for lists, (_, each) in zip(self.lists, of, strict=True)]
        self.order = torch.tensor(call.order, dtype=torch.int32)
        self.shown = [torch.tensor(_watched(population), dtype=torch.int32) for population in call.populations]
        self.populations = (structures.ListPopulation * len(call.populations))()
        self.connections = (structures.ListConnection * len(of))()
        for number, population in enumerate(call.populations):
            sent, grad, neurons = population.sent, None if to is None else to.populations[number], population.neurons
            self.populations[number] = structures.ListPopulation(
                neurons=neuron_arguments(neurons, () if grad is None else grad.neurons.parameters),
                dropped=pointer(population.dropped),
                state=pointer(population.state),
                sent=pointer(sent),
                sent_steps=0 if sent is None else len(sent),
                size=size_of(population),
                shown=self.shown[number].data_ptr(),
                shown_count=len(self.shown[number]),
                slack=1 / neurons.alpha if call.notes else 0,
                grad_state=grad and pointer(grad.state),
                grad_sent=grad and pointer(grad.sent),
            )
        for place, ((target, each), lists, weights, own) in enumerate(
            zip(of, self.lists, self.weights, grads, strict=True)
        ):
            delay = each.delay or Delay(0, 0)
            self.connections[place] = structures.ListConnection(
                lists=lists.address,
                weights=weights.data_ptr(),
                bias=pointer(each.bias),
                delays=None if delay.steps is None else delays_pointer(target, delay, delay.steps),
                least=delay.least,
                most=delay.most,
                source=each.source,
                target=target,
                to_membrane=each.onto == "membrane",
                values=each.values.numel(),
                grad_values=own and pointer(own.values),
                grad_bias=own and pointer(own.bias),
            )
        self.network = structures.ListNetwork(
            populations=addressof(self.populations),
            connections=addressof(self.connections),
            order=self.order.data_ptr(),
            x=call.x.data_ptr(),
            input_counts=arriving and arriving.counts.data_ptr(),
            input_neurons=arriving and arriving.neurons.data_ptr(),
            before=pointer(call.before),
            before_steps=0 if call.before is None else len(call.before),
            population_count=len(call.populations),
            connection_count=len(of),
            inputs=call.inputs,
            samples=call.batch,
            steps=call.steps,
            threads=torch.get_num_threads(),
            held=call.held,
            doubles=call.x.dtype == torch.float64,
            grad_x=to and pointer(to.x),
            grad_before=to and pointer(to.before),
            truncate=call.truncate,
            visit_cost=visit_cost(),
        )


_Each = list[torch.Tensor]
#: counts [B, N] of the output; of each population rates [N] and the states after the last step [states, B, N]; the
#: spikes of its last steps [tail, B, N] and the membranes [T, B, n] where they are wanted; and kept of each: how many
#: spikes each sample has in each step, int32 [B, T], and the neurons of these in order, int32; then the same of
#: gradient events, with their surrogate derivative
Outputs = tuple[torch.Tensor, _Each, _Each, _Each, _Each, _Each]


def _listed(call: EventsCall, handle: int, number: int, valued: bool) -> list[torch.Tensor]:
    """What ``handle`` has of a population: counts, neurons and, with ``valued``, numbers."""
    numbers = range(number * call.batch, (number + 1) * call.batch)
    sizes = [library().g2g_spikes_count(handle, each) for each in numbers]
    counts = torch.empty(call.batch, call.steps, dtype=torch.int32)
    neurons = torch.empty(sum(sizes), dtype=torch.int32)
    values = torch.empty(len(neurons) if valued else 0, dtype=call.x.dtype)
    of_samples = zip(numbers, counts, neurons.split(sizes), strict=True)
    rest = iter(values.split(sizes)) if valued else None
    for each, to, part in of_samples:
        address = rest and next(rest).data_ptr()
        library().g2g_spikes_take(handle, each, to.data_ptr(), part.data_ptr(), address)
    return [counts, neurons, values] if valued else [counts, neurons]


def _forward(call: EventsCall, keep: bool) -> Outputs:
    count = len(call.populations)
    dtype, batch = call.x.dtype, call.batch
    last = [workspace.empty(state_shape(of, batch), dtype) for of in call.populations]
    shown = [workspace.empty((call.steps, batch, len(_watched(of))), dtype) for of in call.populations]
    handles: list[int] = []
    try:
        for _ in range(2 if call.notes else 1):
            if not (handle := library().g2g_spikes_new(count * batch)):
                raise MemoryError(f"there is no memory for the spikes of {count} populations, {batch} samples")
            handles.append(handle)
        arguments = _Arguments(call)
        for population, to, membranes in zip(arguments.populations, last, shown, strict=True):
            population.last, population.membranes = to.data_ptr(), membranes.data_ptr()
        arguments.network.spikes, arguments.network.events = handles[0], handles[-1] if call.notes else None
        run(library().g2g_list_network, arguments.network)
        kept = [_listed(call, handle, number, handle != handles[0]) for handle in handles for number in range(count)]
    finally:
        for handle in handles:
            library().g2g_spikes_free(handle)
    for (*_, excess), population in zip(kept[count:], call.populations, strict=False):
        for part in excess.split(PART):
            part.copy_(SURROGATES[population.neurons.surrogate].derivative(part, population.neurons.alpha))
    spikes = [
        EventSpikes(counts, neurons, size_of(population), call.x.new_empty(0))
        for (counts, neurons, *_), population in zip(kept, call.populations, strict=False)
    ]
    tails = [each.dense(tail) for each, tail in zip(spikes, call.tails, strict=True) if tail]
    rates = [each.per_neuron()[0] / (call.steps * batch) for each in spikes]
    counts, shown = spikes[-1].per_neuron(of_samples=True), [each for each in shown if each.shape[-1]]
    return counts, rates, last, tails, shown, [each for part in kept for each in part]


def _outputs(call: EventsCall, keep: bool) -> list[Output | list[Output]]:
    dtype, shapes = call.x.dtype, [state_shape(population, call.batch) for population in call.populations]
    listed = [Output((call.batch, call.steps), torch.int32), Output((ANY_LENGTH,), torch.int32)]
    of_events = [*listed, Output((ANY_LENGTH,), dtype)] if call.notes else []
    return [
        Output(shapes[-1][1:], dtype),
        [Output(shape[2:], dtype) for shape in shapes],
        [Output(shape, dtype) for shape in shapes],
        [Output((tail, *shape[1:]), dtype) for tail, shape in zip(call.tails, shapes, strict=True) if tail],
        [Output((call.steps, call.batch, len(_watched(of))), dtype) for of in call.populations if of.membranes],
        [*listed * len(shapes), *of_events * len(shapes)],
    ]


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, (of_counts, *of_results) = given.call, given.grads
    count = len(call.populations)
    spikes = [given.kept[2 * number : 2 * number + 2] for number in range(count)]
    events = [given.kept[2 * count + 3 * number : 2 * count + 3 * number + 3] for number in range(count)]
    grads, to = given.made(workspace.alike)
    arguments, tails = _Arguments(call, to), iter(of_results[2 * count :])
    outlive: list[torch.Tensor | None] = []
    for number, (population, place) in enumerate(zip(call.populations, arguments.populations, strict=True)):
        _check_listed(f"population {number}", size_of(population), *spikes[number])
        _check_listed(f"population {number}", size_of(population), *events[number])
        of_spikes = of_counts if number + 1 == count else None
        if (of_rates := of_results[number]) is not None:
            of_rates = (of_rates / (call.steps * call.batch)).expand(call.batch, -1)
            of_spikes = of_rates.contiguous() if of_spikes is None else of_spikes + of_rates
        place.spike_counts, place.spike_neurons = [each.data_ptr() for each in spikes[number]]
        place.event_counts, place.event_neurons = [each.data_ptr() for each in events[number][:2]]
        place.slopes, place.grad_rates = events[number][2].data_ptr(), pointer(of_spikes)
        place.grad_last, place.tail_steps = pointer(of_results[count + number]), call.tails[number]
        place.grad_tail = pointer(next(tails)) if call.tails[number] else None
        outlive.append(of_spikes)
    run(library().g2g_list_network, arguments.network, backward=True)
    names = {id(tensor): name for name, tensor, *_ in call.expected()}
    for tensor, grad in zip(opened(call)[0], grads, strict=True):
        if grad is not None and not grad.sum().isfinite() and not grad.isfinite().all():
            raise FloatingPointError(
                f"the gradient of {names[id(tensor)]} is not finite: over {call.truncate or call.steps} steps back it "
                "grows from spike to spike; give simulate() a truncate of fewer steps"
            )
    return grads


def _check_listed(of: str, size: int, counts: torch.Tensor, neurons: torch.Tensor, *values: torch.Tensor) -> None:
    """Raises ValueError for lists that kernels would read outside of."""
    fit = int(counts.sum()) == len(neurons) and all([len(each) == len(neurons) for each in values])
    if not fit or counts.min() < 0 or (len(neurons) and not 0 <= neurons.min() <= neurons.max() < size):
        raise ValueError(
            f"the spikes and gradient events of {of} must be as many as their counts say, of neurons below {size}"
        )


def _plain(call: EventsCall) -> list[torch.Tensor]:
    """Counts, rates, last states, the last spikes and membranes by plain operations."""
    held = call.steps if call.held else None
    x = call.x if call.arriving is None else call.arriving.dense(call.x)
    plain = Call(x, call.populations, held, call.before, spikes=True)
    run_plain = partial(in_turn, operators=PRODUCTS, neurons=in_steps)
    if call.truncate:
        activity = in_chunks(run_plain, call.truncate, replaced(plain, plain=True), truncated=True)
    else:
        activity = run_plain(plain)
    assert activity.states is not None
    tails = [each.dense()[call.steps - tail :] for each, tail in zip(activity.spikes, call.tails, strict=True) if tail]
    membranes = [each for each in activity.membranes or () if each is not None]
    return [activity.counts, *activity.rates, *activity.states, *tails, *membranes]


RESULTS = "(Tensor counts, Tensor[] rates, Tensor[] last, Tensor[] tails, Tensor[] shown, Tensor[] kept)"
OPERATOR = Differentiable("events", RESULTS, 5, _forward, _backward, _outputs, _plain)
