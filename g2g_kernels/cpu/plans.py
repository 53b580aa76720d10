"""The compiled kernels' view of a mask (``csrc/plan.h``), built when a mask is first used or has changed in place
(DST): on every use it is compared with the index buffers, 8 bytes per unit; lists only if these have other
versions."""

import ctypes
import functools
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from g2g_kernels.cpu import library as cpu_library
from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, too_large
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.tracing import version

#: number of plans that are always kept, and total units of further plans (a unit costs some 80 bytes)
_PLANS, _UNITS = 64, 1 << 22
_LEAST_UNITS = 1 << 10  # minimum size of a plan, however small its mask
#: Units with sides from this on keep their tiles.
LEAST_SIDE = 16
#: Weights of smaller ones are taken from lists where less than this share of the units of the grid exists, and there
#: are at least so many tiles (csrc/PERFORMANCE.md): in ``g2g_linear``; by a layer of a stack, whose operators are then
#: called one after the other; and by a recurrent connection.
IN_LISTS = {"linear": (0.2, 0), "stack": (0.02, 1 << 17), "recurrent": (0.02, 1 << 12)}
#: Neurons of a range of lists, which 16 bits number. Lists of fewer weights than this, on average, are not cut: where
#: each begins would take more memory than its weights.
MOST_OTHERS, LEAST_IN_LIST = 1 << 16, 8
#: weights that are compared where a tensor's version says that none has changed
SAMPLED = 1024
_lock = threading.RLock()  # the garbage collector may call kernels from a finalizer while it is held
_plans: "OrderedDict[tuple, Plan]" = OrderedDict()
if hasattr(os, "register_at_fork"):  # in a forked child a thread that held the lock does not exist
    os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


