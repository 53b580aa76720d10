"""A training step as a CUDA graph: what ``train.py`` does on a CUDA device, for loops of one's own too.

A step of a small network takes some fifty launches, each microseconds of the CPU's time; a captured step is one launch.
It reads and writes tensors at fixed addresses: parameters, optimizer state and the masks' indices. Dynamic sparse
training changes these in place, so the graph stays valid across its updates, unless they make weights fewer.

**Not run on a GPU yet.** That nothing in the step waits for the device, which capturing forbids, is tested on the CPU.
"""

import collections
import enum
import logging
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from g2g_kernels import BlockMask
from g2gnet.base.messages import reason

logger = logging.getLogger("g2gnet")

#: types of what is compared by value
_PLAIN = (numbers.Number, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)


def captured(step: Callable[..., Any], device: torch.device | str, watch: Sequence[Any]) -> "CapturedStep":
    """``step`` as a CUDA graph if ``device`` is a CUDA device; on others it is called as it is.

    **The contract.** A graph repeats the launches of one call. Before each replay, the arguments are compared, which
    gradients exist, ``no_grad`` and ``autocast``, and of what is in ``watch``: addresses, shapes and dtypes of
    parameters, buffers and optimizer state, which parameters are learned, parameter groups, ``training`` and other
    plain attributes. After a change the step runs directly, and the fourth such call captures a new graph. When
    anything else changes that the step reads, such as the mask of a loaded checkpoint, call ``step.recapture()``.

    A step that cannot be captured runs directly, and a warning says why: it must not wait for the device
    (``loss.item()``, ``tensor[mask]``; ``torch.cuda.set_sync_debug_mode("warn")`` says where), nor draw random numbers
    on the CPU. What it keeps for the next call is in tensors that it writes in place.

    Args:
        step: one training step. Tensors among its arguments (also in tuples, lists and dictionaries) are copied to
            where the graph reads them, as are gradients with which it begins; they are on ``device``, need no gradient
            and are not changed by ``step``. Other arguments are numbers, strings, None and the like. The results of a
            replay are the same tensors with new content: read them before the next call.
        device: of the network and of all tensors.
        watch: the modules and optimizers that ``step`` uses.

    Raises:
        TypeError: for anything else in ``watch``.
        ValueError: at a call, for an argument that a graph cannot read.

    Example:
        >>> net = G2GNet(64, 64, 10, block_size=8, T=5)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> def step(x, labels):
        ...     loss = torch.nn.functional.cross_entropy(net(x), labels)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     return loss.detach()
        ...
        >>> step = captured(step, "cpu", watch=(net, optimizer))  # a CUDA graph on "cuda"
        >>> step(torch.rand(8, 64), torch.zeros(8, dtype=torch.int64)).shape
        torch.Size([])
    """
    return CapturedStep(step, torch.device(device), watch)


