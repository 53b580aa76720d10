"""A call of ``g2g_stack`` in the form of the compiled backends' operators, and their registration."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops import record
from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.neurons.models import MODELS, Neurons

#: counts [B, N] of the last layer; of each layer rates [N], states after the last step [states, B, N], and spikes; and
#: what the backward pass needs
Outputs = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


class RecurrentCall(NamedTuple):
    """A :class:`Recurrent`, its values contiguous and its mask as tensors."""

    values: torch.Tensor
    mask: MaskTensors


class LayerCall(NamedTuple):
    """A :class:`SpikingLayer`, its tensors contiguous and its mask as tensors."""

    values: torch.Tensor
    mask: MaskTensors
    bias: torch.Tensor | None
    population: Neurons
    dropped: torch.Tensor | None
    state: torch.Tensor | None = None
    recurrent: RecurrentCall | None = None

    @property
    def size(self) -> int:
        """The number of its neurons."""
        return self.mask.shape[0]


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _unless_empty(tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor if tensor.numel() else None


class StackCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        x: contiguous [T, B, in], or [B, in] held for ``steps`` steps.
        layers: from input to output.
        steps: 0 if x has a time dimension.
        dtype: of the factors of products: bfloat16 or float16 under autocast.
        keep: whether to return what the backward pass needs.
    """

    x: torch.Tensor
    layers: tuple[LayerCall, ...]
    steps: int
    dtype: torch.dtype
    keep: bool

    @classmethod
    def of(cls, x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, dtype: torch.dtype) -> "StackCall":
        """The call with these arguments of the public function."""
        tensors = [tensor for layer in layers for tensor in layer.tensors()]
        keep = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (x, *tensors)])
        called = []
        for values, mask, bias, population, dropped, state, recurrent, *_ in layers:
            parameters = tuple([parameter.reshape(-1).contiguous() for parameter in population.parameters])
            bias = None if bias is None else bias.contiguous()
            dropped = None if dropped is None else dropped.contiguous()
            population = population.with_parameters(parameters)
            state = None if state is None else state.float().contiguous()
            joined = None if recurrent is None else RecurrentCall(recurrent[0].contiguous(), recurrent[1].tensors())
            called.append(LayerCall(values.contiguous(), mask.tensors(), bias, population, dropped, state, joined))
        return cls(x.contiguous(), tuple(called), steps or 0, dtype, keep)

    def flat(self) -> tuple[Any, ...]:
        x, layers, steps, dtype, keep = self
        populations = [layer.population for layer in layers]
        return (
            x,
            [layer.values for layer in layers],
            [tensor for layer in layers for tensor in layer.mask],
            [_or_empty(layer.bias, layer.values) for layer in layers],
            [each.model for each in populations],
            [parameter for each in populations for parameter in each.parameters],
            [each.reset for each in populations],
            [each.surrogate for each in populations],
            [each.alpha for each in populations],
            [_or_empty(layer.dropped, layer.values) for layer in layers],
            [_or_empty(layer.state, layer.values) for layer in layers],
            [_or_empty(layer.recurrent and layer.recurrent.values, layer.values) for layer in layers],
            [tensor for layer in layers if layer.recurrent for tensor in layer.recurrent.mask],
            steps,
            dtype,
            keep,
        )

    @classmethod
    def of_flat(cls, *arguments: Any) -> "StackCall":
        x, values, masks, biases, models, parameters, resets, surrogates, alphas, dropped, states, *rest = arguments
        recurrents, recurrent_masks, *rest = rest
        masks, recurrent_masks, parameters, layers = iter(masks), iter(recurrent_masks), iter(parameters), []
        for i, model in enumerate(models):
            mask = MaskTensors(*islice(masks, len(MaskTensors._fields)))
            own = tuple(islice(parameters, len(MODELS[model].parameters)))
            population = Neurons(model, own, resets[i], surrogates[i], alphas[i])
            bias, silent, state = (_unless_empty(optional[i]) for optional in (biases, dropped, states))
            joined = None
            if recurrents[i].dim() == 3:  # values, even if there are none
                joined = RecurrentCall(recurrents[i], MaskTensors(*islice(recurrent_masks, len(MaskTensors._fields))))
            layers.append(LayerCall(values[i], mask, bias, population, silent, state, joined))
        call = cls(x, tuple(layers), *rest)
        call.check()  # which the public function does for its callers
        return call

    def tensors(self) -> list[torch.Tensor | None]:
        """Those that may need a gradient in the order of :class:`StackGradients`, then what else a pass reads."""
        layers = self.layers
        return [
            self.x,
            *[layer.values for layer in layers],
            *[layer.bias for layer in layers],
            *[layer.state for layer in layers],
            *[layer.recurrent and layer.recurrent.values for layer in layers],
            *[parameter for layer in layers for parameter in layer.population.parameters],
            *[layer.dropped for layer in layers],
            *[layer.mask.unit_row for layer in layers],
            *[layer.recurrent and layer.recurrent.mask.unit_row for layer in layers],
        ]

    def with_tensors(self, tensors: Sequence[Any]) -> "StackCall":
        """The call with these tensors in place of :meth:`tensors`; masks stay."""
        each = iter(tensors)
        count = len(self.layers)
        x = next(each)
        values, biases, states, recurrents = (list(islice(each, count)) for _ in range(4))
        parameters = [tuple(islice(each, len(layer.population.parameters))) for layer in self.layers]
        layers = [
            LayerCall(
                values[i],
                layer.mask,
                biases[i],
                layer.population.with_parameters(parameters[i]),
                next(each),
                states[i],
                layer.recurrent and RecurrentCall(recurrents[i], layer.recurrent.mask),
            )
            for i, layer in enumerate(self.layers)
        ]
        return StackCall(x, tuple(layers), self.steps, self.dtype, self.keep)

    @property
    def held(self) -> bool:
        """Whether x is the same at all steps."""
        return self.steps > 0

    @property
    def num_steps(self) -> int:
        """T."""
        return self.steps or self.x.shape[0]

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[-2]

    def state_shape(self, layer: LayerCall) -> tuple[int, int, int]:
        """[states, B, N]."""
        return len(MODELS[layer.population.model].states), self.batch, layer.size

    def check(self) -> None:
        """Raises ValueError unless the sizes of layers, biases and parameters match."""
        width = self.x.shape[-1]
        for number, layer in enumerate(self.layers):
            size, inputs = layer.mask.shape
            if inputs != width:
                raise ValueError(f"layer {number} has {inputs} inputs but receives {width}")
            width = size
            if layer.bias is not None and layer.bias.numel() != size:
                raise ValueError(f"bias of layer {number} has {layer.bias.numel()} entries, expected {size}")
            if layer.dropped is not None and layer.dropped.shape != (self.batch, size):
                raise ValueError(f"dropped of layer {number} has shape {tuple(layer.dropped.shape)}")
            if layer.recurrent is not None and tuple(layer.recurrent.mask.shape) != (size, size):
                raise ValueError(f"the recurrent connection of layer {number} is {tuple(layer.recurrent.mask.shape)}")
            if layer.state is not None and tuple(layer.state.shape) != self.state_shape(layer):
                raise ValueError(f"state of layer {number} has shape {tuple(layer.state.shape)}")
            names = MODELS[layer.population.model].parameters
            for name, parameter in zip(names, layer.population.parameters, strict=True):
                if parameter.numel() not in (1, size):
                    raise ValueError(f"{name} of layer {number} has {parameter.numel()} entries, expected 1 or {size}")

    def empty_gradients(
        self, grad_x: bool, like: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like
    ) -> "StackGradients":
        """Uninitialised gradients, made by ``like``."""
        layers = self.layers
        return StackGradients(
            like(self.x) if grad_x else None,
            [like(layer.values) for layer in layers],
            [None if layer.bias is None else like(layer.bias) for layer in layers],
            [[like(parameter) for parameter in layer.population.parameters] for layer in layers],
            [None if layer.state is None else like(layer.state) for layer in layers],
            [None if layer.recurrent is None else like(layer.recurrent.values) for layer in layers],
        )


