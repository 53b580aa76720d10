"""Populations whose connections are lists, forward over all steps in one call, on the compiled CPU kernels: operator
``g2g::events``. A spike costs the weights that it visits, and spikes stay lists (``csrc/list_network.h``). It takes
float32 or float64, and computes no gradients.
"""

import os
from ctypes import addressof
from typing import NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run, too_large
from g2g_kernels.cpu.plans import in_lists, lists_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Spikes
from g2g_kernels.ops.g2g_stack.call import contiguous
from g2g_kernels.ops.g2g_stack.checks import check_ends
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
from g2g_kernels.ops.neurons.cpu import neuron_arguments
from g2g_kernels.ops.record import TYPES, Expected, RecordOperator, opened
from g2g_kernels.tracing import is_traced, replaced

#: fields that the kernels do not read
UNREAD = unread([name for name in (*Population._fields, *Connection._fields) if name not in ("membranes", "images")])
#: what ``G2G_CPU_NEURONS`` makes of ``VISIT_COST``
FORCED = {"reached": 0.0, "all": float("inf")}


class EventsCall(NamedTuple):
    """What the operator takes; its tensors are contiguous, and numbers of one dtype.

    Attributes:
        x: [T, B, in], or [B, in] held for all steps.
        before: [D, B, in], the inputs of the D steps before the first; None: nothing.
        populations: the output last.
        steps: T.
        order: the populations in the order in which they receive in a step.
    """

    x: torch.Tensor
    before: torch.Tensor | None
    populations: tuple[Population, ...]
    steps: int
    order: tuple[int, ...]

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[-2]

    def expected(self) -> Expected:
        """What the kernels take for granted."""
        check_ends(self.populations, self.x.shape[-1])
        if sorted(self.order) != [*range(len(self.populations))] or self.steps < 1:
            raise ValueError(f"order={self.order} must name each population once, and steps={self.steps} be above 0")
        dtype, shape = self.x.dtype, (self.batch, self.x.shape[-1])
        yield "x", self.x, shape if self.x.dim() == 2 else (self.steps, *shape), dtype
        yield "before", self.before, (0 if self.before is None else len(self.before), *shape), dtype
        for name, tensor, of, usual in expected_of(self.populations, self.batch):
            yield name, tensor, of, dtype if usual == torch.float32 else usual


TYPES["EventsCall"] = EventsCall


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
    if call.repeated or (torch.is_grad_enabled() and any([each.requires_grad for each in opened(call)[0]])):
        return "computes no gradients; call under torch.no_grad() where none is needed"
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

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample and the step of each."""
        samples, steps = self._counts.shape
        of_all = torch.repeat_interleave(torch.arange(samples * steps), self._counts.flatten())
        return of_all // steps, of_all % steps

    def events(self) -> torch.Tensor:
        """int64 [spikes, 3], as :meth:`Spikes.events`."""
        sample, step = self._places()
        events = torch.stack([step, sample, self._neurons.long()], 1)
        return events[step.argsort(stable=True)]

    def dense(self, last: int | None = None) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order; of the ``last`` steps, or of all."""
        samples, steps = self._counts.shape
        last = steps if last is None else last
        (sample, step), neurons = self._places(), self._neurons
        late = step >= steps - last
        spikes = self._like.new_zeros(last, samples, self._size)
        spikes[step[late] - (steps - last), sample[late], neurons[late].long()] = 1
        return spikes

    def per_neuron(self, of_samples: bool = False) -> torch.Tensor:
        """How many each neuron has sent, [N], or in each sample, [B, N]."""
        samples = len(self._counts) if of_samples else 1
        place = self._neurons.long()
        if samples > 1:
            place += self._places()[0] * self._size
        return torch.bincount(place, minlength=samples * self._size).view(samples, self._size).to(self._like.dtype)


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
        populations.append(contiguous(population, connections, sent, call.x.dtype))
    order = tuple([number for component in components(call.populations) for number in component.members])
    before = None if call.before is None else call.before.contiguous()
    counts, neurons, last = OPERATOR(EventsCall(call.x.contiguous(), before, tuple(populations), steps, order))
    spikes = [
        EventSpikes(of_steps, of_all, size_of(population), call.x.new_empty(0))
        for of_steps, of_all, population in zip(counts, neurons, call.populations, strict=True)
    ]
    vectors = steps * call.x.shape[-2]
    sent_last: list[Spikes | None] = [
        LastEvents(each, reach[number], steps, populations[number].sent) if reach[number] else None
        for number, each in enumerate(spikes)
    ]
    return Activity(
        spikes[-1].per_neuron(of_samples=True),
        tuple([each.per_neuron()[0] / vectors for each in spikes]),
        tuple(spikes),
        states=tuple(last),
        sent=(*sent_last, _last_inputs(call, reach[-1], steps)),
    )


