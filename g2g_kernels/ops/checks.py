"""Checks of the arguments of public functions: every error names the argument, before any work. (Hand-made calls of
registered operators are checked in ``ops/record.py``.)"""

import torch

from g2g_kernels.mask.block_mask import BlockMask

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_tensor(name: str, tensor: torch.Tensor, spikes: bool = False, of: str = "") -> None:
    """Raises ValueError, with ``name`` and ``of``, unless this is a dense floating-point tensor, or with ``spikes`` one
    of bytes. Backends judge device and width."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}{of} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}{of} must be a dense tensor, not one of layout {tensor.layout}")
    if tensor.dtype not in DTYPES and not (spikes and tensor.dtype == torch.uint8):
        raise ValueError(f"{name}{of} must be a floating-point tensor, not {tensor.dtype}")


def mixed_dtypes(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """Why PyTorch's product cannot take tensors of these dtypes, or None if it can."""
    for name, dtype in (("x", x.dtype), ("bias", values.dtype if bias is None else bias.dtype)):
        if dtype == values.dtype:
            continue
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not autocast or torch.float64 in (dtype, values.dtype):  # (autocast leaves float64 alone)
            return f"{name} is {dtype} and the weights are {values.dtype}; give {name}.to({values.dtype})"
    return None


def check_connection(suffix: str, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> None:
    """Raises ValueError unless weights and bias fit ``mask``."""
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask{suffix} must be a BlockMask, not {type(mask).__name__}")
    check_tensor("values", values, of=suffix)
    mask.check_values(values)
    if bias is not None:
        check_tensor("bias", bias, of=suffix)
        if bias.shape != mask.shape[:1]:
            raise ValueError(f"bias{suffix} has shape {tuple(bias.shape)}, the mask has {mask.shape[0]} outputs")
