"""Packages that only some uses of g2gnet need."""

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """An optional package is missing; the message names it and the extra that installs it."""


def optional_package(name: str, extra: str) -> Any:
    """The package, imported. Raises MissingPackageError, naming the ``extra`` that installs it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = f"this needs the package {name}; pip install 'g2gnet[{extra}]' installs it ({error})"
        raise MissingPackageError(text) from error
