"""Packages that only these conversions need."""

import importlib
from typing import Any


def optional_package(name: str) -> Any:
    """The package, imported.

    Raises:
        ImportError: if it is not installed, with the remedy.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs the package {name}; pip install 'g2g[interop]' brings it ({error})") from error
