"""``g2g_stack`` on the compiled CPU kernels: the whole stack of layers, forward and backward, in one call each.

Three ``torch.library`` operators: ``g2g::stack_forward`` (with its autograd formula), ``g2g::stack_backward`` and
``g2g::unpack_spikes``. Spikes of a layer are words, int64 [B, row blocks, T]. What the forward pass keeps for the
backward pass:

    header   float64 [1 + layers], whether x was spikes, and how often each layer's inputs are ones
    inputs   for each layer the words that it reads in its own order, int64 [B, column blocks, T]
    states   for each layer float32 [B, row blocks, T, states, 64]; for a held input its currents [row blocks, B, 64],
             and for a recurrent layer [row blocks, T, B, states, 64]
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu import plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import bf16_wanted, library, pointer, run, too_large
from g2g_kernels.cpu.plans import Plan, blocks, plan_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.derivatives import Recomputed
from g2g_kernels.ops.g2g_stack.activity import Activity, Spikes
from g2g_kernels.ops.g2g_stack.call import Outputs, StackCall, chain_of, operator_of
from g2g_kernels.ops.g2g_stack.chain_chunks import backward_in_chunks, forward_in_chunks, shapes_in_chunks
from g2g_kernels.ops.g2g_stack.chunks import ChunkedSpikes
from g2g_kernels.ops.g2g_stack.delays import Delay, Train
from g2g_kernels.ops.g2g_stack.population import (
    Call,
    Connection,
    Population,
    reaches,
    refuses_kernels,
    total_steps,
    unread,
)
from g2g_kernels.ops.neurons.cpu import neuron_arguments
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.ops.record import TYPES, Backward, Expected, Output, RecordOperator, built, opened
from g2g_kernels.tracing import is_traced, replaced

logger = logging.getLogger("g2g_kernels")

#: rows of a chunk are numbered in 16 bits
MOST_STEPS = 1 << 16

#: The input gradient of a layer is computed by events up to this share of neurons that a gradient reaches through their
#: own spikes (True: under bfloat16), where the product multiplies as many rows of weights as events may have to; the
#: kernels scale it by how many (``EventRuns.ratio``).
GRADIENT_EVENT_LIMIT = {False: 0.35, True: 0.23}

#: fields that the kernels' structure of a layer has under the same name
OF_POPULATION = [name for name in Population._fields if hasattr(structures.Layer, name) and name != "neurons"]
OF_CONNECTION = [name for name in Connection._fields if hasattr(structures.Layer, name)]
#: fields that they do not read
UNREAD = unread([*OF_POPULATION, "neurons", "connections", *OF_CONNECTION, "kind", "mask", "source", "delay"])

Tensors = Sequence[torch.Tensor]


def refuses(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if reason := refuses_call(call, UNREAD):
        return reason
    chain = chain_of(call.populations)
    if isinstance(chain, str):
        return chain
    reach = reaches(call.populations)
    for number, (feed, recurrent) in enumerate(chain):
        for each, use in ((feed, "stack"), (recurrent, "recurrent")):
            if each is None:
                continue
            if plans.in_lists(each.mask.grid, each.values.shape, use):
                return f"the weights to population {number} lie in lists"
            if reason := plans.refuses(each.mask, each.values, use):
                return reason
        if recurrent is not None and _in_other_order(feed, recurrent):
            return (
                f"the recurrent connection of population {number} has other groups, or other sizes of units, than the "
                "connection to it; give BlockMask.sample(layout, layout, …) that one's mask.rows.layout and block_size"
            )
        population = call.populations[number]
        continues = call.carried or population.state is not None or population.sent is not None
        if recurrent is not None and continues and MODELS[population.neurons.model].compared is not None:
            return f"the recurrent spikes of population {number} before the run do not follow from its states"
        if feed.delay is not None and number:
            sends = call.populations[number - 1]
            of_state = sends.state is not None and not reach[number - 1]
            if of_state or call.carried or (sends.sent is not None and sends.sent.requires_grad):
                return f"the delayed spikes to population {number} that come from a state have no gradient"
    return None


def refuses_tensors(call: Call, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no kernel for numbers of a dtype can take a call's tensors, or None."""
    for tensor in opened((call.x, call.populations))[0]:
        if not tensor.is_cpu:
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype not in (dtype, torch.bool, torch.int64):  # (delays; x is floating point)
            return f"needs {str(dtype).removeprefix('torch.')} tensors, not {tensor.dtype}"
    return None


