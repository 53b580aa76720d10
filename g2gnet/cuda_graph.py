"""A training step as a CUDA graph: what ``train.py`` does on a CUDA device, for loops of one's own too.

A step of a small network takes some fifty launches, each microseconds of the CPU's time; a captured step is one launch.
It reads and writes tensors at fixed addresses: parameters, optimizer state and the masks' buffers. Dynamic sparse
training changes these in place, so the graph stays valid across its updates, unless they make weights fewer.

**Not run on a GPU yet.** That nothing in the step waits for the device, which capturing forbids, is tested on the CPU.
"""

import collections
import contextlib
import enum
import functools
import itertools
import logging
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from g2g_kernels.sides import Indices
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

    A graph does not follow changes of Python objects. Compared before each replay are

    - arguments that are no tensors, and the tensors' shapes and dtypes;
    - of each network to which ``step`` refers: its modules, their attributes (numbers such as ``T`` and ``training``,
      which objects they are, and what is in a list, tuple, set or dictionary), and its parameters and buffers: which
      tensors they are, of which module, their addresses, shapes, strides and dtypes, and which are learned;
    - of each optimizer: which one it is, its settings, and which tensors its state consists of and where they are;
    - which hooks these have: they are called at direct steps alone, and what they launch is in the graph;
    - whether gradients are recorded, and autocast.

    If one has changed, the step runs directly, and the fourth such call captures a new graph. Networks and optimizers
    are found by the variables of ``step``, by the object whose method it is, by ``functools.partial``, and from there
    by at most three attributes of objects or items of tuples, lists, sets and dictionaries (of at most 100 items):
    ``self.trainer.nets[0]``. What is first referred to after the capture, from an object that referred to none before,
    is not found. If there is no parameter at all, a warning says so. Changes of anything else that ``step`` reads are
    not noticed, such as another number in a variable. A learning rate that changes at every step must be a tensor,
    whose number a graph reads: ``Adam(…, lr=torch.tensor(0.001, device=device), capturable=True)``.

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
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
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
        self._watched = _Watched(step, self._device)
        # kinds of calls since the last replay, and how many there were of each
        self._direct: collections.deque[tuple[Any, int]] = collections.deque(maxlen=self.KINDS)
        self._told: set[str] = set()  # warnings
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[_Gradient] = []
        self._captured_kind: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step."""
        if not self._possible:
            with torch.cuda.device(self._device):
                return self._step(*args, **kwargs)
        given, form = tree_flatten((args, kwargs))
        kind = self._kind_of(given, form)
        if kind != self._captured_kind and self._watched.search():
            kind = self._kind_of(given, form)
        with torch.cuda.device(self._device):
            if self._graph is None or kind != self._captured_kind:
                calls = self._count(kind)
                if calls <= self.WARM_UP:
                    return self._directly(args, kwargs, given, last=calls == self.WARM_UP)
                if not self._capture(given, form, kind):
                    return self._directly(args, kwargs, given)
            self._direct.clear()
            for here, each in zip(self._read, given, strict=True):
                if isinstance(each, torch.Tensor):
                    here.copy_(each)
            assert self._graph is not None
            for gradient in self._gradients:
                gradient.before()
            self._graph.replay()
            for gradient in self._gradients:
                gradient.after()
            return self._result

    def _kind_of(self, given: list[Any], form: Any) -> tuple[Any, ...]:
        """What a graph cannot change between replays; equal for calls that one graph serves."""
        mode = (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
        )  # fmt: skip
        return form, [_kind_of_argument(each, self._device) for each in given], mode, self._watched.settings()

    def _count(self, kind: Any) -> int:
        """How many calls of this kind there were since the last replay, with this one."""
        for number, (other, calls) in enumerate(self._direct):
            if other == kind:
                self._direct[number] = kind, calls + 1
                return calls + 1
        if len(self._direct) == self.KINDS and all(calls == 1 for _, calls in self._direct):
            self._warn_once(
                "training steps are not replayed as a CUDA graph, but run directly: %d calls differ in an argument, a "
                "setting or a state that a graph cannot change; give numbers that change as tensors, a learning rate "
                "as lr=torch.tensor(0.001, device='%s'), and change tensors in place",
                self.KINDS + 1, self._device,
            )  # fmt: skip
        self._direct.append((kind, 1))
        return 1

    def _directly(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Any], last: bool = False) -> Any:
        """A call on the stream on which the step will be captured, as autograd needs it; ``given`` are all arguments.

        In the last one before the capture, what waits for the device is noticed: PyTorch up to 2.11 may end the process
        where a capture fails. So is what an optimizer counts in Python, which would stand still.
        """
        waits: list[str] = []
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        versions = [each._version for each in tensors if not each.is_inference()]
        numbers = self._watched.numbers() if last else []
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream), _noticing(waits) if last else contextlib.nullcontext():
                result = self._step(*args, **kwargs)
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        if versions != [each._version for each in tensors if not each.is_inference()]:
            self._give_up("it changes an argument in place, of which a graph would change a copy; return it instead")
        elif last and numbers != self._watched.numbers():
            self._give_up("its optimizer counts on the CPU, which a graph does not repeat; give it `capturable=True`")
        elif waits:
            self._give_up(f"it waits for the device in {waits[0]}")
        return result

    def _capture(self, given: list[Any], form: Any, kind: Any) -> bool:
        """Captures a step with copies of these tensors; nothing is computed. Returns whether it could."""
        self._graph = self._result = self._captured_kind = None  # gives its memory to the next one
        copies = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
        args, kwargs = tree_unflatten(copies, form)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        gradients = [_Gradient(parameter) for parameter in self._watched.parameters()]
        try:
            with warnings.catch_warnings():
                # of a step that launches on another device or stream: replays would do nothing
                warnings.filterwarnings("error", message="The CUDA Graph is empty")
                # other threads, such as one that pins batches, may call what a capture forbids
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    result = self._step(*args, **kwargs)
        except (RuntimeError, UserWarning) as error:
            torch.cuda.set_stream(current)  # which PyTorch up to 2.11 does not after an error
            for gradient in gradients:
                gradient.restore()
            self._give_up(reason(error), error)
            return False
        for gradient in gradients:
            gradient.captured()
        self._graph, self._result, self._read, self._captured_kind = graph, result, copies, kind
        self._gradients = gradients
        if not self._watched:
            self._warn_once(
                "no parameter and no optimizer was found to which the training step refers, so its CUDA graph does not "
                "notice their changes; let it refer to them by variables, attributes or functools.partial"
            )
        return True

    def _warn_once(self, message: str, *values: object) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message, *values)

    def _give_up(self, why: str, error: BaseException | None = None) -> None:
        if self._required:
            raise RuntimeError(f"the training step cannot be captured in a CUDA graph: {why}") from error
        logger.warning("training steps are not replayed as a CUDA graph, but run directly: %s", why)
        self._possible = False


def _kind_of_argument(given: Any, device: torch.device) -> tuple[Any, ...]:
    if isinstance(given, torch.Tensor):
        _check_device(given, device)
        if given.requires_grad:
            raise ValueError(
                f"an argument of the step, a tensor of shape {tuple(given.shape)}, needs a gradient, which its copy in "
                "the CUDA graph would get; detach it, or make it inside the step"
            )
        return given.shape, given.dtype
    if not isinstance(given, _CONSTANTS):
        raise TypeError(
            f"an argument of the step, of type {type(given).__name__}, would be a constant of the CUDA graph, and its "
            "changes would not be noticed; give tensors, numbers, strings, None, or tuples, lists and dictionaries of "
            "these. To networks and optimizers let the step refer by variables"
        )
    return type(given), given  # 1, 1.0 and True are equal


_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def _check_device(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"the step is captured on {device}, but a tensor is on {tensor.device}; move it there")


class _Identity:
    """Equal to that of the same object only."""

    def __init__(self, of: object) -> None:
        self._of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._of is other._of


class _Gradient:
    """The gradient of a parameter, which Python may take away or replace between replays."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter, self._read = parameter, parameter.grad

    def captured(self) -> None:
        """What the graph writes is known."""
        self._written = self._parameter.grad

    def before(self) -> None:
        """Gives a graph that adds to a gradient the present one."""
        present = self._parameter.grad
        if self._read is self._written is not present and present is not None and self._read is not None:
            self._read.copy_(present)

    def after(self) -> None:
        """Shows what the graph wrote."""
        if self._parameter.grad is not self._written:
            self._parameter.grad = self._written

    def restore(self) -> None:
        """Takes away what a capture left that failed."""
        self._parameter.grad = self._read


