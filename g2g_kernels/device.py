"""Which device to run on: DirectML, then CUDA, then the CPU; others only by name."""

import importlib

import torch

NAMES = "auto, cpu, cuda, cuda:N, directml, mps, xpu or xpu:N"


def _directml_device() -> torch.device | None:
    """The default DirectML device, or None without the optional package ``torch-directml`` or without an adapter."""
    try:
        torch_directml = importlib.import_module("torch_directml")
    except ImportError:
        return None
    return torch_directml.device() if torch_directml.is_available() else None


def _devices(kind: str) -> int:
    """The number of devices of a kind (``"cuda"``, ``"mps"`` or ``"xpu"``) that this PyTorch finds."""
    if kind == "mps":  # Apple's GPU, always one
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


def select_device(name: str = "auto") -> torch.device:
    """The device called ``name``, or for ``"auto"`` the first available of DirectML, CUDA and CPU.

    Apple's ``"mps"`` and Intel's ``"xpu"`` run on plain PyTorch operations, so the compiled CPU kernels are faster:
    these devices are used only by name.

    Raises:
        ValueError: for an unknown name or a device missing on this machine, with the remedy.

    Example:
        >>> select_device("cpu")
        device(type='cpu')
    """
    directml = _directml_device() if name in ("auto", "directml") else None
    if directml is not None:
        return directml
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "directml":
        raise ValueError(
            "device='directml' needs the package torch-directml (pip install torch-directml) and an adapter"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is unknown; give {NAMES}") from None
    if device.type == "cpu":
        return device
    if device.type not in ("cuda", "mps", "xpu"):
        raise ValueError(f"device={name!r} is not supported; give {NAMES}")
    count, kind = _devices(device.type), device.type.upper()
    if not count:
        raise ValueError(f"device={name!r}: PyTorch {torch.__version__} finds no {kind} device here; give cpu or auto")
    if device.index is not None and device.index >= count:
        raise ValueError(f"device={name!r}: this machine has {kind} devices 0 … {count - 1}")
    return device
