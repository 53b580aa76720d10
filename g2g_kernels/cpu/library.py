"""Finds, loads and calls the compiled CPU kernels. A library with other structures and options than ``interface.py``
is refused.

Environment: ``G2G_CPU_LIBRARY`` names another build of the library (a sanitizer build, say); ``G2G_CPU_ISA`` selects an
instruction set (``baseline``, ``avx2``, ``avx512``, ``avx512_bf16``) instead of the CPU's best.
"""

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from ctypes import Structure, c_char_p, c_double, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

from g2g_kernels.cpu.interface import declarations, fields, lengths
from g2g_kernels.cpu.workspace import SMALL, address_of, workspace
from g2g_kernels.numbers import INT32
from g2g_kernels.tracing import constant_when_traced

logger = logging.getLogger("g2g_kernels")

ABI = 10
#: beside this file, as setup.py names it
FILE = "libg2g_cpu" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")

#: the names of the options of neurons, which both sides number in their order (``g2g_kernels.ops.neurons.cpu``)
OPTIONS: dict[str, Iterable[str]] = {}

#: a kernel's answers to sizes and options that it cannot number, in place of the size of its scratch memory
TOO_LARGE, UNKNOWN_OPTION = -2, -3

#: Inputs of ``g2g_linear`` with a larger share of spikes are multiplied by the matrix kernels (False: in float32, True:
#: under bfloat16); there both take equally long (csrc/PERFORMANCE.md). Weight gradients are summed in float32 anyway.
EVENT_LIMIT_FORWARD = {False: 0.5, True: 0.28}
EVENT_LIMIT_BACKWARD = {False: 0.5, True: 0.5}
# Factors on the costs that the kernels assume for their ways to multiply (``csrc/stack.h``); 0: always that way,
# infinity: never.
#: spikes by events (``event_cycles``)
EVENT_COST = 1.0
#: spikes with vectors over the batch, in layers with units below 16 (``by_batch``)
BATCH_COST = 1.0
#: spikes by sums of subsets, in layers with units of 16 and 32 (``by_subsets``)
SUBSET_COST = 1.0
#: input gradients where the layer below needs them (``by_need``)
NEEDED_COST = 1.0
#: convolutions by events (``relative_cost`` in ``csrc/convolution.h``)
CONVOLUTION_COST = 1.0
#: weights in lists (``g2g_kernels.cpu.plans.in_lists``)
LIST_COST = 1.0
#: neurons in lists that are visited where something arrives, and not all in each step (``csrc/list_network.h``);
#: ``G2G_CPU_NEURONS=reached`` is 0, ``G2G_CPU_NEURONS=all`` infinity
VISIT_COST = 1.0
#: Share of a call that may be spent waiting for PyTorch's threads before some calls run on others (``csrc/pool.h``).
MOST_WAITING = 0.1


def too_large(**counts: int) -> str | None:
    """Why a call with these counts, of 32 bits, cannot be served, or None. Traced calls are checked when they run."""
    for name, count in {} if torch.compiler.is_compiling() else counts.items():
        if count > INT32[1]:
            return f"serves at most {INT32[1]} {name}, not {count}"
    return None


class _Int32:
    """An int32 argument of a function, checked as fields are."""

    @classmethod
    def from_param(cls, value: int) -> c_int32:
        if not INT32[0] <= value <= INT32[1]:
            raise OverflowError(f"{value} does not fit an argument of the compiled kernels, {INT32[0]} to {INT32[1]}")
        return c_int32(value)


def _table(text: str, options: Mapping[str, str]) -> dict[str, str]:
    """Everything that both sides must agree on, by name."""
    table = {
        f"{structure}.{field}": f"field {place}, {kind}"
        for structure, types in fields(text).items()
        for place, (field, kind) in enumerate(types.items(), 1)
    }
    return {**{name: str(length) for name, length in lengths(text).items()}, **table, **options}


