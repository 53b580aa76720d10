"""Layers that may reach one another, for all steps in one call, on the compiled CPU kernels: operators
``g2g::graph_forward`` (with its autograd formula) and ``g2g::graph_backward``.

Products with the inputs are computed before. What the forward pass keeps for the backward pass is of each layer its
spikes as words, int64 [B, row blocks, T], and its states of every step, float32 [B, row blocks, T, states, 64] in the
order of ``KeptStates`` (``csrc/graph.h``).
"""

import functools
from collections.abc import Sequence
from ctypes import Structure, addressof
from typing import Any, NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run
from g2g_kernels.cpu.plans import blocks, in_lists, plan_for, refuses
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.dispatch import forced_backend
from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_linear import reference as linear
from g2g_kernels.ops.g2g_linear.cpu import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes
from g2g_kernels.ops.g2g_stack.cpu import PackedSpikes, check_tensors, delays_pointer, refuses_tensors
from g2g_kernels.ops.g2g_stack.delays import Delay, Train, arrived
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.g2g_stack.reference import GraphRun, functions_of
from g2g_kernels.ops.g2g_stack.schedule import Graph, components_of
from g2g_kernels.ops.neurons.cpu import neuron_arguments, neurons
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, RecordOperator


class Member(NamedTuple):
    """A layer.

    Attributes:
        mask: of any connection to it, whose rows say where its neurons lie in memory.
        values: packed weights of that shape.
        current: from outside, contiguous [T, B, N], or [B, N] held for all steps.
        population: the neurons.
        dropped: bool [B, N], where nothing comes from a neuron in a sample; None: nowhere.
        state: [states, B, N] before the first step; None: zeros.
        sent: [D, B, N], the spikes of the D steps before the first; None: none.
        tail: how many of its last steps' spikes are wanted.
    """

    mask: Any
    values: torch.Tensor
    current: torch.Tensor
    population: Neurons
    dropped: torch.Tensor | None
    state: torch.Tensor | None
    sent: torch.Tensor | None
    tail: int


class Inner(NamedTuple):
    """A connection between two layers.

    Attributes:
        values, mask: packed weights, and the units that exist.
        source, target: which layers.
        delay: with steps of each neuron of the source.
    """

    values: torch.Tensor
    mask: Any
    source: int
    target: int
    delay: Delay


class GraphCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        members: the layers, the output last.
        inner: the connections between them.
        steps: T.
    """

    members: tuple[Member, ...]
    inner: tuple[Inner, ...]
    steps: int

    @property
    def batch(self) -> int:
        """B."""
        return self.members[0].current.shape[-2]

    @property
    def blocks(self) -> torch.Tensor:
        """int32 [blocks, 3], in the order in which they run: a layer, its first step, the step after its last."""
        delays = [(each.source, each.target, each.delay.least) for each in self.inner]
        into = range(len(self.members))
        return _blocks(tuple([tuple([(p, least) for p, q, least in delays if q == n]) for n in into]), self.steps)

    def state_shape(self, member: Member) -> tuple[int, int, int]:
        """[states, B, N]."""
        return len(MODELS[member.population.model].states), self.batch, member.mask.shape[0]

    def check(self) -> None:
        """Raises ValueError unless sizes match."""
        sizes = [member.mask.shape[0] for member in self.members]
        for number, member in enumerate(self.members):
            shape = self.steps, self.batch, sizes[number]
            wanted = [("current", member.current, (shape, shape[1:])), ("dropped", member.dropped, (shape[1:],))]
            wanted.append(("state", member.state, (self.state_shape(member),)))
            if member.sent is not None:
                wanted.append(("sent", member.sent, ((len(member.sent), *shape[1:]),)))
            for name, tensor, shapes in wanted:
                if tensor is not None and tuple(tensor.shape) not in shapes:
                    raise ValueError(f"{name} of layer {number} has shape {tuple(tensor.shape)}, expected {shapes}")
            if not 0 <= member.tail <= self.steps:
                raise ValueError(f"{member.tail} last steps of layer {number} are wanted, of {self.steps}")
            member.population.check_entries(sizes[number], f" of layer {number}")
        for number, each in enumerate(self.inner):
            if not (0 <= each.source < len(sizes) and 0 <= each.target < len(sizes)):
                raise ValueError(f"connection {number} joins layers {each.source} and {each.target} of {len(sizes)}")
            if each.mask.shape != (sizes[each.target], sizes[each.source]):
                raise ValueError(f"the mask of connection {number} describes {each.mask.shape} weights")
            steps = each.delay.steps
            if steps is None or tuple(steps.shape) != (sizes[each.source],) or steps.dtype != torch.int64:
                raise ValueError(f"the delays of connection {number} must be int64 [{sizes[each.source]}]")
            if each.delay.least < 0:
                raise ValueError(f"connection {number} has delays from {each.delay.least} on")


TYPES |= {"Member": Member, "Inner": Inner, "GraphCall": GraphCall}


def serves(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, backend: str | None) -> bool:
    """Whether these kernels can run a call of ``g2g_stack`` that is not traced, and of which nothing is shown."""
    if forced_backend(backend) not in (None, "cpu") or cpu_library.unavailable() is not None:
        return False
    if refuses_tensors(x, layers, steps):
        return False
    for number, layer in enumerate(layers):
        connections = layer.connections(number)
        if layer.membranes or any([each.observer is not None for each in connections]):
            return False
        plans = []
        for each in connections:
            mask, values = each.mask.tensors(), each.values
            ways = [in_lists(mask.grid, tuple(values.shape), use) for use in ("stack", "recurrent")]
            if any(ways) or refuses(each.mask, values, "stack"):
                return False
            plans.append(plan_for(mask, values).address)
        if not all([library().g2g_plans_same_rows(plans[0], plan) for plan in plans[1:]]):
            return False
    return True


def g2g_graph(
    x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, before: torch.Tensor | None = None
) -> Activity:
    """``g2g_stack`` for the layers of a graph; ``before``: as there."""
    given = GraphRun(x, layers, functions_of(layers, g2g_linear, neurons), steps, before)
    members, inner = [], []
    for number, (layer, reach) in enumerate(zip(layers, given.reaches, strict=False)):  # the inputs come last
        current = given.current(number, 0, given.steps, lambda source: source < 0)
        for each in given.connections[number]:
            if each.source < 0:
                continue
            if each.bias is not None:
                current = each.bias if current is None else current + each.bias
            delay = (each.delay or Delay(0, 0)).of_each(each.mask.shape[1], x.device)
            inner.append(Inner(each.values.contiguous(), each.mask.tensors(), each.source, number, delay))
        if current is None or current.dim() == 1:  # nothing comes from the inputs
            nothing = x.new_zeros(x.shape[-2], layer.size)
            current = nothing if current is None else current.expand_as(nothing)
        sent, population = given.before(number, x.dtype), layer.population
        flat = tuple([each.reshape(-1).contiguous() for each in population.parameters])
        members.append(
            Member(
                layer.mask.tensors(),
                layer.values.detach(),
                current.float().contiguous(),  # autocast computes products in fewer bits
                population.with_parameters(flat),
                None if layer.dropped is None else layer.dropped.contiguous(),
                None if layer.state is None else layer.state.contiguous(),
                None if sent is None else sent.contiguous(),
                min(reach, given.steps),
            )
        )
    counts, rates, last, tails, kept = FORWARD(GraphCall(tuple(members), tuple(inner), given.steps))
    spikes = [PackedSpikes(each, member.values, member.mask) for each, member in zip(kept, members, strict=False)]
    sent_in_run: list[DenseSpikes | None] = []
    rest = iter(tails)
    for layer, reach in zip(layers, given.reaches, strict=False):
        if not reach:
            sent_in_run.append(None)
            continue
        train = Train(counts.new_zeros(x.shape[-2], layer.size), layer.sent)
        train.append(next(rest))
        sent_in_run.append(DenseSpikes(train.window(train.length - reach, train.length)))
    reach = given.reaches[-1]
    of_inputs = given.trains[-1].window(given.steps - reach, given.steps) if reach else None
    sent_in_run.append(None if of_inputs is None else DenseSpikes(of_inputs))
    return Activity(counts, tuple(rates), tuple(spikes), states=tuple(last), sent=tuple(sent_in_run))


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
        count = len(call.members)
        self.plans = [plan_for(each.mask, each.values) for each in call.members]
        self.plans += [plan_for(each.mask, each.values) for each in call.inner]
        self.layers = (structures.Layer * count)()
        self.outer = (structures.Outer * count)()
        self.inner = (structures.Inner * max(1, len(call.inner)))()
        for number, member in enumerate(call.members):
            grads = None if to is None else to.members[number]
            self.layers[number] = structures.Layer(
                plan=self.plans[number].address,
                neurons=neuron_arguments(member.population, () if grads is None else grads.population.parameters),
                spikes=words[number].data_ptr(),
                dropped=pointer(member.dropped),
                state=pointer(member.state),
                sent=pointer(member.sent),
                sent_steps=0 if member.sent is None else len(member.sent),
                grad_state=None if grads is None else pointer(grads.state),
            )
            self.outer[number] = structures.Outer(
                current=member.current.data_ptr(),
                held=member.current.dim() == 2,
                tail_steps=member.tail,
                grad_current=None if grads is None else pointer(grads.current),
                grad_sent=None if grads is None else pointer(grads.sent),
            )
        for number, (each, plan) in enumerate(zip(call.inner, self.plans[count:], strict=True)):
            if not library().g2g_plans_same_rows(self.plans[each.target].address, plan.address):
                raise ValueError(f"connection {number} has other groups, or other sizes of units, than its target")
            assert each.delay.steps is not None
            of_inner = None if to is None else to.inner[number]
            self.inner[number] = structures.Inner(
                plan=plan.address,
                values=each.values.data_ptr(),
                delays=delays_pointer(each.target, each.delay, each.delay.steps),
                source=each.source,
                target=each.target,
                grad_values=None if of_inner is None else pointer(of_inner.values),
                grad_delays=None if of_inner is None else pointer(of_inner.delay.learned),
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
            inner=addressof(self.inner),
            inner_count=len(call.inner),
            blocks=self.blocks.data_ptr(),
            block_count=len(self.blocks),
        )


def _kept_shapes(call: GraphCall) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of the words and of the states of each layer."""
    words: list[tuple[int, ...]] = []
    states: list[tuple[int, ...]] = []
    for member in call.members:
        rows, _ = blocks(member.mask.grid, tuple(member.values.shape))
        words.append((call.batch, rows, call.steps))
        states.append((*words[-1], len(MODELS[member.population.model].states), 64))
    return words, states


