"""Packages that only some uses of g2gnet need."""

import importlib
from typing import Any


def optional_package(name: str, extra: str) -> Any:
    """The package, imported; ImportError, naming the ``extra`` that has it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {name}; pip install 'g2gnet[{extra}]' installs it ({error})"
        ) from error
