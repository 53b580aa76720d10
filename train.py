"""``g2g-train`` from a checkout: see :mod:`g2gnet.train`."""

import sys

from g2gnet.train import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
