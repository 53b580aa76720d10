"""A call of ``g2g_conv2d`` in the form of a compiled backend's operators."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from g2g_kernels.ops.g2g_conv2d import reference
from g2g_kernels.ops.g2g_conv2d.reference import Pair
from g2g_kernels.ops.record import TYPES, Expected


class ConvolutionCall(NamedTuple):
    """What the forward pass takes. x and the output lie in memory as [N, C, H, W], or, if ``last``, as [N, H, W, C],
    and are contiguous tensors of that shape; the weight is [out, C / groups, kernel rows, kernel columns]; the bias
    [out] or None."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    last: bool

    def expected(self) -> Expected:
        """What kernels take for granted; ValueError for numbers that they cannot have."""
        x, weight, bias, *options, groups, _ = self
        if x.dim() != 4 or weight.dim() != 4 or min(*options[0], *options[2], groups, min(options[1]) + 1) < 1:
            raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} with {(*options, groups)} cannot be")
        batch, _, *image = images(self, x).shape
        out, of_group, *_ = weight.shape
        if min(output_shape(self)[1:]) < 1 or out % groups:
            raise ValueError(f"weight {list(weight.shape)} in {groups} groups does not fit into images of {image}")
        channels = of_group * groups
        yield "x", x, (batch, *image, channels) if self.last else (batch, channels, *image), torch.float32
        yield "weight", weight, weight.shape, torch.float32
        yield "bias", bias, (out,), torch.float32


TYPES["ConvolutionCall"] = ConvolutionCall


def images(call: ConvolutionCall, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that lies as the call says in PyTorch's form, [N, C, H, W]."""
    return tensor.permute(0, 3, 1, 2) if call.last else tensor


def laid(call: ConvolutionCall, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`images`, contiguous."""
    return (tensor.permute(0, 2, 3, 1) if call.last else tensor).contiguous()


def output_shape(call: ConvolutionCall) -> tuple[int, ...]:
    """The shape of the output as it lies in memory."""
    batch, _, *image = images(call, call.x).shape
    size = output_size(image, call.weight.shape[2:], call.stride, call.padding, call.dilation)
    out = call.weight.shape[0]
    return (batch, *size, out) if call.last else (batch, out, *size)


def output_size(image: Sequence[int], kernel: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Rows and columns of the output for images of that size."""
    rows, columns = ((image[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return rows, columns


def plain(call: ConvolutionCall) -> tuple[torch.Tensor]:
    """The output by PyTorch's own convolution."""
    return (laid(call, reference.g2g_conv2d(images(call, call.x), *call[1:7])),)


def flops(call: ConvolutionCall) -> int:
    """A multiplication and an addition for each output and each weight that it reads."""
    return 2 * math.prod(output_shape(call)) * call.weight.shape[1:].numel()