_Each = list[torch.Tensor]
#: counts; rates and last states of each layer, the last spikes of those of which they are wanted; and what is kept
Outputs = tuple[torch.Tensor, _Each, _Each, _Each, _Each]


def _forward(call: GraphCall, keep: bool) -> Outputs:
    of_words, of_states = _kept_shapes(call)
    words = workspace.exactly(of_words, torch.int64)
    states = workspace.each(of_states) if keep else []
    *rates, counts = workspace.each(
        [*[shape[2:] for shape in map(call.state_shape, call.members)], call.state_shape(call.members[-1])[1:]]
    )
    last = workspace.exactly([call.state_shape(member) for member in call.members])
    tailed = [member for member in call.members if member.tail]
    tails = workspace.each([(member.tail, call.batch, member.mask.shape[0]) for member in tailed])
    arguments, rest = _Arguments(call, words), iter(tails)
    for number, (layer, outer) in enumerate(zip(arguments.layers, arguments.outer, strict=True)):
        layer.rates, layer.last = rates[number].data_ptr(), last[number].data_ptr()
        layer.states = states[number].data_ptr() if keep else None
        outer.tail = next(rest).data_ptr() if call.members[number].tail else None
    arguments.graph.stack.counts = counts.data_ptr()
    run(library().g2g_graph, arguments.graph)
    return counts, rates, last, tails, [*words, *states]


