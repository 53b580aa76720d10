"""A training step as a CUDA graph: what ``train.py`` does on a CUDA device, for loops of one's own too.

A step of a small network takes some fifty launches, each microseconds of the CPU's time; a captured step is one launch.
It reads and writes tensors at fixed addresses: parameters, optimizer state and the masks' buffers. Dynamic sparse
training changes these in place, so the graph stays valid across its updates, unless they make weights fewer.

**Not run on a GPU yet.** That nothing in the step waits for the device, which capturing forbids, is tested on the CPU.
"""

import collections
import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from g2gnet.messages import reason
from g2gnet.watched import CONSTANTS, Settings, Watched, plain

logger = logging.getLogger("g2gnet")


def captured(step: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """``step`` as a CUDA graph if ``device`` is a CUDA device, itself if not.

    For a training loop of one's own::

        optimizer = torch.optim.Adam(net.parameters(), capturable=True)

        def step(x, labels):
            loss = F.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        step = g2gnet.captured(step, device)
        for x, labels in batches:
            loss = step(x.to(device), labels.to(device))

    Nothing in ``step`` may wait for the device (``loss.item()``, ``tensor[mask]``, ``nonzero``) or draw random numbers
    on the CPU: a graph repeats the launches of one call. If it cannot be captured, it runs directly, and a warning says
    why.

    A graph does not follow changes of Python objects. Compared before each replay are

    - arguments that are no tensors, and the tensors' shapes and dtypes;
    - by which of its variables, attributes and items ``step`` refers to which network or optimizer;
    - of each network: its modules and where each is, their attributes (numbers such as ``T`` and ``training``, which
      objects they are, what is in a list, tuple, set, deque or dictionary of at most 100 items, also in one inside it,
      and the numbers of a small tensor on the host; but none of its masks, which a graph reads), and its parameters and
      buffers: which tensors they are, of which module, their addresses, shapes, strides and dtypes, and which are
      learned;
    - of each optimizer: its settings, its attributes, and which numbers and tensors its state consists of and where
      these are;
    - which hooks these have: they are called at direct steps alone, and what they launch is in the graph;
    - whether gradients are recorded, and autocast.

    If one has changed, the step runs directly, and the fourth such call without a replay between captures a new graph.
    Networks and optimizers are found by the variables of ``step``, by the object whose method it is, by
    ``functools.partial``, and from there by at most three attributes of objects (not of classes) or items of tuples,
    lists, sets, deques and dictionaries (of at most 100 items), also by weak references (it keeps these networks
    alive): ``self.trainer.nets[0]``. What a module of a network refers to, also by variables of its ``forward``, is
    found as what the network refers to. What is first referred to after the capture, by an object that referred to none
    before, is not found. If there is no parameter at all, a warning says so. Changes of anything else that ``step``
    reads are not noticed, such as another number in a variable. A learning rate that changes at every step must be a
    tensor, whose number a graph reads:
    ``Adam(…, lr=torch.tensor(0.001, device=device), capturable=True)``.

    A module that makes a tensor at every call and keeps it as an attribute, as those of ``torch.nn.utils.prune`` do,
    leaves no graph, as does whatever else ``step`` changes of what is compared, unless the loop restores it before the
    next step. Gradients that exist when a step begins are copied before each replay, since it may read them; those that
    it clears at its end are not. If capturing fails, the Python of ``step`` has run once more than its launches.

    Args:
        step: one training step. Tensors among its arguments (also in tuples, lists and dictionaries) are copied to
            where the graph reads them; they are on ``device``, need no gradient and are not changed by ``step``. Other
            arguments are numbers, strings, None and the like.
        device: of the network and of all tensors.

    Returns:
        A function that is called like ``step``. It returns the same tensors at every replay, with new content: read
        them before the next call.

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
        >>> step = captured(step, torch.device("cpu"))  # a CUDA graph on "cuda"
        >>> step(torch.rand(8, 64), torch.zeros(8, dtype=torch.int64)).shape
        torch.Size([])
    """
    device = torch.device(device)
    return CapturedStep(step, device) if device.type == "cuda" else step


class CapturedStep:
    """Calls ``step`` by replaying its CUDA graph; see :func:`captured`.

    A call of another kind (:meth:`_kind_of`) than that of the graph runs directly; after :data:`WARM_UP` of them
    without a replay between, the next one captures a new graph: by then kernels are compiled and the optimizer has its
    state, whatever changed. Direct calls are ordinary ones, so training is the same with and without a graph.

    Args:
        step: launches one training step.
        device: of the network and of all tensors.
        required: whether a step that cannot be captured is an error; if not, it runs directly from then on.

    Raises:
        ValueError: if ``device`` is no CUDA device; at a call, for tensors on another device or that need a gradient.
        TypeError: at a call, for an argument that is neither a tensor nor a plain constant.
        RuntimeError: at a call, if the step cannot be captured but has to be.
    """

    #: direct calls before a graph is captured
    WARM_UP = 3
    #: kinds of direct calls that are remembered
    KINDS = 8

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
        self._watched = Watched(step, self._device)
        # kinds of calls since the last replay, and how many there were of each
        self._direct: collections.deque[tuple[Any, int]] = collections.deque(maxlen=self.KINDS)
        self._told: set[str] = set()  # warnings
        self._graph: torch.cuda.CUDAGraph | None = None
        self._read: list[Any] = []
        self._result: Any = None
        self._gradients: _Gradients | None = None
        self._kept: list[torch.Tensor] = []
        self._captured_kind: _Kind | None = None
        # of the last direct call before a capture: its kind, what the step refers to after it, and the tensors of that
        self._last: tuple[_Kind, Settings, list[torch.Tensor]] | None = None
        self._captures = self._replays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        given, form = tree_flatten((args, kwargs))
        kind, tensors = self._kind_of(given, form) if self._possible else (None, [])
        with torch.cuda.device(self._device):
            if kind is None or not self._stays(kind):
                return self._step(*args, **kwargs)
            if self._graph is None or kind != self._captured_kind:
                calls = self._count(kind)
                if calls < self.WARM_UP:
                    del tensors  # the step may replace them, which should not take more memory
                    return self._directly(args, kwargs, given)
                if calls == self.WARM_UP:
                    return self._directly(args, kwargs, given, kind)
                if not self._capture(given, form, kind, tensors):
                    return self._directly(args, kwargs, given)
            self._direct.clear()
            for here, each in zip(self._read, given, strict=True):
                if isinstance(each, torch.Tensor):
                    here.copy_(each)
            assert self._graph is not None
            assert self._gradients is not None
            self._gradients.before()
            self._graph.replay()
            self._replays += 1
            self._gradients.after()
            return self._result

    def _kind_of(self, given: list[Any], form: Any) -> "tuple[_Kind | None, list[torch.Tensor]]":
        """What a graph cannot change between replays, equal for calls that one graph serves, and tensors of it.

        Gives up at an object of the user's that cannot be looked at.
        """
        mode = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
        )  # fmt: skip
        arguments = [_kind_of_argument(each, self._device) for each in given]
        try:
            settings, tensors = self._watched.settings()
            kind = _Kind(form, arguments, mode, settings)
            if kind != self._captured_kind and self._watched.search():
                settings, tensors = self._watched.settings()
        except Exception as error:  # a user's object may raise anything when it is looked at
            self._give_up_comparing(error)
            return None, []
        return kind._replace(settings=settings), tensors

    def _count(self, kind: "_Kind") -> int:
        """How many calls of this kind there were since the last replay, with this one.

        What optimizers count may differ: :meth:`_stays` says so.
        """
        kind = kind.without("counts")
        for number, (other, calls) in enumerate(self._direct):
            if other == kind:
                self._direct[number] = kind, calls + 1
                return calls + 1
        if len(self._direct) == self.KINDS:
            last, made = self._direct[-1][0], sum(calls for _, calls in self._direct)
            self._warn_once(
                "training steps are not replayed as a CUDA graph, but run directly: of %d calls no four could share "
                "one, the last two differ in %s; " + _REMEDY,
                made + 1, last.difference(kind), self._device,
            )  # fmt: skip
        self._direct.append((kind, 1))
        return 1

    def _uncount(self, kind: "_Kind") -> None:
        """Makes the last call of this kind count for nothing."""
        kind = kind.without("counts")
        counted = [(other, calls - (other == kind)) for other, calls in self._direct]
        self._direct = collections.deque(counted, maxlen=self.KINDS)

    def _directly(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any], before: "_Kind | None" = None
    ) -> Any:
        """A call on the stream on which the step will be captured, as autograd needs it; ``given`` are all arguments.

        In the last one before the capture, which has the kind ``before``, what waits for the device is noticed: PyTorch
        up to 2.11 may end the process where a capture fails. So is what the step changes in Python (:meth:`_stays`).
        """
        waits: list[str] = []
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        versions = [each._version for each in tensors if not each.is_inference()]
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream), _noticing(waits) if before else contextlib.nullcontext():
                result = self._step(*args, **kwargs)
        except BaseException:
            if before:
                self._uncount(before)
            raise
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        if versions != [each._version for each in tensors if not each.is_inference()]:
            self._give_up("it changes an argument in place, of which a graph would change a copy; return it instead")
        elif waits:
            self._give_up(f"it waits for the device in {waits[0]}")
        elif before:
            try:
                self._last = before, *self._watched.settings()
            except Exception as error:  # as before the call
                self._give_up_comparing(error)
        return result

    def _stays(self, kind: "_Kind") -> bool:
        """Gives up if the last call before a capture changed in Python what is so now; returns whether it did not.

        A graph would not repeat this. What a loop restores after each step does no harm.
        """
        if self._last is None:
            return True
        before, after, _ = self._last
        self._last = None
        # most steps replace gradients
        was, became, now = (each.without("gradients") for each in (before.settings, after, kind.settings))
        if now == was or became == was:
            return True
        if now != became:  # by whom?
            self._uncount(before)
            return True
        if was.without("counts") == now.without("counts"):
            self._give_up("its optimizer counts on the CPU, which a graph does not repeat; give it `capturable=True`")
        else:
            self._give_up(f"it changes {was.difference(now)}, which a graph does not repeat")
        return False

    def _capture(self, given: list[Any], form: Any, kind: "_Kind", tensors: list[torch.Tensor]) -> bool:
        """Captures a step with copies of the arguments; nothing is computed. Returns whether it could.

        Keeps ``tensors``, those of networks and optimizers: another one would be taken for one that is gone.
        """
        before = self._captured_kind
        if before is not None and self._captures >= self.KINDS and self._replays < self.KINDS * self._captures:
            self._warn_once(
                "a CUDA graph of the training step was captured %d times and replayed %d times; the last two differ in "
                "%s; " + _REMEDY,
                self._captures, self._replays, before.difference(kind), self._device,
            )  # fmt: skip
        self._forget()  # gives its memory to the next one
        copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
        args, kwargs = tree_unflatten(copies, form)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        gradients = _Gradients(tensors)
        try:
            with warnings.catch_warnings():
                # of a step that launches on another device or stream: replays would do nothing
                warnings.filterwarnings("error", message="The CUDA Graph is empty")
                # other threads, such as one that pins batches, may call what a capture forbids
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    result = self._step(*args, **kwargs)
        except BaseException as error:
            torch.cuda.set_stream(current)  # which PyTorch up to 2.11 does not after an error
            gradients.restore()
            if not isinstance(error, RuntimeError | UserWarning):  # the step's own
                raise
            self._give_up(reason(error), error)
            return False
        gradients.captured()
        self._graph, self._result, self._read, self._captured_kind = graph, result, copies, kind
        self._gradients, self._kept = gradients, tensors
        self._captures += 1
        if not self._watched:
            self._warn_once(
                "no parameter and no optimizer was found to which the training step refers, so its CUDA graph does not "
                "notice their changes; let it refer to them by variables, attributes or functools.partial"
            )
        return True

    def _forget(self) -> None:
        """Lets go of the graph, and of all that belongs to its memory."""
        self._graph = self._result = self._captured_kind = self._gradients = None
        self._read, self._kept = [], []

    def _warn_once(self, message: str, *values: object) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message, *values)

    def _give_up_comparing(self, error: Exception) -> None:
        self._give_up(f"what it refers to cannot be compared ({reason(error)})", error)

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        if self._required:
            raise RuntimeError(f"the training step cannot be captured in a CUDA graph: {why}") from error
        logger.warning("training steps are not replayed as a CUDA graph, but run directly: %s", why)
        self._possible = False
        self._forget()
        self._direct.clear()
        self._last = None
        self._watched = Watched(self._step, self._device)


