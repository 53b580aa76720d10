"""Where Triton kernels can run, how they are launched, and in which precision they multiply.

Triton itself is imported by the modules that hold kernels, when a call is first served by them. With the environment
variable ``TRITON_INTERPRET=1``, set before that, kernels run on CPU tensors in Triton's interpreter: thousands of times
slower, to check values without a GPU.
"""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from g2g_kernels.tracing import constant_when_traced

#: the minimal compute capability: bfloat16 on tensor cores came with Ampere
OLDEST = (8, 0)
#: the minimal version of Triton (that of PyTorch 2.7): kernels hold the steps of a segment in tuples
OLDEST_TRITON = (3, 3)


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _unavailable(interpreter: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        remedy = "pip install triton" if sys.platform == "linux" else "it exists for Linux"
        return f"the package triton is not installed ({remedy})"
    if interpreter:
        return _too_old()
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built for the CPU only (install a CUDA or ROCm build: pytorch.org)"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA or ROCm device (see nvidia-smi or rocm-smi for the driver)"
    newest = max(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if newest < OLDEST:
        required, found = (".".join(map(str, capability)) for capability in (OLDEST, newest))
        return f"the kernels need a GPU of compute capability {required} or more, this one has {found}"
    return _too_old()


def _too_old() -> str | None:
    triton = importlib.import_module("triton").__version__
    if tuple(map(int, triton.split(".")[:2])) < OLDEST_TRITON:
        return f"the kernels need Triton 3.3 or newer, not {triton} (it comes with PyTorch 2.7 and newer)"
    return None


@constant_when_traced
def unavailable() -> str | None:
    """Why the Triton kernels are unavailable here, or None."""
    return _unavailable(interpreted())


@constant_when_traced
def only_by_name() -> str | None:
    """Why a call must request these kernels by name, or None."""
    return "its interpreter is for checking values; ask for it by name" if interpreted() else None


def refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot serve these tensors, or None: a wrong device or number format."""
    device_type = "cpu" if interpreted() else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device_type:
            return f"needs tensors on {device_type}, not on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"needs float32, float16 or bfloat16 tensors, not {tensor.dtype}"
    return None


def input_precision() -> str:
    """How float32 factors are multiplied: ``"tf32"`` (10-bit mantissas, on tensor cores) or ``"ieee"`` (all 23 bits).

    PyTorch's own switch decides, as for its dense products: ``torch.set_float32_matmul_precision`` (or
    ``torch.backends.cuda.matmul.allow_tf32``), whose default is full precision. AMD GPUs always use the latter.
    """
    return "tf32" if torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None else "ieee"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of products under ``torch.autocast``, None outside of it."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def rdna(device: torch.device) -> bool:
    """True for AMD GPUs with warps of 32 threads (gfx10 to gfx12); the others' have 64."""
    name = _recorded_for
    if device.type == "cuda" and torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
    return name.startswith(("gfx10", "gfx11", "gfx12"))


class Launch(NamedTuple):
    """One kernel launch: the kernel, its grid, and by name its arguments, compile-time values and launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_recorded: list[Launch] | None = None
_recorded_for = ""


@contextlib.contextmanager
def recorded(architecture: str = "") -> Iterator[list[Launch]]:
    """Inside, launches are recorded instead of run, so tensors on the ``meta`` device suffice.

    ``benchmarks/aot.py`` compiles the recorded launches for other GPUs.

    Args:
        architecture: the card whose tiles to choose: AMD's name of it, or "" for NVIDIA's, which all have the same.
    """
    global _recorded, _recorded_for
    launches: list[Launch] = []
    _recorded, _recorded_for = launches, architecture
    try:
        yield launches
    finally:
        _recorded, _recorded_for = None, ""


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Runs ``kernel[grid](**arguments)`` on the device of its first tensor.

    Multiplications and additions may be contracted to fused multiply-adds unless ``enable_fp_fusion`` says otherwise.
    """
    arguments = {"enable_fp_fusion": True} | arguments
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments)