def _difference(said: str) -> str | None:
    """The first difference between the library's table and this package, or None."""
    parts = (line.partition(":") for line in said.splitlines())
    lines = {name: text.strip() for name, _, text in parts}
    theirs = _table(lines.pop("structures", ""), lines)
    ours = _table(declarations(), {name: " ".join(names) for name, names in OPTIONS.items()})
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'missing')!r} there and {ours.get(name, 'missing')!r} here"
    return None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why it is missing."""
    if sys.byteorder != "little":
        return None, "the compiled kernels are for little-endian machines"
    given = os.environ.get("G2G_CPU_LIBRARY")
    path = Path(given) if given else Path(__file__).with_name(FILE)
    if not path.exists():
        remedy = "check G2G_CPU_LIBRARY" if given else "reinstall g2g: its build brings a compiler where there is none"
        return None, f"the compiled kernels {path} were not built ({remedy})"
    try:
        library = ctypes.CDLL(str(path))
        if library.g2g_abi() != ABI:
            return None, f"{path} was built from another version of g2g; reinstall"
        library.g2g_interface.restype = c_char_p
        difference = _difference((library.g2g_interface() or b"").decode())
        if difference:
            return None, f"{path} was built from another version of g2g ({difference}); reinstall"
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "g2g_isa": (c_char_p, []),
        "g2g_has_bf16": (c_int32, []),
        "g2g_use_openmp": (None, [c_void_p, c_double]),
        "g2g_plan_new": (c_void_p, [*[c_void_p] * 4, _Int32]),
        "g2g_plan_free": (None, [c_void_p]),
        "g2g_plan_matches": (c_int32, [c_void_p] * 7),
        "g2g_plans_aligned": (c_int32, [c_void_p] * 2),
        "g2g_plans_same_rows": (c_int32, [c_void_p] * 2),
        "g2g_lists_new": (c_void_p, [*[c_void_p] * 4, _Int32, _Int32, _Int32]),
        "g2g_lists_free": (None, [c_void_p]),
        "g2g_lists_match": (c_int32, [*[c_void_p] * 5, _Int32]),
        "g2g_lists_order": (None, [*[c_void_p] * 3, _Int32, _Int32]),
        "g2g_digest": (c_uint64, [c_void_p, c_int64, _Int32]),
        "g2g_spikes_new": (c_void_p, [c_int64]),
        "g2g_spikes_free": (None, [c_void_p]),
        "g2g_spikes_count": (c_int64, [c_void_p, c_int64]),
        "g2g_spikes_take": (None, [c_void_p, c_int64, c_void_p, c_void_p, c_void_p]),
        "g2g_unpack": (None, [c_void_p, c_void_p, _Int32, _Int32, _Int32, c_void_p]),
        "g2g_unpack_images": (None, [c_void_p, c_int64, *[_Int32] * 4, c_void_p]),
    }
    for kernel in ("stack", "graph", "linear", "convolution", "image_layer", "list_loop", "list_network", "neurons"):
        signatures[f"g2g_{kernel}"] = (c_int64, [c_void_p, c_int32, c_void_p])
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    asked, chosen = os.environ.get("G2G_CPU_ISA"), library.g2g_isa().decode()
    if asked and asked != chosen:
        why = "which this CPU does not have" if asked in ISAS else f"which is not one of {', '.join(ISAS)}"
        reason = f"G2G_CPU_ISA={asked!r} asks for an instruction set {why}; leave it unset for the best one"
        logger.warning("the compiled CPU kernels are not used: %s", reason)
        return None, reason
    library.g2g_use_openmp(openmp(), MOST_WAITING)
    return library, None


@functools.cache
def openmp() -> int | None:
    """The address of ``GOMP_parallel`` in PyTorch's OpenMP runtime (GNU's or LLVM's), or None. The kernels run on its
    threads: other threads would wait for the cores on which PyTorch's spin."""
    try:  # searches only what PyTorch is linked with, and loads nothing
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        logger.debug("PyTorch has no OpenMP runtime, so the compiled CPU kernels start threads of their own")
        return None


@constant_when_traced
def unavailable() -> str | None:
    """Why the compiled kernels are unavailable here, or None."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library; raises RuntimeError if there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def instruction_set() -> str:
    """The instruction set in use."""
    return library().g2g_isa().decode()


def run(kernel: Callable[..., int], arguments: Structure, backward: bool = False) -> None:
    """Calls a pass of a kernel. Raises ValueError for what it cannot number, MemoryError if memory is short."""
    address = ctypes.addressof(arguments)
    size = kernel(address, backward, None)
    if size < 0:
        raise _failure(size)
    if size < SMALL:
        size = max(size, 1)
        scratch = workspace.bytes(size) if workspace.poison else torch.empty(size, dtype=torch.uint8)
        if (answer := kernel(address, backward, scratch.data_ptr())) < 0:
            raise _failure(answer)
        return
    memory = workspace.borrow(size)
    try:
        if (answer := kernel(address, backward, address_of(memory))) < 0:
            raise _failure(answer)
    finally:
        workspace.give_back(memory)


def _failure(answer: int) -> Exception:
    """The error that a negative answer of a kernel means."""
    if answer == TOO_LARGE:
        return ValueError(
            "the compiled CPU kernels number the neurons of a layer times the time steps in 32 bits, and these are "
            "more; give fewer of them, or backend='torch'"
        )
    if answer == UNKNOWN_OPTION:
        return ValueError("the compiled CPU kernels lack this neuron model, reset or surrogate; rebuild them")
    return MemoryError("the compiled CPU kernels ran out of memory")


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's first element, None for no tensor and 0 for one without elements."""
    return None if tensor is None else tensor.data_ptr()


def event_limit(bf16: bool, backward: bool) -> float:
    """The share of ones up to which spikes are multiplied event by event."""
    return (EVENT_LIMIT_BACKWARD if backward else EVENT_LIMIT_FORWARD)[bool(bf16)]


def bf16_wanted() -> bool:
    """True under CPU autocast to bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
