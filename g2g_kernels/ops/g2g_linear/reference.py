"""Plain PyTorch ``g2g_linear``: the weight unpacked to its dense form. The oracle for every other backend."""

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.checks import mixed_dtypes


def refuses(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> str | None:
    """Why these operations cannot serve a call, or None."""
    return mixed_dtypes(values if x.dtype == torch.uint8 else x, values, bias)


def g2g_linear(
    x: torch.Tensor, values: torch.Tensor, mask: BlockMask | MaskTensors, bias: torch.Tensor | None
) -> torch.Tensor:
    if x.dtype == torch.uint8:
        x = x.to(values.dtype)
    return torch.nn.functional.linear(x, mask.unpack(values), bias)
