"""A call of ``g2g_linear`` in the form of the compiled backends' operators, and their registration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_linear import reference
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, RecordOperator


class LinearCall(NamedTuple):
    """What the forward pass takes: x, contiguous [M, in]; packed weights [num_units, unit_rows, unit_cols] and their
    mask; the bias [out] or None; the dtype of the output."""

    x: torch.Tensor
    values: torch.Tensor
    mask: MaskTensors
    bias: torch.Tensor | None
    dtype: torch.dtype

    def check(self) -> None:
        """Raises ValueError unless sizes match."""
        out_size, in_size = self.mask.shape
        if self.x.dim() != 2 or self.x.shape[1] != in_size or (self.bias is not None and self.bias.numel() != out_size):
            raise ValueError(f"x {tuple(self.x.shape)} or bias does not fit a mask of {out_size} × {in_size} weights")


TYPES["LinearCall"] = LinearCall


def operators(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[LinearCall, bool], torch.Tensor],
    backward: Callable[[Backward], list[torch.Tensor | None]],
) -> tuple[Differentiable, RecordOperator]:
    """Registers and returns ``g2g::{prefix}linear_forward``, with its autograd formula, and ``…_backward`` for the
    dispatch ``keys`` of a backend. ``forward`` gives y [M, out] and keeps nothing besides its arguments, ``backward``
    the gradients of the call's tensors.
    """

    def fake(call: LinearCall, keep: bool) -> torch.Tensor:
        return call.x.new_empty((call.x.shape[0], call.mask.shape[0]), dtype=call.dtype)

    def plain(call: LinearCall) -> tuple[torch.Tensor]:
        return (reference.g2g_linear(call.x, call.values, call.mask, call.bias),)

    name = f"{prefix}linear"
    backward_operator = RecordOperator(f"{name}_backward", "Tensor[]", backward, Backward.empty, keys)
    forward_operator = Differentiable(f"{name}_forward", "Tensor", 1, forward, fake, backward_operator, plain, keys)

    def flops(call: LinearCall) -> int:
        return product_flops(call.x.shape[0], call.values, call.mask)

    count_flops(forward_operator, flops)
    count_flops(backward_operator, lambda given: flops(given.call) * sum(given.needed[:2]))
    return forward_operator, backward_operator


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
