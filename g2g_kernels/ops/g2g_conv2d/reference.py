"""Plain PyTorch ``g2g_conv2d``, by the library that PyTorch has for the device. The oracle for every other backend."""

import functools
import logging

import torch
from torch.nn import functional as F

from g2g_kernels.ops.checks import mixed_dtypes

logger = logging.getLogger("g2g_kernels")

#: along both axes of an image
Pair = tuple[int, int]


def refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: object) -> str | None:
    """Why these operations cannot serve a call, or None."""
    return mixed_dtypes(weight if x.dtype == torch.uint8 else x, weight, bias)


def g2g_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    if x.dtype == torch.uint8:
        x = x.to(weight.dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def on_triton(*call: object) -> torch.Tensor:
    """The same for the backend ``triton``, which has no kernel of its own."""
    _say_once()
    return g2g_conv2d(*call)  # type: ignore[arg-type]


@functools.cache
def _say_once() -> None:
    logger.info("g2g_conv2d has no Triton kernel yet; convolutions run by PyTorch's own")
