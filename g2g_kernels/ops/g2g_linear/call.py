"""A call of ``g2g_linear`` in the form of the compiled backends' operators, and their registration.

The autograd formula that is registered serves compiled code, which traces no ``autograd.Function`` with a forward mode;
all other code takes that of ``derivatives.py``, which has one. Both call :func:`gradients`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops import record
from g2g_kernels.ops.derivatives import refuse_compiled_backward
from g2g_kernels.ops.flops import count_flops, product_flops


class LinearCall(NamedTuple):
    """What the forward pass takes.

    Attributes:
        x: contiguous [M, in].
        values: packed weights [num_units, unit_rows, unit_cols].
        mask: the units that exist.
        bias: [out], or None.
        dtype: that of the output.
    """

    x: torch.Tensor
    values: torch.Tensor
    mask: MaskTensors
    bias: torch.Tensor | None
    dtype: torch.dtype

    def flat(self) -> tuple[Any, ...]:
        x, values, mask, bias, dtype = self
        return x, values, list(mask), bias, dtype

    @classmethod
    def of_flat(cls, x: Any, values: Any, mask: Any, bias: Any, dtype: Any) -> "LinearCall":
        return cls(x, values, MaskTensors(*mask), bias, dtype)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those that may need a gradient, then what else a pass reads."""
        return self.x, self.values, self.bias, self.mask.unit_row

    def with_tensors(self, tensors: Sequence[Any]) -> "LinearCall":
        """The call with these tensors in place of :meth:`tensors`; the mask stays."""
        x, values, bias, _ = tensors
        return LinearCall(x, values, self.mask, bias, self.dtype)


class LinearBackward(NamedTuple):
    """What the backward pass takes.

    Attributes:
        call: as the forward pass had it.
        grad_y: ∂L/∂y, contiguous [M, out].
        wanted: which gradients to compute: x, values, bias.
    """

    call: LinearCall
    grad_y: torch.Tensor
    wanted: tuple[bool, ...]

    def flat(self) -> tuple[Any, ...]:
        return *self.call.flat(), self.grad_y, self.wanted

    @classmethod
    def of_flat(cls, *arguments: Any) -> "LinearBackward":
        *call, grad_y, wanted = arguments
        return cls(LinearCall.of_flat(*call), grad_y, tuple(wanted))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those that may need a gradient."""
        return *self.call.tensors(), self.grad_y

    def empty_gradients(self) -> list[torch.Tensor]:
        """Empty tensors for the gradients of x, values and bias (the last float32), 0 elements if unwanted."""
        x, values, mask, _, _ = self.call
        want_x, want_values, want_bias = self.wanted
        return [
            x.new_empty(x.shape if want_x else 0),
            values.new_empty(values.shape if want_values else 0),
            values.new_empty(mask.shape[0] if want_bias else 0, dtype=torch.float32),
        ]


Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def gradients(
    backward: record.RecordOperator, call: LinearCall, grad_y: torch.Tensor, wanted: tuple[bool, ...]
) -> Gradients:
    """∂L/∂x, ∂L/∂W and ∂L/∂b by the backward operator of a backend, None where not wanted."""
    to_x, to_values, to_bias = backward(LinearBackward(call, grad_y.contiguous(), wanted))
    return (
        to_x if wanted[0] else None,
        to_values if wanted[1] else None,
        to_bias.to(call.bias.dtype) if wanted[2] and call.bias is not None else None,
    )


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[LinearCall], torch.Tensor],
    backward: Callable[[LinearBackward], list[torch.Tensor]],
) -> tuple[record.RecordOperator, record.RecordOperator]:
    """Registers and returns ``g2g::{prefix}linear_forward``, with its autograd formula, and ``…_backward``.

    Args:
        prefix: distinguishes the operators of different backends.
        keys: the dispatch keys that they serve.
        forward: y [M, out].
        backward: gradients as :meth:`LinearBackward.empty_gradients` has them.
    """

    def fake(call: LinearCall) -> torch.Tensor:
        return call.x.new_empty((call.x.shape[0], call.mask.shape[0]), dtype=call.dtype)

    def of_record(given: record.Gradients) -> Gradients:
        (grad_y,) = given.grads
        assert grad_y is not None  # y is the only result
        return gradients(backward_operator, given.record, grad_y, tuple(given.needed))

    call = "Tensor x, Tensor values, Tensor[] mask, Tensor? bias, ScalarType dtype"
    schema = f"{prefix}linear_backward({call}, Tensor grad_y, bool[] wanted) -> Tensor[]"
    backward_operator = record.define(schema, LinearBackward, backward, LinearBackward.empty_gradients, keys)
    record.refuse_derivative(backward_operator, refuse_compiled_backward)
    schema = f"{prefix}linear_forward({call}) -> Tensor"
    forward_operator = record.define(schema, LinearCall, forward, fake, keys)
    record.differentiate(forward_operator, ("x", "values", "bias"), 1, of_record)

    def flops(call: LinearCall) -> int:
        return product_flops(call.x.shape[0], call.values, call.mask)

    count_flops(forward_operator, flops)
    count_flops(backward_operator, lambda given: flops(given.call) * sum(given.wanted[:2]))
    return forward_operator, backward_operator
