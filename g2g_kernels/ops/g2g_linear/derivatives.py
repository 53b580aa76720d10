"""Derivatives of any order of ``g2g_linear``, in either mode, and ``vmap``, for backends whose kernels have the first.

A product and its two gradients are the derivatives of one trilinear form of an output's gradient g, x and W,

    F(g, x, W) = Σ over samples of g·(W x),        ∂F/∂g = W x,   ∂F/∂x = Wᵀ g,   ∂F/∂W = g xᵀ at the existing units

so each of the three is linear in two of the arguments, and its derivatives are the other two. The bias is a
plain sum.
"""

from dataclasses import dataclass
from typing import Any

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.derivatives import for_each_of_old, has_tangent
from g2g_kernels.ops.g2g_linear.call import LinearCall, gradients
from g2g_kernels.ops.record import RecordOperator
from g2g_kernels.tracing import is_traced


@dataclass(frozen=True, eq=False)
class Kernels:
    """What a backend computes for one mask.

    Attributes:
        forward, backward: its operators.
        mask: the units that exist.
        packed: the shape of the weights, [num_units, unit_rows, unit_cols].
        dtype: that of the product.
    """

    forward: RecordOperator
    backward: RecordOperator
    mask: MaskTensors
    packed: torch.Size
    dtype: torch.dtype

    def call(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> LinearCall:
        """The product of contiguous x [M, in]."""
        bias = None if bias is None else bias.contiguous()
        return LinearCall(x.contiguous(), values.contiguous(), self.mask, bias, self.dtype)


def g2g_linear(
    forward: RecordOperator,
    backward: RecordOperator,
    x: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [..., out] of ``dtype`` by the two operators of a backend, with derivatives of every order."""
    kernels = Kernels(forward, backward, mask.tensors(), values.shape, dtype)
    flat = x.reshape(-1, x.shape[-1])
    if is_traced():
        y = forward(kernels.call(flat, values, bias))
    else:
        y = _Product.apply(flat.contiguous(), values.contiguous(), bias, kernels)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Form(torch.autograd.Function):
    """Base of the three: two linear arguments, another argument, and the kernels."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, other, ctx.kernels = inputs
        other = other if isinstance(other, torch.Tensor) else None
        # the mask's first index changes whenever it does, which PyTorch then notices
        saved = first, second, other, ctx.kernels.mask.unit_row
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)


class _Product(_Form):
    """∂F/∂g: x, values, bias → y."""

    @staticmethod
    def forward(x, values, bias, kernels):
        return kernels.forward(kernels.call(x, values, bias))

    @staticmethod
    @for_each_of_old
    def backward(ctx, grad_y):
        x, values, bias, _ = ctx.saved_tensors
        need_x, need_values, need_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or has_tangent((grad_y, x, values)):
            to_x = _ToInput.apply(grad_y, values, x.dtype, ctx.kernels) if need_x else None
            to_values = _ToWeights.apply(grad_y, x, values.dtype, ctx.kernels) if need_values else None
            return to_x, to_values, grad_y.sum(0, dtype=bias.dtype) if need_bias else None, None
        call = ctx.kernels.call(x, values, bias)
        return *gradients(ctx.kernels.backward, call, grad_y, (need_x, need_values, need_bias)), None

    @staticmethod
    def jvp(ctx, x_tangent, values_tangent, bias_tangent, _):
        x, values = ctx.saved_tensors[:2]
        parts = [] if bias_tangent is None else [bias_tangent]
        if x_tangent is not None:
            parts.append(_Product.apply(x_tangent, values, None, ctx.kernels))
        if values_tangent is not None:
            parts.append(_Product.apply(x, values_tangent, None, ctx.kernels))
        return _sum(parts, (len(x), ctx.kernels.mask.shape[0]))

    @staticmethod
    def vmap(info, dims, x, values, bias, kernels):
        if dims[1] is not None:
            return _one_by_one(_Product, info, dims, x, values, bias, kernels)
        y = _folded(_Product, info, dims[0], x, values, None, kernels)
        if bias is not None:
            bias = bias.movedim(dims[2], 0)[:, None] if dims[2] is not None else bias
            y = y + bias.to(y.dtype)
        return y, 0


class _ToInput(_Form):
    """∂F/∂x: grad_y, values → dx, of the given dtype."""

    @staticmethod
    def forward(grad_y, values, dtype, kernels):
        x = grad_y.new_zeros((len(grad_y), kernels.mask.shape[1]), dtype=dtype)
        return gradients(kernels.backward, kernels.call(x, values, None), grad_y, (True, False, False))[0]

    @staticmethod
    @for_each_of_old
    def backward(ctx, grad):
        grad_y, values, *_ = ctx.saved_tensors
        to_grad_y = _Product.apply(grad, values, None, ctx.kernels) if ctx.needs_input_grad[0] else None
        to_values = _ToWeights.apply(grad_y, grad, values.dtype, ctx.kernels) if ctx.needs_input_grad[1] else None
        return to_grad_y, to_values, None, None

    @staticmethod
    def jvp(ctx, grad_y_tangent, values_tangent, dtype, _):
        grad_y, values = ctx.saved_tensors[:2]
        parts = []
        if grad_y_tangent is not None:
            parts.append(_ToInput.apply(grad_y_tangent, values, ctx.dtype, ctx.kernels))
        if values_tangent is not None:
            parts.append(_ToInput.apply(grad_y, values_tangent, ctx.dtype, ctx.kernels))
        return _sum(parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Form.setup_context(ctx, inputs, output)
        ctx.dtype = inputs[2]

    @staticmethod
    def vmap(info, dims, grad_y, values, dtype, kernels):
        if dims[1] is not None:
            return _one_by_one(_ToInput, info, dims, grad_y, values, dtype, kernels)
        return _folded(_ToInput, info, dims[0], grad_y, values, dtype, kernels), 0


class _ToWeights(_Form):
    """∂F/∂W: grad_y, x → dW, packed, of the given dtype, zero in the padding."""

    @staticmethod
    def forward(grad_y, x, dtype, kernels):
        values = grad_y.new_zeros(kernels.packed, dtype=dtype)
        return gradients(kernels.backward, kernels.call(x, values, None), grad_y, (False, True, False))[1]

    @staticmethod
    @for_each_of_old
    def backward(ctx, grad):
        grad_y, x, *_ = ctx.saved_tensors
        to_grad_y = _Product.apply(x, grad, None, ctx.kernels) if ctx.needs_input_grad[0] else None
        to_x = _ToInput.apply(grad_y, grad, x.dtype, ctx.kernels) if ctx.needs_input_grad[1] else None
        return to_grad_y, to_x, None, None

    @staticmethod
    def jvp(ctx, grad_y_tangent, x_tangent, dtype, _):
        grad_y, x = ctx.saved_tensors[:2]
        parts = []
        if grad_y_tangent is not None:
            parts.append(_ToWeights.apply(grad_y_tangent, x, ctx.dtype, ctx.kernels))
        if x_tangent is not None:
            parts.append(_ToWeights.apply(grad_y, x_tangent, ctx.dtype, ctx.kernels))
        return _sum(parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Form.setup_context(ctx, inputs, output)
        ctx.dtype = inputs[2]

    @staticmethod
    def vmap(info, dims, grad_y, x, dtype, kernels):
        return _one_by_one(_ToWeights, info, dims, grad_y, x, dtype, kernels)


def _sum(parts: list[torch.Tensor], shape: tuple[int, ...] | None = None) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.dtype) if part.dim() >= total.dim() else part + total.to(part.dtype)
    return total if shape is None or total.shape == shape else total.expand(shape)


def _folded(form: type[_Form], info: Any, dim: int | None, first: torch.Tensor, *rest: Any) -> torch.Tensor:
    """One call for all elements of a ``vmap`` over the samples' tensor, [..., M, n] → [B, M, n']."""
    many = first.movedim(dim, 0) if dim is not None else first.expand(info.batch_size, *first.shape)
    result = form.apply(many.reshape(-1, many.shape[-1]), *rest)
    return result.view(*many.shape[:2], result.shape[-1])


def _one_by_one(form: type[_Form], info: Any, dims: tuple, *arguments: Any) -> tuple[torch.Tensor, int]:
    """A call for each element of a ``vmap``."""
    results = [
        form.apply(
            *(
                argument if dim is None else argument.select(dim, index)
                for argument, dim in zip(arguments, dims, strict=True)
            )
        )
        for index in range(info.batch_size)
    ]
    return torch.stack(results), 0
