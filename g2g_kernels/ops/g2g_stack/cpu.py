"""``g2g_stack`` on the compiled CPU kernels: the whole stack of layers, forward and backward, in one call each.

Three ``torch.library`` operators: ``g2g::stack_forward`` (with its autograd formula), ``g2g::stack_backward`` and
``g2g::unpack_spikes``. What the forward pass keeps for the backward pass travels in two int64 tensors:

    spikes  the spike words of every layer, [B][row blocks][T] one after the other
    state   input rates and what kind of input x was, then the spike words that each layer reads in its own order, then
            float32 membranes [B][row blocks][T][64] of every layer (for a held input, currents [row blocks][B][64])
"""

import ctypes
from collections.abc import Sequence

import torch

from g2g_kernels.cpu import plans
from g2g_kernels.cpu.library import (
    LayerArguments,
    StackArguments,
    bf16_wanted,
    event_limit,
    gradient_event_limit,
    library,
    neuron_arguments,
    pointer,
    run,
)
from g2g_kernels.cpu.plans import INDICES, Plan, blocks, indices, plan_for
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.g2g_stack.activity import Activity
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer

#: rows of a chunk are numbered in 16 bits
MOST_STEPS = 1 << 16

Tensors = Sequence[torch.Tensor]

_HEADER = 64  # int64 words at the start of `state`


