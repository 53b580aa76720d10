"""Connections as NIR's nodes and back: linear layers, convolutions, pools and what stands between them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from g2g_kernels import BlockMask
from g2g_kernels.ops.g2g_stack.images import Pool
from g2gnet.convolution import G2GConv2d
from g2gnet.images import SumPool2d, normed
from g2gnet.interop.arrays import Mask, numbers
from g2gnet.interop.nir_links import Link, metadata_of
from g2gnet.projections import NumberedProjection
from g2gnet.spiking_network import SpikingNetwork


def is_of_images(module: nn.Module) -> bool:
    """Whether a connection is a convolution or pools."""
    return isinstance(module, G2GConv2d | nn.MaxPool2d | nn.AvgPool2d | nn.Sequential)


def nodes_of(net: SpikingNetwork, projection: NumberedProjection, nir: Any) -> dict[str, Any]:
    """The nodes of a connection in the order of its edges, the one with its name among them. Raises ValueError for what
    NIR has no node for."""
    name, module, path = projection.name, net.connections()[projection.name], net._paths[projection.name]
    shape = net.shapes[(*net.populations, "input")[projection.source]]
    before, after = (
        {f"{name}_{side}{number}": _pool_node(name, pool, nir) for number, pool in enumerate(pools, 1)}
        for side, pools in (("pool", path.before), ("pooled", path.after))
    )
    flatten = {f"{name}_flatten": nir.Flatten(input_type={"input": None}, start_dim=0)}
    if path.kind == "pool":
        first, *others = before.items()
        return {name: first[1], **dict(others), **(flatten if path.flat else {})}
    if path.kind == "linear":
        return {**before, **(flatten if len(shape) == 3 else {}), name: _linear_node(module, nir)}
    image = tuple(np.array(shape[1:]).tolist()) if not before else None
    return {**before, name: _conv_node(net, name, image, nir), **after, **(flatten if path.flat else {})}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy().copy()


def _wiring(layer: Any) -> dict[str, Any]:
    mask: BlockMask | None = getattr(layer, "mask", None)
    return {} if mask is None or mask.is_full else {"wiring": _array(mask.state_dict()["wiring"])}


def _linear_node(connection: Any, nir: Any) -> Any:
    metadata = _wiring(connection)
    if connection.bits is not None:
        metadata["bits"] = connection.bits
    weight = _array(connection.dense_weight())
    if connection.bias is None:
        return nir.Linear(weight=weight, metadata=metadata)
    return nir.Affine(weight=weight, bias=_array(connection.bias), metadata=metadata)


def _conv_node(net: SpikingNetwork, name: str, image: tuple[int, ...] | None, nir: Any) -> Any:
    layer: Any = net.connections()[name]
    if layer.kernel_size[0] != layer.kernel_size[1] or layer.groups != 1:
        what = f"kernels of {layer.kernel_size[0]} × {layer.kernel_size[1]} and {layer.groups} groups"
        raise ValueError(f"{name} has {what}; the types of the package nir are those of square kernels and one group")
    weight, bias, norm = layer.kernels(), layer.bias, net._modules.get(f"{name}_norm")
    if isinstance(norm, nn.BatchNorm2d):
        weight, bias, trains = normed(weight, bias, norm)
        if trains is not None:
            raise ValueError(f"{name}_norm takes the statistics of each run; call net.eval() first, which folds it")
    has_bias = bias is not None
    return nir.Conv2d(
        input_shape=image,
        weight=_array(weight),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=_array(bias) if has_bias else np.zeros(len(weight), np.float32),
        metadata={**_wiring(layer), "bias": has_bias},
    )


def _pool_node(name: str, pool: Pool, nir: Any) -> Any:
    what = None
    if pool.kind == "max":
        what = "a pool of maxima"
    elif pool.ceil:
        what = "pools with ceil_mode"
    elif pool.inside:
        what = "pools with count_include_pad=False"
    if what is not None:
        raise ValueError(f"{name}: NIR has no node for {what}; train with nn.AvgPool2d(size) or SumPool2d(size)")
    kind = nir.SumPool2d if pool.kind == "sum" else nir.AvgPool2d
    sizes = (pool.kernel, pool.stride, pool.padding)
    return kind(**dict(zip(("kernel_size", "stride", "padding"), map(np.array, sizes), strict=True)))


def _pair(name: str, values: Any) -> Any:
    """Two whole numbers, or a name of a padding."""
    if isinstance(values, str):
        return values
    found = numbers(name, values, 2)
    if (found != found.round()).any():
        raise ValueError(f"{name} is {found.tolist()}; give whole numbers")
    return tuple(int(each) for each in np.broadcast_to(found, 2))


def pool_of(name: str, node: Any) -> nn.Module:
    """The pool of a node."""
    kind = SumPool2d if type(node).__name__ == "SumPool2d" else nn.AvgPool2d
    options = {
        each: _pair(f"node {name}: {each}", getattr(node, each)) for each in ("kernel_size", "stride", "padding")
    }
    return kind(**options)


def layer_of(link: Link, node: Any, mask: Mask | None, backend: str | None) -> nn.Module:
    """The convolution, or the first of pools alone, of a node."""
    name = link.name
    if not link.shape:
        return pool_of(name, node)
    weight = numbers(f"node {name}: weight", node.weight, math.prod(link.shape)).reshape(link.shape)
    options = {each: _pair(f"node {name}: {each}", getattr(node, each)) for each in ("stride", "padding", "dilation")}
    groups = int(node.groups)
    with metadata_of(name, node) as metadata:
        has_bias = bool(metadata.get("bias", True)) or bool(np.any(link.bias))
        mask = mask_of(name, metadata, weight) if mask is None else mask
    try:
        conv = nn.utils.skip_init(
            nn.Conv2d, weight.shape[1] * groups, len(weight), weight.shape[2:], groups=groups, bias=has_bias, **options
        )
        conv.weight.data.copy_(torch.from_numpy(weight))
        if has_bias:
            conv.bias.data.copy_(torch.tensor(link.bias))
        return G2GConv2d.from_conv2d(conv, mask, backend)
    except ValueError as error:
        raise ValueError(f"node {name}: {error}") from error


def mask_of(name: str, metadata: Mapping[str, Any], weight: np.ndarray) -> BlockMask | None:
    """The mask in a node's metadata, for this weight; None without one."""
    if (row := metadata.get("wiring")) is None:
        return None
    wiring = torch.from_numpy(numbers("wiring", row, np.size(row)))
    mask = BlockMask.from_state({"wiring": wiring}, (weight.shape[0], weight.shape[1]))
    if weight[~mask.to_dense().numpy()].any():
        raise ValueError(f"wiring calls weights absent that are not 0; give masks={{{name!r}: ...}}")
    return mask
