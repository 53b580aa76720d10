"""A call of neurons alone in the form of the compiled backends' operators, and their registration."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops import record
from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.neurons.models import MODELS, NeuronModel, Neurons


class NeuronsCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        current: contiguous [T, ..., N], or [..., N] held for ``steps`` steps.
        population: the neurons.
        steps: 0 if ``current`` has a time dimension.
        keep: whether to return what the backward pass needs.
    """

    current: torch.Tensor
    population: Neurons
    steps: int
    keep: bool

    @classmethod
    def of(cls, current: torch.Tensor, population: Neurons, steps: int | None) -> "NeuronsCall":
        """The call with these arguments of the public function."""
        parameters = tuple([parameter.contiguous() for parameter in population.parameters])
        keep = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (current, *parameters)])
        return cls(current.contiguous(), population._replace(parameters=parameters), steps or 0, keep)

    def flat(self) -> tuple[Any, ...]:
        current, (model, parameters, reset, surrogate, alpha), steps, keep = self
        return current, model, list(parameters), reset, surrogate, alpha, steps, keep

    @classmethod
    def of_flat(
        cls, current: Any, model: Any, parameters: Any, reset: Any, surrogate: Any, alpha: Any, steps: Any, keep: Any
    ) -> "NeuronsCall":
        return cls(current, Neurons(model, tuple(parameters), reset, surrogate, alpha), steps, keep)

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


class NeuronsBackward(NamedTuple):
    """What the backward pass takes.

    Attributes:
        call: as the forward pass had it.
        kept: what the forward pass kept, float32.
        grad_spikes: ∂L/∂S, contiguous [T, ..., N].
        wanted: which gradients to compute: the current, each parameter.
    """

    call: NeuronsCall
    kept: torch.Tensor
    grad_spikes: torch.Tensor
    wanted: tuple[bool, ...]

    def flat(self) -> tuple[Any, ...]:
        return *self.call.flat(), self.kept, self.grad_spikes, self.wanted

    @classmethod
    def of_flat(cls, *arguments: Any) -> "NeuronsBackward":
        *call, kept, grad_spikes, wanted = arguments
        return cls(NeuronsCall.of_flat(*call), kept, grad_spikes, tuple(wanted))

    def check(self, kept_shape: tuple[int, ...]) -> None:
        """Raises ValueError unless kept states and gradient have the shapes that belong to the call."""
        for name, tensor, shape in (
            ("kept", self.kept, kept_shape),
            ("grad_spikes", self.grad_spikes, self.call.shape),
        ):
            if tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous {list(shape)}, not {list(tensor.shape)}")

    def empty_gradients(self) -> list[torch.Tensor]:
        """Empty tensors for the gradients of the current and of each parameter, without elements for unwanted ones."""
        tensors = self.call.current, *self.call.population.parameters
        return [t.new_empty(t.shape if wanted else 0) for t, wanted in zip(tensors, self.wanted, strict=True)]


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[NeuronsCall], tuple[torch.Tensor, torch.Tensor]],
    backward: Callable[[NeuronsBackward], list[torch.Tensor]],
    kept_shape: Callable[[NeuronsCall], tuple[int, ...]],
) -> tuple[record.RecordOperator, record.RecordOperator]:
    """Registers and returns ``g2g::{prefix}neurons_forward``, with its autograd formula, and ``…_backward``.

    Args:
        prefix: distinguishes the operators of different backends.
        keys: the dispatch keys that they serve.
        forward: spikes, and the states that the backward pass needs (nothing unless ``keep``).
        backward: gradients as :meth:`NeuronsBackward.empty_gradients` has them.
        kept_shape: the shape of those states.
    """

    def fake(call: NeuronsCall) -> tuple[torch.Tensor, torch.Tensor]:
        kept = call.current.new_empty(kept_shape(call) if call.keep else 0, dtype=torch.float32)
        return call.current.new_empty(call.shape), kept

    def gradients(given: record.Gradients) -> dict[str, object]:
        (grad_spikes,), (kept,) = given.grads, given.kept
        wanted = given.needed["current"], *given.needed["parameters"]
        grads = backward_operator(NeuronsBackward(given.record, kept, grad_spikes, wanted))
        current, *parameters = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return {"current": current, "parameters": parameters}

    call = "Tensor current, str model, Tensor[] parameters, str reset, str surrogate, float alpha, int steps, bool keep"
    schema = f"{prefix}neurons_backward({call}, Tensor kept, Tensor grad_spikes, bool[] wanted) -> Tensor[]"
    backward_operator = record.define(schema, NeuronsBackward, backward, NeuronsBackward.empty_gradients, keys)
    record.refuse_derivative(backward_operator, refuse_backward)
    schema = f"{prefix}neurons_forward({call}) -> (Tensor spikes, Tensor kept)"
    forward_operator = record.define(schema, NeuronsCall, forward, fake, keys)
    record.differentiate(forward_operator, 1, gradients)
    return forward_operator, backward_operator