class _Watched:
    """The networks and optimizers to which a step refers (:func:`_search`)."""

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self._step, self._device = step, device
        self._found: list[Any] = []
        self._holders: dict[int, Any] = {}
        self._modules: list[nn.Module] = []
        self._optimizers: list[torch.optim.Optimizer] = []

    def __bool__(self) -> bool:
        return bool(self.parameters())

    def search(self) -> bool:
        """Looks for them everywhere; returns whether others were found than before."""
        before = self._found
        self._found, self._holders = _search(self._step)
        return list(map(id, before)) != list(map(id, self._found))

    def parameters(self) -> list[torch.Tensor]:
        """All that may be learned, each once."""
        learned = [
            each for optimizer in self._optimizers for group in optimizer.param_groups for each in group["params"]
        ]
        learned += [each for module in self._modules for each in module._parameters.values() if each is not None]
        return list({id(each): each for each in learned}.values())

    def settings(self) -> tuple[Any, ...]:
        """What a graph cannot change: which they are, where their tensors are, and their other settings."""
        # variables may have been assigned anew; looking only where some were found is quick
        self._found, _ = _search(self._step, self._holders)
        self._modules = _with_children([each for each in self._found if isinstance(each, nn.Module)])
        self._optimizers = [each for each in self._found if isinstance(each, torch.optim.Optimizer)]
        parameters = self.parameters()
        buffers = [each for module in self._modules for each in module._buffers.values() if each is not None]
        tensors = [each for each in parameters + buffers if not is_lazy(each)]
        # masks count their changes, which a graph reads from their tensors
        attributes = [self._attributes(module, tensors) for module in self._modules if not isinstance(module, Indices)]
        # by which module; which they are follows from their places
        roles = [list(map(id, module._parameters.values())) for module in self._modules]
        learned = [(each.requires_grad, each.grad is None, _hooks(each, _OF_TENSORS)) for each in parameters]
        groups = [self._of_group(group) for optimizer in self._optimizers for group in optimizer.param_groups]
        hooks = [_hooks(optimizer, _OF_OPTIMIZERS) for optimizer in self._optimizers]
        layouts = [(each.shape, each.stride(), each.dtype) for each in tensors]
        for optimizer in self._optimizers:
            _add_tensors(optimizer.state, tensors)
        return self._modules, self._optimizers, attributes, roles, learned, groups, hooks, layouts, _places(tensors)

    def _of_group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The settings of a group of an optimizer; of tensors that a graph reads, only which they are."""

        def setting(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return _Identity(value) if _is_on(value, self._device) else value.tolist()

        return {name: len(value) if name == "params" else setting(value) for name, value in group.items()}

    def _attributes(self, module: nn.Module, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """The attributes of a module as constants of a graph; adds those on the device to ``tensors``.

        Of objects it is which ones they are, and what is in a list, tuple or dictionary, as one of hooks.
        """

        def constant(value: Any) -> Any:
            if type(value) in _PLAIN or isinstance(value, np.generic):
                return value
            if not isinstance(value, torch.Tensor):
                return _Identity(value)
            if value.ndim == 0 and not _is_on(value, self._device):
                return value.item()
            tensors.append(value)
            return None

        found = {}
        for name, value in vars(module).items():
            if not isinstance(value, _COLLECTIONS):
                found[name] = constant(value)
            elif value and name not in _WATCHED:
                items = [*value, *value.values()] if isinstance(value, dict) else value
                found[name] = [type(value), *map(constant, items)]
        return found

    def numbers(self) -> list[Any]:
        """What optimizers keep in their state for Python to read and change, as a step that they count."""
        leaves = tree_leaves([list(optimizer.state.values()) for optimizer in self._optimizers])
        on_host = [each for each in leaves if not isinstance(each, torch.Tensor) or not _is_on(each, self._device)]
        numbers = [each.item() if isinstance(each, torch.Tensor) and each.ndim == 0 else each for each in on_host]
        return [each for each in numbers if isinstance(each, _CONSTANTS)]


_CONTAINERS = tuple, list, dict
_COLLECTIONS = *_CONTAINERS, set, frozenset


def _add_tensors(state: Any, tensors: list[torch.Tensor]) -> None:
    """Adds those of an optimizer's state to ``tensors``; quicker than ``tree_leaves``."""
    for each in state.values() if isinstance(state, dict) else state:
        if isinstance(each, torch.Tensor):
            tensors.append(each)
        elif isinstance(each, _CONTAINERS):
            _add_tensors(each, tensors)


