"""Finds and loads the compiled CPU kernels, and mirrors the structures of ``csrc/interface.h``.

The library reports the offsets of its fields and the numbers of its options. It is refused if they differ from this
module.

Environment: ``G2G_CPU_LIBRARY`` names another build of the library (a sanitizer build, say); ``G2G_CPU_ISA`` selects
an instruction set (``baseline``, ``avx2``, ``avx512``, ``avx512_bf16``) instead of the CPU's best.
"""

import ctypes
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.numbers import FLOAT32, INT32, INT64
from g2g_kernels.tracing import constant_when_traced

if TYPE_CHECKING:
    from g2g_kernels.ops.neurons.models import NeuronModel, Neurons

logger = logging.getLogger("g2g_kernels")

ABI = 4
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
RESETS = {"subtract": 0, "zero": 1, "none": 2}
SURROGATES = {"atan": 0, "fast_sigmoid": 1, "sigmoid": 2, "triangle": 3, "boxcar": 4}


MOST_PARAMETERS = 3
#: what a kernel answers, instead of the size of its scratch memory, to sizes that it cannot number
TOO_LARGE = -2

#: Inputs that are spikes more often than this are multiplied by the matrix kernels (in float32, under bfloat16): where
#: the two take equally long (docs/cpu-performance.md). Weight gradients are summed in float32 in either case.
EVENT_LIMIT_FORWARD = {False: 0.5, True: 0.28}
EVENT_LIMIT_BACKWARD = {False: 0.5, True: 0.5}
#: The same for input gradients: the share of neurons that a gradient reaches through their own spikes where the product
#: multiplies as many rows of weights as events may have to; the kernels scale it by how many (``EventRuns.ratio``).
GRADIENT_EVENT_LIMIT = {False: 0.3, True: 0.2}
#: Cost of products with vectors over the batch, relative to what the kernels assume (``by_batch`` in ``csrc/stack.h``):
#: layers with units below 16 take them where they cost less than events and matrix kernels. 0: always, infinity: never.
BATCH_COST = 1.0
#: Share of a call that may be spent waiting for PyTorch's threads before some calls run on others (``csrc/pool.h``).
MOST_WAITING = 0.1
COMPACT_SURROGATES = ("triangle", "boxcar")  # zero where |U − θ| ≥ 1/α


class _NumberField:
    """A field of a structure that refuses what its C type cannot hold, which ctypes would cut off in silence."""

    def __init__(self, name: str, field: Any, kind: type) -> None:
        self.name, self.field, self.range = name, field, _RANGES[kind]

    def __get__(self, structure: Structure | None, owner: type | None = None) -> Any:
        return self.field if structure is None else self.field.__get__(structure, owner)

    def __set__(self, structure: Structure, value: float) -> None:
        low, high = self.range
        if not low <= value <= high and -math.inf < value < math.inf:
            raise OverflowError(f"{self.name}={value} does not fit its field in the compiled kernels, {low} to {high}")
        self.field.__set__(structure, value)


_RANGES: dict[type, tuple[float, float]] = {
    c_int32: INT32,
    c_int64: INT64,
    c_float: (-FLOAT32[1], FLOAT32[1]),
}


def _checked(structure: type[Structure]) -> type[Structure]:
    """``structure``, its numbers as :class:`_NumberField`\\ s."""
    for name, kind, *_ in structure._fields_:
        if kind in _RANGES:
            setattr(structure, name, _NumberField(f"{structure.__name__}.{name}", getattr(structure, name), kind))
    return structure


def too_large(**counts: int) -> str | None:
    """Why a call with these counts cannot be served, or None: their fields have 32 bits.

    A call that is traced is not asked, since its sizes may be unknown; the fields themselves are checked when it runs.
    """
    if torch.compiler.is_compiling():
        return None
    for name, count in counts.items():
        if count > INT32[1]:
            return f"serves at most {INT32[1]} {name}, not {count}"
    return None


class _Int32:
    """An int32 argument of a function, refused as a field is."""

    @classmethod
    def from_param(cls, value: int) -> c_int32:
        if not INT32[0] <= value <= INT32[1]:
            raise OverflowError(f"{value} does not fit an argument of the compiled kernels, {INT32[0]} to {INT32[1]}")
        return c_int32(value)


