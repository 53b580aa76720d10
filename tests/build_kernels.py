"""Builds the CPU kernels into a file, with the compiler and flags of the environment (``CXX``, ``G2G_CXXFLAGS``).

Usage: ``python tests/build_kernels.py FILE [INSTRUCTION SET ...]``: those named are left out. It needs only setuptools.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    file = Path(sys.argv[1]).resolve()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import setup

    for name in sys.argv[2:]:
        setup.INSTRUCTION_SETS[name] = ["-DG2G_LEFT_OUT"]
    setup.build_library(file, file.parent)


if __name__ == "__main__":
    main()
