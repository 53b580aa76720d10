"""The version of g2g, which ``pyproject.toml`` reads here without importing PyTorch."""

__version__ = "0.1.0"