def _fields(**groups: str) -> list[tuple[str, type]]:
    kinds = {"pointer": c_void_p, "int32": c_int32, "int64": c_int64, "float": c_float, "double": c_double}
    return [(name, kinds[kind.rstrip("_")]) for kind, names in groups.items() for name in names.split()]


@_checked
class AxisSource(Structure):
    _fields_ = _fields(int32="size num_units width", pointer="order bounds")


@_checked
class ParameterArguments(Structure):
    _fields_ = _fields(pointer="value grad", int32="per_neuron")


@_checked
class NeuronArguments(Structure):
    _fields_ = [
        *_fields(int32="model reset surrogate", float="alpha"),
        ("parameters", ParameterArguments * MOST_PARAMETERS),
    ]


@_checked
class LayerArguments(Structure):
    _fields_ = [
        *_fields(pointer="plan values bias"),
        ("neurons", NeuronArguments),
        *_fields(
            pointer="spikes inputs kept rates grad_rates grad_values grad_bias dropped",
            double="input_rate",
            float="gradient_event_limit",
            int32="gradient_event_chunks",
            double_="gradient_event_rate",
        ),
    ]


@_checked
class StackArguments(Structure):
    _fields_ = _fields(
        pointer="layers",
        int32="count batch steps threads bf16 held",
        float="event_limit batch_cost",
        pointer_="x counts grad_counts grad_x",
        int32_="x_spikes",
    )


@_checked
class LinearArguments(Structure):
    _fields_ = _fields(
        pointer="plan values bias x grad_y y grad_x grad_values grad_bias",
        int64="rows",
        int32="threads bf16 x_half y_half",
        float="event_limit",
    )


@_checked
class NeuronLoopArguments(Structure):
    _fields_ = [
        ("neurons", NeuronArguments),
        *_fields(
            pointer="current",
            int64="samples",
            int32="size steps threads held every",
            pointer_="spikes kept grad_spikes grad_current",
        ),
    ]


#: the mirrored structures by their names in C++
STRUCTURES: dict[str, type[Structure]] = {
    "AxisSource": AxisSource,
    "Parameter": ParameterArguments,
    "Neurons": NeuronArguments,
    "Layer": LayerArguments,
    "Stack": StackArguments,
    "Linear": LinearArguments,
    "NeuronLoop": NeuronLoopArguments,
}


def _models() -> "dict[str, NeuronModel]":
    """The neuron models, numbered in their order."""
    from g2g_kernels.ops.neurons.models import MODELS  # whose package registers the kernels of this library

    return MODELS


def _interface() -> dict[str, str]:
    """The required table of the library (``csrc/interface.cpp``)."""
    table = {}
    for name, structure in STRUCTURES.items():
        table[name] = f"size {ctypes.sizeof(structure)}"
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            table[f"{name}.{field}"] = f"offset {place.offset}, size {place.size}"
    for kind, numbers in (("Reset", RESETS), ("Surrogate", SURROGATES)):
        table |= {f"{kind}.{name}": str(number) for name, number in numbers.items()}
    for number, (name, model) in enumerate(_models().items()):
        table[f"Model.{name}"] = str(number)
        for kind in ("states", "parameters", "decays"):
            table[f"Model.{name}.{kind}"] = " ".join(getattr(model, kind))
    return table


