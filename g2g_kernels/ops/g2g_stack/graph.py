"""Populations that may reach one another, for all steps in one call, on the compiled CPU kernels: operators
``g2g::graph_forward`` (with its autograd formula) and ``g2g::graph_backward``.

Products with the inputs are computed before. What the forward pass keeps for the backward pass is of each population
its spikes as words, int64 [B, row blocks, T], and its states of every step, float32 [B, row blocks, T, states, 64] in
the order of ``KeptStates`` (``csrc/graph.h``).
"""

import functools
from collections.abc import Sequence
from ctypes import Structure, addressof
from typing import NamedTuple

import torch

from g2g_kernels.cpu import plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run
from g2g_kernels.cpu.plans import blocks, in_lists, plan_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_linear import reference as linear
from g2g_kernels.ops.g2g_linear.cpu import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Spikes
from g2g_kernels.ops.g2g_stack.call import contiguous
from g2g_kernels.ops.g2g_stack.checks import check_ends
from g2g_kernels.ops.g2g_stack.cpu import LastSpikes, PackedSpikes, delays_pointer, refuses_call
from g2g_kernels.ops.g2g_stack.delays import Delay, Train, arrived
from g2g_kernels.ops.g2g_stack.population import (
    Call,
    Connection,
    Population,
    components,
    expected_of,
    graph_of,
    size_of,
    state_shape,
    unread,
)
from g2g_kernels.ops.g2g_stack.reference import GraphRun, functions_of
from g2g_kernels.ops.g2g_stack.schedule import Graph, components_of
from g2g_kernels.ops.neurons.cpu import neuron_arguments, neurons
from g2g_kernels.ops.neurons.models import MODELS
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output, opened
from g2g_kernels.tracing import is_traced


class GraphCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        populations: the output last. Of connections from the inputs only the mask is read, and the shape of values:
            they say where the neurons lie in memory. Those between populations have steps of each neuron of the source.
        currents: of each population from outside, contiguous [T, B, N], or [B, N] held for all steps; biases included.
        tails: of each population how many of its last steps' spikes are wanted.
        steps: T.
    """

    populations: tuple[Population, ...]
    currents: tuple[torch.Tensor, ...]
    tails: tuple[int, ...]
    steps: int

    @property
    def batch(self) -> int:
        """B."""
        return self.currents[0].shape[-2]

    @property
    def connections(self) -> list[tuple[int, Connection]]:
        """The connections between populations, each with the number of its target."""
        return [(n, each) for n, of in enumerate(self.populations) for each in of.connections if each.source >= 0]

    @property
    def blocks(self) -> torch.Tensor:
        """int32 [blocks, 3], in the order in which they run: a population, its first step, the step after its last."""
        return _blocks(graph_of(self.populations), self.steps)

    def expected(self) -> Expected:
        """What the kernels take for granted."""
        check_ends(self.populations, None)
        yield from expected_of(self.populations, self.batch)
        of_all = enumerate(zip(self.populations, self.currents, self.tails, strict=True))
        for number, (population, current, tail) in of_all:
            steps = () if current.dim() == 2 else (self.steps,)
            shape = (*steps, self.batch, size_of(population))
            yield f"the current of population {number}", current, shape, torch.float32
            if not 0 <= tail <= self.steps:
                raise ValueError(f"{tail} last steps of population {number} are wanted, of {self.steps}")
        for target, each in self.connections:
            if each.delay is None or each.delay.steps is None:
                raise ValueError(f"the connection from {each.source} to {target} needs the delay of each source neuron")


TYPES["GraphCall"] = GraphCall

#: fields that these kernels read, and those that they do not
READ = (
    "neurons", "connections", "dropped", "state", "sent", "kind", "values", "mask", "source", "delay", "bias",
)  # fmt: skip
UNREAD = unread(READ)


def refuses(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if reason := refuses_call(call, UNREAD):
        return reason
    if is_traced():
        return "does not run where calls are recorded (torch.compile, torch.export)"
    if any([component.late for component in components(call.populations)]):
        return "connections without delay form a cycle"
    for number, population in enumerate(call.populations):
        of_population = []
        for each in population.connections:
            mask, values = each.mask.tensors(), each.values
            if any([in_lists(mask.grid, tuple(values.shape), use) for use in ("stack", "recurrent")]):
                return f"the weights to population {number} lie in lists"
            if reason := plans.refuses(each.mask, values, "stack"):
                return reason
            of_population.append(plan_for(mask, values).address)
        if not all([library().g2g_plans_same_rows(of_population[0], plan) for plan in of_population[1:]]):
            return (
                f"the connections to population {number} have other groups, or other sizes of units, than one another; "
                "give all of their masks the same rows.layout and block_size"
            )
    return None


def g2g_graph(call: Call) -> Activity:
    """``g2g_stack`` for populations of any graph."""
    x, given = call.x, GraphRun(call, functions_of(call.populations, {"linear": g2g_linear}, neurons))
    populations, currents = [], []
    for number, population in enumerate(call.populations):
        current, connections = given.current(number, 0, given.steps, lambda source: source < 0), []
        for each in population.connections:
            if each.source < 0:
                connections.append(Connection("linear", each.values.detach(), each.mask.tensors(), each.source))
                continue
            if each.bias is not None:
                current = each.bias if current is None else current + each.bias
            delay = (each.delay or Delay(0, 0)).of_each(each.mask.shape[1], x.device)
            values = each.values.contiguous()
            connections.append(Connection("linear", values, each.mask.tensors(), each.source, delay))
        if current is None or current.dim() == 1:  # nothing comes from the inputs
            nothing = x.new_zeros(x.shape[-2], size_of(population))
            current = nothing if current is None else current.expand_as(nothing)
        currents.append(current.float().contiguous())  # autocast computes products in fewer bits
        populations.append(contiguous(population, connections, given.before(number, x.dtype)))
    # where a run is no chunk, mostly nobody reads what it carries on: LastSpikes finds it when it is asked
    lengths = tuple([min(reach, given.steps) if call.carried else 0 for reach in given.reaches[:-1]])
    counts, rates, last, tails, kept = FORWARD(GraphCall(tuple(populations), tuple(currents), lengths, given.steps))
    spikes = [
        PackedSpikes(words, of.connections[0].values.detach(), of.connections[0].mask)
        for words, of in zip(kept, populations, strict=False)
    ]
    sent: list[Spikes | None] = []
    rest = iter(tails)
    for number, (population, reach) in enumerate(zip(call.populations, given.reaches, strict=False)):  # without inputs
        if not reach:
            sent.append(None)
        elif not call.carried:
            sent.append(LastSpikes(spikes[number], reach, number, call, g2g_graph))
        else:
            train = Train(counts.new_zeros(x.shape[-2], size_of(population)), population.sent)
            train.append(next(rest))
            sent.append(DenseSpikes(train.window(train.length - reach, train.length)))
    reach = given.reaches[-1]
    of_inputs = given.trains[-1].window(given.steps - reach, given.steps) if reach else None
    sent.append(None if of_inputs is None else DenseSpikes(of_inputs))
    return Activity(counts, tuple(rates), tuple(spikes), states=tuple(last), sent=tuple(sent))


@functools.lru_cache(64)
def _blocks(graph: Graph, steps: int) -> torch.Tensor:
    return torch.tensor(
        [block for component in components_of(graph) for block in component.blocks(steps)],
        dtype=torch.int32,
        device="cpu",
    )


class _Arguments:
    """The arguments of a kernel, and all that must outlive it."""

    def __init__(self, call: GraphCall, words: Sequence[torch.Tensor], to: GraphCall | None = None) -> None:
        count, between = len(call.populations), call.connections
        self.plans = [plan_for(of.connections[0].mask, of.connections[0].values) for of in call.populations]
        self.plans += [plan_for(each.mask, each.values) for _, each in between]
        self.layers = (structures.Layer * count)()
        self.outer = (structures.Outer * count)()
        self.connections = (structures.Connection * max(1, len(between)))()
        for number, population in enumerate(call.populations):
            grads = None if to is None else to.populations[number]
            self.layers[number] = structures.Layer(
                plan=self.plans[number].address,
                neurons=neuron_arguments(population.neurons, () if grads is None else grads.neurons.parameters),
                spikes=words[number].data_ptr(),
                dropped=pointer(population.dropped),
                state=pointer(population.state),
                sent=pointer(population.sent),
                sent_steps=0 if population.sent is None else len(population.sent),
                grad_state=None if grads is None else pointer(grads.state),
            )
            self.outer[number] = structures.Outer(
                current=call.currents[number].data_ptr(),
                held=call.currents[number].dim() == 2,
                tail_steps=call.tails[number],
                grad_current=None if to is None else pointer(to.currents[number]),
                grad_sent=None if grads is None else pointer(grads.sent),
            )
        grads_between = [None] * len(between) if to is None else [each for _, each in to.connections]
        for number, ((target, each), plan, grad) in enumerate(
            zip(between, self.plans[count:], grads_between, strict=True)
        ):
            if not library().g2g_plans_same_rows(self.plans[target].address, plan.address):
                raise ValueError(
                    f"the connection from {each.source} to {target} has other groups, or other sizes of units, than "
                    "another one to it"
                )
            assert each.delay is not None
            assert each.delay.steps is not None
            self.connections[number] = structures.Connection(
                plan=plan.address,
                values=each.values.data_ptr(),
                delays=delays_pointer(target, each.delay, each.delay.steps),
                source=each.source,
                target=target,
                grad_values=None if grad is None else pointer(grad.values),
                grad_delays=None if grad is None or grad.delay is None else pointer(grad.delay.learned),
                delay_width=each.delay.width,
            )
        stack = structures.Stack(
            layers=addressof(self.layers),
            count=count,
            batch=call.batch,
            steps=call.steps,
            threads=torch.get_num_threads(),
        )
        self.blocks = call.blocks
        self.graph: Structure = structures.Graph(
            stack=stack,
            outer=addressof(self.outer),
            connections=addressof(self.connections),
            connection_count=len(between),
            blocks=self.blocks.data_ptr(),
            block_count=len(self.blocks),
        )


def _kept_shapes(call: GraphCall) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of the words and of the states of each population."""
    words: list[tuple[int, ...]] = []
    states: list[tuple[int, ...]] = []
    for population in call.populations:
        first = population.connections[0]
        rows, _ = blocks(first.mask.grid, tuple(first.values.shape))
        words.append((call.batch, rows, call.steps))
        states.append((*words[-1], len(MODELS[population.neurons.model].states), 64))
    return words, states


