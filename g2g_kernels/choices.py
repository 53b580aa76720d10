"""Arguments that are one of a few values, and the one check of each: flags and names."""

import reprlib
from collections.abc import Iterable
from typing import Any

#: of a value that is no known name, perhaps a long path: both of its ends
_SHORT = reprlib.Repr()
_SHORT.maxstring = 60


def check_flag(name: str, value: Any) -> bool:
    """``value``, if it is True or False; else ValueError, as for ``"no"``, which counts as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.40} must be True or False")
    return value


def check_choice(name: str, value: Any, known: Iterable[str], more: str = "", of: str = "") -> Any:
    """``value``; raises ValueError unless it is one of the ``known`` names. ``more``: what else could be given; ``of``:
    whose argument it is, after its value."""
    known = list(known)
    if value not in known:
        raise ValueError(unknown(name, value, known, more, of))
    return value


def unknown(name: str, value: Any, known: Iterable[str], more: str = "", of: str = "") -> str:
    """What to say of a value that is not known."""
    return f"{name}={_SHORT.repr(value)}{of} is unknown; choose one of {', '.join(known)}{more and ', or '}{more}"
