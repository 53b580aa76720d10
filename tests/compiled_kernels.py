"""The compiled CPU kernels on another instruction set, or from another file: loaded beside the installed ones, so that
no other interpreter has to be started."""

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from g2g_kernels.cpu import library, plans


@contextmanager
def loaded(file: Path, **environment: str) -> Iterator[None]:
    """Inside, the compiled kernels are those of ``file``, loaded in that environment. A file that is loaded already
    stays as it is: to have it read its environment again, give a copy."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"G2G_CPU_LIBRARY": str(file), **environment}.items():
            patch.setenv(name, value)
        patch.setattr(library, "_load", functools.cache(library._load.__wrapped__))
        patch.setattr(plans, "_plans", type(plans._plans)())  # they lie in the memory of one library
        yield


@contextmanager
def instruction_set(name: str, folder: Path) -> Iterator[None]:
    """Inside, the compiled kernels are those of that instruction set, from a copy of their file in ``folder``. Skips
    the test where this CPU does not have the instruction set."""
    copy = shutil.copy(library.library()._name, folder / f"{name}.so")
    with loaded(copy, G2G_CPU_ISA=name):
        reason = library.unavailable()
        if reason and "which this CPU does not have" in reason:
            pytest.skip(reason)
        yield
