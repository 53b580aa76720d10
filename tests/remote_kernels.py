"""The CPU kernels of another processor or system, in a process that an emulator runs: a plugin of pytest.

``G2G_REMOTE="EMULATOR … SERVER LIBRARY" pytest -p remote_kernels …`` runs tests as they are. Where they call a function
of the compiled kernels, its arguments and all memory that they point to go to the server (``remote_kernels.cpp``). It
calls the function of that library and sends the memory back. How large a piece of memory is, tensors say when they
are asked for their address. The same call then goes to this machine's own library: what both return and write must be
the same bits, unless ``G2G_REMOTE_DIFFERS`` is set.
"""

import ctypes
import functools
import json
import operator
import os
import shlex
import struct
import subprocess
import threading
from typing import Any

import torch

from g2g_kernels.cpu import library
from g2g_kernels.cpu.interface import declarations, fields, structures

NUMBER, ADDRESS, SCRATCH, TEXT = range(4)
OWN = (1 << 64) - 1  # in place of a piece's number: an address of the server
CHUNK = 1 << 24  # bytes
TYPES = fields(declarations())
#: how many structures these fields point to; the others to one
COUNTS = {"layers": "count", "outer": "stack.count", "connections": "connection_count", "blocks": "block_count"}
#: of each function: what its arguments are, a plan (or lists) or a number unless a structure or plain memory; and
#: what it returns
FUNCTIONS = {
    "g2g_abi": ("", "int"),
    "g2g_has_bf16": ("", "int"),
    "g2g_isa": ("", "text"),
    "g2g_interface": ("", "text"),
    "g2g_plan_new": ("const Side* const Side* const* const* number", "plan"),
    "g2g_plan_matches": ("plan const* const* const* const* const* const*", "int"),
    "g2g_plans_aligned": ("plan plan", "int"),
    "g2g_plans_same_rows": ("plan plan", "int"),
    "g2g_lists_new": ("const Side* const Side* const* const* number number number", "plan"),
    "g2g_lists_match": ("plan const Side* const Side* const* const* number", "int"),
    "g2g_unpack": ("plan const* number number number *", "none"),
    **{f"g2g_{name}": (f"{kind}* number scratch", "long")
       for name, kind in (("stack", "Stack"), ("graph", "Graph"), ("linear", "Linear"), ("list_loop", "ListLoop"),
                          ("neurons", "NeuronLoop"))},
}  # fmt: skip


