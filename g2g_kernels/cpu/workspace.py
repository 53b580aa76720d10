"""Pooled workspaces: fresh pages cost a CPU as much as the arithmetic on them. A tensor from here is in an anonymous
memory map, which returns to the pool with the last tensor on it, and serves a later request of about its size.

The garbage collector may free a tensor at any time, also while the pool's lock is held. A finalizer therefore takes no
lock: it appends the map to a queue, which the next request empties.
"""

import collections
import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence

import torch

PAGE = 2 << 20  # maps are multiples of a huge page
SMALL = 256 << 10  # smaller sizes use PyTorch's allocator, which reuses small blocks anyway
if os.environ.get("G2G_CPU_POOL") == "0":
    SMALL = sys.maxsize  # no pool: memory checkers see every access past an end


class Workspace:
    """A pool of memory maps; with ``poison`` (tests; ``G2G_CPU_POISON=1``) new tensors are filled with NaN."""

    def __init__(self) -> None:
        self.poison = os.environ.get("G2G_CPU_POISON", "") not in ("", "0")
        self._lock = threading.Lock()
        self._returned: collections.deque[mmap.mmap] = collections.deque()  # by finalizers, and still in _in_use
        self._free: list[mmap.mmap] = []  # most recently returned last
        self._in_use = 0
        self._most_in_use = 0

    def bytes(self, size: int) -> torch.Tensor:
        """An uninitialised uint8 tensor of ``size`` elements, aligned to 64 bytes."""
        return self.empty((size,), torch.uint8)

    def borrow(self, size: int) -> mmap.mmap:
        """A map of at least ``size`` uninitialised bytes, until it is given back."""
        memory = self._take(size, briefly=True)
        if self.poison:
            ctypes.memset(address_of(memory), 0xFF, size)
        return memory

    def give_back(self, memory: mmap.mmap) -> None:
        """Takes a map back that :meth:`borrow` gave."""
        self._returned.append(memory)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised contiguous tensor, aligned to 64 bytes. It is no view: PyTorch adds a gradient to another
        one in place where nothing else refers to its memory."""
        count = math.prod(shape)
        if count * dtype.itemsize < SMALL:
            tensor = torch.empty(shape, dtype=dtype)  # PyTorch aligns its memory so
        else:
            memory = self._take(count * dtype.itemsize)
            array = (ctypes.c_char * len(memory)).from_buffer(memory)
            weakref.finalize(array, self._returned.append, memory).atexit = False
            tensor = torch.frombuffer(array, dtype=dtype, count=count).resize_(shape)
        return self._poisoned(tensor)

    def _poisoned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.poison and tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(0xFF)
        return tensor

    def each(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """As :meth:`empty`, one tensor for each shape."""
        return [self.empty(shape, dtype) for shape in shapes]

    def alike(self, tensors: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor | None]:
        """An uninitialised tensor like each contiguous one that is ``needed``, None for the others."""
        made: list[torch.Tensor | None] = []
        for tensor, need in zip(tensors, needed, strict=True):
            if not need:
                made.append(None)
            elif not self.poison and tensor.nbytes < SMALL:
                made.append(torch.empty_like(tensor))
            else:
                made.append(self.empty(tuple(tensor.shape), tensor.dtype))
        return made

    def exactly(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """As :meth:`each`, for many tensors that are kept for long: up to a few maps' size they take no whole map."""
        return [
            self.empty(shape, dtype)
            if math.prod(shape) * dtype.itemsize >= 4 * PAGE
            else self._poisoned(torch.empty(shape, dtype=dtype))
            for shape in shapes
        ]

    def _take(self, size: int, briefly: bool = False) -> mmap.mmap:
        length = -(-size // PAGE) * PAGE
        with self._lock:
            self._collect()
            most = sys.maxsize if briefly else length + max(length // 4, PAGE)
            fitting = [m for m in self._free if length <= len(m) <= most]
            if fitting:
                memory = min(fitting, key=len)
                self._free.remove(memory)
            else:
                # least recently used maps are freed before the pool exceeds the most ever needed at once
                spare = self._most_in_use - self._in_use - length
                while self._free and sum(map(len, self._free)) > max(spare, 0):
                    self._free.pop(0)
                memory = _map(length)
            self._in_use += len(memory)
            self._most_in_use = max(self._most_in_use, self._in_use)
        return memory

    def _collect(self) -> None:
        """Collects the maps returned by finalizers; the caller holds the lock."""
        while self._returned:
            memory = self._returned.popleft()
            self._in_use -= len(memory)
            self._free.append(memory)


def address_of(memory: mmap.mmap) -> int:
    """Where a map begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _map(length: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, length)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # private: a forked child has its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages has small ones
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


workspace = Workspace()
if hasattr(os, "register_at_fork"):  # in a forked child a thread that held the lock does not exist
    os.register_at_fork(after_in_child=workspace._lock._at_fork_reinit)  # type: ignore[attr-defined]
