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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu import plans
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import (
    bf16_wanted,
    library,
    pointer,
    run,
    too_large,
)
from g2g_kernels.cpu.plans import Plan, blocks, plan_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops import record
from g2g_kernels.ops.g2g_linear.cpu import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity
from g2g_kernels.ops.g2g_stack.call import Outputs, StackBackward, StackCall, StackGradients, operators
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.g2g_stack.reference import activity_of, in_turn
from g2g_kernels.ops.neurons import cpu as neurons_alone
from g2g_kernels.ops.neurons.cpu import neuron_arguments
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.tracing import is_traced

logger = logging.getLogger("g2g_kernels")

#: rows of a chunk are numbered in 16 bits
MOST_STEPS = 1 << 16

#: The input gradient of a layer is computed by events up to this share of neurons that a gradient reaches through their
#: own spikes (True: under bfloat16), where the product multiplies as many rows of weights as events may have to; the
#: kernels scale it by how many (``EventRuns.ratio``).
GRADIENT_EVENT_LIMIT = {False: 0.35, True: 0.23}

Tensors = Sequence[torch.Tensor]


def refuses(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    for tensor in (x, *[tensor for layer in layers for tensor in layer.tensors()]):
        if not tensor.is_cpu:
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"needs float32 tensors, not {tensor.dtype}"
    if any([layer.dropped is not None and not layer.dropped.is_cpu for layer in layers]):
        return "needs tensors on the CPU, dropped among them"
    if (steps or len(x)) > MOST_STEPS:
        return f"serves at most {MOST_STEPS} time steps"
    if x.numel() == 0:
        return "needs a batch that is not empty"
    for layer in layers:
        for values, mask in layer.connections():
            if reason := plans.refuses(mask, values):
                return reason
    return too_large(samples=x.shape[-2])


def g2g_stack(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    if any(layer.recurrent is not None and _in_other_order(layer) for layer in layers):
        _say_that_it_takes_steps()
        return activity_of(*in_turn(x, layers, steps, g2g_linear, neurons_alone.neurons), differentiable=False)
    call = StackCall.of(x, layers, steps, torch.bfloat16 if bf16_wanted() else torch.float32)
    counts, rates, last, words, _ = FORWARD(call)
    spikes = [PackedSpikes(each, layer.values.detach(), layer.mask) for each, layer in zip(words, call.layers)]  # noqa: B905
    return Activity(counts, tuple(rates), tuple(spikes), states=tuple(last))


def _in_other_order(layer: SpikingLayer) -> bool:
    """Whether a recurrent connection orders the neurons otherwise than the layer: other groups, or other units."""
    assert layer.recurrent is not None
    (values, mask), (own_values, own) = (layer.values, layer.mask), layer.recurrent
    if is_traced() or type(mask.unit_row) is not torch.Tensor:
        return False  # the operator itself refuses it
    plan, recurrent = plan_for(mask.tensors(), values), plan_for(own.tensors(), own_values)
    return not library().g2g_plans_join(plan.address, recurrent.address)


@functools.cache
def _say_that_it_takes_steps() -> None:
    logger.warning(
        "a recurrent layer runs step by step, which is slower: its recurrent connection has other groups, or other "
        "sizes of units, than the connection to the layer; give BlockMask.sample(layout, layout, …) that one's "
        "mask.rows.layout and block_size"
    )


class PackedSpikes:
    """Spikes of one layer, one bit each."""

    def __init__(self, words: torch.Tensor, values: torch.Tensor, mask: MaskTensors) -> None:
        self._packed = PackedWords(words, values, mask)
        # the order of the neurons and the ranges of units, which load_state_dict may change in place
        self._order, self._bounds = mask.rows_then()

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        packed, mask = self._packed, self._packed.mask
        if not (torch.equal(self._order, mask.row_order) and torch.equal(self._bounds, mask.row_bounds)):
            packed = packed._replace(mask=mask._replace(row_order=self._order, row_bounds=self._bounds))
        return UNPACK(packed)


# --- shapes -----------------------------------------------------------------------------------------------------


class _Shapes(NamedTuple):
    """Shapes of the tensors of a call, from those of its tensors alone: they are also asked for while compiling."""

    spikes: list[tuple[int, ...]]
    inputs: list[tuple[int, ...]]
    states: list[tuple[int, ...]]


def _shapes(call: StackCall) -> _Shapes:
    shapes = _Shapes([], [], [])
    batch, steps = call.batch, call.num_steps
    for number, (values, mask, _, population, _, _, recurrent) in enumerate(call.layers):
        _, height, width = values.shape
        rows, cols = mask.grid
        rows, cols = blocks(rows, height), blocks(cols, width)
        held = call.held and number == 0
        shapes.spikes.append((batch, rows, steps))
        shapes.inputs.append((0,) if held else (batch, cols, steps))
        states = len(MODELS[population.model].states)
        of_all_steps = (batch, rows, steps) if recurrent is None else (rows, steps, batch)
        currents_alone = held and recurrent is None
        shapes.states.append((rows, batch, 64) if currents_alone else (*of_all_steps, states, 64))
    return shapes


# --- operators --------------------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """What the kernels read and write besides the call's own tensors, layer by layer; no states: none are kept."""

    spikes: Tensors
    inputs: Tensors
    states: Tensors | None


class _Arguments:
    """The arguments of one call of the C kernels, and everything that must outlive it."""

    def __init__(self, call: StackCall, memory: _Memory, grads: Sequence[Tensors] | None = None) -> None:
        self.plans: list[Plan] = []
        below: Plan | None = None
        self.layers = (structures.Layer * len(call.layers))()
        for number, (values, mask, bias, population, dropped, state, recurrent) in enumerate(call.layers):
            joined = None if recurrent is None else recurrent.values
            for tensor in (call.x, values, bias, state, joined, *population.parameters):
                if tensor is not None and not (
                    tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.is_cpu
                ):
                    raise ValueError("the compiled kernels need contiguous float32 tensors on the CPU")
            plan = plan_for(mask, values)
            kept = pointer(memory.states[number]) if memory.states else None
            currents_alone = call.held and number == 0 and recurrent is None
            self.layers[number] = structures.Layer(
                plan=plan.address,
                values=pointer(values),
                bias=pointer(bias),
                neurons=neuron_arguments(population, grads[number] if grads else None),
                spikes=pointer(memory.spikes[number]),
                inputs=pointer(memory.inputs[number]),
                states=None if currents_alone else kept,
                currents=kept if currents_alone else None,
                dropped=pointer(dropped),
                first=pointer(state),
            )
            if recurrent is not None:
                self.plans.append(plan_for(recurrent.mask, recurrent.values))
                if not library().g2g_plans_join(plan.address, self.plans[-1].address):
                    raise ValueError(
                        f"the recurrent connection of layer {number} has other groups, or other sizes of units, than "
                        "the connection to the layer, which compiled code cannot run on backend cpu; give "
                        "`backend='torch'`, or BlockMask.sample(layout, layout, …) that one's mask.rows.layout and "
                        "block_size"
                    )
                self.layers[number].recurrent = self.plans[-1].address
                self.layers[number].recurrent_values = pointer(recurrent.values)
            if below is not None and _aligned(below, plan):
                self.layers[number].inputs = self.layers[number - 1].spikes
            below = plan
            self.plans.append(plan)
        self.stack = structures.Stack(
            layers=ctypes.addressof(self.layers),
            count=len(call.layers),
            batch=call.batch,
            steps=call.num_steps,
            threads=torch.get_num_threads(),
            bf16=call.dtype == torch.bfloat16 and library().g2g_has_bf16(),
            held=call.held,
            event_cost=cpu_library.EVENT_COST,
            batch_cost=cpu_library.BATCH_COST,
            subset_cost=cpu_library.SUBSET_COST,
            needed_cost=cpu_library.NEEDED_COST,
            x=call.x.data_ptr(),
        )


def _aligned(lower: Plan, upper: Plan) -> bool:
    return bool(library().g2g_plans_aligned(lower.address, upper.address))


def _forward(call: StackCall) -> Outputs:
    shapes = _shapes(call)
    spikes = [workspace.exactly(shape, torch.int64) for shape in shapes.spikes]
    inputs = [workspace.empty(shape, torch.int64) for shape in shapes.inputs]
    states = [workspace.empty(shape) for shape in shapes.states] if call.keep else None
    arguments = _Arguments(call, _Memory(spikes, inputs, states))
    counts = workspace.empty((call.batch, call.layers[-1].size))
    rates = [workspace.empty((layer.size,)) for layer in call.layers]
    last = [workspace.exactly(call.state_shape(layer)) for layer in call.layers]
    for layer, of_layer, after in zip(arguments.layers, rates, last, strict=True):
        layer.rates, layer.last = of_layer.data_ptr(), after.data_ptr()
    arguments.stack.counts = counts.data_ptr()
    run(library().g2g_stack_forward, arguments.stack)
    if states is None:
        return counts, rates, last, spikes, []
    header = [arguments.stack.x_spikes, *(layer.input_rate for layer in arguments.layers)]
    return counts, rates, last, spikes, [torch.tensor(header, dtype=torch.float64), *inputs, *states]


def _forward_fake(call: StackCall) -> Outputs:
    shapes, x = _shapes(call), call.x
    kept = []
    if call.keep:
        kept = [
            x.new_empty(1 + len(call.layers), dtype=torch.float64),
            *(x.new_empty(shape, dtype=torch.int64) for shape in shapes.inputs),
            *(x.new_empty(shape) for shape in shapes.states),
        ]
    spikes = [x.new_empty(shape, dtype=torch.int64) for shape in shapes.spikes]
    rates = [x.new_empty(layer.size) for layer in call.layers]
    last = [x.new_empty(call.state_shape(layer)) for layer in call.layers]
    return x.new_empty(call.batch, call.layers[-1].size), rates, last, spikes, kept


def _backward(backward: StackBackward) -> StackGradients:
    call, shapes, count = backward.call, _shapes(backward.call), len(backward.call.layers)
    header, inputs, states = backward.kept[0], backward.kept[1 : 1 + count], backward.kept[1 + count :]
    for tensors, expected in ((backward.spikes, shapes.spikes), (inputs, shapes.inputs), (states, shapes.states)):
        if [tuple(tensor.shape) for tensor in tensors] != expected:
            raise ValueError("spikes and kept are not those of a forward pass over these tensors")
    grads = call.empty_gradients(backward.grad_x, workspace.like)
    arguments = _Arguments(call, _Memory(backward.spikes, inputs, states), grads.parameters)
    x_spikes, *input_rates = header.tolist()
    of_layers = zip(arguments.layers, backward.grad_rates, backward.grad_last, strict=True)
    for number, (layer, grad_rates, grad_last) in enumerate(of_layers):
        layer.input_rate = input_rates[number]
        if grad_last is None:  # which reaches the currents through no event
            layer.gradient_event_limit = _gradient_event_limit(call.layers[number].population, arguments.stack.bf16)
        layer.grad_last, layer.grad_first = pointer(grad_last), pointer(grads.states[number])
        layer.grad_rates = pointer(grad_rates)
        layer.grad_values, layer.grad_bias = pointer(grads.values[number]), pointer(grads.biases[number])
        layer.grad_recurrent = pointer(grads.recurrents[number])
    stack = arguments.stack
    stack.x_spikes = int(x_spikes)
    stack.grad_counts, stack.grad_x = pointer(backward.grad_counts), pointer(grads.x)
    run(library().g2g_stack_backward, stack)
    return grads


def _gradient_event_limit(population: Neurons, bf16: bool) -> float:
    """The share of events up to which the input gradient of a layer with these neurons is computed by events.

    0 if it always takes the product; the reason is logged once.
    """
    model, parameters, reset, surrogate, _ = population
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

    def flat(self) -> tuple[Any, ...]:
        return self.words, self.values, list(self.mask)

    @classmethod
    def of_flat(cls, words: Any, values: Any, mask: Any) -> "PackedWords":
        return cls(words, values, MaskTensors(*mask))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those that are not the mask's."""
        return self.words, self.values


def _unpack(packed: PackedWords) -> torch.Tensor:
    words, values, mask = packed
    plan = plan_for(mask, values)
    if words.dtype != torch.int64 or words.dim() != 3 or words.shape[1] != library().g2g_plan_row_blocks(plan.address):
        raise ValueError("words are not the spikes of this layer")
    batch, _, steps = words.shape
    spikes = workspace.empty((steps, batch, mask.shape[0]))
    library().g2g_unpack(
        plan.address, words.contiguous().data_ptr(), batch, steps, torch.get_num_threads(), spikes.data_ptr()
    )
    return spikes


def _unpack_fake(packed: PackedWords) -> torch.Tensor:
    batch, _, steps = packed.words.shape
    return packed.values.new_empty(steps, batch, packed.mask.shape[0])


FORWARD, BACKWARD = operators("", ("CPU",), _forward, _forward_fake, _backward)
UNPACK = record.define(
    "unpack_spikes(Tensor words, Tensor values, Tensor[] mask) -> Tensor", PackedWords, _unpack, _unpack_fake
)
