"""A training step as a CUDA graph: what ``train.py`` does on a CUDA device, for loops of one's own too.

A step of a small network takes some fifty launches, each microseconds of the CPU's time; a captured step is one launch.
It reads and writes tensors at fixed addresses: parameters, optimizer state and the masks' indices. Dynamic sparse
training changes these in place, so the graph stays valid across its updates, unless they make weights fewer.

**Not run on a GPU yet.** That nothing in the step waits for the device, which capturing forbids, is tested on the CPU.
"""

import collections
import contextlib
import enum
import functools
import logging
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from g2g_kernels import BlockMask
from g2gnet.messages import reason

logger = logging.getLogger("g2gnet")

Watch = Sequence[nn.Module | Optimizer]
#: types of what is compared by value
_CONSTANTS = (numbers.Number, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)


def captured(step: Callable[..., Any], device: torch.device | str, watch: Watch) -> "CapturedStep":
    """``step`` as a CUDA graph if ``device`` is a CUDA device; on others it is called as it is.

    **The contract.** A graph repeats the launches of one call. Before each replay, the arguments are compared, and of
    what is in ``watch``: addresses, shapes and dtypes of parameters, buffers and optimizer state, which parameters are
    learned, the numbers of parameter groups, ``training`` and plain attributes (``T``, ``alpha``). After a change the
    step runs directly, and the fourth such call captures a new graph. When anything else changes that the step reads,
    such as the mask of a loaded checkpoint, a hook or a variable, call ``step.recapture()``.

    A step that cannot be captured runs directly, and a warning says why: it must not wait for the device
    (``loss.item()``, ``tensor[mask]``, ``nonzero``), nor draw random numbers on the CPU. What it keeps for the next
    call is in tensors that it writes in place.

    Args:
        step: one training step. Tensors among its arguments (also in tuples, lists and dictionaries) are copied to
            where the graph reads them; they are on ``device``, need no gradient and are not changed by ``step``. Other
            arguments are numbers, strings, None and the like.
        device: of the network and of all tensors.
        watch: the modules and optimizers that ``step`` uses.

    Returns:
        A function that is called like ``step``, with a method ``recapture()``. It returns the same tensors at every
        replay, with new content: read them before the next call.

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
    """What :func:`captured` returns; if ``required``, a step that cannot be captured is an error.

    Raises:
        ValueError: if ``required``, for a device other than CUDA; at a call, for tensors elsewhere or with gradients.
        TypeError: for anything else in ``watch``; at a call, for an argument that is neither a tensor nor plain.
        RuntimeError: at a call, if ``required`` and the step cannot be captured.
    """

    #: direct calls of one kind before a graph is captured: kernels are compiled then, and the optimizer has its state
    WARM_UP = 3
    #: direct calls after which there is a warning, if fewer were replayed
    PATIENCE = 32

    def __init__(self, step: Callable[..., Any], device: torch.device, watch: Watch, required: bool = False) -> None:
        for each in watch if isinstance(watch, tuple | list) else [watch]:
            if each is watch or not isinstance(each, nn.Module | Optimizer):
                raise TypeError(
                    f"watch={type(each).__name__} is no tuple of modules and optimizers; give all that the step uses, "
                    "as in watch=(net, optimizer)"
                )
        self._possible = device.type == "cuda"
        if required and not self._possible:
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device}; leave `cuda_graph` out")
        if self._possible:
            # "cuda" is the device that is current now
            device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
            with torch.cuda.device(device):
                self._stream = torch.cuda.Stream()
        self._step, self._device, self._watch, self._required = step, device, watch, required
        #: of direct calls since the last replay, and since a change of what is watched
        self._kinds: collections.deque[_Kind] = collections.deque(maxlen=self.PATIENCE)
        self._graph: _Graph | None = None
        self._direct = self._replays = 0
        self._change = ""

    def recapture(self) -> None:
        """Forgets the graph, since something that ``step`` reads has changed; the fourth call captures a new one."""
        self._graph = None
        self._kinds.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        if self._device.type != "cuda":
            return self._step(*args, **kwargs)
        with torch.cuda.device(self._device):
            kind = self._kind_of(args, kwargs) if self._possible else None
            if kind is None:
                return self._step(*args, **kwargs)
            if self._graph is None or kind != self._graph.kind:
                last = self._kinds[-1] if self._kinds else self._graph.kind if self._graph else kind
                if kind != last:
                    self._change = last.difference(kind)
                if kind.watched != last.watched:  # by the step itself, if that happens at every call
                    self._kinds.clear()
                calls = self._kinds.count(kind)
                if calls < self.WARM_UP or not self._capture(args, kwargs, kind):
                    return self._directly(args, kwargs, kind, calls == self.WARM_UP - 1)
            assert self._graph is not None
            self._kinds.clear()
            self._replays += 1
            return self._graph.replay(args, kwargs)

    def _kind_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Kind | None":
        given, form = tree_flatten((args, kwargs))
        arguments = form, [_kind_of_argument(each, self._device) for each in given]
        try:
            return _look(self._watch, self._device, arguments)[0]
        except Exception as error:  # other people's objects may raise anything
            self._give_up(f"what it watches cannot be compared ({reason(error)})", error)
            return None

    def _directly(self, args: tuple[Any, ...], kwargs: dict[str, Any], kind: "_Kind", last: bool) -> Any:
        """A call on the stream on which the step will be captured, as autograd needs it.

        In the ``last`` one before a capture, what waits for the device is noticed: PyTorch up to 2.11 may end the
        process where a capture fails.
        """
        waits: list[str] = []
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream), _noticing(waits) if last else contextlib.nullcontext():
                result = self._step(*args, **kwargs)
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._kinds.append(kind)
        self._direct += 1
        if waits:
            self._give_up(f"it waits for the device in {waits[0]}")
        if self._direct == self.PATIENCE > self._replays and self._possible:
            logger.warning(
                "of %d training steps %d were replayed as a CUDA graph, since between them %s changes; give numbers "
                "that change as tensors on the device, a learning rate as lr=torch.tensor(0.001, device='%s'), change "
                "tensors in place, and let the optimizer count on the device (capturable=True)",
                self._direct + self._replays, self._replays, self._change, self._device,
            )  # fmt: skip
        return result

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any], kind: "_Kind") -> bool:
        """Captures a step with copies of the arguments; nothing is computed. Returns whether it could."""
        self.recapture()  # gives the memory of the last graph to this one
        _, tensors = _look(self._watch, self._device, None)
        learned = [each for each in tensors if each.requires_grad and each.is_leaf]
        before = [each.grad for each in learned]
        given, form = tree_flatten((args, kwargs))
        inputs = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
        args, kwargs = tree_unflatten(inputs, form)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with warnings.catch_warnings():
                # of a step that launches on another device or stream: replays would do nothing
                warnings.filterwarnings("error", message="The CUDA Graph is empty")
                # other threads, such as one that pins batches, may call what a capture forbids
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    result = self._step(*args, **kwargs)
        except (RuntimeError, UserWarning) as error:
            self._give_up(reason(error), error)
            return False
        finally:
            torch.cuda.set_stream(stream)  # which PyTorch up to 2.11 does not after an error
            gradients = [(each, read, each.grad) for each, read in zip(learned, before, strict=True)]
            for each, read, _ in gradients:
                each.grad = read
        if any(isinstance(each, torch.Tensor) and not each.is_inference() and each._version for each in inputs):
            self._give_up("it changes an argument in place, of which a graph would change a copy; return it instead")
            return False
        self._graph = _Graph(graph, kind, inputs, result, gradients, tensors)
        return True

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        if self._required:
            raise RuntimeError(f"the training step cannot be captured in a CUDA graph: {why}") from error
        logger.warning("training steps are not replayed as a CUDA graph, but run directly: %s", why)
        self._possible = False
        self.recapture()


class _Kind(NamedTuple):
    """Of a call, what a graph of it cannot change."""

    arguments: Any
    mode: tuple[Any, ...]
    gradients: list[bool]
    modules: list[nn.Module | None]
    constants: list[tuple[Any, ...]]
    places: list[int]
    layouts: list[Any]

    @property
    def watched(self) -> tuple[Any, ...]:
        return self[3:]

    def difference(self, other: "_Kind") -> str:
        """What differs, in words."""
        pairs = zip(self.constants, other.constants, strict=False)
        number = next((repr(one[0]) for one, another in pairs if one != another), "the number of attributes")
        where = "which tensors there are, where, or what is in those on the host"
        names = "an argument", "a mode of PyTorch", "which gradients exist", "which modules exist", number, where, where
        return next(name for name, one, another in zip(names, self, other, strict=True) if one != another)


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    kind: _Kind
    inputs: list[Any]
    result: Any
    gradients: list[tuple[torch.Tensor, Any, Any]]  # of each tensor: what is read and written
    tensors: list[torch.Tensor]  # kept, since another one would be taken for one that is gone

    @torch.no_grad()
    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for here, each in zip(self.inputs, tree_flatten((args, kwargs))[0], strict=True):
            if isinstance(each, torch.Tensor):
                here.copy_(each)
        moved = [(read, each.grad) for each, read, _ in self.gradients if each.grad is not read]
        if moved:  # made anew since; the step may read them, or add to them
            read, now = zip(*moved, strict=True)
            torch._foreach_copy_(read, now)
        self.graph.replay()
        for each, _, written in self.gradients:
            if each.grad is not written:
                each.grad = written
        return self.result


def _look(watch: Watch, device: torch.device, arguments: Any) -> tuple[_Kind, list[torch.Tensor]]:
    """The kind of a call with these arguments, and the tensors of what is watched."""
    modules: list[nn.Module | None] = [each for each in watch if isinstance(each, nn.Module)]
    seen: set[nn.Module | None] = {None}
    constants: list[tuple[Any, ...]] = []
    found: list[torch.Tensor | None] = []
    for module in modules:
        if module is None or module in seen:
            continue
        seen.add(module)
        found += (*module._parameters.values(), *module._buffers.values())
        if not isinstance(module, BlockMask):  # updates change its other numbers and tensors in place
            _sort(vars(module), constants, found)
            modules += module._modules.values()
    for optimizer in watch:
        if isinstance(optimizer, Optimizer):
            # schedulers of older versions count in it
            _sort({name: each for name, each in vars(optimizer).items() if name != "_step_count"}, constants, found)
            for group in optimizer.param_groups:
                found += group["params"]
                _sort(group, constants, found)
            for state in (optimizer.state, *optimizer.state.values()):
                _sort(state if isinstance(state, dict) else {}, constants, found)
    places = list(map(id, found))
    tensors = [each for each in dict(zip(places, found, strict=True)).values() if each is not None]
    mode = (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
    )  # fmt: skip
    gradients = [each.requires_grad and each.is_leaf and each.grad is not None for each in tensors]
    layouts = [_layout(each, device) for each in tensors]
    return _Kind(arguments, mode, gradients, modules, constants, places, layouts), tensors


def _sort(values: dict[Any, Any], constants: list[tuple[Any, ...]], tensors: list[torch.Tensor | None]) -> None:
    """Adds the constants and tensors of a dictionary, also in its tuples, and nothing else."""
    for name, value in values.items():
        kind: Any = type(value)
        role = _role(kind)
        if role is _CONSTANTS:
            constants.append((name, kind, value))
        elif role is torch.Tensor:
            tensors.append(value)
        elif role is tuple:
            _sort({(name, place): each for place, each in enumerate(value)}, constants, tensors)


@functools.lru_cache(maxsize=1000)
def _role(kind: type) -> Any:
    return next((role for role in (_CONSTANTS, torch.Tensor, tuple) if issubclass(kind, role)), None)


def _layout(tensor: torch.Tensor, device: torch.device) -> tuple[Any, ...]:
    """Where a tensor is and how it is read; if it is sparse or on the host, also how often it was written to."""
    try:
        place = tensor.requires_grad, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    except (RuntimeError, ValueError):  # it has no address, or has not yet
        return tensor.requires_grad, tensor._version
    return place if _is_on(tensor, device) else (*place, tensor._version)


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device


def _kind_of_argument(given: Any, device: torch.device) -> tuple[Any, ...]:
    if isinstance(given, torch.Tensor):
        if not _is_on(given, device) or given.requires_grad:
            raise ValueError(
                f"arguments of the step are on {device} and need no gradient, since a graph reads copies, but a tensor "
                f"of shape {tuple(given.shape)} is on {given.device}, with requires_grad={given.requires_grad}; move "
                "or detach it, or make it inside the step"
            )
        return given.shape, given.dtype
    if not isinstance(given, _CONSTANTS):
        raise TypeError(
            f"an argument of the step, of type {type(given).__name__}, would be a constant of the CUDA graph; give "
            "tensors, numbers, strings, None, or tuples, lists and dictionaries of these, and what the step uses of "
            "networks and optimizers as `watch`"
        )
    return type(given), given if given == given else "nan"


@contextlib.contextmanager
def _noticing(waits: list[str]) -> Iterator[None]:
    """Adds to ``waits`` where the CPU waits for the device; other warnings were given in the calls before."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits += [f"{each.filename}, line {each.lineno}" for each in seen if "synchronizing CUDA" in str(each.message)]
