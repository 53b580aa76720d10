"""``g2g_conv2d``: a convolution of images of spikes, y = x ⋆ W + b."""

from collections.abc import Sequence

import torch

from g2g_kernels.dispatch import Operator
from g2g_kernels.numbers import COUNT, WHOLE, Number
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.g2g_conv2d import cpu, reference
from g2g_kernels.ops.g2g_conv2d.call import output_size
from g2g_kernels.ops.g2g_conv2d.reference import Pair
from g2g_kernels.tracing import is_transformed

operator = Operator("g2g_conv2d")
operator.register("triton", reference.on_triton, reference.refuses)
operator.register("cpu", cpu.g2g_conv2d, cpu.refuses)
operator.register("torch", reference.g2g_conv2d, reference.refuses)


def g2g_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.conv2d``, on the CPU by events where x is mostly zero; differentiable in ``x``, ``weight``
    and ``bias`` as :func:`~g2g_kernels.g2g_linear`.

    Args:
        x: [N, C, H, W], channels last in memory or not: floats, or spikes in uint8.
        weight: [out, C / groups, kernel rows, kernel columns], of x's dtype unless x is uint8 or autocast is on.
        bias: [out], or None.
        stride, padding, dilation: of both axes, or (of rows, of columns). Padding is with zeros.
        groups: C and out are divided into so many groups; outputs read inputs of their own group alone.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Returns:
        [N, out, rows, columns], channels last in memory if x or the weight is.

    Raises:
        ValueError: for tensors, dtypes and options that do not match, or an unknown backend.
        BackendError: if the forced backend cannot serve the call.

    Example:
        >>> spikes = (torch.rand(5, 16, 12, 12) < 0.1).float()
        >>> g2g_conv2d(spikes, torch.rand(32, 16, 3, 3), padding=1).shape
        torch.Size([5, 32, 12, 12])
    """
    check_tensor("x", x, spikes=True)
    check_tensor("weight", weight)
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; give [N, C, H, W] and "
            "[out, C / groups, kernel rows, kernel columns]"
        )
    stride, padding = pair_of("stride", stride, COUNT), pair_of("padding", padding, WHOLE)
    dilation = pair_of("dilation", dilation, COUNT)
    groups = COUNT.check("groups", groups)
    out_channels, of_group, *kernel = weight.shape
    if x.shape[1] != of_group * groups or out_channels % groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, and groups={groups} of weight {tuple(weight.shape)} read "
            f"{of_group * groups}; both numbers of channels must be multiples of groups"
        )
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, the weight gives {out_channels} channels")
    if min(output_size(x.shape[2:], kernel, stride, padding, dilation)) < 1:
        raise ValueError(
            f"images of {x.shape[2]} × {x.shape[3]} with padding {padding} are smaller than the kernel, "
            f"{kernel[0]} × {kernel[1]} with dilation {dilation}"
        )
    if reason := reference.refuses(x, weight, bias):  # which every backend's reasons would only surround
        raise ValueError(reason)
    if is_transformed((x, weight, bias)):
        return reference.g2g_conv2d(x, weight, bias, stride, padding, dilation, groups)
    return operator(x, weight, bias, stride, padding, dilation, groups, backend=backend)


def pair_of(name: str, given: int | Sequence[int], kind: Number) -> Pair:
    """(of rows, of columns) of an option. Raises ValueError, which names it, for numbers of another kind."""
    both = tuple(given) if isinstance(given, Sequence) else (given, given)
    if len(both) != 2:
        raise ValueError(f"{name}={given!r} must be one number or two, (of rows, of columns)")
    rows, columns = [kind.check(name, each) for each in both]
    return rows, columns
