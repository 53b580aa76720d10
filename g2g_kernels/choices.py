"""Arguments with few possible values, flags and names, and the one check of each."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

#: shows both ends of an unknown value, which may be a long path
_SHORT = reprlib.Repr()
_SHORT.maxstring = 60


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False; else ValueError, also for ``"no"``, which Python counts as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.40} must be True or False")
    return value


def check_choice(name: str, value: Any, known: Iterable[str], more: str = "", of: str = "") -> Any:
    """``value``; raises ValueError unless it is one of the ``known`` names. ``more`` says what else could be given,
    ``of`` whose argument it is."""
    known = list(known)
    if value not in known:
        raise ValueError(unknown(name, value, known, more, of))
    return value


def unknown(name: str, value: Any, known: Iterable[str], more: str = "", of: str = "") -> str:
    """The message about an unknown value."""
    known = list(known)
    near = difflib.get_close_matches(str(value), [each for each in known if not each.isdigit()], 1)
    choices = f"{', '.join(known)}{more and ', or '}{more}{f'; did you mean {near[0]}?' if near else ''}"
    return f"{name}={_SHORT.repr(value)}{of} is unknown; choose one of {choices}"
