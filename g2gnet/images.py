"""Convolutions, pools and norms of networks: what a projection is made of where populations are images."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from g2g_kernels.numbers import COUNT, WHOLE
from g2g_kernels.ops.g2g_conv2d import pair_of
from g2g_kernels.ops.g2g_stack.images import Convolution, Images, Norm, Pool, convolved_shape, pooled_shape
from g2gnet.base.hooks import own_code
from g2gnet.convolution import G2GConv2d
from g2gnet.layers import G2GLinear

#: (C, H, W) of an image, (N,) of a list of neurons
Shape = tuple[int, ...]


class SumPool2d(nn.AvgPool2d):
    """The sum over each window of an image, ``nn.AvgPool2d`` with the divisor 1: spikes stay whole numbers.

    Args:
        kernel_size, stride, padding: as of ``nn.AvgPool2d``.

    Example:
        >>> SumPool2d(2)(torch.ones(1, 3, 4, 4)).unique(), SumPool2d(2)(torch.ones(1, 3, 4, 4)).shape
        (tensor([4.]), torch.Size([1, 3, 2, 2]))
    """

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0) -> None:
        super().__init__(kernel_size, stride, padding, divisor_override=1)


class Path(NamedTuple):
    """What a projection does beside its weights.

    Attributes:
        kind: ``"linear"``, ``"convolution"`` or ``"pool"``.
        before, after: the pools before and behind the weights.
        flat: whether an ``nn.Flatten`` is a part of it.
    """

    kind: str
    before: tuple[Pool, ...] = ()
    after: tuple[Pool, ...] = ()
    flat: bool = False

    @property
    def takes_images(self) -> bool:
        """Whether its source has to be an image."""
        return self.kind != "linear" or bool(self.before)


class Parts(NamedTuple):
    """A projection's path, the module that becomes the network's, and the norm behind it."""

    path: Path
    module: Any
    norm: nn.BatchNorm2d | None = None


#: what takes the place of PyTorch's layers
COUNTERPARTS = {nn.Conv2d: "G2GConv2d.from_conv2d(conv)", nn.Linear: "G2GLinear.from_linear(linear)"}
#: modules that become options of a connection
_SETTINGS: tuple[type[nn.Module], ...] = (nn.MaxPool2d, nn.AvgPool2d, nn.Flatten)
#: the modules that a projection may have beside its weights
PARTS = "pools (nn.MaxPool2d, nn.AvgPool2d, SumPool2d) and nn.Flatten, and nn.BatchNorm2d behind a convolution"


def parts_of(name: str, connection: nn.Module) -> Parts:
    """The parts of the connection ``name``: one module, or an ``nn.Sequential`` of several. Raises TypeError for others
    than those that networks take, ValueError for options that these do not have."""
    modules = _inside(name, connection)
    before: list[Pool] = []
    after: list[Pool] = []
    layer: Any = None
    norm, flat = None, False
    for module in modules:
        kind = type(module).__name__
        behind = "" if layer is None else f" behind a {type(layer).__name__}"
        if flat and not hasattr(module, "in_features"):
            raise TypeError(f"{name} has a {kind} behind nn.Flatten, which leaves no images; give a G2GLinear there")
        if layer is None and (isinstance(module, G2GConv2d) or _is_linear(module, alone=len(modules) == 1)):
            layer = module
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and (layer is None or isinstance(layer, G2GConv2d)):
            (before if layer is None else after).append(pool_of(name, module))
        elif isinstance(module, nn.Flatten):
            if module.start_dim not in (1, -3) or module.end_dim not in (3, -1):
                raise ValueError(
                    f"{name} has {module}, and images become neurons by nn.Flatten(1, -1) alone; give that"
                )
            flat = True
        elif type(module) is nn.BatchNorm2d and isinstance(layer, G2GConv2d) and not after and norm is None:
            norm = _checked_norm(name, module, layer)
        else:
            remedy = f"a network joins G2GLinear and G2GConv2d layers with {PARTS}. Put others into your own module"
            for layer_kind, counterpart in COUNTERPARTS.items():
                if isinstance(module, layer_kind) and not behind:
                    remedy = f"give {counterpart}, or call sparsify(model) before"
            raise TypeError(f"{name} is a {kind}{behind}; {remedy} (docs/limits.md)")
    if layer is None and not before:
        raise TypeError(f"{name} has no weights and no pool; give a G2GConv2d, a G2GLinear or a pool")
    if layer is None:
        return Parts(Path("pool", tuple(before), flat=flat), connection)
    kind = "convolution" if isinstance(layer, G2GConv2d) else "linear"
    return Parts(Path(kind, tuple(before), tuple(after), flat), layer, norm)


def _inside(name: str, connection: nn.Module) -> list[nn.Module]:
    """The modules of a connection, one or those of an ``nn.Sequential``."""
    if type(connection) is not nn.Sequential:
        return [connection]
    _refuse_own_code(name, connection, nn.Sequential)
    for module in connection:
        for kind in _SETTINGS:
            if isinstance(module, kind):
                _refuse_own_code(name, module, kind)
    return [*connection]


def _refuse_own_code(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises TypeError for a part of a connection of which a network takes over the options, and no more."""
    if why := own_code(module, kind):
        raise TypeError(
            f"{name} has a {type(module).__name__} that {why}, and a network takes over the options of pools and "
            "nn.Flatten, and calls none of them; put hooks on the layer beside it or on the neurons, and a pool of "
            "your own alone into a Projection, which calls it"
        )