def blocks(grid: tuple[int, int], packed: tuple[int, ...]) -> tuple[int, int]:
    """The numbers of 64-lane blocks of rows and of columns of a unit grid with packed weights of that shape."""
    (row_ranges, col_ranges), (_, height, width) = grid, packed
    rows = row_ranges * -(-height // 64) if height > 64 else -(-row_ranges // (64 // height))
    cols = col_ranges * -(-width // 64) if width > 64 else -(-col_ranges // (64 // width))
    return rows, cols


class Plan:
    """A built plan of a mask for ``packed`` weights of that shape, or weights in lists; ``address`` is what kernels
    take. ``owners``: None for a plan of tiles, ``"rows"`` or ``"cols"`` for lists of the weights of each neuron of that
    side, cut into ranges of ``length`` neurons of the other at most (csrc/lists.h).
    """

    def __init__(self, mask: MaskTensors, packed: tuple[int, ...], owners: str | None = None, length: int = 0) -> None:
        sides = [
            structures.Side(
                size=len(order),
                num_units=len(bounds) - 1,
                width=width,
                order=order.data_ptr(),
                bounds=bounds.data_ptr(),
            )
            for width, order, bounds in (
                (packed[1], mask.row_order, mask.row_bounds),
                (packed[2], mask.col_order, mask.col_bounds),
            )
        ]
        lib = library()
        units = mask.unit_row.data_ptr(), mask.unit_col.data_ptr(), len(mask.unit_row)
        given = ctypes.byref(sides[0]), ctypes.byref(sides[1]), *units
        address = lib.g2g_plan_new(*given) if owners is None else lib.g2g_lists_new(*given, owners == "rows", length)
        if not address:
            raise ValueError("the mask's indices do not describe a valid mask, or memory has run out")
        self.address: int = address
        #: whether this is still the plan of what lies where the mask did that it was built from
        self._equals: Callable[[], int]
        if owners is None:
            sources = [tensor.data_ptr() for tensor in _sources(mask)]
            self._equals = functools.partial(lib.g2g_plan_matches, address, *sources)
        else:
            self._equals = functools.partial(lib.g2g_lists_match, address, *given)
        #: of lists, which are large: the tensors that they were built from or compared with, and their versions
        self._read: list[tuple[weakref.ref, int]] = []
        self._ordered: _Ordered | None = None
        self._lists = owners is not None
        self.units = max(len(mask.unit_row), _LEAST_UNITS)
        weakref.finalize(self, lib.g2g_plan_free if owners is None else lib.g2g_lists_free, address).atexit = False

    def matches(self, mask: MaskTensors) -> bool:
        """Whether this is still the plan of a mask whose tensors lie where the plan's did."""
        sources = _sources(mask)
        if self._read and all(
            [of() is tensor and -1 < then == version(tensor) for (of, then), tensor in zip(self._read, sources)]  # noqa: B905
        ):
            return True
        if not self._equals():
            return False
        if self._lists:
            self._read = [(weakref.ref(tensor), version(tensor)) for tensor in sources]
        return True

    def ordered(self, values: torch.Tensor) -> torch.Tensor:
        """Packed weights in the order of these lists, which are kept until a call comes with other numbers. They are
        not read where the tensor is the last call's, with its version: a write that no version counts (``.data``,
        NumPy) is then noticed if it changes one of :data:`SAMPLED` weights."""
        kept, now, sample = self._ordered, version(values), values.flatten()[:: values.numel() // SAMPLED + 1]
        if kept and kept.of() is values and kept.then == (now, values.data_ptr()) and torch.equal(sample, kept.sample):
            return kept.weights
        threads, doubles = torch.get_num_threads(), values.dtype == torch.float64
        words = values.numel() * (2 if doubles else 1)
        key = library().g2g_digest(values.data_ptr(), words, threads), values.dtype
        if kept and kept.key == key:
            weights = kept.weights
        else:
            weights = torch.empty(values.numel(), dtype=values.dtype)
            library().g2g_lists_order(self.address, values.data_ptr(), weights.data_ptr(), doubles, threads)
        then = None if now < 0 else (now, values.data_ptr())
        self._ordered = _Ordered(weights, key, weakref.ref(values), then, sample.detach().clone())
        return weights


class _Ordered(NamedTuple):
    """Weights in the order of lists, the digest and the dtype of the packed ones; and the tensor that these were, its
    version and address (None: it has no versions), and a sample of it."""

    weights: torch.Tensor
    key: tuple[int, torch.dtype]
    of: weakref.ref
    then: tuple[int, int] | None
    sample: torch.Tensor


def _sources(mask: MaskTensors) -> tuple[torch.Tensor, ...]:
    """What a plan is built from: the units, and both sides."""
    return mask.unit_row, mask.unit_col, mask.row_order, mask.row_bounds, mask.col_order, mask.col_bounds


def refuses(mask: BlockMask, values: torch.Tensor, use: str) -> str | None:
    """Why the kernels cannot take a mask with these packed weights, or None: its parts are numbered in 32 bits."""
    if torch.compiler.is_compiling():
        return None
    packed = tuple(values.shape)
    return _refuses(mask.grid, packed, in_lists(mask.grid, packed, use))


@functools.lru_cache(1024)
def _refuses(grid: tuple[int, int], packed: tuple[int, int, int], lists: bool) -> str | None:
    weights = {"weights in a layer": math.prod(packed)}
    if lists:
        return too_large(**weights)
    rows, cols = blocks(grid, packed)
    return too_large(
        **{**weights, "blocks of 64 × 64 weights in the matrix of a layer": rows * cols},
        **{"places for the neurons of a layer, in blocks of 64": 64 * max(rows, cols)},
    )


def in_lists(grid: tuple[int, int], packed: tuple[int, ...], use: str) -> bool:
    """Whether the kernels take the weights of a unit grid from lists, for a ``use`` in :data:`IN_LISTS`."""
    if min(packed[1:]) >= LEAST_SIDE:
        return False
    (share, least), cost = IN_LISTS[use], cpu_library.LIST_COST
    return packed[0] * cost < share * math.prod(grid) and math.prod(blocks(grid, packed)) >= least * min(cost, 1.0)


def lists_for(mask: MaskTensors, values: torch.Tensor, owners: str) -> Plan:
    """As :func:`plan_for`, the weights in lists by the neurons of the ``"rows"`` or ``"cols"``."""
    owned, others = len(mask.row_order), len(mask.col_order)
    if owners == "cols":
        owned, others = others, owned
    ranges = -(-others // MOST_OTHERS)
    cut = ranges == 1 or values.numel() >= LEAST_IN_LIST * owned * ranges
    return plan_for(mask, values, owners, MOST_OTHERS if cut else others)


def plan_for(mask: MaskTensors, values: torch.Tensor, *way: Any) -> Plan:
    """The plan of a mask whose packed weights are ``values``, made as a :class:`Plan` with ``way``; raises ValueError
    for tensors that do not fit a mask."""
    keys = vars(mask).setdefault("plan_keys", {})
    key = keys.get(way)
    if key is None or key[: values.dim()] != values.shape:
        key = keys[way] = (*_key(mask, values), *way)
    plan = _plans.get(key)
    if plan is not None and plan.matches(mask):
        try:  # noqa: SIM105  (contextlib.suppress takes as long as the comparison)
            _plans.move_to_end(key)  # most recently used last
        except KeyError:
            pass  # another thread has removed it
        return plan
    with _lock:
        plan = Plan(mask, tuple(values.shape), *way)
        kept = list(_plans.values())  # at once, since other threads move theirs to the end without the lock
        excess = sum(other.units for other in kept) + plan.units - _UNITS
        while excess > 0 and len(_plans) >= _PLANS:
            excess -= _plans.popitem(last=False)[1].units
        _plans.pop(key, None)
        _plans[key] = plan
    return plan


def _key(mask: MaskTensors, values: torch.Tensor) -> tuple[int, ...]:
    """The packed shape and the addresses of what a plan is made of."""
    tensors = _sources(mask)
    unit_row, unit_col, row_order, row_bounds, col_order, col_bounds = tensors
    for tensor, dtype in ((unit_row, torch.int32), (unit_col, torch.int32), (row_bounds, torch.int32),
                          (col_bounds, torch.int32), (row_order, torch.int64), (col_order, torch.int64)):  # fmt: skip
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("the mask's index buffers must be contiguous tensors on the CPU")
    if values.dim() != 3 or len(unit_row) != len(values) or len(unit_col) != len(values):
        raise ValueError(f"values of shape {tuple(values.shape)} do not fit a mask of {len(unit_row)} units")
    return (*values.shape, *(tensor.data_ptr() for tensor in tensors), *(tensor.numel() for tensor in tensors))