_PLAIN = frozenset(_CONSTANTS) - {enum.Enum}
#: the attributes of a module that are compared by themselves
_WATCHED = frozenset(("_parameters", "_buffers", "_modules"))
#: attributes with the hooks of a tensor and of an optimizer
_OF_TENSORS = "_backward_hooks", "_post_accumulate_grad_hooks"
_OF_OPTIMIZERS = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"


def _hooks(of: Any, names: tuple[str, ...]) -> list[list[int]]:
    """Numbers of the hooks, which are given to no other."""
    return [list(getattr(of, name, None) or ()) for name in names]


def _with_children(modules: list[nn.Module]) -> list[nn.Module]:
    """These and all below, each once; quicker than ``Module.modules``."""
    each_once = dict.fromkeys(modules)
    queue = list(each_once)
    for module in queue:
        for child in module._modules.values():
            if child is not None and child not in each_once:
                each_once[child] = None
                queue.append(child)
    return queue


def _places(tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """Which tensors these are, and where: a new one may have the address and the id of one that is gone.

    A tensor has one weak reference, whose id is no other's while these are kept. Ids come first: where they are equal,
    so are the references, and ``==`` of tensors is not called.
    """
    references = list(map(weakref.ref, tensors))
    return list(map(id, references)), references, list(map(torch.Tensor.data_ptr, tensors))


#: how many variables, attributes and items after one another lead from a step to a network
_DEPTH = 4
#: items of a tuple, list or dictionary that may have networks in it
_MANY = 100
_SOUGHT = nn.Module, torch.optim.Optimizer


def _search(step: Any, within: dict[int, Any] | None = None) -> tuple[list[Any], dict[int, Any]]:
    """The networks and optimizers to which a step refers, and by which objects; ``within``: by those only."""
    found = [step] if isinstance(step, _SOUGHT) else []
    holder: dict[int, Any] = {id(step): None}
    level = [step]
    for _ in range(_DEPTH):
        below = []
        for value in level:
            for each in _referred(value) if within is None or id(value) in within else ():
                if id(each) not in holder:
                    holder[id(each)] = value
                    below.append(each)
                    if isinstance(each, _SOUGHT):
                        found.append(each)
        level = below
    holders: dict[int, Any] = {}
    for each in found:
        while (each := holder[id(each)]) is not None:
            holders[id(each)] = each
    return found, holders


def _referred(value: Any) -> Collection[Any]:
    """The objects to which one refers by a variable, an attribute or an item."""
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not assigned yet
                cells.append(cell.cell_contents)
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *map(value.__globals__.get, _names(value.__code__)), *vars(value).values()]
    if isinstance(value, types.MethodType):
        owner = value.__self__
        return [*(vars(owner).values() if isinstance(owner, type) else [owner]), value.__func__]
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, _COLLECTIONS):
        items = list(value.values()) if isinstance(value, dict) else value
        return items if len(items) <= _MANY else ()
    if isinstance(value, _OPAQUE):
        return ()
    attributes = _slots(value) | getattr(value, "__dict__", {})
    if isinstance(value, _SOUGHT):
        return [each for name, each in attributes.items() if name not in ("_modules", "state", "param_groups")]
    return list(attributes.values())


def _slots(value: Any) -> dict[str, Any]:
    """The attributes of an object that its classes name in ``__slots__``."""
    slots = [vars(each).get("__slots__", ()) for each in type(value).__mro__]
    names = itertools.chain.from_iterable([each] if isinstance(each, str) else each for each in slots)
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names in a function, with those in functions and generators inside it."""
    names = code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            names += _names(each)
    return names


_OPAQUE = types.ModuleType, type, torch.Tensor


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device


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
