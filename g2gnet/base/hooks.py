"""What a module does beside what its class says: hooks, and a ``forward`` of its own."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune


class OwnHook:
    """A hook that needs no call of its module, and is dropped when that is copied or pickled: a stack that carries only
    such hooks runs in one call."""

    def __init__(self, function: Callable[..., None], *first: Any) -> None:
        self._function, self._first = function, first

    def __call__(self, *arguments: Any) -> None:
        self._function(*self._first, *arguments)

    def __reduce__(self) -> tuple:
        return OwnHook, (_nothing,)


def _nothing(*arguments: Any) -> None:
    pass


def has_hooks(module: nn.Module, without: type | tuple[type, ...] = OwnHook) -> bool:
    """Whether a module carries hooks, ``without`` those of a class, that need a call of it."""
    every = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(not isinstance(hook, without) for hooks in every for hook in hooks.values())


def own_code(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What would be lost where options and parameters of a module of this ``kind`` alone are taken over; None: nothing.
    The hooks of ``torch.nn.utils.prune``, and parametrizations, are no loss of layers with weights: what they compute
    is taken over."""
    # a convolution computes in a method that its forward calls
    methods = [name for name in ("__call__", "forward", "_conv_forward") if hasattr(kind, name)]
    if any(name in vars(module) or getattr(type(module), name) is not getattr(kind, name) for name in methods):
        return "has a forward of its own"
    computed = issubclass(kind, nn.Linear | nn.Conv2d)
    if parametrize.is_parametrized(module) and not computed:
        return "is parametrized"
    of_parameters = [
        (each._backward_hooks, getattr(each, "_post_accumulate_grad_hooks", None)) for each in module.parameters()
    ]
    if any(any(each) for each in of_parameters):
        return "carries hooks on its parameters"
    return "carries hooks" if has_hooks(module, (OwnHook, prune.BasePruningMethod) if computed else OwnHook) else None
