"""``g2g_linear``: y = x·Wᵀ + b with a weight of which only the units of a :class:`BlockMask` exist."""

from types import ModuleType

import torch

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.dispatch import Operator
from g2g_kernels.ops.g2g_linear import cpu, reference


def _triton() -> ModuleType:
    from g2g_kernels.ops.g2g_linear import triton  # imports Triton, which not everyone has

    return triton


operator = Operator("g2g_linear")
operator.register_module("triton", _triton)
operator.register("cpu", cpu.g2g_linear, cpu.refuses)
operator.register("torch", reference.g2g_linear)


def g2g_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Applies a block-sparse linear layer; differentiable in ``x``, ``values`` and ``bias``.

    Args:
        x: [..., in], in neuron order.
        values: packed weights [num_units, unit_rows, unit_cols] (see :meth:`BlockMask.pack`), of x's dtype unless
            autocast is on.
        mask: the units that exist, on the same device.
        bias: [out], or None.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Returns:
        [..., out], in neuron order.

    Raises:
        ValueError: for shapes that do not fit the mask, or an unknown backend.
        BackendError: if the forced backend cannot serve the call.
    """
    mask.check_values(values)
    out_size, in_size = mask.shape
    if x.dim() < 1 or x.shape[-1] != in_size:
        raise ValueError(f"x has shape {tuple(x.shape)}, its last dimension must be the mask's {in_size} inputs")
    if bias is not None and tuple(bias.shape) != (out_size,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the mask has {out_size} outputs")
    return operator(x, values, mask, bias, backend=backend)
