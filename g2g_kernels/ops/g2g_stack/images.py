"""Connections between images: convolutions, pools, and what is between a source and a target beside their weights.

Populations are lists of neurons everywhere else; those of an image (C, H, W) are in the order of ``torch.flatten``. A
connection with :class:`Images` takes them as images: pools, the product with its weights, a norm, pools again.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from g2g_kernels.choices import check_choice
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.g2g_conv2d.call import output_size
from g2g_kernels.ops.g2g_conv2d.reference import Pair
from g2g_kernels.ops.record import TYPES

#: (channels, rows, columns)
Shape = tuple[int, int, int]
#: what a pool gives of a window
POOLS = ("max", "average", "sum")


class Pool(NamedTuple):
    """A pool, as PyTorch has it.

    Attributes:
        kind: of :data:`POOLS`.
        kernel, stride, padding, dilation: (of rows, of columns).
        ceil: whether windows may end outside of the padded image (``ceil_mode``).
        inside: whether an average is of the pixels inside of the image alone (``count_include_pad=False``).
    """

    kind: str
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False
    inside: bool = False


class Convolution(NamedTuple):
    """The options of a convolution, as :func:`g2g_kernels.g2g_conv2d` takes them."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Norm(NamedTuple):
    """Batch normalisation over samples, pixels and all steps of a run: what ``nn.BatchNorm2d`` does while it trains.

    Attributes:
        weight, bias: [C], or None.
        mean, variance: [C], running ones, which a run changes in place; or None.
        momentum: with which it does.
        eps: added to the variance.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    variance: torch.Tensor | None
    momentum: float
    eps: float


class Images(NamedTuple):
    """The images that a connection takes and gives.

    Attributes:
        source: the shape in which the source's neurons lie.
        before: the pools that come before the weights.
        convolution: of a connection of that kind.
        norm: between weights and neurons; or None.
        after: the pools of what the weights (and the norm) gave.
    """

    source: Shape
    before: tuple[Pool, ...] = ()
    convolution: Convolution | None = None
    norm: Norm | None = None
    after: tuple[Pool, ...] = ()


TYPES |= {"Pool": Pool, "Convolution": Convolution, "Norm": Norm, "Images": Images}


def pooled_shape(shape: Shape, pool: Pool) -> Shape:
    """The shape of what a pool gives. Raises ValueError if it has no pixel."""
    channels, *image = shape
    size = list(output_size(image, pool.kernel, pool.stride, pool.padding, pool.dilation))
    for axis in range(2) if pool.ceil else ():
        reach = pool.dilation[axis] * (pool.kernel[axis] - 1)
        padded = image[axis] + 2 * pool.padding[axis]
        size[axis] = -(-(padded - reach - 1) // pool.stride[axis]) + 1
        # no window begins behind the image and its padding before it
        size[axis] -= (size[axis] - 1) * pool.stride[axis] >= image[axis] + pool.padding[axis]
    if min(size) < 1:
        raise ValueError(f"images of {image[0]} × {image[1]} are smaller than a pool of {pool.kernel}")
    return channels, size[0], size[1]


def convolved_shape(shape: Shape, weight: torch.Size, convolution: Convolution) -> Shape:
    """The shape of what a convolution gives. Raises ValueError for images that it cannot take."""
    out, of_group, *kernel = weight
    stride, padding, dilation, groups = convolution
    if shape[0] != of_group * groups:
        raise ValueError(f"images have {shape[0]} channels, and the convolution reads {of_group * groups}")
    rows, columns = output_size(shape[1:], kernel, stride, padding, dilation)
    if min(rows, columns) < 1:
        raise ValueError(
            f"images of {shape[1]} × {shape[2]} with padding {padding} are smaller than the kernel, "
            f"{kernel[0]} × {kernel[1]} with dilation {dilation}"
        )
    return out, rows, columns


def convolved(images: Images) -> Shape:
    """The shape of what reaches the weights."""
    shape = images.source
    for pool in images.before:
        shape = pooled_shape(shape, pool)
    return shape


def ends_of(connection: Any) -> tuple[int, int]:
    """The numbers of outputs and inputs of a connection. Raises ValueError for parts that do not fit."""
    images = connection.images
    if images is None:
        return connection.mask.shape
    shape = convolved(images)
    if connection.kind == "linear":
        outputs, inputs = connection.mask.shape
        if inputs != math.prod(shape):
            raise ValueError(f"the weights have {inputs} inputs, and images of {list(shape)} {math.prod(shape)} pixels")
        return outputs, math.prod(images.source)
    if connection.kind == "convolution":
        shape = convolved_shape(shape, connection.values.shape, images.convolution)
    for pool in images.after:
        shape = pooled_shape(shape, pool)
    return math.prod(shape), math.prod(images.source)


def check_images(suffix: str, connection: Any) -> None:
    """Raises ValueError unless the parts of a connection of images fit one another."""
    kind, values, images, bias = connection.kind, connection.values, connection.images, connection.bias
    if not isinstance(images, Images):
        raise ValueError(f"a connection{suffix} is of kind {kind!r} without Images; give images=Images(source, …)")
    for pool in (*images.before, *images.after):
        check_choice(f"kind of a pool{suffix}", pool.kind, POOLS)
    if kind == "convolution":
        check_tensor("values", values, of=suffix)
        if values.dim() != 4 or images.convolution is None:
            raise ValueError(
                f"a convolution{suffix} has values {list(values.shape)} and the options {images.convolution}; give "
                "[out, C / groups, kernel rows, kernel columns] and Convolution(…)"
            )
        if bias is not None:
            check_tensor("bias", bias, of=suffix)
            if bias.shape != values.shape[:1]:
                raise ValueError(f"bias{suffix} has shape {list(bias.shape)}, the kernels give {values.shape[0]}")
    elif (images.norm, images.convolution) != (None, None) or (images.after and kind == "linear"):
        raise ValueError(f"a connection{suffix} of kind {kind!r} has a norm or pools that only convolutions have")
    try:
        ends_of(connection)
    except ValueError as error:
        raise ValueError(f"a connection{suffix}: {error}") from None


def pooled(x: torch.Tensor, pool: Pool) -> torch.Tensor:
    """What a pool gives of images [n, C, H, W]."""
    if pool.kind == "max":
        return F.max_pool2d(x, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil)
    only = 1 if pool.kind == "sum" else None
    return F.avg_pool2d(x, pool.kernel, pool.stride, pool.padding, pool.ceil, not pool.inside, only)


def through(
    images: Images, x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor], flat: bool
) -> torch.Tensor:
    """What a connection gives, [..., N], of what it receives, [..., N_src]; ``product`` is that of images
    [n, C, H, W] with its weights, or if they are ``flat`` of [n, N]."""
    lead = x.shape[:-1]
    y = x.reshape(math.prod(lead), *images.source)
    for pool in images.before:
        y = pooled(y, pool)
    y = product(y.flatten(1) if flat else y)
    norm = images.norm
    if norm is not None:
        y = F.batch_norm(y, norm.mean, norm.variance, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    for pool in images.after:
        y = pooled(y, pool)
    return y.reshape(*lead, math.prod(y.shape[1:]))
