"""``g2g-crossval`` from a checkout: see :mod:`g2gnet.programs.crossval`."""

import sys

from g2gnet.programs.crossval import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
