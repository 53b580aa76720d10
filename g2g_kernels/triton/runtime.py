"""Where Triton kernels can run, how they are launched, and in which precision they multiply.

Triton itself is imported by the modules that hold kernels, when a call is first served by them. With the environment
variable ``TRITON_INTERPRET=1``, set before that, kernels run on CPU tensors in Triton's interpreter: thousands of times
slower, to check values without a GPU.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from g2g_kernels.tracing import constant_when_traced

logger = logging.getLogger("g2g_kernels")

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
    reasons = [old_device(index) for index in range(torch.cuda.device_count())]
    if all(reasons):
        return reasons[0]
    return _no_launcher() or _too_old()


def _no_launcher() -> str | None:
    """Why Triton cannot compile its launcher and keep it, or None."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler for its launcher, and there is none (apt install gcc, or name one by CC=…)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Triton needs Python's headers for its launcher, and there is no {header} (apt install python3-dev)"
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    exists = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not os.access(exists, os.W_OK):
        return f"Triton cannot write what it compiles to {cache} (name a folder by TRITON_CACHE_DIR=…)"
    return None


@constant_when_traced
def old_device(index: int) -> str | None:
    """Why the GPU of that number is too old, or None."""
    return _old_device(index)


@functools.cache
def _old_device(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return None
    required, found = (".".join(map(str, each)) for each in (OLDEST, capability))
    return f"the kernels need a GPU of compute capability {required} or more, cuda:{index} has {found}"


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


def _unchecked(operator: str, index: int | None) -> str | None:
    return None


#: of an operator and the number of a GPU (None: the interpreter): why its kernels are not to be used there, or None;
#: ``g2g_kernels/first_use.py`` puts its check here
first_use = _unchecked


def refuses(operator: str, *tensors: torch.Tensor | None) -> str | None:
    """Why kernels of an operator cannot serve these tensors, or None: a wrong device or number format, or kernels that
    are wrong on this card."""
    device_type = "cpu" if interpreted() else "cuda"
    for device, dtype in dict.fromkeys([(tensor.device, tensor.dtype) for tensor in tensors if tensor is not None]):
        if device.type != device_type:
            return f"needs tensors on {device_type}, not on {device}"
        if device.type == "cuda" and (reason := old_device(device.index)):
            return reason
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"needs float32, float16 or bfloat16 tensors, not {dtype}"
    return None if assumed.right or _recorded is not None else first_use(operator, device.index)


def input_precision() -> str:
    """What PyTorch asks of float32 products: ``"tf32"`` (10-bit mantissas) or ``"ieee"`` (all 23 bits, the default).
    Its own switch decides, as for dense products: ``torch.backends.cuda.matmul.fp32_precision``, or where that is not
    set ``torch.backends.fp32_precision``; ``torch.set_float32_matmul_precision`` sets the first, and is all that
    PyTorch up to 2.8 has. AMD GPUs always use full precision.
    """
    if torch.version.hip is not None:
        return "ieee"
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "none")
    return "tf32" if precision == "tf32" else "ieee"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of products under ``torch.autocast``, None outside of it."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class Card(NamedTuple):
    """What the choice of tiles and kernels depends on: its ``architecture``, ``"sm_90"`` or AMD's ``"gfx942"``, its
    multiprocessors, and the bytes of shared memory that one program may have."""

    architecture: str
    multiprocessors: int
    shared: int

    @property
    def amd(self) -> bool:
        """Whether it is AMD's, where loads pass through registers."""
        return self.architecture.startswith("gfx")

    @property
    def flop_per_byte(self) -> int:
        """Multiplications of its tensor cores, in 16 bits, in the time in which memory delivers a byte."""
        return DATA_CENTER.get(self.architecture, 50)


#: cards whose tensor cores multiply 16 bits at least eight times as fast as their ordinary cores float32, with
#: :attr:`Card.flop_per_byte` by data sheets; an RTX 4090, an L40S or an A10 do two to four times as fast
DATA_CENTER = {"sm_80": 78, "sm_90": 145, "sm_100": 145, "sm_103": 145, "gfx942": 145, "gfx950": 145}
#: cards that can be assumed
CARDS = {
    card.architecture: card
    for card in (
        Card("sm_80", 108, 163 << 10),
        Card("sm_89", 128, 99 << 10),
        Card("sm_90", 132, 227 << 10),
        Card("sm_100", 148, 227 << 10),
        Card("gfx90a", 104, 64 << 10),
        Card("gfx942", 304, 64 << 10),
        Card("gfx1100", 96, 64 << 10),
    )
}


class Assumptions(NamedTuple):
    """What holds inside :func:`assuming`: tensors on no GPU are on the card of that ``architecture``, a key of
    :data:`CARDS`; all products are ``dense``, or by units; all layers that can be ``fused`` are, or no layer is (None:
    the rules decide); kernels are ``right``, so they are not checked at their first use."""

    architecture: str = "sm_90"
    dense: bool | None = None
    fused: bool | None = None
    right: bool = False


assumed = Assumptions()


@contextlib.contextmanager
def assuming(**what: Any) -> Iterator[None]:
    """Inside, these :class:`Assumptions` hold besides those outside: to compare, and to compile for other cards."""
    global assumed
    before, assumed = assumed, assumed._replace(**what)
    try:
        yield
    finally:
        assumed = before


@constant_when_traced
def card_of(device: torch.device) -> Card:
    """The card of a device; an assumed one if it is no GPU."""
    return _card_of(device.index or 0) if device.type == "cuda" else CARDS[assumed.architecture]


@functools.cache
def _card_of(index: int) -> Card:
    of = torch.cuda.get_device_properties(index)
    architecture = f"sm_{of.major}{of.minor}" if torch.version.hip is None else of.gcnArchName.partition(":")[0]
    return Card(architecture, of.multi_processor_count, getattr(of, "shared_memory_per_block_optin", 64 << 10))


def precision_of(products: torch.dtype, device: torch.device) -> str:
    """How factors of a dtype are multiplied on a device: ``"parts"`` (full float32 where bfloat16 is much faster),
    ``"tf32"``, or ``"ieee"``, unchanged."""
    if products != torch.float32:
        return "ieee"
    precision = input_precision()
    parts = precision == "ieee" and card_of(device).architecture in DATA_CENTER
    return "parts" if parts else precision


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. (Triton's own is made for kernels, and takes 5 µs on the host, as the next function does.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n``, which is above 0."""
    return 1 << (n - 1).bit_length()


class Launch(NamedTuple):
    """One kernel launch: the kernel, its grid, and by name its arguments, compile-time values and launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are recorded instead of run, so tensors on the ``meta`` device suffice: ``benchmarks/aot.py``
    compiles them for other GPUs, which are assumed meanwhile."""
    global _recorded
    launches: list[Launch] = []
    _recorded = launches
    try:
        yield launches
    finally:
        _recorded = None


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Runs ``kernel[grid](**arguments)`` on the device of its first tensor. Multiplications and additions may be
    contracted to fused multiply-adds unless ``enable_fp_fusion`` says otherwise."""
    arguments = {"enable_fp_fusion": True} | arguments
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    if device.type != "cuda":
        kernel[grid](**arguments)
        return
    _say_what_takes_long()
    with torch.cuda.device(device):
        kernel[grid](**arguments)


@functools.cache
def _say_what_takes_long() -> None:
    logger.info("Triton compiles each kernel at its first launch; the next run finds it in Triton's cache")