def refuses_call(call: Call, unread_fields: Sequence[str]) -> str | None:
    """Why no kernel for several populations that does not read these fields can serve a call, or None."""
    if reason := refuses_kernels(call, unread_fields) or refuses_tensors(call):
        return reason
    if total_steps(call) > MOST_STEPS:
        return f"serves at most {MOST_STEPS} time steps"
    if call.x.numel() == 0:
        return "needs a batch that is not empty"
    return "gives spikes over time no gradient" if call.spikes else too_large(samples=call.x.shape[-2])


def g2g_stack(call: Call, again: Callable[[Call], Activity], chunk: int = 0) -> Activity:
    """Runs a chain, ``chunk`` steps at a time (0: all); ``again`` runs it once more where what delays carry out of it
    has a gradient."""
    of_kernels = StackCall.of(call, torch.bfloat16 if bf16_wanted() else torch.float32, chunk)
    counts, rates, last, _, words, _ = FORWARD(of_kernels)
    trains, late = [], False
    for number, population in enumerate(of_kernels.populations):
        feed = population.connections[0]
        of_chunks = words[number :: len(of_kernels.populations)]
        trains.append([PackedSpikes(each, feed.values.detach(), feed.mask) for each in of_chunks])
        late = late or feed.delay is not None or MODELS[population.neurons.model].compared is not None
    spikes = tuple([ChunkedSpikes(train, chunk) if chunk else train[0] for train in trains])
    activity = Activity(counts, tuple(rates), spikes, states=tuple(last))
    if not late:
        return activity
    sent = [
        LastSpikes(train[-1], reach, number, call, again) if reach else None
        for number, (train, reach) in enumerate(zip(trains, reaches(call.populations)))  # noqa: B905
    ]
    return replaced(activity, sent=(*sent, None))


class LastSpikes(Spikes):
    """What population ``number`` sent in the last ``steps`` of the run of a call with these ``spikes``, and before it.
    ``graph`` runs the call again for the gradient, as a part of a longer run."""

    def __init__(self, spikes: "PackedSpikes", steps: int, number: int, call: Call, graph: Callable) -> None:
        self._spikes, self._steps, self._number, self._call, self._graph = spikes, steps, number, call, graph

    def dense(self) -> torch.Tensor:
        """[D, B, N]; differentiable."""
        tensors, form = opened((self._call.x, self._call.before, self._call.populations))
        differentiable = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
        if differentiable and is_traced():
            raise RuntimeError(
                "compiled code has no gradient through spikes that delays carry from one run of the CPU's chain into "
                "the next; read the state outside of it or under torch.no_grad(), or give backend='torch'"
            )
        spikes, before = self._spikes.dense(self._steps), self._call.populations[self._number].sent
        train = Train(spikes[0], None if before is None else before.detach())
        train.append(spikes)
        sent = train.window(len(spikes) - self._steps, len(spikes))
        if not differentiable:
            return sent

        def again(*given: torch.Tensor) -> list[torch.Tensor]:
            x, before, populations = built(form, given)
            activity = self._graph(replaced(self._call, x=x, before=before, populations=populations, carried=True))
            return [activity.sent[self._number].dense()]

        (sent,) = Recomputed.apply(lambda *given: [sent], again, (), *tensors)
        return sent


