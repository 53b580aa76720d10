"""CUDA graphs without a GPU: what a step runs is recorded operation by operation, and replayed on the same tensors.

As on a GPU, capturing computes nothing that lasts, a replay repeats operations and not Python, and it reads and writes
the tensors of the captured call, wherever parameters and gradients have gone since.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Recorder(TorchDispatchMode):
    """Records operations; keeps what they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, list[torch.Tensor]]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        for tensor in given if function._schema.is_mutable else ():
            address = tensor.untyped_storage()._cdata
            if address not in self.made and address not in self.before:
                self.before[address] = tensor, tensor.clone()
        result = function(*args, **kwargs)
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in tensors_of(result) if tensor.untyped_storage()._cdata not in storages]
        self.made |= {tensor.untyped_storage()._cdata for tensor in fresh}
        if fresh or function._schema.is_mutable:  # not a view
            self.operations.append((function, args, kwargs, tensors_of(result) if fresh else []))
        return result


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    captured: "list[Graph]" = []  # noqa: RUF012  (emptied by install)
    capturing = False

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, made in self.operations:
            results = tensors_of(function(*args, **kwargs))
            for old, new in zip(made, results, strict=True) if made else ():
                old.copy_(new)


class Stream:
    """Stands in for ``torch.cuda.Stream``."""

    current: "Stream"

    def __init__(self, device: torch.device) -> None:
        self.device = device.index

    def wait_stream(self, other: "Stream") -> None:
        pass


class Device(contextlib.AbstractContextManager):
    """Stands in for ``torch.cuda.device``."""

    current = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before, Device.current = Device.current, self.device.index

    def __exit__(self, *error: object) -> None:
        Device.current = self.before


def wait() -> None:
    """What an operation does that waits for the device."""
    if Graph.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")


@contextlib.contextmanager
def use(stream: Stream):
    """Stands in for ``torch.cuda.stream``."""
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


@contextlib.contextmanager
def capture(graph: Graph, stream: Stream, capture_error_mode: str):
    """Stands in for ``torch.cuda.graph``, of an older version: after an error its stream remains the current one."""
    assert capture_error_mode == "thread_local"
    assert stream.device == Device.current
    Graph.captured.append(graph)
    Graph.capturing, before = True, Stream.current
    Stream.current = stream
    try:
        with torch.random.fork_rng(devices=[]), _Recorder() as recorder:
            yield
    finally:
        Graph.capturing = False
        with torch.no_grad():
            for tensor, before in recorder.before.values():
                tensor.copy_(before)
    graph.operations, Stream.current = recorder.operations, before


def install(monkeypatch) -> None:
    """Two CUDA devices of which 0 is current, for the rest of a test; tensors remain on the CPU."""
    Graph.captured.clear()
    Stream.current = Stream(torch.device("cuda:0"))
    stand_ins = {
        "is_available": lambda: True, "current_device": lambda: Device.current, "device": Device, "Stream": Stream,
        "current_stream": lambda: Stream.current, "stream": use, "CUDAGraph": Graph, "graph": capture,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # new and old PyTorch
        if hasattr(torch.optim.Optimizer, name):
            monkeypatch.setattr(torch.optim.Optimizer, name, lambda self: None)
    monkeypatch.setattr("g2gnet.training.captured_step._is_on", lambda tensor, device: True)
