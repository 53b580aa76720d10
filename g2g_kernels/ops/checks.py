"""Checks of what operators are called with: every error names the argument, and comes before any work."""

import torch

from g2g_kernels.block_mask import BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """Raises ValueError unless ``tensor`` is a dense tensor of floats, beside ``like`` and of its dtype.

    Under autocast, which converts them, dtypes may differ.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be a dense floating-point tensor, not {tensor.layout} of {tensor.dtype}")
    if like is None:
        return
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {like.device}")
    if tensor.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise ValueError(f"{name} has dtype {tensor.dtype}, x {like.dtype}; convert one of them")


def check_connection(
    suffix: str, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None, like: torch.Tensor
) -> None:
    """Raises ValueError unless weights and bias are those of ``mask`` and go with the input x, ``like``."""
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask{suffix} must be a BlockMask, not {type(mask).__name__}")
    if mask.unit_row.device != like.device:
        raise ValueError(f"mask{suffix} is on {mask.unit_row.device}, x on {like.device}")
    check_tensor(f"values{suffix}", values, like)
    mask.check_values(values)
    if bias is not None:
        check_tensor(f"bias{suffix}", bias, like)
        if tuple(bias.shape) != mask.shape[:1]:
            raise ValueError(f"bias{suffix} has shape {tuple(bias.shape)}, the mask has {mask.shape[0]} outputs")