_Each = list[torch.Tensor]
#: counts; rates and last states of each population; the last spikes that are wanted; and what is kept
Outputs = tuple[torch.Tensor, _Each, _Each, _Each, _Each]


def _forward(call: GraphCall, keep: bool) -> Outputs:
    of_words, of_states = _kept_shapes(call)
    words = workspace.exactly(of_words, torch.int64)
    states = workspace.each(of_states) if keep else []
    shapes = [state_shape(population, call.batch) for population in call.populations]
    *rates, counts = workspace.each([*[shape[2:] for shape in shapes], shapes[-1][1:]])
    last = workspace.exactly(shapes)
    tails = workspace.each([(tail, *shape[1:]) for tail, shape in zip(call.tails, shapes, strict=True) if tail])
    arguments, rest = _Arguments(call, words), iter(tails)
    for number, (layer, outer) in enumerate(zip(arguments.layers, arguments.outer, strict=True)):
        layer.rates, layer.last = rates[number].data_ptr(), last[number].data_ptr()
        layer.states = states[number].data_ptr() if keep else None
        outer.tail = next(rest).data_ptr() if call.tails[number] else None
    arguments.graph.stack.counts = counts.data_ptr()
    run(library().g2g_graph, arguments.graph)
    return counts, rates, last, tails, [*words, *states]


