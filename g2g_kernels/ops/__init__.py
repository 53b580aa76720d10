"""The operators, one folder each: README.md (formula), reference.py (plain PyTorch) and one file a faster backend."""