#: of calls that differ; the device follows
_REMEDY = (
    "give numbers that change as tensors on the device, a learning rate as lr=torch.tensor(0.001, device='%s'), and "
    "change tensors in place"
)


class _Kind(NamedTuple):
    """Of a call: the form of its arguments and these, modes of PyTorch, and what the step refers to."""

    form: Any
    arguments: list[Any]
    mode: tuple[Any, ...]
    settings: Settings

    def without(self, *names: str) -> "_Kind":
        """This kind, as if equal to others in these settings."""
        return self._replace(settings=self.settings.without(*names))

    def difference(self, other: "_Kind") -> str:
        """In what two kinds differ, in words."""
        if self[:2] != other[:2]:
            return "an argument"
        if self.mode != other.mode:
            return "a mode of PyTorch"
        return self.settings.difference(other.settings)


def _kind_of_argument(given: Any, device: torch.device) -> tuple[Any, ...]:
    if isinstance(given, torch.Tensor):
        _check_device(given, device)
        if given.requires_grad:
            raise ValueError(
                f"an argument of the step, a tensor of shape {tuple(given.shape)}, needs a gradient, which its copy in "
                "the CUDA graph would get; detach it, or make it inside the step"
            )
        return given.shape, given.dtype
    if not isinstance(given, CONSTANTS):
        raise TypeError(
            f"an argument of the step, of type {type(given).__name__}, would be a constant of the CUDA graph, and its "
            "changes would not be noticed; give tensors, numbers, strings, None, or tuples, lists and dictionaries of "
            "these. To networks and optimizers let the step refer by variables"
        )
    return plain(given)


