"""``g2g_conv2d`` on the compiled CPU kernels: operators ``g2g::conv2d_forward`` (with its autograd formula) and
``g2g::conv2d_backward``.

Each product is computed by events where its input is sparse enough for that to be faster: the output and the gradient
of the weight by those of x, the gradient of x by those of ∂y. The kernels decide, by the numbers of the call, and
PyTorch's own convolution (oneDNN) computes the others.
"""

import functools
from collections.abc import Sequence
from ctypes import Structure
from typing import Any

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, pointer, run, too_large
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.flops import count_flops
from g2g_kernels.ops.g2g_conv2d.call import ConvolutionCall, flops, images, laid, output_shape, output_size, plain
from g2g_kernels.ops.g2g_conv2d.reference import Pair
from g2g_kernels.ops.record import Backward, Differentiable, Output

#: places of a row of a group are numbered in 16 bits; frames around an image grow with the reach of its kernel; and the
#: rows of a kernel that ``kMostTaps`` in ``csrc/convolution.h`` allows
MOST_PLACES, MOST_REACH, MOST_ROWS = 1 << 16, 1 << 12, 64


def refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    for tensor in (x, weight, bias):
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"needs tensors on the CPU, not on {tensor.device}"
        if tensor.dtype != torch.float32 and not (tensor is x and x.dtype == torch.uint8):
            return f"needs float32 tensors, not {tensor.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "computes in float32, not under autocast"
    if x.numel() == 0 or weight.numel() == 0:
        return "needs an input and a weight that are not empty"
    return refuses_sizes(x.shape[1:], weight.shape, (stride, padding, dilation, groups))


def refuses_sizes(image: Sequence[int], weight: Sequence[int], options: tuple[Pair, Pair, Pair, int]) -> str | None:
    """Why these kernels cannot serve images [C, H, W] and a weight of that shape, with stride, padding, dilation and
    groups, or None."""
    stride, padding, dilation, groups = options
    kernel = weight[2:]
    rows, columns = output_size(image[1:], kernel, stride, padding, dilation)
    of_group = image[0] // groups, weight[0] // groups
    if max(image[2] * of_group[0], columns * of_group[1]) > MOST_PLACES:
        return f"serves rows of at most {MOST_PLACES} numbers, columns times channels of a group"
    if kernel[0] > MOST_ROWS:
        return f"serves kernels of at most {MOST_ROWS} rows"
    if max((size - 1) * apart for size, apart in zip(kernel, dilation, strict=True)) > MOST_REACH:
        return f"serves kernels that reach at most {MOST_REACH} places"
    return too_large(rows=max(rows, *image[1:]), padding=max(padding), stride=max(stride))


def g2g_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    last = any([_is_last(tensor) for tensor in (x, weight)])
    bias = None if bias is None else bias.contiguous()
    call = ConvolutionCall(x.to(torch.float32), weight.contiguous(), bias, stride, padding, dilation, groups, last)
    return images(call, FORWARD(call._replace(x=laid(call, call.x))))


def _is_last(tensor: torch.Tensor) -> bool:
    """Whether the channels are last in memory, of a tensor that could have them first."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _arguments(call: ConvolutionCall) -> Structure:
    x, weight, bias, *options = call
    arguments = structures.Convolution.from_buffer_copy(_sizes(x.shape, weight.shape, *options))
    arguments.x, arguments.weight, arguments.bias = x.data_ptr(), weight.data_ptr(), pointer(bias)
    arguments.threads, arguments.event_cost = torch.get_num_threads(), cpu_library.CONVOLUTION_COST
    return arguments


@functools.lru_cache(1024)  # filling it takes as long as a small convolution
def _sizes(
    x: tuple[int, ...], weight: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair, groups: int, last: bool
) -> Structure:
    """Arguments of a call with these shapes of x, as it lies in memory, and of the weight."""
    batch, height, width, channels = x if last else (x[0], *x[2:], x[1])
    out_height, out_width = output_size((height, width), weight[2:], stride, padding, dilation)
    return structures.Convolution(
        images=batch,
        channels=channels,
        out_channels=weight[0],
        groups=groups,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        kernel_rows=weight[2],
        kernel_columns=weight[3],
        stride_y=stride[0],
        stride_x=stride[1],
        padding_y=padding[0],
        padding_x=padding[1],
        dilation_y=dilation[0],
        dilation_x=dilation[1],
        x_last=last,
        y_last=last,
    )


def _by_events(arguments: Structure, shapes: dict[str, tuple[int, ...]], backward: bool) -> dict[str, torch.Tensor]:
    """Those of the results ``y``, ``grad_x`` and ``grad_weight`` of these shapes that are computed by events. A sample
    says first which will be: memory that is not used in the end costs as much as a small convolution."""
    for name in shapes:
        setattr(arguments, f"{name}_by_events", True)
    arguments.sample = True
    run(library().g2g_convolution, arguments, backward)
    made = {}
    for name, shape in shapes.items():
        if getattr(arguments, f"{name}_by_events"):
            made[name] = workspace.empty(shape)
            setattr(arguments, name, made[name].data_ptr())
    if made:
        arguments.sample = False
        run(library().g2g_convolution, arguments, backward)
    return {name: tensor for name, tensor in made.items() if getattr(arguments, f"{name}_by_events")}


def _forward(call: ConvolutionCall, keep: bool) -> torch.Tensor:
    made = _by_events(_arguments(call), {"y": output_shape(call)}, backward=False)
    return made["y"] if made else plain(call)[0]


def _backward(given: Backward) -> list[torch.Tensor | None]:
    grad_y: Any
    call, _, (grad_y,), (want_x, want_weight, *want_bias) = given
    arguments = _arguments(call)
    arguments.grad_y = grad_y.data_ptr()
    wanted = {"grad_x": call.x if want_x else None, "grad_weight": call.weight if want_weight else None}
    shapes = {name: tuple(like.shape) for name, like in wanted.items() if like is not None}
    made = _by_events(arguments, shapes, backward=True)
    left, bias = [name in shapes and name not in made for name in wanted], None
    if any(left):
        options = [list(each) for each in call[3:6]]
        operands = images(call, grad_y), images(call, call.x), call.weight
        of_x, of_weight, bias = torch.ops.aten.convolution_backward(
            *operands, [len(call.weight)], *options, False, [0, 0], call.groups, [*left, left[1] and any(want_bias)]
        )
        made |= {"grad_x": laid(call, of_x)} if left[0] else {}
        made |= {"grad_weight": of_weight.contiguous()} if left[1] else {}
    if any(want_bias) and bias is None:
        bias = grad_y.sum((0, 1, 2) if call.last else (0, 2, 3))
    return [made.get("grad_x"), made.get("grad_weight"), *([] if call.bias is None else [bias])]


def _shapes(call: ConvolutionCall, keep: bool) -> list[Output]:
    return [Output(output_shape(call))]


FORWARD = Differentiable("conv2d", "Tensor", 1, _forward, _backward, _shapes, plain)
count_flops(FORWARD, flops)
count_flops(FORWARD.backward, lambda given: flops(given.call) * sum(given.needed[:2]))
