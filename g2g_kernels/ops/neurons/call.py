"""A call of neurons alone in the form of the compiled backends' operators, and their registration."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops import record
from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.neurons.models import MODELS, NeuronModel, Neurons
from g2g_kernels.tracing import replaced


class NeuronsCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        current: contiguous [T, ..., N], or [..., N] held for ``steps`` steps.
        population: the neurons.
        steps: 0 if ``current`` has a time dimension.
        keep: whether to return what the backward pass needs.
        state: the states before the first step, contiguous float32 [states, ..., N], or None for zeros.
    """

    current: torch.Tensor
    population: Neurons
    steps: int
    keep: bool
    state: torch.Tensor | None = None

    @classmethod
    def of(
        cls, current: torch.Tensor, population: Neurons, steps: int | None, state: torch.Tensor | None = None
    ) -> "NeuronsCall":
        """The call with these arguments of the public function."""
        parameters = tuple([parameter.contiguous() for parameter in population.parameters])
        state = None if state is None else state.float().contiguous()
        given = (current, *parameters) if state is None else (current, state, *parameters)
        keep = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in given])
        return cls(current.contiguous(), replaced(population, parameters=parameters), steps or 0, keep, state)

    def flat(self) -> tuple[Any, ...]:
        current, (model, parameters, reset, surrogate, alpha), steps, keep, state = self
        return current, model, list(parameters), reset, surrogate, alpha, steps, keep, state

    @classmethod
    def of_flat(cls, current: Any, model: Any, parameters: Any, *rest: Any) -> "NeuronsCall":
        reset, surrogate, alpha, *call = rest
        return cls(current, Neurons(model, tuple(parameters), reset, surrogate, alpha), *call)

    def tensors(self) -> list[torch.Tensor | None]:
        """All tensors."""
        return [self.state, self.current, *self.population.parameters]

    def with_tensors(self, tensors: Sequence[Any]) -> "NeuronsCall":
        """The call with these tensors in place of :meth:`tensors`."""
        state, current, *parameters = tensors
        return NeuronsCall(current, self.population.with_parameters(tuple(parameters)), self.steps, self.keep, state)

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

    def check_parameters(self) -> None:
        """Raises ValueError unless parameters have one entry, or one per neuron."""
        size = self.current.shape[-1]
        for name, parameter in zip(self.model.parameters, self.population.parameters, strict=True):
            if parameter.numel() not in (1, size):
                raise ValueError(f"{name} has {parameter.numel()} entries, expected 1 or {size}")
        if self.state is not None and tuple(self.state.shape) != self.state_shape:
            raise ValueError(f"state has shape {tuple(self.state.shape)}, expected {self.state_shape}")


class NeuronsBackward(NamedTuple):
    """What the backward pass takes.

    Attributes:
        call: as the forward pass had it.
        kept: what the forward pass kept, float32.
        grad_spikes: ∂L/∂S, contiguous [T, ..., N].
        wanted: which gradients to compute: the current, each parameter.
        grad_last: that of the states after the last step, contiguous float32 [states, ..., N], or None for zeros.
        state_wanted: whether the gradient of the states before the first step is.
    """

    call: NeuronsCall
    kept: torch.Tensor
    grad_spikes: torch.Tensor
    wanted: tuple[bool, ...]
    grad_last: torch.Tensor | None = None
    state_wanted: bool = False

    def flat(self) -> tuple[Any, ...]:
        return *self.call.flat(), *self[1:]

    @classmethod
    def of_flat(cls, *arguments: Any) -> "NeuronsBackward":
        *call, kept, grad_spikes, wanted, grad_last, state_wanted = arguments
        return cls(NeuronsCall.of_flat(*call), kept, grad_spikes, tuple(wanted), grad_last, state_wanted)

    def tensors(self) -> list[torch.Tensor | None]:
        """Those that may need a gradient."""
        return [*self.call.tensors(), self.grad_spikes, self.grad_last]

    def check(self, kept_shape: tuple[int, ...]) -> None:
        """Raises ValueError unless kept states and gradient have the shapes that belong to the call."""
        for name, tensor, shape in (
            ("kept", self.kept, kept_shape),
            ("grad_spikes", self.grad_spikes, self.call.shape),
            ("grad_last", self.grad_last, self.call.state_shape),
        ):
            if tensor is None:
                continue
            if tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous {list(shape)}, not {list(tensor.shape)}")

    def empty_gradients(self) -> list[torch.Tensor]:
        """Empty tensors for the gradients of the state, the current and each parameter, without elements for unwanted
        ones."""
        call = self.call
        tensors = call.current, *call.population.parameters
        state = call.current.new_empty(call.state_shape if self.state_wanted else 0, dtype=torch.float32)
        return [state, *(t.new_empty(t.shape if wanted else 0) for t, wanted in zip(tensors, self.wanted, strict=True))]


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[NeuronsCall], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    backward: Callable[[NeuronsBackward], list[torch.Tensor]],
    kept_shape: Callable[[NeuronsCall], tuple[int, ...]],
) -> tuple[record.RecordOperator, record.RecordOperator]:
    """Registers and returns ``g2g::{prefix}neurons_forward``, with its autograd formula, and ``…_backward``.

    Args:
        prefix: distinguishes the operators of different backends.
        keys: the dispatch keys that they serve.
        forward: spikes, the states after the last step, and those that the backward pass needs (nothing unless
            ``keep``).
        backward: gradients as :meth:`NeuronsBackward.empty_gradients` has them.
        kept_shape: the shape of those states.
    """

    def fake(call: NeuronsCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kept = call.current.new_empty(kept_shape(call) if call.keep else 0, dtype=torch.float32)
        last = call.current.new_empty(call.state_shape, dtype=torch.float32)
        return call.current.new_empty(call.shape), last, kept

    def gradients(given: record.Gradients) -> Sequence[torch.Tensor]:
        (grad_spikes, grad_last), (kept,), call = given.grads, given.kept, given.record
        if grad_spikes is None:
            grad_spikes = call.current.new_zeros(call.shape)
        state_wanted, *wanted = given.needed
        return backward_operator(NeuronsBackward(call, kept, grad_spikes, tuple(wanted), grad_last, state_wanted))

    call = (
        "Tensor current, str model, Tensor[] parameters, str reset, str surrogate, float alpha, int steps, bool keep, "
        "Tensor? state"
    )
    more = "Tensor kept, Tensor grad_spikes, bool[] wanted, Tensor? grad_last, bool state_wanted"
    schema = f"{prefix}neurons_backward({call}, {more}) -> Tensor[]"
    backward_operator = record.define(schema, NeuronsBackward, backward, NeuronsBackward.empty_gradients, keys)
    record.refuse_derivative(backward_operator, refuse_backward)
    schema = f"{prefix}neurons_forward({call}) -> (Tensor spikes, Tensor last, Tensor kept)"
    forward_operator = record.define(schema, NeuronsCall, forward, fake, keys)
    record.differentiate(forward_operator, ("state", "current", "parameters"), 2, gradients)
    return forward_operator, backward_operator
