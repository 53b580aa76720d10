"""Which device to run on: DirectML, then CUDA, then the CPU."""

import importlib

import torch


def _directml_device() -> torch.device | None:
    """The default DirectML device, or None without the optional package ``torch-directml`` or without an adapter."""
    try:
        torch_directml = importlib.import_module("torch_directml")
    except ImportError:
        return None
    return torch_directml.device() if torch_directml.is_available() else None


def select_device(name: str = "auto") -> torch.device:
    """The device called ``name``, or for ``"auto"`` the first there is of DirectML, CUDA and CPU.

    Args:
        name: ``"auto"``, ``"directml"``, or any name that ``torch.device`` takes (``"cpu"``, ``"cuda"``, ``"cuda:1"``).

    Raises:
        ValueError: for an unknown name or a device that this machine does not have, with the remedy.
    """
    if name == "auto":
        directml = _directml_device()
        if directml is not None:
            return directml
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "directml":
        directml = _directml_device()
        if directml is None:
            raise ValueError(
                "device='directml' needs the package torch-directml (pip install torch-directml) and an adapter"
            )
        return directml
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is unknown; give auto, cpu, cuda, cuda:N or directml") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device={name!r}: PyTorch {torch.__version__} finds no CUDA device here; give cpu or auto"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"device={name!r}: this machine has CUDA devices 0 … {torch.cuda.device_count() - 1}")
    elif device.type != "cpu":
        raise ValueError(f"device={name!r} is not supported; give auto, cpu, cuda, cuda:N or directml")
    return device
