"""The operators, one folder each: README.md (formula), reference.py (plain PyTorch) and one file per backend."""

from g2g_kernels import backends as backends  # registers them
