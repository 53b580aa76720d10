"""What is different where calls are recorded instead of run: by torch.compile, torch.export and torch.jit.trace."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

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


def is_scripted() -> bool:
    """Whether torch.jit.trace records; torch.compile before 2.10 cannot ask it, and need not."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def replaced(record: _Record, **fields: Any) -> _Record:
    """``record._replace(**fields)`` of a named tuple, which torch.compile of PyTorch 2.8 cannot trace."""
    names = type(record)._fields  # type: ignore[attr-defined]
    return type(record)(*[fields[name] if name in fields else getattr(record, name) for name in names])


def is_transformed() -> bool:
    """Whether torch.func transforms (grad, vmap, …) or torch.jit.trace are at work: unlike torch.compile they cannot
    look into an operator whose gradient is one, too, and need plain operations."""
    return not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or torch._C._is_tracing())


def is_observed(tensors: Sequence[torch.Tensor | None]) -> bool:
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
        or any([tensor is not None and (tensor.is_neg() or tensor._is_zerotensor()) for tensor in tensors])
    )


_PLAIN = {torch.Tensor, nn.Parameter, type(None)}


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