def _check_device(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"the step is captured on {device}, but a tensor is on {tensor.device}; move it there")


class _Gradients:
    """The gradients of tensors, which Python may take away or replace between replays."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = list({id(each): each for each in tensors if each.requires_grad and each.is_leaf}.values())
        self._read = [each.grad for each in self._tensors]

    def captured(self) -> None:
        """What the graph writes is known; nothing is computed yet, so the present ones stay."""
        self._written = [each.grad for each in self._tensors]
        self.restore()

    @torch.no_grad()
    def before(self) -> None:
        """Gives the present ones to a graph, which may add to those that it was captured with, or read them first."""
        present = [each.grad for each in self._tensors]
        pairs = [
            (read, now)
            for read, now in zip(self._read, present, strict=True)
            if read is not None and now is not None and now is not read
        ]
        if pairs:
            places = set(map(id, self._read))
            torch._foreach_copy_(
                [read for read, _ in pairs],
                [now.clone() if id(now) in places else now.detach() for _, now in pairs],
            )

    def after(self) -> None:
        """Shows what the graph wrote."""
        for written, each in zip(self._written, self._tensors, strict=True):
            if each.grad is not written:
                each.grad = written

    def restore(self) -> None:
        """Takes away what a capture left."""
        for read, each in zip(self._read, self._tensors, strict=True):
            each.grad = read


@contextlib.contextmanager
def _noticing(waits: list[str]) -> Iterator[None]:
    """Adds to ``waits`` where the CPU waits for the device while entered."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for each in seen:
        text = str(each.message)
        if "synchronizing CUDA operation" in text:
            waits.append(f"{each.filename}, line {each.lineno}")
        elif not text.startswith("Synchronization debug mode is a prototype"):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