def _difference(said: str) -> str | None:
    """The first difference between the library's table and this module, or None."""
    theirs = dict(line.split(": ", 1) for line in said.splitlines())
    ours = _interface()
    # fields before the sizes of whole structures, which any of them changes
    for name in sorted((*theirs, *ours), key=lambda name: "." not in name):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'missing')!r} there and {ours.get(name, 'missing')!r} here"
    return None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why it is missing."""
    if sys.byteorder != "little":
        return None, "the compiled kernels are for little-endian machines"
    given = os.environ.get("G2G_CPU_LIBRARY")
    path = Path(given) if given else Path(__file__).with_name("libg2g_cpu.so")
    if not path.exists():
        remedy = "check G2G_CPU_LIBRARY" if given else "reinstall g2g with a C++17 compiler at hand"
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
    axis, layer_pointer = POINTER(AxisSource), c_void_p
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "g2g_isa": (c_char_p, []),
        "g2g_has_bf16": (c_int32, []),
        "g2g_use_openmp": (None, [c_void_p, c_double]),
        "g2g_plan_new": (c_void_p, [axis, axis, c_void_p, c_void_p, _Int32]),
        "g2g_plan_free": (None, [c_void_p]),
        "g2g_plan_matches": (c_int32, [c_void_p] * 3),
        "g2g_plan_row_blocks": (c_int32, [c_void_p]),
        "g2g_plans_aligned": (c_int32, [c_void_p] * 2),
        "g2g_unpack": (None, [c_void_p, c_void_p, _Int32, _Int32, _Int32, c_void_p]),
    }
    for operator in ("stack", "linear", "neurons"):
        for direction in ("forward", "backward"):
            signatures[f"g2g_{operator}_{direction}"] = (c_int64, [layer_pointer, c_void_p])
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    asked, chosen = os.environ.get("G2G_CPU_ISA"), library.g2g_isa().decode()
    if asked and asked != chosen:
        there = "which this CPU does not have" if asked in ISAS else f"which is not one of {', '.join(ISAS)}"
        reason = f"G2G_CPU_ISA={asked!r} asks for an instruction set {there}; leave it unset for the best one"
        logging.getLogger("g2g_kernels").warning("the compiled CPU kernels are not used: %s", reason)
        return None, reason
    library.g2g_use_openmp(openmp(), MOST_WAITING)
    return library, None


@functools.cache
def openmp() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that PyTorch has loaded, or None.

    GNU's and LLVM's runtimes both have it. The kernels run on its threads, since a second set of threads would wait for
    the cores on which PyTorch's spin.
    """
    try:  # looks only through what PyTorch is linked with, and loads nothing
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        logger.info("PyTorch has no OpenMP runtime, so the compiled CPU kernels start threads of their own")
        return None


@constant_when_traced
def unavailable() -> str | None:
    """Why the compiled kernels are unavailable here, or None."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: if there is none.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def instruction_set() -> str:
    """The instruction set in use."""
    return library().g2g_isa().decode()


def run(kernel: Callable[..., int], arguments: Structure) -> None:
    """Calls a kernel with the scratch memory it needs."""
    address = ctypes.addressof(arguments)
    size = kernel(address, None)
    if size == TOO_LARGE:
        raise ValueError(
            "the compiled CPU kernels number the neurons of a layer times the time steps in 32 bits, and these are "
            "more; give fewer of them, or backend='torch'"
        )
    scratch = workspace.bytes(max(size, 64), briefly=True)
    if size < 0 or kernel(address, scratch.data_ptr()) < 0:
        raise MemoryError("the compiled CPU kernels ran out of memory")


def neuron_arguments(neurons: "Neurons", grads: Sequence[torch.Tensor] | None = None) -> NeuronArguments:
    """A population of neurons, and where the gradients of its parameters go (nowhere for empty ones)."""
    number = list(_models()).index(neurons.model)
    arguments = NeuronArguments(number, RESETS[neurons.reset], SURROGATES[neurons.surrogate], neurons.alpha)
    for k, value in enumerate(neurons.parameters):
        grad = pointer(grads[k]) if grads else None
        arguments.parameters[k] = ParameterArguments(value.data_ptr(), grad, value.numel() > 1)
    return arguments


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor's first element, None for no tensor or one without elements."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def event_limit(bf16: bool, backward: bool) -> float:
    """The share of ones up to which spikes are multiplied event by event."""
    return (EVENT_LIMIT_BACKWARD if backward else EVENT_LIMIT_FORWARD)[bool(bf16)]


def gradient_event_limit(neurons: "Neurons", bf16: bool) -> float:
    """The share of events up to which the input gradient of a layer with these neurons is computed by events.

    0 if it always takes the product; the reason is logged once.
    """
    reason = _why_product(neurons.model, neurons.reset, neurons.surrogate, neurons.parameters[0].numel() > 1)
    return 0.0 if reason else GRADIENT_EVENT_LIMIT[bool(bf16)]


@functools.cache
def _why_product(model: str, reset: str, surrogate: str, per_neuron: bool) -> str | None:
    reasons = {
        f"gradients of surrogate {surrogate!r} reach every neuron": surrogate not in COMPACT_SURROGATES,
        f"neuron {model!r} has two decays": model != "lif",
        "gradients pass through reset 'zero'": reset == "zero",
        "each neuron has its own beta": per_neuron,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    path = f"the product: {reason}" if reason else "events where these are few"
    logger.info("input gradients are computed by %s", path)
    return reason


def bf16_wanted() -> bool:
    """True under CPU autocast to bfloat16."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
