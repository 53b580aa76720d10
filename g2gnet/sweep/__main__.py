import sys

from g2gnet.sweep.program import main

if __name__ == "__main__":  # processes that train import this module under another name
    sys.exit(main())
