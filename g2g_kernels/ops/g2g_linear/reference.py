"""Plain PyTorch ``g2g_linear``: the weight unpacked to its dense form. The oracle for every other backend."""

import torch

from g2g_kernels.block_mask import BlockMask


def g2g_linear(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype == torch.uint8:
        x = x.to(values.dtype)
    return torch.nn.functional.linear(x, mask.unpack(values), bias)