class Memory:
    """The pieces of this process's memory that the arguments of a call refer to."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.spans: dict[int, tuple[int, bool]] = {}  # begin: size, whether it may be written
        self.pointers: list[tuple[int, int]] = []  # where an address is, and which
        self.plans: list[tuple[int, int]] = []  # where the address of a plan is, and which

    def add(self, kind: str, address: int, count: int = 1) -> None:
        """Notes what lies at an address: a type of C, without its asterisk."""
        if not address:
            return
        structure = getattr(structures, kind.removeprefix("const ") or "-", None)
        size = self.sizes[address] if structure is None else count * ctypes.sizeof(structure)
        before, written = self.spans.get(address, (0, False))
        self.spans[address] = max(size, before), written or not kind.startswith("const")
        for number in range(count if structure else 0):
            self._fields(kind.removeprefix("const "), structure, address + number * ctypes.sizeof(structure))

    def _fields(self, kind: str, structure: Any, address: int) -> None:
        value = structure.from_address(address)
        for name, of in TYPES[kind].items():
            at = address + getattr(getattr(structure, name), "field", getattr(structure, name)).offset
            element = of.partition("[")[0]
            if element in TYPES:
                inner = getattr(structures, element)
                for number in range(len(getattr(value, name)) if "[" in of else 1):
                    self._fields(element, inner, at + number * ctypes.sizeof(inner))
            elif of.endswith("*") and (pointer := getattr(value, name)):
                if of in ("const Plan*", "const Lists*"):
                    self.plans.append((at, pointer))
                    continue
                self.pointers.append((at, pointer))
                self.add(of[:-1], pointer, operator.attrgetter(COUNTS[name])(value) if name in COUNTS else 1)

    def pieces(self) -> list[tuple[int, int, bool]]:
        """Begin, size and whether it may be written, of the spans, those that overlap joined."""
        joined: list[tuple[int, int, bool]] = []
        for begin, (size, written) in sorted(self.spans.items()):
            if joined and begin < sum(joined[-1][:2]):
                first, length, too = joined[-1]
                joined[-1] = first, max(first + length, begin + size) - first, written or too
            else:
                joined.append((begin, size, written))
        return joined


class Remote:
    """The library of a server, called as :class:`ctypes.CDLL` is; ``twin`` is the library that must do the same."""

    def __init__(self, command: list[str], sizes: dict[int, int], twin: Any) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock, self._sizes, self._scratch = threading.Lock(), sizes, {}
        self._name, self._twin = command[-1], twin
        self._plans: dict[int, int] = {}  # the server's, by those of the twin
        self.calls: dict[str, int] = {}

    def g2g_plan_free(self, plan: int) -> None:
        """Nothing: the garbage collector calls it, perhaps in the middle of another call."""

    g2g_lists_free = g2g_plan_free

    def g2g_use_openmp(self, parallel: int | None, share: float) -> None:
        """For the twin alone: the server has threads of its own."""
        if self._twin:
            self._twin.g2g_use_openmp(parallel, share)

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        memory, kinds = Memory(self._sizes), FUNCTIONS[name][0].replace("const ", "const_").split()
        given = []
        for kind, argument in zip(kinds, arguments, strict=True):
            address = ctypes.addressof(argument._obj) if hasattr(argument, "_obj") else int(argument or 0)
            given.append((kind, address))
            if kind.endswith("*"):
                memory.add(kind[:-1].replace("_", " "), address)
        pieces = memory.pieces()

        def place(address: int) -> tuple[int, int]:
            """Of an address: the number of its piece, and where it is in there."""
            for number, (begin, size, _) in enumerate(pieces):
                if begin <= address < begin + max(size, 1):
                    return number, address - begin
            raise AssertionError(f"{name}: nothing was said of the memory at {address:#x}")

        numbers = []
        for kind, value in given:
            if kind.endswith("*") and value:
                numbers.append((ADDRESS, *place(value)))
            elif kind == "scratch" and value:
                numbers.append((SCRATCH, self._scratch[name], 0))
            else:
                value = self._plans.get(value, value) if kind == "plan" else value
                numbers.append((NUMBER, value & (1 << 64) - 1, 0))
        returns = FUNCTIONS[name][1]
        with self._lock:
            self.calls[name] = self.calls.get(name, 0) + 1
            self._send(TEXT if returns == "text" else NUMBER, len(name), name.encode(), len(pieces))
            for begin, size, written in pieces:
                self._send(written, size)
                for at in range(0, size, CHUNK):
                    content = ctypes.string_at(begin + at, min(CHUNK, size - at))
                    if content.count(0) < len(content):
                        self._send(len(content), at, content)
                self._send(0)
            self._send(len(memory.pointers) + len(memory.plans))
            for at, pointer in memory.pointers:
                self._send(*place(at), *place(pointer))
            for at, plan in memory.plans:
                self._send(*place(at), OWN, self._plans.get(plan, plan))
            self._send(len(numbers), *(number for argument in numbers for number in argument))
            self._process.stdin.flush()
            ours = getattr(self._twin, name)(*arguments) if self._twin else None
            (result,) = struct.unpack("<Q", self._receive(8))
            if returns == "text":
                return self._receive(result)
            for begin, size, _ in (piece for piece in pieces if piece[2]):
                theirs = self._receive(size)
                if not self._twin:
                    ctypes.memmove(begin, theirs, size)
                elif theirs != (own := ctypes.string_at(begin, size)):
                    first = next(i for i in range(size) if theirs[i] != own[i])
                    what = f"{name}{[value for _, value in given]}: byte {first} of {size}"
                    raise AssertionError(f"{what} is {theirs[first]} there, {own[first]} here")
        if returns == "plan":
            if ours and result:
                self._plans[ours] = result
            assert not self._twin or bool(ours) == bool(result), f"{name}: a plan on one side alone"
            return ours or result or None
        value = ctypes.c_int32(result).value if returns == "int" else ctypes.c_int64(result).value
        assert not self._twin or returns == "none" or value == ours, f"{name} is {value} there, {ours} here"
        if kinds[-1:] == ["scratch"] and not given[-1][1]:
            self._scratch[name] = value
        return value

    def _send(self, *values: int | bytes) -> None:
        for value in values:
            self._process.stdin.write(value if isinstance(value, bytes) else struct.pack("<Q", value))

    def _receive(self, size: int) -> bytes:
        content = self._process.stdout.read(size)
        assert len(content) == size, f"the server has ended, with status {self._process.wait()}"
        return content


def pytest_configure(config: Any) -> None:
    sizes: dict[int, int] = {}
    address_of = torch.Tensor.data_ptr

    def data_ptr(tensor: torch.Tensor) -> int:
        address = address_of(tensor)
        storage = tensor.untyped_storage()
        sizes[address] = storage.nbytes() - (address - storage.data_ptr()) if address else 0
        return address

    torch.Tensor.data_ptr = data_ptr
    twin = None if "G2G_REMOTE_DIFFERS" in os.environ else library.library()
    remote = Remote(shlex.split(os.environ["G2G_REMOTE"]), sizes, twin)
    assert remote.g2g_abi() == library.ABI
    assert library._difference(remote.g2g_interface().decode()) is None
    assert twin is None or remote.g2g_isa() == twin.g2g_isa()
    library._load = lambda: (remote, None)
    config.remote_kernels = remote


def pytest_unconfigure(config: Any) -> None:
    print("calls of kernels:", json.dumps(config.remote_kernels.calls))
    config.remote_kernels._process.stdin.close()
    config.remote_kernels._process.wait(60)
