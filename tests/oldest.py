"""Prints the oldest versions that pyproject.toml allows, as requirements of pip: ``name==version``, one per line.

Usage: python tests/oldest.py [extra ...]; it needs Python 3.11.
"""

import re
import sys
from pathlib import Path

import tomllib

BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")


def oldest(extras: list[str]) -> list[str]:
    """Of the dependencies that have a lower bound, and of those of ``extras``."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    return sorted({f"{bound[1]}=={bound[2]}" for name in listed if (bound := BOUND.match(name))})


if __name__ == "__main__":
    print("\n".join(oldest(sys.argv[1:])))
