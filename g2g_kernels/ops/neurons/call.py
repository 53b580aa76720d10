"""A call of neurons alone in the form of the compiled backends' operators, and their registration."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.ops.neurons.models import MODELS, NeuronModel, Neurons
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output
from g2g_kernels.tracing import replaced


class NeuronsCall(NamedTuple):
    """What the forward pass takes: a contiguous ``current`` [T, ..., N], or [..., N] held for ``steps`` steps
    (otherwise 0); the neurons; and the states before the first step, float32 [states, ..., N], or None for zeros."""

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

    def expected(self) -> Expected:
        """What kernels take for granted."""
        yield "current", self.current, self.current.shape, torch.float32
        yield "state", self.state, self.state_shape, torch.float32
        yield from self.population.expected(self.current.shape[-1])


TYPES |= {"NeuronsCall": NeuronsCall, "Neurons": Neurons}


def operator_of(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[NeuronsCall, bool], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    backward: Callable[[Backward], list[torch.Tensor | None]],
    kept_shape: Callable[[NeuronsCall], tuple[int, ...]],
) -> Differentiable:
    """Registers ``g2g::{prefix}neurons_forward`` and ``…_backward``, as those of
    :mod:`g2g_kernels.ops.g2g_linear.call`. ``forward`` returns spikes, the states after the last step, and those that
    the backward pass needs, of ``kept_shape`` (nothing unless they are to be kept)."""

    def shapes(call: NeuronsCall, keep: bool) -> list[Output]:
        kept = Output(kept_shape(call) if keep else (0,))
        return [Output(call.shape, call.current.dtype), Output(call.state_shape), kept]

    def plain(call: NeuronsCall) -> tuple[torch.Tensor, torch.Tensor]:
        return in_steps(call.current, call.population, call.steps or None, call.state)

    results = "(Tensor spikes, Tensor last, Tensor kept)"
    return Differentiable(f"{prefix}neurons", results, 2, forward, backward, shapes, plain, keys)
