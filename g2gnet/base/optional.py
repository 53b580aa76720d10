"""Packages that only some uses of g2gnet need."""

import importlib
import importlib.metadata
import re
from typing import Any


def optional_package(name: str, extra: str, least: tuple[int, ...] = ()) -> Any:
    """The package, imported; ImportError, naming the ``extra`` that has it, if missing or older than ``least``."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs the package {name}; pip install 'g2gnet[{extra}]' installs it ({error})"
        ) from error
    if least:
        found = importlib.metadata.version(name)
        if tuple(map(int, re.findall(r"\d+", found)[: len(least)])) < least:
            wanted = ".".join(map(str, least))
            raise ImportError(
                f"this needs {name} {wanted} or newer, not {found}; pip install '{name}>={wanted}', "
                "in another environment if a package in this one does not allow it"
            )
    return package
