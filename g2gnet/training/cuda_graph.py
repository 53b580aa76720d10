"""A training step captured in a CUDA graph: ``train.py --cuda_graph``.

A step of a small network is some fifty launches that cost the CPU microseconds each; a captured step is a single
launch. It reads and writes tensors at fixed addresses: parameters, optimizer state and the masks' buffers. Dynamic
sparse training changes these in place, so the graph stays valid across its updates.

**Not run on a GPU yet.** That nothing in the step waits for the device, which capturing forbids, is tested on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch


class CapturedStep:
    """Calls ``step(inputs, labels, constants)`` by replaying its CUDA graph.

    The first calls run directly, on the side stream that capturing needs: kernels are compiled and the optimizer
    creates its state. They are ordinary steps, so training is the same with and without a graph. Later calls copy the
    batch to where the graph reads it, and replay. Every call returns the same tensors, with new content: read them
    before the next call.

    Args:
        step: launches one training step; every call has inputs and labels of the same shapes.

    Raises:
        ValueError: without a CUDA device.
    """

    #: calls before the first capture
    WARM_UP = 3

    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor, Any], Any]) -> None:
        if not torch.cuda.is_available():
            raise ValueError("a CUDA graph needs a CUDA device; leave out --cuda_graph")
        self._step = step
        self._stream = torch.cuda.Stream()
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._constants: Any = None

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor, constants: Any) -> Any:
        """One step; ``constants``, of any type with equality, are part of the graph: new ones make a new graph."""
        if self._calls < self.WARM_UP:
            self._calls += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._step(inputs, labels, constants)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None or constants != self._constants:
            self._inputs, self._labels, self._constants = inputs.clone(), labels.clone(), constants
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._step(self._inputs, self._labels, constants)
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._result
