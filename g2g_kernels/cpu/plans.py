"""The compiled kernels' view of a mask (``csrc/plan.h``), built when a mask is first used or has changed.

A mask's index buffers change in place (dynamic sparse training), so a cached plan is compared with them on every use:
a memory comparison of 8 bytes per unit, which detects every in-place change.
"""

import ctypes
import functools
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch

from g2g_kernels.cpu.interface import structures
from g2g_kernels.cpu.library import library, too_large
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.unit_grid import MaskTensors

#: number of plans that are always kept, and total units of further plans (a unit costs some 80 bytes)
_PLANS, _UNITS = 64, 1 << 22
_LEAST_UNITS = 1 << 10  # minimum size of a plan, however small its mask
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
    """A built plan; ``address`` is what the kernels take."""

    def __init__(self, mask: MaskTensors, width: tuple[int, int]) -> None:
        sources = [
            structures.Side(
                size=len(order),
                num_units=len(bounds) - 1,
                width=side,
                order=order.data_ptr(),
                bounds=bounds.data_ptr(),
            )
            for side, order, bounds in (
                (width[0], mask.row_order, mask.row_bounds),
                (width[1], mask.col_order, mask.col_bounds),
            )
        ]
        lib = library()
        units = mask.unit_row.data_ptr(), mask.unit_col.data_ptr(), len(mask.unit_row)
        address = lib.g2g_plan_new(ctypes.byref(sources[0]), ctypes.byref(sources[1]), *units)
        if not address:
            raise ValueError("the mask's indices do not describe a valid mask")
        self.address: int = address
        #: whether this is still the plan of the mask whose tensors it was built from, in place
        self.matches: Callable[[], int] = functools.partial(
            lib.g2g_plan_matches, address, *[tensor.data_ptr() for tensor in _sources(mask)]
        )
        self.units = max(len(mask.unit_row), _LEAST_UNITS)
        weakref.finalize(self, lib.g2g_plan_free, address).atexit = False


def _sources(mask: MaskTensors) -> tuple[torch.Tensor, ...]:
    """What a plan is built from: the units, and both sides."""
    return mask.unit_row, mask.unit_col, mask.row_order, mask.row_bounds, mask.col_order, mask.col_bounds


def refuses(mask: BlockMask, values: torch.Tensor) -> str | None:
    """Why a mask with these packed weights cannot have a plan, or None: its parts are numbered in 32 bits."""
    return None if torch.compiler.is_compiling() else _refuses(mask.grid, tuple(values.shape))


@functools.lru_cache(1024)
def _refuses(grid: tuple[int, int], packed: tuple[int, int, int]) -> str | None:
    rows, cols = blocks(grid, packed)
    return too_large(
        **{"weights in a layer": math.prod(packed), "blocks of 64 × 64 weights in the matrix of a layer": rows * cols},
        **{"places for the neurons of a layer, in blocks of 64": 64 * max(rows, cols)},
    )


def plan_for(mask: MaskTensors, values: torch.Tensor) -> Plan:
    """The plan of a mask whose packed weights are ``values``; raises ValueError for tensors that do not fit a mask."""
    key = vars(mask).get("plan_key")
    if key is None or key[:3] != values.shape:
        key = mask.__dict__["plan_key"] = _key(mask, values)
    plan = _plans.get(key)
    if plan is not None and plan.matches():
        try:  # noqa: SIM105  (contextlib.suppress takes as long as the comparison)
            _plans.move_to_end(key)  # most recently used last
        except KeyError:
            pass  # another thread has removed it
        return plan
    with _lock:
        plan = Plan(mask, (key[1], key[2]))
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
