"""A call of neurons alone in the form of the compiled backends' operators, and their registration."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.ops.neurons.models import MODELS, NeuronModel, Neurons
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, RecordOperator
from g2g_kernels.tracing import replaced


class NeuronsCall(NamedTuple):
    """What the forward pass takes: a contiguous ``current`` [T, ..., N], or [..., N] held for ``steps`` steps
    (otherwise 0); the neurons; and the states before the first step, contiguous float32 [states, ..., N], or None for
    zeros.
    """

    current: torch.Tensor
    population: Neurons
    steps: int
    state: torch.Tensor | None = None

    @classmethod
    def of(
        cls, current: torch.Tensor, population: Neurons, steps: int | None, state: torch.Tensor | None = None
    ) -> "NeuronsCall":
        """The call with these arguments of the public function."""
        population = replaced(
            population, parameters=tuple([parameter.contiguous() for parameter in population.parameters])
        )
        state = None if state is None else state.float().contiguous()
        return cls(current.contiguous(), population, steps or 0, state)

    @property
    def model(self) -> NeuronModel:
        return MODELS[self.population.model]

    @property
    def held(self) -> bool:
        """Whether the current is the same at all steps."""
        return self.steps > 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the spikes: [T, ..., N]."""
        return (self.steps, *self.current.shape) if self.held else tuple(self.current.shape)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the states: [states, ..., N]."""
        return len(self.model.states), *self.shape[1:]

    @property
    def flat_shape(self) -> tuple[int, int, int]:
        """T, the number of samples (everything between T and N), and N."""
        steps, *samples, neurons = self.shape
        return steps, math.prod(samples), neurons

    def check(self) -> None:
        """Raises ValueError unless parameters have one entry, or one per neuron, and the state its shape."""
        self.population.check_entries(self.current.shape[-1])
        if self.state is not None and tuple(self.state.shape) != self.state_shape:
            raise ValueError(f"state has shape {tuple(self.state.shape)}, expected {self.state_shape}")


TYPES |= {"NeuronsCall": NeuronsCall, "Neurons": Neurons}


def check_backward(given: Backward, kept_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless kept states and gradients have the shapes that belong to the call, and the ``dtype`` if
    that is given."""
    grad_spikes, grad_last = given.grads
    call = given.call
    for name, tensor, shape in (
        ("kept", given.kept[0], kept_shape),
        ("grad_spikes", grad_spikes, call.shape),
        ("grad_last", grad_last, call.state_shape),
    ):
        if tensor is not None and (tuple(tensor.shape) != tuple(shape) or dtype not in (None, tensor.dtype)):
            wanted = "" if dtype is None else f"{dtype} "
            raise ValueError(f"{name} must be {wanted}{list(shape)}, not {tensor.dtype} {list(tensor.shape)}")


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[NeuronsCall, bool], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    backward: Callable[[Backward], list[torch.Tensor | None]],
    kept_shape: Callable[[NeuronsCall], tuple[int, ...]],
) -> tuple[Differentiable, RecordOperator]:
    """Registers and returns ``g2g::{prefix}neurons_forward`` and ``…_backward``, as those of
    :mod:`g2g_kernels.ops.g2g_linear.call`. ``forward`` returns spikes, the states after the last step, and those that
    the backward pass needs, of ``kept_shape`` (nothing unless they are to be kept).
    """

    def fake(call: NeuronsCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kept = call.current.new_empty(kept_shape(call) if keep else 0, dtype=torch.float32)
        last = call.current.new_empty(call.state_shape, dtype=torch.float32)
        return call.current.new_empty(call.shape), last, kept

    def plain(call: NeuronsCall) -> tuple[torch.Tensor, torch.Tensor]:
        return in_steps(call.current, call.population, call.steps or None, call.state)

    name = f"{prefix}neurons"
    backward_operator = RecordOperator(f"{name}_backward", "Tensor[]", backward, Backward.empty, keys)
    results = "(Tensor spikes, Tensor last, Tensor kept)"
    forward_operator = Differentiable(f"{name}_forward", results, 2, forward, fake, backward_operator, plain, keys)
    return forward_operator, backward_operator
