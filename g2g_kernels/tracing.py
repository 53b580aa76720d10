"""What is in force around a call: whether it is recorded instead of run (torch.compile, torch.export, torch.jit.trace),
transforms, and autocast."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable)
_Record = TypeVar("_Record", bound=tuple)


def constant_when_traced(function: _Function) -> _Function:
    """Lets torch.compile call ``function`` once, while it traces, and keep the result.
    (``torch.compiler.assume_constant_result`` only sets this mark, but imports the compiler, which takes longer than
    the rest of PyTorch.)
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced() -> bool:
    """Whether calls are being recorded: nothing may depend on values, and only plain operations are understood."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def replaced(record: _Record, **fields: Any) -> _Record:
    """``record._replace(**fields)`` of a named tuple, which torch.compile of PyTorch 2.8 cannot trace."""
    kind = type(record)
    return kind(**{**dict(zip(kind._fields, record)), **fields})  # type: ignore[attr-defined]  # noqa: B905


def is_transformed(tensors: Iterable[torch.Tensor | None] = ()) -> bool:
    """Whether torch.func transforms (grad, vmap, …), torch.jit.trace or, on one of the ``tensors``, tangents of
    forward-mode differentiation are at work: unlike torch.compile they cannot look into an operator whose gradient is
    one, too, and need plain operations."""
    if not torch.compiler.is_compiling():  # which keeps a level of tangents of its own
        if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
            return True
        if forward_ad._current_level < 0:
            return False
    return any([tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors])


def autocast_of(tensor: torch.Tensor) -> Callable[[], contextlib.AbstractContextManager]:
    """Makes the autocast that is in force where ``tensor`` is, for what runs a forward pass again."""
    device = tensor.device.type
    without = _without_autocast(device)
    if without is None:
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(device)
    return functools.partial(torch.autocast, device, torch.get_autocast_dtype(device)) if enabled else without


@functools.cache
def _without_autocast(device: str) -> Callable[[], contextlib.AbstractContextManager] | None:
    """Makes a context without autocast; None on a device that has none."""
    return functools.partial(torch.autocast, device, enabled=False) if torch.amp.is_autocast_available(device) else None


def is_observed(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether something may look at the operators that are called with these tensors: tracers, dispatch modes (fake
    tensors, counters of FLOPs), transforms, profilers, subclasses of tensors; or the dispatcher itself, where a
    tensor's memory is not its content: a view that is to be negated, zeros that are only noted.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
        or any(map(torch.Tensor.is_neg, tensors))
        or any(map(torch.Tensor._is_zerotensor, tensors))
    )


_PLAIN = {torch.Tensor, nn.Parameter}


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside the wrappers of ``torch.func``; a dimension of ``vmap`` comes first."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        batched = functorch.is_batchedtensor(tensor)
        place = functorch.maybe_get_bdim(tensor) if batched else 0
        tensor = functorch.get_unwrapped(tensor)
        tensor = tensor.movedim(place, 0) if batched else tensor
    return tensor


def version(tensor: torch.Tensor) -> int:
    """A number that grows whenever the tensor is written to; −1 for one created in inference mode, which has none."""
    return -1 if tensor.is_inference() else tensor._version


def default_device() -> torch.device:
    """Where tensors are created, in a ``torch.device`` context too (``torch.get_default_device`` of 2.4 knows none)."""
    return torch.zeros(0).device


def on_cpu(function: _Function) -> _Function:
    """Decorates a function that creates tensors on the CPU, whatever ``torch.device`` or default device is in force."""

    @functools.wraps(function)
    def with_cpu_as_default(*args: Any, **kwargs: Any) -> Any:
        # the context would slow each call in the function down
        if default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return with_cpu_as_default  # type: ignore[return-value]
