"""``g2g-train`` from a checkout: see :mod:`g2gnet.programs.train`."""

import sys

from g2gnet.programs.train import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
