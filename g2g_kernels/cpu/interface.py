"""The structures of the C interface as ctypes structures, made from their only list, ``csrc/structures.h``, and filled
by name, ``structures.Layer(plan=…)``; other fields are 0 or null. Unknown names are refused, as are numbers that a
field's C type cannot hold, which ctypes would silently cut off.
"""

import math
import re
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from g2g_kernels.numbers import FLOAT32, INT32, INT64

_NUMBERS = {"int32_t": c_int32, "int64_t": c_int64, "float": c_float, "double": c_double}
_RANGES: dict[Any, tuple[float, float]] = {c_int32: INT32, c_int64: INT64, c_float: (-FLOAT32[1], FLOAT32[1])}


class _NumberField(property):
    """A ``field`` of a structure that refuses numbers that its C type cannot hold."""

    def __init__(self, name: str, field: Any, kind: type) -> None:
        self.field, (low, high) = field, _RANGES[kind]

        def write(structure: Structure, value: float) -> None:
            if not low <= value <= high and -math.inf < value < math.inf:
                raise OverflowError(f"{name}={value} does not fit its field in the compiled kernels, {low} to {high}")
            field.__set__(structure, value)

        super().__init__(field.__get__, write)


def declarations() -> str:
    """The structures in C, without comments and with single spaces."""
    source = (Path(__file__).parents[1] / "csrc" / "structures.h").read_text(encoding="utf-8")
    listed = source.partition("\nG2G_STRUCTURES(\n")[2].rpartition("\n)\n")[0]
    return " ".join(re.sub("//.*", "", listed).split())


def fields(text: str) -> dict[str, dict[str, str]]:
    """The C types of the fields of each structure declared in a text, ``{"Layer": {"values": "const float*"}}``."""
    structures: dict[str, dict[str, str]] = {}
    for structure, body in re.findall(r"struct (\w+) {(.*?)};", text):
        structures[structure] = {}
        for kind, names in re.findall(r"((?:const )?\w+)([^;]+);", body):
            for pointer, name, count in re.findall(r"(\*?) ?(\w+)(\[\w+\])?", names):
                structures[structure][name] = kind + pointer + count
    return structures


def lengths(text: str) -> dict[str, int]:
    """The constants declared in a text: lengths of arrays."""
    return {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}


def _made() -> dict[str, Any]:
    text = declarations()
    made: dict[str, Any] = {}
    for structure, types in fields(text).items():
        members = {}
        for name, kind in types.items():
            element, _, length = kind.rstrip("]").partition("[")
            member = c_void_p if element.endswith("*") else (_NUMBERS | made)[element]
            members[name] = member * lengths(text)[length] if length else member
        made[structure] = type(structure, (Structure,), {"__slots__": (), "_fields_": list(members.items())})
        for name, member in members.items():
            if member in _RANGES:
                field = _NumberField(f"{structure}.{name}", getattr(made[structure], name), member)
                setattr(made[structure], name, field)
    return made


#: by their names in C++
structures = SimpleNamespace(**_made())