def _outputs(call: GraphCall, keep: bool) -> list[Output | list[Output]]:
    words, states = _kept_shapes(call)
    shapes = [state_shape(population, call.batch) for population in call.populations]
    tails = [Output((tail, *shape[1:])) for tail, shape in zip(call.tails, shapes, strict=True) if tail]
    kept = [*[Output(shape, torch.int64) for shape in words], *[Output(shape) for shape in states if keep]]
    return [Output(shapes[-1][1:]), [Output(shape[2:]) for shape in shapes], [*map(Output, shapes)], tails, kept]


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, kept, (grad_counts, *grads_of_populations), _ = given
    count = len(call.populations)
    words, states = kept[:count], kept[count:]
    written = {id(each.values) for _, each in call.connections}  # the kernels always write the gradients of these
    wanted = [need or id(tensor) in written for tensor, need in zip(opened(call)[0], given.needed, strict=True)]
    grads, to = given.made(lambda tensors, _: workspace.alike(tensors, wanted))
    for population in to.populations:
        for each in population.connections:
            if each.source < 0 and each.values is not None:  # they only say where neurons are
                each.values.zero_()
    arguments = _Arguments(call, words, to)
    tails = iter(grads_of_populations[2 * count :])
    for number, (layer, outer) in enumerate(zip(arguments.layers, arguments.outer, strict=True)):
        of_rates, of_last = grads_of_populations[number], grads_of_populations[count + number]
        layer.grad_rates, layer.grad_last = pointer(of_rates), pointer(of_last)
        layer.states = states[number].data_ptr()
        outer.grad_tail = pointer(next(tails)) if call.tails[number] else None
    arguments.graph.stack.grad_counts = pointer(grad_counts)
    run(library().g2g_graph, arguments.graph, backward=True)
    return [grad if need else None for grad, need in zip(grads, given.needed, strict=True)]


def _plain(call: GraphCall) -> list[torch.Tensor]:
    """Counts, rates, last states and the last spikes by plain operations."""
    shapes = [state_shape(population, call.batch) for population in call.populations]
    trains = [
        Train(current.detach().new_zeros(shape[1:]), population.sent)
        for current, shape, population in zip(call.currents, shapes, call.populations, strict=True)
    ]
    states = [population.state for population in call.populations]
    for number, first, last in call.blocks.tolist():
        population = call.populations[number]
        current = call.currents[number].expand(call.steps, *shapes[number][1:])[first:last]
        for target, each in call.connections:
            received = arrived(trains[each.source], each.delay, first, last) if target == number else None
            if received is not None:
                current = current + linear.g2g_linear(received, each.values, each.mask, None)
        spikes, states[number] = in_steps(current, population.neurons, None, states[number])
        trains[number].append(spikes if population.dropped is None else spikes.masked_fill(population.dropped, 0))
    spikes_of_all = [train.window(0, call.steps) for train in trains]
    return [
        spikes_of_all[-1].sum(0),
        *[spikes.mean((0, 1)) for spikes in spikes_of_all],
        *[each for each in states if each is not None],
        *[spikes[call.steps - tail :] for spikes, tail in zip(spikes_of_all, call.tails, strict=True) if tail],
    ]


def _flops(call: GraphCall) -> int:
    return sum(product_flops(call.steps * call.batch, each.values, each.mask) for _, each in call.connections)


RESULTS = "(Tensor counts, Tensor[] rates, Tensor[] last, Tensor[] tails, Tensor[] kept)"
FORWARD = Differentiable("graph", RESULTS, 4, _forward, _backward, _outputs, _plain)
count_flops(FORWARD, _flops)
count_flops(FORWARD.backward, lambda given: 2 * _flops(given.call))
