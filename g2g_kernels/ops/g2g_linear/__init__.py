"""``g2g_linear``: y = x·Wᵀ + b with a weight that consists of the units of a :class:`BlockMask`."""

from types import ModuleType

import torch

from g2g_kernels.dispatch import Operator
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.ops.checks import check_connection, check_tensor
from g2g_kernels.ops.g2g_linear import cpu, reference
from g2g_kernels.tracing import is_transformed


def _triton() -> ModuleType:
    from g2g_kernels.ops.g2g_linear import triton  # imports Triton, which is optional

    return triton


operator = Operator("g2g_linear")
operator.register_module("triton", _triton)
operator.register("cpu", cpu.g2g_linear, cpu.refuses)
operator.register("torch", reference.g2g_linear, reference.refuses)


def g2g_linear(
    x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None = None, backend: str | None = None
) -> torch.Tensor:
    """Applies a block-sparse linear layer; differentiable in ``x``, ``values`` and ``bias``, any number of times and in
    forward mode, and under ``torch.func.vmap``. (Inside ``torch.compile``: once, and in forward mode.)

    Args:
        x: [..., in], in neuron order: floats, or spikes in uint8.
        values: packed weights [num_units, unit_rows, unit_cols] (see :meth:`BlockMask.pack`), of x's dtype unless x is
            uint8 or autocast is on.
        mask: the units that exist, on the same device.
        bias: [out], or None.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Returns:
        [..., out], in neuron order.

    Raises:
        ValueError: for tensors that do not match, or an unknown backend.
        BackendError: if the forced backend cannot serve the call.

    Example:
        >>> mask = BlockMask.sample(GroupLayout(32), GroupLayout(64), block_size=4)
        >>> weight = torch.rand(32, 64)
        >>> y = g2g_linear(torch.rand(5, 64), mask.pack(weight), mask)
        >>> y.shape
        torch.Size([5, 32])
    """
    check_tensor("x", x, spikes=True)
    check_connection("", values, mask, bias)
    if x.dim() < 1 or x.shape[-1] != mask.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, its last dimension must be the mask's {mask.shape[1]} inputs")
    if is_transformed((x, values, bias)):
        return reference.g2g_linear(x, values, mask, bias)
    return operator(x, values, mask, bias, backend=backend)