class StackGradients(NamedTuple):
    """∂L/∂x, and for each layer the gradients of values, bias, parameters, state and recurrent values.

    None where there is no such tensor, and for x if its gradient is not wanted.
    """

    x: torch.Tensor | None
    values: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    parameters: Sequence[Sequence[torch.Tensor]]
    states: Sequence[torch.Tensor | None]
    recurrents: Sequence[torch.Tensor | None]

    def flat(self) -> list[torch.Tensor | None]:
        """One after the other, as an operator returns them."""
        parameters = [grad for layer in self.parameters for grad in layer]
        return [self.x, *self.values, *self.biases, *self.states, *self.recurrents, *parameters]


class StackBackward(NamedTuple):
    """What the backward pass takes.

    Attributes:
        call: as the forward pass had it.
        spikes, kept: what the forward pass returned.
        grad_counts: ∂L/∂counts [B, N] of the last layer, or None for zeros.
        grad_rates: of each layer ∂L/∂rates, or None for zeros.
        grad_x: whether ∂L/∂x is wanted.
        grad_last: of each layer that of its states after the last step, or None for zeros.
    """

    call: StackCall
    spikes: Sequence[torch.Tensor]
    kept: Sequence[torch.Tensor]
    grad_counts: torch.Tensor | None
    grad_rates: Sequence[torch.Tensor | None]
    grad_last: Sequence[torch.Tensor | None]
    grad_x: bool

    def flat(self) -> tuple[Any, ...]:
        call, *lists, grad_x = self
        return *call.flat(), *(list(each) if isinstance(each, Sequence) else each for each in lists), grad_x

    @classmethod
    def of_flat(cls, *arguments: Any) -> "StackBackward":
        *call, spikes, kept, grad_counts, grad_rates, grad_last, grad_x = arguments
        return cls(StackCall.of_flat(*call), spikes, kept, grad_counts, grad_rates, grad_last, grad_x)

    def tensors(self) -> list[torch.Tensor | None]:
        """Those that may need a gradient."""
        return [*self.call.tensors(), self.grad_counts, *self.grad_rates, *self.grad_last]


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[StackCall], Outputs],
    fake: Callable[[StackCall], Outputs],
    backward: Callable[[StackBackward], StackGradients],
) -> tuple[record.RecordOperator, record.RecordOperator]:
    """Registers and returns ``g2g::{prefix}stack_forward``, with its autograd formula, and ``…_backward``.

    Args:
        prefix: distinguishes the operators of different backends.
        keys: the dispatch keys that they serve.
        forward, fake: the forward pass, and its outputs uninitialised.
        backward: the backward pass.
    """

    def gradients(given: record.Gradients) -> Sequence[torch.Tensor | None]:
        call, (grad_counts, *grads) = given.record, given.grads
        count = len(call.layers)
        spikes, kept, grad_rates, grad_last = given.kept[:count], given.kept[count:], grads[:count], grads[count:]
        return backward_operator(StackBackward(call, spikes, kept, grad_counts, grad_rates, grad_last, given.needed[0]))

    # lists over the layers; absent biases, dropped neurons, states and recurrent values are empty
    call = (
        "Tensor x, Tensor[] values, Tensor[] masks, Tensor[] biases, str[] models, Tensor[] parameters, str[] resets, "
        "str[] surrogates, float[] alphas, Tensor[] dropped, Tensor[] states, Tensor[] recurrents, "
        "Tensor[] recurrent_masks, int steps, ScalarType dtype, bool keep"
    )
    more = "Tensor[] spikes, Tensor[] kept, Tensor? grad_counts, Tensor?[] grad_rates, Tensor?[] grad_last, bool grad_x"
    backward_operator = record.define(
        f"{prefix}stack_backward({call}, {more}) -> Tensor[]",
        StackBackward,
        lambda given: backward(given).flat(),
        lambda given: given.call.empty_gradients(given.grad_x).flat(),
        keys,
    )
    record.refuse_derivative(backward_operator, refuse_backward)
    results = "Tensor counts, Tensor[] rates, Tensor[] last, Tensor[] spikes, Tensor[] kept"
    forward_operator = record.define(f"{prefix}stack_forward({call}) -> ({results})", StackCall, forward, fake, keys)
    inputs = ("x", "values", "biases", "states", "recurrents", "parameters")
    record.differentiate(forward_operator, inputs, 3, gradients)
    count_flops(forward_operator, lambda call: sum(_flops(call)) + _recurrent_flops(call))
    count_flops(backward_operator, _backward_flops)
    return forward_operator, backward_operator


def _flops(call: StackCall) -> list[int]:
    """Of the product of each layer, the first of which is computed once where x is held."""
    samples = [call.batch * (1 if call.held and number == 0 else call.num_steps) for number in range(len(call.layers))]
    return [product_flops(count, layer.values, layer.mask) for count, layer in zip(samples, call.layers, strict=True)]


def _recurrent_flops(call: StackCall) -> int:
    samples = call.batch * (call.num_steps - 1)  # before the first step there are no spikes
    return sum(product_flops(samples, *layer.recurrent) for layer in call.layers if layer.recurrent)


def _backward_flops(backward: StackBackward) -> int:
    first, *rest = _flops(backward.call)
    return first * (1 + backward.grad_x) + 2 * (sum(rest) + _recurrent_flops(backward.call))