def refuses(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    first = layers[0].neurons
    for layer in layers:
        if layer.neurons.model != "lif" or layer.neurons.surrogate == "boxcar":
            return "serves LIF neurons, with every surrogate but boxcar"
        if layer.neurons[2:] != first[2:]:
            return "needs one reset, surrogate and alpha for all layers"
    for tensor in (x, *(tensor for layer in layers for tensor in layer.tensors())):
        if tensor.device.type != "cpu":
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"needs float32 tensors, not {tensor.dtype}"
    if len(layers) > _HEADER - 2:
        return f"serves at most {_HEADER - 2} layers"
    if (steps or len(x)) > MOST_STEPS:
        return f"serves at most {MOST_STEPS} time steps"
    if x.numel() == 0:
        return "needs a batch that is not empty"
    return next(filter(None, (plans.refuses(layer.values) for layer in layers)), None)


def g2g_stack(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    _, _, reset, surrogate, alpha = layers[0].neurons
    num_steps, batch = (steps, x.shape[0]) if steps is not None else (x.shape[0], x.shape[1])
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    all_indices = [tensor for layer in layers for tensor in indices(layer.mask)]
    counts, rates, words, _ = torch.ops.g2g.stack_forward(
        x.contiguous(),
        [layer.values.contiguous() for layer in layers],
        [layer.values.new_empty(0) if layer.bias is None else layer.bias.contiguous() for layer in layers],
        [layer.neurons.parameters[0].reshape(-1).contiguous() for layer in layers],
        [layer.neurons.parameters[1].reshape(-1).contiguous() for layer in layers],
        all_indices,
        steps or 0,
        reset,
        surrogate,
        alpha,
        bf16_wanted(),
        keep,
    )
    rates_of = rates.split([layer.mask.shape[0] for layer in layers])
    row_blocks = [blocks(*_rows(layer.values, all_indices, i)) for i, layer in enumerate(layers)]
    words_of = words.split([batch * number * num_steps for number in row_blocks])
    spikes = tuple(
        PackedSpikes(words_of[i], layer.values.detach(), all_indices[i * INDICES : (i + 1) * INDICES], batch, num_steps)
        for i, layer in enumerate(layers)
    )
    return Activity(counts, tuple(rates_of), spikes)


class PackedSpikes:
    """Spikes of one layer, one bit each."""

    def __init__(
        self, words: torch.Tensor, values: torch.Tensor, mask_indices: list[torch.Tensor], batch: int, steps: int
    ) -> None:
        self._words = words
        self._values, self._indices = values, mask_indices
        # the order of the neurons and the ranges of units, which load_state_dict may change in place
        self._rows = [tensor.clone() for tensor in mask_indices[2:4]]
        self._batch, self._steps = batch, steps

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        tensors = self._indices
        if not all(map(torch.equal, self._rows, tensors[2:4])):
            tensors = [*tensors[:2], *self._rows, *tensors[4:]]
        return torch.ops.g2g.unpack_spikes(self._words, self._values, tensors, self._batch, self._steps)


# --- sizes ------------------------------------------------------------------------------------------------------


def _rows(values: torch.Tensor, all_indices: Tensors, layer: int) -> tuple[int, int]:
    """(unit ranges, their width) of a layer's output side."""
    return all_indices[layer * INDICES + 3].shape[0] - 1, values.shape[1]


def _cols(values: torch.Tensor, all_indices: Tensors, layer: int) -> tuple[int, int]:
    return all_indices[layer * INDICES + 5].shape[0] - 1, values.shape[2]


class _Sizes:
    """Shapes of a stack, from tensor shapes alone (they are also asked for while compiling)."""

    def __init__(self, x: torch.Tensor, values: Tensors, all_indices: Tensors, held: int):
        self.held = held > 0
        self.steps, self.batch = (held, x.shape[0]) if self.held else (x.shape[0], x.shape[1])
        layers = range(len(values))
        self.row_blocks = [blocks(*_rows(values[i], all_indices, i)) for i in layers]
        self.col_blocks = [blocks(*_cols(values[i], all_indices, i)) for i in layers]
        self.neurons = [all_indices[i * INDICES + 2].shape[0] for i in layers]
        words = self.batch * self.steps
        self.spikes = [words * number for number in self.row_blocks]
        self.inputs = [words * number for number in self.col_blocks]
        self.inputs[0] = 0 if self.held else self.inputs[0]
        self.kept = [self.spikes[i] * 32 for i in layers]
        if self.held:
            self.kept[0] = self.batch * self.row_blocks[0] * 32

    def state(self, keep: bool) -> int:
        return _HEADER + sum(self.inputs) + (sum(self.kept) if keep else 0)


# --- operators --------------------------------------------------------------------------------------------------

_library = torch.library.Library("g2g", "FRAGMENT")
_library.define(
    "stack_forward(Tensor x, Tensor[] values, Tensor[] biases, Tensor[] betas, Tensor[] thresholds, Tensor[] indices, "
    "int steps, str reset, str surrogate, float alpha, bool bf16, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "stack_backward(Tensor? grad_counts, Tensor? grad_rates, Tensor x, Tensor[] values, Tensor[] biases, "
    "Tensor[] betas, Tensor[] thresholds, Tensor[] indices, Tensor spikes, Tensor state, int steps, str reset, "
    "str surrogate, float alpha, bool bf16, bool grad_x) -> Tensor[]"
)
_library.define("unpack_spikes(Tensor words, Tensor values, Tensor[] indices, int batch, int steps) -> Tensor")


class _Call:
    """The arguments of one call of the C kernels, and everything that must outlive it."""

    def __init__(
        self,
        x: torch.Tensor,
        values: Tensors,
        biases: Tensors,
        betas: Tensors,
        thresholds: Tensors,
        all_indices: Tensors,
        held: int,
        reset: str,
        surrogate: str,
        alpha: float,
        bf16: bool,
        spikes: torch.Tensor,
        state: torch.Tensor,
    ) -> None:
        count = len(values)
        if not (len(biases) == len(betas) == len(thresholds) == count and len(all_indices) == count * INDICES):
            raise ValueError("a stack needs as many biases, betas, thresholds and masks as values")
        self.sizes = sizes = _Sizes(x, values, all_indices, held)
        self.plans = [plan_for(all_indices[i * INDICES : (i + 1) * INDICES], values[i]) for i in range(count)]
        self.layers = (LayerArguments * count)()
        self.stack = StackArguments(
            layers=ctypes.addressof(self.layers),
            count=count,
            batch=sizes.batch,
            steps=sizes.steps,
            threads=torch.get_num_threads(),
            bf16=bf16 and library().g2g_has_bf16(),
            held=sizes.held,
            x=x.data_ptr(),
        )
        keep = state.numel() == sizes.state(True)
        inputs_at = state.data_ptr() + _HEADER * 8
        kept_at = inputs_at + sum(sizes.inputs) * 8
        spikes_at = spikes.data_ptr()
        width = x.shape[-1]
        for i, layer in enumerate(self.layers):
            out_size, in_size = sizes.neurons[i], all_indices[i * INDICES + 4].shape[0]
            if in_size != width:
                raise ValueError(f"layer {i} has {in_size} inputs but receives {width}")
            width = out_size
            for name, tensor, allowed in (
                ("bias", biases[i], (0, out_size)),
                ("beta", betas[i], (1, out_size)),
                ("threshold", thresholds[i], (1, out_size)),
            ):
                if tensor.numel() not in allowed:
                    raise ValueError(f"{name} of layer {i} has {tensor.numel()} entries, expected one of {allowed}")
            for tensor in (x, values[i], biases[i], betas[i], thresholds[i]):
                if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
                    raise ValueError("the compiled kernels need contiguous float32 tensors on the CPU")
            layer.plan = self.plans[i].address
            layer.values, layer.bias = pointer(values[i]), pointer(biases[i])
            layer.neurons = neuron_arguments("lif", reset, surrogate, alpha, (betas[i], thresholds[i]))
            layer.spikes, layer.inputs = spikes_at, inputs_at
            layer.kept = kept_at if keep else None
            if i and _aligned(self.plans[i - 1], self.plans[i]):
                layer.inputs = self.layers[i - 1].spikes
            spikes_at += sizes.spikes[i] * 8
            inputs_at += sizes.inputs[i] * 8
            kept_at += sizes.kept[i] * 8


def _aligned(lower: Plan, upper: Plan) -> bool:
    return bool(library().g2g_plans_aligned(lower.address, upper.address))


def _forward(
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    bf16: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if not values or len(all_indices) != INDICES * len(values):
        raise ValueError(f"{len(values)} layers need {INDICES * len(values)} tensors of masks, not {len(all_indices)}")
    sizes = _Sizes(x, values, all_indices, steps)
    spikes = workspace.empty((sum(sizes.spikes),), torch.int64)
    state = workspace.empty((sizes.state(keep),), torch.int64)
    call = _Call(x, values, biases, betas, thresholds, all_indices, steps, reset, surrogate, alpha, bf16, spikes, state)
    counts = workspace.empty((sizes.batch, sizes.neurons[-1]))
    rates = workspace.empty((sum(sizes.neurons),))
    place = rates.data_ptr()
    for layer, neurons in zip(call.layers, sizes.neurons, strict=True):
        layer.rates = place
        place += neurons * 4
    call.stack.counts = counts.data_ptr()
    call.stack.event_limit = event_limit(call.stack.bf16, backward=False)
    run(library().g2g_stack_forward, call.stack)
    if not keep:
        return counts, rates, spikes, state.new_empty(0)
    state[0] = call.stack.x_spikes
    header = state[1 : 1 + len(values)].view(torch.float64)
    header.copy_(torch.tensor([layer.input_rate for layer in call.layers], dtype=torch.float64))
    return counts, rates, spikes, state


def _forward_fake(
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    bf16: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sizes = _Sizes(x, values, all_indices, steps)
    return (
        x.new_empty(sizes.batch, sizes.neurons[-1]),
        x.new_empty(sum(sizes.neurons)),
        x.new_empty(sum(sizes.spikes), dtype=torch.int64),
        x.new_empty(sizes.state(True) if keep else 0, dtype=torch.int64),
    )


def _backward(
    grad_counts: torch.Tensor | None,
    grad_rates: torch.Tensor | None,
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    spikes: torch.Tensor,
    state: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    bf16: bool,
    grad_x: bool,
) -> list[torch.Tensor]:
    call = _Call(x, values, biases, betas, thresholds, all_indices, steps, reset, surrogate, alpha, bf16, spikes, state)
    sizes, stack = call.sizes, call.stack
    if state.numel() != sizes.state(True) or spikes.numel() != sum(sizes.spikes):
        raise ValueError("spikes and state are not those of a forward pass over these tensors")
    stack.x_spikes = int(state[0])
    stack.event_limit = event_limit(stack.bf16, backward=True)
    grads = [workspace.empty(tuple(t.shape)) for group in (values, biases, betas, thresholds) for t in group]
    number = len(values)
    place = grad_rates.data_ptr() if grad_rates is not None else 0
    input_rates = state[1 : 1 + number].view(torch.float64).tolist()
    for i, layer in enumerate(call.layers):
        layer.input_rate = input_rates[i]
        layer.gradient_event_limit = gradient_event_limit(layer.neurons, stack.bf16)
        layer.grad_rates = place + sum(sizes.neurons[:i]) * 4 if place else None
        parameters = layer.neurons.parameters
        layer.grad_values, layer.grad_bias, parameters[0].grad, parameters[1].grad = (
            pointer(grad) for grad in grads[i::number]
        )
    stack.grad_counts = pointer(grad_counts)
    dx = workspace.empty(tuple(x.shape)) if grad_x else x.new_empty(0)
    stack.grad_x = pointer(dx)
    run(library().g2g_stack_backward, stack)
    return [dx, *grads]


def _backward_fake(
    grad_counts: torch.Tensor | None,
    grad_rates: torch.Tensor | None,
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    spikes: torch.Tensor,
    state: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    bf16: bool,
    grad_x: bool,
) -> list[torch.Tensor]:
    groups = (values, biases, betas, thresholds)
    return [x.new_empty(x.shape if grad_x else 0), *(t.new_empty(t.shape) for group in groups for t in group)]


def _unpack(words: torch.Tensor, values: torch.Tensor, mask_indices: Tensors, batch: int, steps: int) -> torch.Tensor:
    plan = plan_for(mask_indices, values)
    neurons = mask_indices[2].shape[0]
    if words.dtype != torch.int64 or words.numel() != batch * steps * library().g2g_plan_row_blocks(plan.address):
        raise ValueError("words are not the spikes of this layer")
    spikes = workspace.empty((steps, batch, neurons))
    library().g2g_unpack(
        plan.address, words.contiguous().data_ptr(), batch, steps, torch.get_num_threads(), spikes.data_ptr()
    )
    return spikes


def _unpack_fake(
    words: torch.Tensor, values: torch.Tensor, mask_indices: Tensors, batch: int, steps: int
) -> torch.Tensor:
    return values.new_empty(steps, batch, mask_indices[2].shape[0])


def _setup_context(ctx, inputs, output):
    x, values, biases, betas, thresholds, all_indices, *options, _ = inputs
    _, _, spikes, state = output
    ctx.set_materialize_grads(False)
    ctx.number = len(values)
    ctx.options = options
    ctx.save_for_backward(x, spikes, state, *values, *biases, *betas, *thresholds, *all_indices)


def _autograd(ctx, grad_counts, grad_rates, _spikes, _state):
    x, spikes, state, *rest = ctx.saved_tensors
    number = ctx.number
    groups = [rest[i * number : (i + 1) * number] for i in range(4)]
    all_indices = rest[4 * number :]
    if grad_counts is None and grad_rates is None:
        return (None,) * 12
    dx, *grads = torch.ops.g2g.stack_backward(
        None if grad_counts is None else grad_counts.contiguous(),
        None if grad_rates is None else grad_rates.contiguous(),
        x, *groups, all_indices, spikes, state, *ctx.options, ctx.needs_input_grad[0],
    )  # fmt: skip
    parts = [grads[i * number : (i + 1) * number] for i in range(4)]
    return (dx if ctx.needs_input_grad[0] else None, *parts, [None] * len(all_indices), *(None,) * 6)


for _name, _function, _fake in (
    ("stack_forward", _forward, _forward_fake),
    ("stack_backward", _backward, _backward_fake),
    ("unpack_spikes", _unpack, _unpack_fake),
):
    _library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"g2g::{_name}", _fake, lib=_library)
torch.library.register_autograd("g2g::stack_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("g2g::stack_backward", refuse_backward, lib=_library)