def _fake(call: GraphCall, keep: bool) -> Outputs:
    like, (words, states) = call.members[0].current, _kept_shapes(call)
    shapes = [call.state_shape(member) for member in call.members]
    return (
        like.new_empty(shapes[-1][1:]),
        [like.new_empty(shape[2:]) for shape in shapes],
        [like.new_empty(shape) for shape in shapes],
        [like.new_empty(each.tail, *shape[1:]) for each, shape in zip(call.members, shapes, strict=True) if each.tail],
        [
            *[like.new_empty(shape, dtype=torch.int64) for shape in words],
            *[like.new_empty(shape) for shape in states if keep],
        ],
    )


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, kept, (grad_counts, *grads_of_layers), _ = given
    count = len(call.members)
    words, states = kept[:count], kept[count:]
    if tuple([[tuple(tensor.shape) for tensor in each] for each in (words, states)]) != _kept_shapes(call):
        raise ValueError("what was kept is not of a forward pass over these tensors")
    grads, to = given.made(workspace.alike)
    for member in to.members:
        if member.values is not None:  # they only say where its neurons are
            member.values.zero_()
    written = [torch.empty_like(each.values) for each in call.inner]  # the kernels always write these
    inner = [
        each if each.values is not None else each._replace(values=values)
        for each, values in zip(to.inner, written, strict=True)
    ]
    arguments = _Arguments(call, words, to._replace(inner=tuple(inner)))
    tails = iter(grads_of_layers[2 * count :])
    for number, (layer, outer) in enumerate(zip(arguments.layers, arguments.outer, strict=True)):
        layer.grad_rates, layer.grad_last = pointer(grads_of_layers[number]), pointer(grads_of_layers[count + number])
        layer.states = states[number].data_ptr()
        outer.grad_tail = pointer(next(tails)) if call.members[number].tail else None
    arguments.graph.stack.grad_counts = pointer(grad_counts)
    run(library().g2g_graph, arguments.graph, backward=True)
    return grads


def _plain(call: GraphCall) -> list[torch.Tensor]:
    """Counts, rates, last states and the last spikes by plain operations."""
    trains = [Train(each.current.detach().new_zeros(call.state_shape(each)[1:]), each.sent) for each in call.members]
    states = [each.state for each in call.members]
    for number, first, last in call.blocks.tolist():
        member = call.members[number]
        current = member.current.expand(call.steps, *call.state_shape(member)[1:])[first:last]
        for each in call.inner:
            received = arrived(trains[each.source], each.delay, first, last) if each.target == number else None
            if received is not None:
                current = current + linear.g2g_linear(received, each.values, each.mask, None)
        spikes, states[number] = in_steps(current, member.population, None, states[number])
        trains[number].append(spikes if member.dropped is None else spikes.masked_fill(member.dropped, 0))
    spikes_of_all = [train.window(0, call.steps) for train in trains]
    return [
        spikes_of_all[-1].sum(0),
        *[spikes.mean((0, 1)) for spikes in spikes_of_all],
        *[each for each in states if each is not None],
        *[
            spikes[call.steps - member.tail :]
            for spikes, member in zip(spikes_of_all, call.members, strict=True)
            if member.tail
        ],
    ]


def _flops(call: GraphCall) -> int:
    return sum(product_flops(call.steps * call.batch, each.values, each.mask) for each in call.inner)


BACKWARD = RecordOperator(
    "graph_backward", "Tensor[]", _backward, Backward.empty, check=lambda given: check_tensors(given.call)
)
RESULTS = "(Tensor counts, Tensor[] rates, Tensor[] last, Tensor[] tails, Tensor[] kept)"
FORWARD = Differentiable("graph_forward", RESULTS, 4, _forward, _fake, BACKWARD, _plain, check=check_tensors)
count_flops(FORWARD, _flops)
count_flops(BACKWARD, lambda given: 2 * _flops(given.call))