def _is_linear(module: nn.Module, alone: bool) -> bool:
    # modules of other people's stand for whole connections
    return isinstance(module, G2GLinear) or (alone and hasattr(module, "in_features"))


def _checked_norm(name: str, norm: nn.BatchNorm2d, layer: Any) -> nn.BatchNorm2d:
    if norm.num_features != layer.out_channels:
        raise ValueError(f"the norm of {name} has {norm.num_features} channels, not {layer.out_channels}")
    return norm


def pool_of(name: str, module: nn.Module) -> Pool:
    """A pool of PyTorch as the operators take it. Raises ValueError for options that they do not have."""
    given: Any = module
    kernel = pair_of("kernel_size", given.kernel_size, COUNT)
    stride = pair_of("stride", given.kernel_size if given.stride is None else given.stride, COUNT)
    padding = pair_of("padding", given.padding, WHOLE)
    if isinstance(module, nn.MaxPool2d):
        if given.return_indices:
            raise ValueError(f"the pool of {name} has return_indices=True; a network has no use for them: leave it out")
        return Pool("max", kernel, stride, padding, pair_of("dilation", given.dilation, COUNT), given.ceil_mode)
    if given.divisor_override not in (None, 1):
        raise ValueError(
            f"the pool of {name} has divisor_override={given.divisor_override}; give None, 1 (a sum), or scale the "
            "weights behind it"
        )
    kind = "average" if given.divisor_override is None else "sum"
    inside = kind == "average" and not given.count_include_pad and padding != (0, 0)
    return Pool(kind, kernel, stride, padding, (1, 1), given.ceil_mode, inside)


def shape_behind(name: str, path: Path, layer: Any, source: Shape) -> Shape:
    """The shape of what a projection gives. Raises ValueError, naming it, for a source that it cannot take."""
    if not path.takes_images:
        return (layer.out_features,)
    if len(source) != 3:
        raise ValueError(
            f"{name} takes images [C, H, W], and its source is {source[0]} neurons without a place; give a G2GLinear "
            "there, or the network input_shape=(C, H, W) if the source is its input"
        )
    shape: Any = source
    try:
        for pool in path.before:
            shape = pooled_shape(shape, pool)
        if path.kind == "linear":
            return (layer.out_features,)
        if path.kind == "convolution":
            kernels = torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
            shape = convolved_shape(shape, kernels, convolution_of(layer))
        for pool in path.after:
            shape = pooled_shape(shape, pool)
    except ValueError as error:
        raise ValueError(f"{name} cannot take images of {list(source)}: {error}") from None
    return (math.prod(shape),) if path.flat else shape


def convolution_of(layer: Any) -> Convolution:
    """The options of a layer as the operators take them."""
    return Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)


def images_of(path: Path, layer: Any, source: Shape, norm: Norm | None = None) -> Images | None:
    """What the operators are told of the images of a projection; None if it needs none."""
    if not path.takes_images:
        return None
    channels, rows, columns = source
    convolution = convolution_of(layer) if path.kind == "convolution" else None
    return Images((channels, rows, columns), path.before, convolution, norm, path.after)


def normed(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor | None, Norm | None]:
    """Weight and bias of a convolution with a norm behind it, and that for operators where it takes the statistics of a
    run. Elsewhere it is None, and folded into weight and bias."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:
        running, momentum = (mean, variance) if norm.training else (None, None), norm.momentum
        if momentum is None:  # the mean of all batches
            momentum = 0.0 if norm.num_batches_tracked is None else 1 / (int(norm.num_batches_tracked) + 1)
        return weight, bias, Norm(norm.weight, norm.bias, *running, momentum, norm.eps)
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = (-mean if bias is None else bias - mean) * scale
    shift = shift if norm.bias is None else shift + norm.bias
    return weight * scale[:, None, None, None], shift, None


def checked_shape(given: Sequence[int]) -> Shape:
    """(C, H, W), or (N,) of an input. Raises ValueError for others."""
    shape = tuple(given) if isinstance(given, Sequence) else (given,)
    if len(shape) not in (1, 3):
        raise ValueError(f"input_shape={given!r} must be (C, H, W), or (D,) of inputs without a place")
    for each in shape:
        COUNT.check("input_shape", each)
    return shape


def grouped(layers: Iterable[Any]) -> list[tuple[list[nn.Module], Sequence[Any]]]:
    """The layers of a stack, each the modules of its connection and, behind these, its neurons and its recurrent
    connection: pools, norms and ``nn.Flatten`` between two layers belong to the connection that follows."""
    found: list[tuple[list[nn.Module], Sequence[Any]]] = []
    waiting: list[nn.Module] = []
    for number, layer in enumerate(layers, 1):
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d | nn.Flatten | nn.BatchNorm2d):
            waiting.append(layer)
            continue
        if not isinstance(layer, tuple | list) or len(layer) < 2:
            raise TypeError(
                f"layer {number} is a {type(layer).__name__}; give pairs (connection, neurons), and between them "
                "nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d and nn.Flatten"
            )
        connection, *rest = layer
        found.append(([*waiting, *_inside(f"layer {number}", connection)], rest))
        waiting = []
    if waiting:
        raise TypeError(
            f"behind the last neurons there is a {type(waiting[0]).__name__}; a stack ends with neurons, whose counts "
            "or readout are its answer"
        )
    return found
