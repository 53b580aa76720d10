"""A tensor computed on every read, so anything written to it would be lost: writing is refused."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: why, and what to do instead
NOT_WRITABLE = (
    "of a G2GLinear is computed from its packed values at every access. Change layer.values "
    "(layer.values.data.copy_(layer.mask.pack(weight)), layer.reset_parameters(), layer.values.requires_grad_(False)), "
    "or create a new layer: G2GLinear.from_linear(linear, mask)"
)


class DerivedWeight(torch.Tensor):
    """The dense weight of a :class:`~g2gnet.G2GLinear`, for reading only, as is all that shares its memory (views,
    ``detach()``, ``.data``). Copies, and results computed from it, are ordinary tensors."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)  # functions of nn.init name their tensor
        name = function.__name__
        in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        if (in_place and isinstance(first, cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(f"{name} would change a copy: the dense weight {NOT_WRITABLE}")
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__deepcopy__", "__reduce_ex__"):
                return function(args[0].as_subclass(torch.Tensor), *args[1:])
            result = function(*args, **kwargs)
            if isinstance(result, torch.Tensor) and isinstance(first, cls) and _same_memory(result, first):
                return result.as_subclass(cls)
        return result


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout != torch.strided or one.is_nested:  # sparse and mkldnn tensors have no such memory
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
