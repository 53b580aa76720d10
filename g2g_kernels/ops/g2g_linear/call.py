"""A call of ``g2g_linear`` in the form of the compiled backends' operators, and their registration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_linear import reference
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output


class LinearCall(NamedTuple):
    """What the forward pass takes: x, contiguous [M, in]; packed weights [num_units, unit_rows, unit_cols] and their
    mask; the bias [out] or None; the dtype of the output."""

    x: torch.Tensor
    values: torch.Tensor
    mask: MaskTensors
    bias: torch.Tensor | None
    dtype: torch.dtype

    def expected(self) -> Expected:
        """What kernels take for granted."""
        x, values, mask, bias, _ = self
        out_size, in_size = mask.shape
        yield "x", x, (len(x), in_size), torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        yield "values", values, values.shape, torch.float32
        yield "bias", bias, (out_size,), torch.float32


TYPES["LinearCall"] = LinearCall


def operator_of(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[LinearCall, bool], torch.Tensor],
    backward: Callable[[Backward], list[torch.Tensor | None]],
) -> Differentiable:
    """Registers ``g2g::{prefix}linear_forward``, with its autograd formula, and ``…_backward`` for the ``keys`` of a
    backend in the dispatcher. ``forward`` gives y [M, out] and keeps nothing besides its arguments, ``backward`` gives
    the gradients of the call's tensors."""

    def shapes(call: LinearCall, keep: bool) -> list[Output]:
        return [Output((call.x.shape[0], call.mask.shape[0]), call.dtype)]

    def plain(call: LinearCall) -> tuple[torch.Tensor]:
        return (reference.g2g_linear(call.x, call.values, call.mask, call.bias),)

    operator = Differentiable(f"{prefix}linear", "Tensor", 1, forward, backward, shapes, plain, keys)

    def flops(call: LinearCall) -> int:
        return product_flops(call.x.shape[0], call.values, call.mask)

    count_flops(operator, flops)
    count_flops(operator.backward, lambda given: flops(given.call) * sum(given.needed[:2]))
    return operator


def product(
    operator: Differentiable,
    x: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [..., out] of ``dtype`` by the operator of a backend."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = operator(LinearCall(flat, values.contiguous(), mask.tensors(), bias, dtype))
    return y.view(*x.shape[:-1], y.shape[-1])