def _last_inputs(call: Call, reach: int, steps: int) -> Spikes | None:
    """The inputs of the last steps, where a delay reads them."""
    if not reach:
        return None
    train = Train(call.x if call.steps is not None else call.x[0], call.before)
    train.append(call.x if call.steps is None else call.x.expand(steps, *call.x.shape))
    return DenseSpikes(train.window(steps - reach, steps))


class _Arguments:
    """The arguments of the kernel, and all that must outlive it."""

    def __init__(self, call: EventsCall, last: list[torch.Tensor], spikes: int) -> None:
        of = [(number, each) for number, population in enumerate(call.populations) for each in population.connections]
        self.lists = [lists_for(each.mask, each.values, "cols") for _, each in of]
        self.weights = [lists.ordered(each.values) for lists, (_, each) in zip(self.lists, of, strict=True)]
        self.order = torch.tensor(call.order, dtype=torch.int32)
        self.populations = (structures.ListPopulation * len(call.populations))()
        self.connections = (structures.ListConnection * len(of))()
        for number, population in enumerate(call.populations):
            sent = population.sent
            self.populations[number] = structures.ListPopulation(
                neurons=neuron_arguments(population.neurons),
                dropped=pointer(population.dropped),
                state=pointer(population.state),
                sent=pointer(sent),
                sent_steps=0 if sent is None else len(sent),
                last=last[number].data_ptr(),
                size=size_of(population),
            )
        for place, ((target, each), lists, weights) in enumerate(zip(of, self.lists, self.weights, strict=True)):
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
            )
        self.network = structures.ListNetwork(
            populations=addressof(self.populations),
            connections=addressof(self.connections),
            order=self.order.data_ptr(),
            x=call.x.data_ptr(),
            before=pointer(call.before),
            before_steps=0 if call.before is None else len(call.before),
            spikes=spikes,
            population_count=len(call.populations),
            connection_count=len(of),
            inputs=call.x.shape[-1],
            samples=call.batch,
            steps=call.steps,
            threads=torch.get_num_threads(),
            held=call.x.dim() == 2,
            doubles=call.x.dtype == torch.float64,
            visit_cost=visit_cost(),
        )


_Each = list[torch.Tensor]


def _forward(call: EventsCall) -> tuple[_Each, _Each, _Each]:
    """Of each population how many spikes each sample has in each step, int32 [B, T]; the neurons of these in order,
    int32; and the states after the last step [states, B, N]."""
    count = len(call.populations) * call.batch
    last = [workspace.empty(state_shape(of, call.batch), call.x.dtype) for of in call.populations]
    if not (spikes := library().g2g_spikes_new(count)):
        raise MemoryError(f"there is no memory for the spikes of {count} populations and samples")
    counts, neurons = [], []
    try:
        arguments = _Arguments(call, last, spikes)
        run(library().g2g_list_network, arguments.network)
        for population in range(len(call.populations)):
            numbers = range(population * call.batch, (population + 1) * call.batch)
            sizes = [library().g2g_spikes_count(spikes, number) for number in numbers]
            of_steps = torch.empty(call.batch, call.steps, dtype=torch.int32)
            of_all = torch.empty(sum(sizes), dtype=torch.int32)
            for number, to, part in zip(numbers, of_steps, of_all.split(sizes), strict=True):
                library().g2g_spikes_copy(spikes, number, to.data_ptr(), part.data_ptr())
            counts.append(of_steps)
            neurons.append(of_all)
    finally:
        library().g2g_spikes_free(spikes)
    return counts, neurons, last


def _fake(call: EventsCall) -> tuple[_Each, _Each, _Each]:
    context = torch.library.get_ctx()
    return (
        [call.x.new_empty(call.batch, call.steps, dtype=torch.int32) for _ in call.populations],
        [call.x.new_empty(context.new_dynamic_size(), dtype=torch.int32) for _ in call.populations],
        [call.x.new_empty(state_shape(population, call.batch)) for population in call.populations],
    )


OPERATOR = RecordOperator("events", "(Tensor[] counts, Tensor[] neurons, Tensor[] last)", _forward, _fake)
