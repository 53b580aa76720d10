"""A call of ``g2g_linear`` in the form of the compiled backends' operators, and their registration."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.ops import record
from g2g_kernels.ops.derivatives import refuse_compiled_backward
from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_linear.derivatives import Kernels, linear
from g2g_kernels.tracing import is_traced
from g2g_kernels.unit_grid import MaskTensors


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

    def gradients(given: record.Gradients) -> Sequence[torch.Tensor]:
        (grad_y,), call = given.grads, given.record
        assert grad_y is not None  # y is the only result
        to_x, to_values, to_bias = backward_operator(LinearBackward(call, grad_y, tuple(given.needed)))
        return to_x, to_values, to_bias if call.bias is None else to_bias.to(call.bias.dtype)

    call = "Tensor x, Tensor values, Tensor[] mask, Tensor? bias, ScalarType dtype"
    schema = f"{prefix}linear_backward({call}, Tensor grad_y, bool[] wanted) -> Tensor[]"
    backward_operator = record.define(schema, LinearBackward, backward, LinearBackward.empty_gradients, keys)
    record.refuse_derivative(backward_operator, refuse_compiled_backward)
    schema = f"{prefix}linear_forward({call}) -> Tensor"
    forward_operator = record.define(schema, LinearCall, forward, fake, keys)
    record.differentiate(forward_operator, ("x", "values", "bias"), 1, gradients)

    def flops(call: LinearCall) -> int:
        return product_flops(call.x.shape[0], call.values, call.mask)

    count_flops(forward_operator, flops)
    count_flops(backward_operator, lambda given: flops(given.call) * sum(given.wanted[:2]))
    return forward_operator, backward_operator


def call_operators(
    operators: tuple[record.RecordOperator, record.RecordOperator],
    x: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [..., out] of ``dtype`` by the two operators of a backend, with derivatives of every order."""
    forward, backward = operators
    tensors = mask.tensors()

    def product(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias.contiguous()
        return forward(LinearCall(x.contiguous(), values.contiguous(), tensors, bias, dtype))

    def gradients(grad_y, x, values, *wanted):
        return backward(LinearBackward(LinearCall(x, values, tensors, None, dtype), grad_y, wanted))

    flat = x.reshape(-1, x.shape[-1])
    if is_traced():  # which traces no Function with a forward mode
        y = product(flat, values, bias)
    else:
        kernels = Kernels(product, gradients, mask, tuple(tensors))
        y = linear(flat.contiguous(), values.contiguous(), bias, kernels)
    return y.view(*x.shape[:-1], y.shape[-1])
