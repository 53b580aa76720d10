"""A call of ``g2g_stack`` in the form of the compiled backends' operators, and their registration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_linear import reference as linear
from g2g_kernels.ops.g2g_stack.layer import Recurrent, SpikingLayer
from g2g_kernels.ops.g2g_stack.reference import activity_of, in_turn
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, RecordOperator

_Each = list[torch.Tensor]
#: counts [B, N] of the last layer; of each layer rates [N] and states after the last step [states, B, N]; membranes
#: [T, B, N] of the layers that give them, and the spikes [T, B, N] of all layers if these need a gradient; of each
#: layer spikes in the backend's form; and what the backward pass needs
Outputs = tuple[torch.Tensor, _Each, _Each, _Each, _Each, _Each]


class StackCall(NamedTuple):
    """What the forward pass takes: x, contiguous [T, B, in], or [B, in] held for ``steps`` steps (otherwise 0); the
    layers from input to output, their tensors contiguous, masks as tensors; the ``dtype`` of the factors of products,
    bfloat16 or float16 under autocast; and whether ``spikes`` over time need a gradient.
    """

    x: torch.Tensor
    layers: tuple[SpikingLayer, ...]
    steps: int
    dtype: torch.dtype
    spikes: bool = False

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        layers: Sequence[SpikingLayer],
        steps: int | None,
        dtype: torch.dtype,
        spikes: bool = False,
    ) -> "StackCall":
        """The call with these arguments of the public function."""
        called = []
        for layer in layers:
            population, recurrent, sent = layer.population, layer.recurrent, layer.sent
            if (steps or x.shape[0]) == 1 and layer.state is None and sent is None:
                recurrent = None  # of one step without spikes before it: its weights have no gradient
            flat = [p.contiguous() if p.dim() == 1 else p.reshape(-1) for p in population.parameters]
            called.append(
                SpikingLayer(
                    layer.values.contiguous(),
                    layer.mask.tensors(),
                    None if layer.bias is None else layer.bias.contiguous(),
                    Neurons(population.model, tuple(flat), population.reset, population.surrogate, population.alpha),
                    None if layer.dropped is None else layer.dropped.contiguous(),
                    None if layer.state is None else layer.state.float().contiguous(),
                    None if recurrent is None else Recurrent(recurrent[0].contiguous(), recurrent[1].tensors()),
                    layer.membranes,
                    delay=None if layer.delay is None else layer.delay.of_each(layer.mask.shape[1], x.device),
                    sent=None if sent is None else sent.float().contiguous(),
                )
            )
        return cls(x.contiguous(), tuple(called), steps or 0, dtype, spikes)

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

    def state_shape(self, layer: SpikingLayer) -> tuple[int, int, int]:
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
            delays = None if layer.delay is None else layer.delay.steps
            if delays is not None and tuple(delays.shape) != (inputs,):
                raise ValueError(f"delays of layer {number} have shape {tuple(delays.shape)}")
            if layer.sent is not None and tuple(layer.sent.shape[1:]) != (self.batch, size):
                raise ValueError(f"sent of layer {number} has shape {tuple(layer.sent.shape)}")
            if layer.state is not None and tuple(layer.state.shape) != self.state_shape(layer):
                raise ValueError(f"state of layer {number} has shape {tuple(layer.state.shape)}")
            layer.population.check_entries(size, f" of layer {number}")


TYPES["StackCall"] = StackCall


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[StackCall, bool], Outputs],
    fake: Callable[[StackCall, bool], Outputs],
    backward: Callable[[Backward], list[torch.Tensor | None]],
    check: Callable[[StackCall], None] = lambda call: None,
) -> tuple[Differentiable, RecordOperator]:
    """Registers and returns ``g2g::{prefix}stack_forward`` and ``…_backward``, as those of
    :mod:`g2g_kernels.ops.g2g_linear.call`. ``fake`` gives the outputs uninitialised. ``backward`` is given the
    gradients of counts, rates, last states, membranes and spikes, and of what was kept spikes and the rest. ``check``
    raises ValueError for calls through the dispatcher that ``forward`` would misread.
    """
    name = f"{prefix}stack"
    backward_operator = RecordOperator(
        f"{name}_backward", "Tensor[]", backward, Backward.empty, keys, lambda given: check(given.call)
    )
    results = "(Tensor counts, Tensor[] rates, Tensor[] last, Tensor[] shown, Tensor[] spikes, Tensor[] kept)"
    forward_operator = Differentiable(
        f"{name}_forward", results, 4, forward, fake, backward_operator, _plain, keys, check
    )
    count_flops(forward_operator, lambda call: sum(_flops(call)) + _recurrent_flops(call))
    count_flops(backward_operator, _backward_flops)
    return forward_operator, backward_operator


def _plain(call: StackCall) -> list[torch.Tensor]:
    """Counts, rates, last states, membranes and spikes by plain operations."""
    turn = in_turn(call.x, call.layers, call.steps or None, linear.g2g_linear, in_steps)
    activity = activity_of(*turn, differentiable=True)
    assert activity.states is not None
    membranes = [each for each in activity.membranes or () if each is not None]
    spikes = [each.dense() for each in activity.spikes] if call.spikes else []
    return [activity.counts, *activity.rates, *activity.states, *membranes, *spikes]


def _flops(call: StackCall) -> list[int]:
    """Of the product of each layer, the first of which is computed once where x is held."""
    samples = [call.batch * (1 if call.held and number == 0 else call.num_steps) for number in range(len(call.layers))]
    return [product_flops(count, layer.values, layer.mask) for count, layer in zip(samples, call.layers, strict=True)]


def _recurrent_flops(call: StackCall) -> int:
    samples = call.batch * (call.num_steps - 1)  # before the first step there are no spikes
    return sum(product_flops(samples, *layer.recurrent) for layer in call.layers if layer.recurrent)


def _backward_flops(given: Backward) -> int:
    first, *rest = _flops(given.call)
    return first * (1 + int(given.needed[0])) + 2 * (sum(rest) + _recurrent_flops(given.call))
