"""How much memory there is, for checks before anything is allocated."""

import os

import torch


def available(device: torch.device | str = "cpu") -> int | None:
    """Bytes of memory of ``device``, whatever other processes use; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return None


def gigabytes(size: float) -> str:
    """A size in bytes, as text."""
    return f"{size / 2**30:,.1f} GB"


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed; on a CPU PyTorch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
