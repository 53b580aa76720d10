"""Hidden layers in the notation of papers, ``32C3-64C3-P2-128C3-P2-256``, and the shapes that follow from it."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from g2g_kernels.numbers import SIZE
from g2g_kernels.ops.g2g_stack.images import pooled_shape
from g2gnet.images import Shape, pool_of

#: what a part may be
FORM = (
    "32C3 (32 channels, kernels 3 × 3, the size kept), P2 or AP2 (the maximum or the mean of 2 × 2 spikes) or 256 "
    "(neurons), joined as 32C3-64C3-P2-128C3-P2"
)
_POOLS = {"": nn.MaxPool2d, "M": nn.MaxPool2d, "A": nn.AvgPool2d}


class Layer(NamedTuple):
    """A population and its weights.

    Attributes:
        size: its channels, or neurons.
        kernel: the side of its kernels, or None of a linear layer.
        pools: those between its source and its weights.
    """

    size: int
    kernel: int | None = None
    pools: tuple[nn.Module, ...] = ()


class Placed(NamedTuple):
    """A layer's shapes: of its population, and of its weights (outputs, inputs), in channels if it is a convolution."""

    shape: Shape
    weight: tuple[int, int]


def parse(text: str, num_classes: int = 1) -> tuple[Layer, ...]:
    """The layers, and behind them the linear one of the output. Raises ValueError, naming the part that is wrong.

    Example:
        >>> [(layer.size, layer.kernel, len(layer.pools)) for layer in parse("8C3-P2-32", num_classes=10)]
        [(8, 3, 0), (32, None, 1), (10, None, 0)]
    """
    layers: list[Layer] = []
    pools: tuple[nn.Module, ...] = ()
    for part in text.split("-"):
        found = re.fullmatch(r"(?P<size>\d{1,18})(C(?P<kernel>\d{1,9}))?|(?P<pool>[AM]?)P(?P<side>\d{1,9})", part)
        if found is None:
            raise ValueError(f"{part!r} in layers={text} is no layer; give {FORM}")
        if (found["kernel"] or found["side"]) and layers and layers[-1].kernel is None:
            raise ValueError(
                f"{part} in layers={text} needs images, but stands behind {layers[-1].size} neurons without a place; "
                f"put it before them: {FORM}"
            )
        for number in (found["size"], found["kernel"], found["side"]):
            if number is not None:
                SIZE.check(f"layers={text}: a number in {part}", int(number))
        if found["side"]:
            pools = (*pools, _POOLS[found["pool"]](int(found["side"])))
            continue
        kernel = found["kernel"] and int(found["kernel"])
        if kernel and kernel % 2 == 0:
            raise ValueError(f"{part} in layers={text} has an even kernel, which cannot keep the size; give an odd one")
        layers.append(Layer(int(found["size"]), kernel or None, pools))
        pools = ()
    if not layers:
        raise ValueError(f"layers={text} has pools alone; give {FORM}")
    return (*layers, Layer(num_classes, None, pools))


def placed(layers: Sequence[Layer], input_shape: Shape) -> list[Placed]:
    """The shapes of the layers of a network for these inputs, (C, H, W) or (D,). Raises ValueError for images that a
    layer cannot take.

    Example:
        >>> [each.shape for each in placed(parse("8C3-P2-32", num_classes=10), (1, 28, 28))]
        [(8, 28, 28), (32,), (10,)]
    """
    source, found = input_shape, []
    for number, layer in enumerate(layers, 1):
        if len(source) != 3 and (layer.kernel or layer.pools):
            raise ValueError(f"layer {number} takes images [C, H, W], and its source has the shape {list(source)}")
        try:
            for pool in layer.pools:
                channels, rows, columns = source
                source = pooled_shape((channels, rows, columns), pool_of(f"layer {number}", pool))
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from None
        if layer.kernel is None:
            found.append(Placed((layer.size,), (layer.size, math.prod(source))))
        else:
            found.append(Placed((layer.size, *source[1:]), (layer.size, source[0])))
        source = found[-1].shape
    return found