class CapturedStep:
    """What :func:`captured` returns; if ``required``, another device or a step that cannot be captured is an error."""

    #: direct calls of one kind before a graph is captured: kernels are compiled then, and the optimizer has its state
    WARM_UP = 3
    #: direct calls after which there is a warning, if fewer were replayed
    PATIENCE = 32

    def __init__(self, step: Callable[..., Any], device: torch.device, watch: Any, required: bool = False) -> None:
        if not isinstance(watch, tuple | list) or not all(isinstance(each, nn.Module | Optimizer) for each in watch):
            raise TypeError(f"watch={type(watch).__name__} must be a tuple of all modules and optimizers of the step")
        self._possible = device.type == "cuda"
        if required and not self._possible:
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device}; leave `cuda_graph` out")
        if self._possible:
            # "cuda" is the device that is current now
            device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
            self._stream = torch.cuda.Stream(device)
        self._step, self._device, self._watch, self._required = step, device, tuple(watch), required
        self._warmed: collections.deque[Any] = collections.deque(maxlen=self.PATIENCE)  # kinds of direct calls
        # the graph, the kind of its calls, and what is compared by its id, which nothing else may get
        self._replay: Any = None
        self._kind: Any = None
        self._kept: Any = None
        self._direct = self._replays = 0

    def recapture(self) -> None:
        """Forgets the graph, since something that ``step`` reads has changed; the fourth call captures a new one."""
        self._replay = self._kept = None
        self._warmed.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        if not self._possible:
            return self._step(*args, **kwargs)
        with torch.cuda.device(self._device):
            watched, learned, kept = _look(self._watch, self._device)
            inputs, form = tree_flatten((args, kwargs))
            arguments = [_kind_of(each, self._device) for each in inputs]
            modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            kind = form, arguments, [each.grad is None for each in learned], modes, watched
            inputs += [each.grad for each in learned]
            if self._replay is None or kind != self._kind:
                if self._warmed.count(kind) < self.WARM_UP or not self._capture(inputs, form, learned):
                    self._warmed.append(kind)
                    return self._directly(args, kwargs)
                self._kind, self._kept = kind, kept
            self._warmed.clear()
            self._replays += 1
            return self._replay(inputs)

    def _directly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on the stream on which the step will be captured, as autograd needs it."""
        stream = torch.cuda.current_stream()
        self._stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._stream):
                result = self._step(*args, **kwargs)
        finally:
            stream.wait_stream(self._stream)
        self._direct += 1
        if self._direct == self.PATIENCE > self._replays:
            logger.warning(
                "training steps are seldom replayed as a CUDA graph, since what is compared changes between them; "
                "change tensors in place, also a learning rate, and let Adam count on the device (capturable=True)"
            )
        return result

    def _capture(self, now: list[Any], form: Any, learned: list[torch.Tensor]) -> bool:
        """Captures a step with copies of arguments and gradients; nothing is computed. Returns whether it could."""
        self.recapture()  # gives the memory of the last graph to this one
        inputs = [each.clone() if isinstance(each, torch.Tensor) else each for each in now]
        args, kwargs = tree_unflatten(inputs[: form.num_leaves], form)
        gradients = _exchange(learned, inputs[form.num_leaves :])
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as one that pins batches, may call what a capture forbids
            capturing = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.stream(self._stream), capturing:  # which does not restore the stream after every error
                result = self._step(*args, **kwargs)
        except RuntimeError as error:
            self._give_up(reason(error), error)
            return False
        finally:
            written = _exchange(learned, gradients)
        copies = [each for each in inputs[: form.num_leaves] if isinstance(each, torch.Tensor)]
        if any(each._version for each in copies if not each.is_inference()):
            self._give_up("it changes an argument in place, of which a graph would change a copy; return it instead")
            return False

        @torch.no_grad()
        def replay(now: list[Any]) -> Any:
            for here, each in zip(inputs, now, strict=True):
                if isinstance(each, torch.Tensor) and each is not here:
                    here.copy_(each)
            graph.replay()
            _exchange(learned, written)
            return result

        self._replay = replay
        return True

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        if self._required:
            raise RuntimeError(f"the training step cannot be captured in a CUDA graph: {why}") from error
        logger.warning("training steps are not replayed as a CUDA graph, but run directly: %s", why)
        self._possible = False
        self.recapture()


def _exchange(tensors: list[torch.Tensor], gradients: list[Any]) -> list[Any]:
    """Gives each tensor its gradient; returns those before."""
    before = [each.grad for each in tensors]
    for each, gradient in zip(tensors, gradients, strict=True):
        each.grad = gradient
    return before


def _look(watch: Sequence[Any], device: torch.device) -> tuple[list[Any], list[torch.Tensor], dict[int, Any]]:
    """What is compared of what is watched, what is learned, and all tensors, modules and optimizers by their ``id``."""
    seen: list[Any] = []
    learned: list[torch.Tensor] = []
    kept: dict[int, Any] = {}
    values = list(watch)
    for value in values:  # which grow
        if isinstance(value, _PLAIN):
            seen += type(value), value
        elif isinstance(value, tuple):
            values += value
        elif isinstance(value, torch.Tensor | nn.Module | Optimizer):
            seen.append(id(value))
            if id(value) in kept:
                continue
            kept[id(value)] = value
            if isinstance(value, torch.Tensor):
                seen += _layout(value, device)
                learned += [value] if value.requires_grad and value.is_leaf else []
            elif isinstance(value, Optimizer):
                for each in (vars(value), *value.param_groups, value.state, *value.state.values()):
                    values += (*each.get("params", ()), *each.values()) if isinstance(each, dict) else ()
            else:
                values += value._buffers.values()
                if not isinstance(value, BlockMask):  # updates change its other numbers and tensors in place
                    values += *value._parameters.values(), *value._modules.values(), *vars(value).values()
    return seen, learned, kept


def _layout(tensor: torch.Tensor, device: torch.device) -> tuple[Any, ...]:
    """Where a tensor is and how it is read; if it is sparse or on the host, also how often it was written to."""
    try:
        place = tensor.requires_grad, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, ValueError):  # it has no address, or has not yet
        return tensor.requires_grad, tensor._version
    return place if _is_on(tensor, device) else (*place, tensor._version)


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device


def _kind_of(value: Any, device: torch.device) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor) and _is_on(value, device) and not value.requires_grad:
        return value.shape, value.dtype
    if isinstance(value, _PLAIN):
        return type(value), value
    where = f" on {value.device} with requires_grad={value.requires_grad}" if isinstance(value, torch.Tensor) else ""
    raise ValueError(
        f"an argument of the step is a {type(value).__name__}{where}, and a graph reads copies of tensors on {device} "
        "that need no gradient, and plain values; move or detach it, make it in the step, or give it in `watch`"
    )