def in_float32(
    operator: Callable, current: torch.Tensor, *arguments: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator of neurons alone, whose kernels take no currents of fewer bits, as under autocast; their spikes have
    as many as these."""
    spikes, state = operator(current.to(torch.promote_types(current.dtype, torch.float32)), *arguments, **options)
    return spikes.to(current.dtype), state


def _in_other_order(feed: Connection, recurrent: Connection) -> bool:
    """Whether a recurrent connection orders neurons otherwise than what feeds them: other groups, or other units."""
    mask, own = feed.mask, recurrent.mask
    if is_traced() or type(mask.unit_row) is not torch.Tensor:
        return False  # the operator itself refuses it
    return not _joins(plan_for(mask.tensors(), feed.values), plan_for(own.tensors(), recurrent.values))


def _joins(feed: Plan, recurrent: Plan) -> bool:
    """Whether both sides of a recurrent connection have the lanes of its neurons."""
    lib, of_feed, own = library(), feed.address, recurrent.address
    return bool(lib.g2g_plans_same_rows(of_feed, own) and lib.g2g_plans_aligned(of_feed, own))


class PackedSpikes(Spikes):
    """Spikes of one layer, one bit each."""

    def __init__(self, words: torch.Tensor, values: torch.Tensor, mask: MaskTensors) -> None:
        self._packed = PackedWords(words, values, mask)
        # the order of the neurons and the ranges of units, which load_state_dict may change in place; masks that are
        # traced, or that torch.export has put together again, have no copies
        then = None if torch.compiler.is_compiling() else mask.rows_then
        self._order, self._bounds = then or (mask.row_order.clone(), mask.row_bounds.clone())

    def dense(self, last: int | None = None) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient; of the ``last`` steps, or of all."""
        packed, mask = self._packed, self._packed.mask
        if last is not None:
            packed = packed._replace(words=packed.words[..., -last:])
        # in compiled code nothing is loaded between a run and this
        same = is_traced() or (torch.equal(self._order, mask.row_order) and torch.equal(self._bounds, mask.row_bounds))
        if not same:
            packed = packed._replace(mask=mask._replace(row_order=self._order, row_bounds=self._bounds))
        return UNPACK(packed)


# --- shapes -----------------------------------------------------------------------------------------------------


class _Shapes(NamedTuple):
    """Shapes of the tensors of a call, from those of its tensors alone: they are also asked for while compiling."""

    rates: list[tuple[int, ...]]
    last: list[tuple[int, ...]]
    spikes: list[tuple[int, ...]]
    inputs: list[tuple[int, ...]]
    states: list[tuple[int, ...]]


def _shapes(call: StackCall) -> _Shapes:
    shapes = _Shapes([], [], [], [], [])
    x, call_held = call.x, call.steps > 0
    batch, steps = x.shape[-2], call.steps or x.shape[0]
    for number, population in enumerate(call.populations):
        feed, *recurrent = population.connections
        rows, cols = blocks(feed.mask.grid, feed.values.shape)
        held = call_held and number == 0
        size, states = feed.mask.row_order.shape[0], len(MODELS[population.neurons.model].states)
        shapes.rates.append((size,))
        shapes.last.append((states, batch, size))
        shapes.spikes.append((batch, rows, steps))
        shapes.inputs.append((0,) if held else (batch, cols, steps))
        of_all_steps = (rows, steps, batch) if recurrent else (batch, rows, steps)
        currents_alone = held and not recurrent
        shapes.states.append((rows, batch, 64) if currents_alone else (*of_all_steps, states, 64))
    return shapes


# --- operators --------------------------------------------------------------------------------------------------


INPUT_RATE = attrgetter("input_rate")
#: the numbers of a call, whose ranges are checked where a structure is made
_options = functools.lru_cache(256)(structures.Stack)


class _Arguments:
    """The arguments of a call of the C kernels, and all that must outlive it: what the kernels read and write besides
    the call's own tensors, layer by layer (without states none are kept), and ``to``, its gradients, or None."""

    def __init__(
        self, call: StackCall, spikes: Tensors, inputs: Tensors, states: Tensors | None, to: StackCall | None = None
    ) -> None:
        self.plans: list[Plan] = []
        below: Plan | None = None
        count = len(call.populations)
        self.layers = (structures.Layer * count)()
        lib, held = library(), call.steps > 0
        for number, population in enumerate(call.populations):
            feed, *recurrent = population.connections
            plan = plan_for(feed.mask, feed.values)
            self.plans.append(plan)
            grads = None if to is None else to.populations[number]
            own = structures.Layer(
                plan=plan.address,
                neurons=neuron_arguments(population.neurons, () if grads is None else grads.neurons.parameters),
                spikes=spikes[number].data_ptr(),
                inputs=inputs[number].data_ptr(),
            )
            to_feed = None if grads is None else grads.connections[0]
            for record, to_record, names in ((feed, to_feed, OF_CONNECTION), (population, grads, OF_POPULATION)):
                for name in names:
                    if (tensor := getattr(record, name)) is not None:
                        setattr(own, name, tensor.data_ptr())
                    if to_record is not None and name != "sent" and (grad := getattr(to_record, name)) is not None:
                        setattr(own, f"grad_{name}", grad.data_ptr())
            if population.sent is not None:
                own.sent_steps = len(population.sent)
            if feed.delay is not None and feed.delay.steps is not None:
                own.delays = delays_pointer(number, feed.delay, feed.delay.steps)
                if to_feed is not None and to_feed.delay is not None:
                    own.grad_delays, own.delay_width = pointer(to_feed.delay.learned), feed.delay.width
            if states:
                kept = "currents" if held and number == 0 and not recurrent else "states"
                setattr(own, kept, states[number].data_ptr())
            if recurrent:
                self._join(own, number, recurrent[0], plan)
                if grads is not None:
                    own.grad_recurrent = pointer(grads.connections[1].values)
            if below is not None and feed.delay is None and lib.g2g_plans_aligned(below.address, plan.address):
                own.inputs = spikes[number - 1].data_ptr()
            self.layers[number] = own
            below = plan
        bf16 = call.dtype == torch.bfloat16 and bool(lib.g2g_has_bf16())
        costs = {"event_cost": cpu_library.EVENT_COST, "batch_cost": cpu_library.BATCH_COST}
        costs |= {"subset_cost": cpu_library.SUBSET_COST, "needed_cost": cpu_library.NEEDED_COST}
        batch, _, steps = spikes[0].shape
        sizes = {"count": count, "batch": batch, "steps": steps, "held": held}
        options = _options(**sizes, **costs, threads=torch.get_num_threads(), bf16=bf16)
        self.stack = structures.Stack.from_buffer_copy(options)
        self.stack.layers, self.stack.x = ctypes.addressof(self.layers), call.x.data_ptr()

    def _join(self, own: ctypes.Structure, number: int, recurrent: Connection, plan: Plan) -> None:
        joined = plan_for(recurrent.mask, recurrent.values)
        self.plans.append(joined)
        if not _joins(plan, joined):
            raise ValueError(
                f"the recurrent connection of population {number} has other groups, or other sizes of units, than the "
                "connection to it, which compiled code cannot run on backend cpu; give `backend='torch'`, or "
                "BlockMask.sample(layout, layout, …) that one's mask.rows.layout and block_size"
            )
        own.recurrent, own.recurrent_values = joined.address, recurrent.values.data_ptr()


def delays_pointer(number: int, delay: Delay, steps: torch.Tensor) -> int:
    """The address of delays to population ``number``; ValueError if they were written to and have left their bounds."""
    least, most = (int(each) for each in steps.aminmax())
    if least < delay.least or most > delay.most:
        raise ValueError(
            f"the delays to population {number} are from {least} to {most}, and were from {delay.least} to {delay.most}"
            " when they were checked; load others with load_state_dict"
        )
    return steps.data_ptr()


def _forward(call: StackCall, keep: bool) -> Outputs:
    if call.chunk:
        return forward_in_chunks(_forward, call, keep)
    shapes = _shapes(call)
    spikes, inputs = workspace.exactly(shapes.spikes, torch.int64), workspace.each(shapes.inputs, torch.int64)
    states = workspace.each(shapes.states) if keep else None
    arguments = _Arguments(call, spikes, inputs, states)
    *rates, counts = workspace.each([*shapes.rates, shapes.last[-1][1:]])
    last = workspace.exactly(shapes.last)
    for layer, of_layer, after in zip(arguments.layers, rates, last, strict=True):
        layer.rates, layer.last = of_layer.data_ptr(), after.data_ptr()
    arguments.stack.counts = counts.data_ptr()
    run(library().g2g_stack, arguments.stack)
    if states is None:
        return counts, rates, last, [], spikes, []
    header = [arguments.stack.x_spikes, *map(INPUT_RATE, arguments.layers)]
    return counts, rates, last, [], spikes, [torch.tensor(header, dtype=torch.float64), *inputs, *states]


def _outputs(call: StackCall, keep: bool) -> list[Output | list[Output]]:
    if call.chunk:
        return shapes_in_chunks(_outputs, call, keep)
    shapes = _shapes(call)
    words = [Output(shape, torch.int64) for shape in shapes.spikes]
    rates, last, states = ([*map(Output, each)] for each in (shapes.rates, shapes.last, shapes.states))
    header, inputs = Output((1 + len(words),), torch.float64), [Output(shape, torch.int64) for shape in shapes.inputs]
    return [Output(shapes.last[-1][1:]), rates, last, [], words, [header, *inputs, *states] if keep else []]


def _backward(given: Backward) -> list[torch.Tensor | None]:
    if given.call.chunk:
        return backward_in_chunks(_forward, _backward, given)
    call, kept, (grad_counts, *grads_of_layers), needed = given
    count = len(call.populations)
    spikes, header, inputs, states = kept[:count], kept[count], kept[count + 1 : 2 * count + 1], kept[2 * count + 1 :]
    grads, to = given.made(_gradients)
    arguments = _Arguments(call, spikes, inputs, states, to)
    x_spikes, *input_rates = header.tolist()
    for number, layer in enumerate(arguments.layers):
        grad_rates, grad_last = grads_of_layers[number], grads_of_layers[count + number]
        layer.input_rate = input_rates[number]
        if grad_last is None or not layer.recurrent:  # whose events are those of spikes alone
            layer.gradient_event_limit = _gradient_event_limit(call.populations[number].neurons, arguments.stack.bf16)
        layer.grad_last, layer.grad_rates = pointer(grad_last), pointer(grad_rates)
    stack = arguments.stack
    stack.x_spikes = int(x_spikes)
    stack.grad_counts, stack.grad_x = pointer(grad_counts), pointer(to.x)
    run(library().g2g_stack, stack, backward=True)
    return [grad if need else None for grad, need in zip(grads, needed)]  # noqa: B905


def _gradients(tensors: Tensors, needed: Sequence[bool]) -> list[torch.Tensor | None]:
    """Memory for gradients: the kernels always write those of layers."""
    return workspace.alike(tensors, [needed[0], *[tensor.is_floating_point() for tensor in tensors[1:]]])


def _gradient_event_limit(neurons: Neurons, bf16: bool) -> float:
    """The share of events up to which these neurons' input gradient is computed by events; 0: never (logged)."""
    model, parameters, reset, surrogate, _ = neurons
    reason = _why_product(model, reset, surrogate, parameters[0].numel() > 1)
    return 0.0 if reason else GRADIENT_EVENT_LIMIT[bool(bf16)]


@functools.cache
def _why_product(model: str, reset: str, surrogate: str, per_neuron: bool) -> str | None:
    reasons = {
        f"gradients of surrogate {surrogate!r} reach every neuron": not SURROGATES[surrogate].compact,
        f"gradients of neuron {model!r} do not decay by one factor alone": not MODELS[model].event_gradients,
        "gradients pass through reset 'zero'": reset == "zero",
        "each neuron has its own beta": per_neuron,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    path = f"the product: {reason}" if reason else "events where these are few"
    logger.debug("input gradients are computed by %s", path)
    return reason


class PackedWords(NamedTuple):
    """Spikes of a layer as words, and its values and mask, which say what the bits stand for."""

    words: torch.Tensor
    values: torch.Tensor
    mask: MaskTensors

    def expected(self) -> Expected:
        """What the kernel takes for granted."""
        batch, _, steps = self.words.shape
        rows, _ = blocks(self.mask.grid, tuple(self.values.shape))
        yield "words", self.words, (batch, rows, steps), torch.int64
        yield "values", self.values, self.values.shape, torch.float32


TYPES["PackedWords"] = PackedWords


def _unpack(packed: PackedWords) -> torch.Tensor:
    words, values, mask = packed
    plan = plan_for(mask, values)
    batch, _, steps = words.shape
    spikes = workspace.empty((steps, batch, mask.shape[0]))
    words = words.contiguous()  # which lives until the kernel has read it
    library().g2g_unpack(plan.address, words.data_ptr(), batch, steps, torch.get_num_threads(), spikes.data_ptr())
    return spikes


def _unpack_fake(packed: PackedWords) -> torch.Tensor:
    batch, _, steps = packed.words.shape
    return packed.values.new_empty(steps, batch, packed.mask.shape[0])


FORWARD = operator_of("", ("CPU",), _forward, _backward, _outputs)
UNPACK = RecordOperator("unpack_spikes", "Tensor", _unpack, _unpack_fake)
