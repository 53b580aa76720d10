"""Marks our functions for torch.compile without importing it."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable)


def constant_when_traced(function: _Function) -> _Function:
    """Lets torch.compile call ``function`` once, while it traces, and keep the result.

    ``torch.compiler.assume_constant_result`` only sets this mark, but imports the compiler for it, which takes
    longer than the rest of PyTorch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
