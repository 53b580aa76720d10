"""A training step as a CUDA graph: what ``train.py`` does on a CUDA device, for loops of one's own too.

A step of a small network is some fifty launches that cost the CPU microseconds each; a captured step is a single
launch. It reads and writes tensors at fixed addresses: parameters, optimizer state and the masks' buffers. Dynamic
sparse training changes these in place, so the graph stays valid across its updates.

**Not run on a GPU yet.** That nothing in the step waits for the device, which capturing forbids, is tested on the CPU.
"""

import collections
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from g2gnet.messages import reason

logger = logging.getLogger("g2gnet")


def captured(step: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """``step`` as a CUDA graph if ``device`` is a CUDA device, itself if not.

    For a training loop of one's own::

        optimizer = torch.optim.Adam(net.parameters(), capturable=True)

        def step(x, labels):
            loss = F.cross_entropy(net(x), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss

        step = g2gnet.captured(step, device)
        for x, labels in batches:
            loss = step(x.to(device), labels.to(device))

    Nothing in ``step`` may wait for the device (``loss.item()``, ``tensor[mask]``, ``nonzero``) or draw random numbers
    on the CPU: a graph repeats the launches of one call. If it cannot be captured, it runs directly, and a warning says
    why.

    Args:
        step: one training step. Tensors among its arguments, all on ``device``, are copied to where the graph reads
            them. Everything else, hashable, and the tensors' shapes and dtypes are constants of the graph: the first
            three calls with others run directly, the next one captures a new graph.
        device: of the network and the tensors.

    Returns:
        A function that is called like ``step``. It returns the same tensors at every replay, with new content: read
        them before the next call.

    Example:
        >>> net = G2GNet(64, 64, 10, block_size=8, T=5)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> def step(x, labels):
        ...     loss = torch.nn.functional.cross_entropy(net(x), labels)
        ...     loss.backward()
        ...     return loss
        ...
        >>> step = captured(step, torch.device("cpu"))  # a CUDA graph on "cuda"
        >>> step(torch.rand(8, 64), torch.zeros(8, dtype=torch.int64)).shape
        torch.Size([])
    """
    device = torch.device(device)
    return CapturedStep(step, device) if device.type == "cuda" else step


class CapturedStep:
    """Calls ``step(*arguments)`` by replaying its CUDA graph.

    Tensors among the arguments are copied to where the graph reads them. Everything else is a constant of the graph,
    hashable, and so are the tensors' shapes and dtypes. A call with others runs directly; after :data:`WARM_UP` of them
    without a replay between, the next one captures a new graph: by then kernels are compiled and the optimizer has its
    state, whatever changed. Direct calls are ordinary ones, so training is the same with and without a graph. Replays
    return the same tensors each time, with new content: read them before the next call.

    Args:
        step: launches one training step.
        device: on which; the tensors' and the network's.
        required: whether a step that cannot be captured is an error; if not, it runs directly from then on.

    Raises:
        ValueError: without a CUDA device; at a call, for tensors on another device.
        RuntimeError: at a call, if the step cannot be captured but has to be.
    """

    #: direct calls before a graph is captured
    WARM_UP = 3

    def __init__(self, step: Callable[..., Any], device: torch.device, required: bool = False) -> None:
        if not torch.cuda.is_available() or device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device}; leave `cuda_graph` out")
        self._step = step
        # "cuda" is the device that is current now
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._required = required
        self._possible = True
        # the current device's, wherever it is made
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()
        self._direct: collections.Counter[Any] = collections.Counter()  # calls of each kind since the last replay
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_kind: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """One step."""
        kind = self._kind_of(arguments)
        with torch.cuda.device(self._device):
            if not self._possible:
                return self._step(*arguments)
            if self._graph is None or kind != self._captured_kind:
                self._direct[kind] += 1
                if self._direct[kind] <= self.WARM_UP or not self._capture(kind, arguments):
                    return self._directly(arguments)
            self._direct.clear()
            for here, given in zip(self._arguments, arguments, strict=True):
                if isinstance(given, torch.Tensor):
                    here.copy_(given)
            assert self._graph is not None
            self._graph.replay()
            return self._result

    def _kind_of(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a graph cannot change between replays."""
        kind = []
        for given in arguments:
            if isinstance(given, torch.Tensor):
                _check_device(given, self._device)
            kind.append((given.shape, given.dtype) if isinstance(given, torch.Tensor) else given)
        return tuple(kind)

    def _directly(self, arguments: tuple[Any, ...]) -> Any:
        """A call on the stream on which the step will be captured, as autograd needs it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(*arguments)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, kind: Any, arguments: tuple[Any, ...]) -> bool:
        """Captures a step with copies of these tensors; nothing is computed. Returns whether it could."""
        self._graph = self._result = self._captured_kind = None  # gives its memory to the next one
        copies = [given.clone() if isinstance(given, torch.Tensor) else given for given in arguments]
        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings():
                # of a step that launches on another device or stream: replays would do nothing
                warnings.filterwarnings("error", message="The CUDA Graph is empty")
                with torch.cuda.graph(graph, stream=self._stream):
                    result = self._step(*copies)
        except (RuntimeError, UserWarning) as error:
            if self._required:
                raise RuntimeError(f"the training step cannot be captured in a CUDA graph: {error}") from error
            logger.warning("training steps are not replayed as a CUDA graph, but run directly: %s", reason(error))
            self._possible = False
            return False
        self._graph, self._result, self._arguments, self._captured_kind = graph, result, copies, kind
        return True


def _check_device(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"the step is captured on {device}, but a tensor is on {tensor.device}; move it there")
