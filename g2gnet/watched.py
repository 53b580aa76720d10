"""What a training step refers to, and what of that a CUDA graph of it cannot change."""

import collections
import contextlib
import enum
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from g2g_kernels import BlockMask
from g2g_kernels.sides import Indices
from g2g_kernels.wiring import version

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
_PLAIN = frozenset(CONSTANTS) - {enum.Enum}
_COLLECTIONS = tuple, list, dict, collections.OrderedDict, set, frozenset, collections.deque
#: items of a collection that are looked at, and how many collections inside one another
_MANY, _NESTED = 100, 2
_NUMBERS = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.complex64, torch.complex128,
)  # fmt: skip
#: the attributes of a module that are compared by themselves
_WATCHED = frozenset(("_parameters", "_buffers", "_modules"))
#: attributes with the hooks of a tensor and of an optimizer
_OF_TENSORS = "_backward_hooks", "_post_accumulate_grad_hooks"
_OF_OPTIMIZERS = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
#: attributes of an optimizer that are compared by themselves, and those that schedulers count
_OF_PYTORCH = frozenset(("state", "param_groups", "defaults", "_step_count", "_opt_called", *_OF_OPTIMIZERS))


class Settings(NamedTuple):
    """What a graph cannot change; equal where one graph does.

    Attributes:
        which: the networks' modules and the optimizers.
        ways: by which variables, attributes and items the step refers to them.
        attributes: of each module, by name, and the numbers of its small parameters and buffers on the host.
        groups: the settings of each group of each optimizer, by name.
        counts: what optimizers keep for Python to read and change, as a step that they count.
        members: which parameters, buffers and modules each module has, by which names.
        learned: of each tensor, whether it is learned, and its hooks.
        gradients: of each tensor, whether it has one.
        hooks: of the optimizers.
        layouts: shapes, strides and dtypes of all tensors.
        places: which they are and where.
        odd: tensors without an address, as sparse ones, and how often each was written to.
        arrivals: of each mask, whether another was written into its buffer, which it has not become yet.
    """

    which: Any
    ways: Any
    attributes: list[tuple[str, dict[str, Any]]]
    groups: list[dict[str, Any]]
    counts: Any
    members: Any
    learned: Any
    gradients: Any
    hooks: Any
    layouts: Any
    places: Any
    odd: Any
    arrivals: Any

    def without(self, *names: str) -> "Settings":
        """These settings, as if equal to others in ``names``."""
        unknown: dict[str, Any] = dict.fromkeys(names)
        return self._replace(**unknown)

    def difference(self, other: "Settings") -> str:
        """What differs, in words: the first that is found."""
        if self.which == other.which:
            for (module, mine), (kind, others) in zip(self.attributes, other.attributes, strict=True):
                if module != kind:
                    return f"the class of a module, {module} or {kind}"
                for name in {**mine, **others}:
                    if mine.get(name) != others.get(name):
                        return f"the attribute {name!r} of {module}"
            if len(self.groups) != len(other.groups):
                return "the number of an optimizer's groups"
            for mine, others in zip(self.groups, other.groups, strict=True):
                for name in {**mine, **others}:
                    if mine.get(name) != others.get(name):
                        return f"the setting {name!r} of an optimizer"
        names = {
            "which": "which networks and optimizers there are",
            "ways": "which variable or attribute has which network or optimizer",
            "counts": "what an optimizer keeps on the CPU",
            "members": "which parameters, buffers and modules a module has",
            "learned": "which tensors are learned, or have hooks",
            "gradients": "which tensors have a gradient",
            "hooks": "the hooks of an optimizer",
            "arrivals": "a mask that was written into a network's buffers",
        }
        found = next(name for name in self._fields if getattr(self, name) != getattr(other, name))
        return names.get(found, "which tensors its networks and optimizers have, or where these are")


class Watched:
    """The networks and optimizers to which a step refers (:func:`_search`)."""

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self._step, self._device = step, device
        self._found: list[Any] = []
        self._holders: dict[int, Any] = {}
        self._modules: list[nn.Module] = []
        self._optimizers: list[torch.optim.Optimizer] = []

    def __bool__(self) -> bool:
        return bool(self._parameters())

    def search(self) -> bool:
        """Looks for them everywhere; returns whether others were found than before, or by other objects."""
        before, by = self._found, self._holders
        self._found, self._holders, _ = _search(self._step)
        return list(map(id, before)) != list(map(id, self._found)) or by.keys() != self._holders.keys()

    def _parameters(self) -> list[torch.Tensor]:
        """All that may be learned, each once."""
        learned = [
            each for optimizer in self._optimizers for group in optimizer.param_groups for each in group["params"]
        ]
        learned += [each for module in self._modules for each in module._parameters.values() if each is not None]
        return list({id(each): each for each in learned}.values())

    def settings(self) -> tuple[Settings, list[torch.Tensor]]:
        """What a graph cannot change, and the tensors of which it is; equal for other ones only if these are gone.

        A weak reference to a tensor would tell it from one that is gone, but keep PyTorch from swapping it.
        """
        # variables may have been assigned anew; looking only where some were found is quick
        self._found, _, ways = _search(self._step, self._holders)
        self._modules = _with_children([each for each in self._found if isinstance(each, nn.Module)])
        self._optimizers = [each for each in self._found if isinstance(each, torch.optim.Optimizer)]
        parameters = self._parameters()
        buffers = [each for module in self._modules for each in module._buffers.values() if each is not None]
        tensors = [each for each in parameters + buffers if not is_lazy(each)]
        # masks count their changes, which a graph reads from their tensors
        attributes = [
            (type(module).__name__, self._attributes(module, tensors))
            for module in self._modules
            if not isinstance(module, Indices)
        ]
        groups = [self._of_group(group, tensors) for each in self._optimizers for group in each.param_groups]
        members = [
            (list(of.keys()), list(map(id, of.values())))  # TorchScript's are no dictionaries
            for module in self._modules
            for of in (module._parameters, module._buffers, module._modules)
            if of
        ]
        learned = [(each.requires_grad, _hooks(each, _OF_TENSORS)) for each in tensors]
        gradients = [each.is_leaf and each.grad is None for each in tensors]
        counts = [self._counts(optimizer, tensors) for optimizer in self._optimizers]
        hooks = [_hooks(optimizer, _OF_OPTIMIZERS) for optimizer in self._optimizers]
        with_address = [each for each in tensors if _has_address(each)]
        odd = []
        if len(with_address) < len(tensors):
            odd = [(id(each), version(each)) for each in tensors if not _has_address(each)]
        layouts = [(each.shape, each.stride(), each.dtype) for each in with_address]
        places = list(map(id, with_address)), list(map(torch.Tensor.data_ptr, with_address))
        which = list(map(_Identity, (*self._modules, *self._optimizers)))
        arrivals = [version(each.own_wiring) != each.written for each in self._modules if isinstance(each, BlockMask)]
        return (
            Settings(
                which, ways, attributes, groups, counts, members, learned, gradients, hooks, layouts, places, odd,
                arrivals,
            ),
            tensors,
        )  # fmt: skip

    def _attributes(self, module: nn.Module, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """The attributes of a module as constants of a graph; adds tensors that it reads to ``tensors``."""
        found: dict[str, Any] = {}
        for name, value in _own(module).items():
            kind = type(value)
            if kind in _PLAIN and value == value:  # as `plain` has it, quicker
                found[name] = kind, value
            elif name not in _WATCHED and not (kind in _COLLECTIONS and not value):
                found[name] = self._constant(value, tensors)
        for members in (module._parameters, module._buffers):
            for name, value in members.items():
                if value is not None and not _is_on(value, self._device):
                    found[name] = self._constant(value, [])
        return found

    def _of_group(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> dict[str, Any]:
        """The settings of a group of an optimizer, in the same way."""
        return {
            name: list(map(id, value)) if name == "params" else self._constant(value, tensors)
            for name, value in group.items()
        }

    def _counts(self, optimizer: torch.optim.Optimizer, tensors: list[torch.Tensor]) -> list[Any]:
        """What Python reads of an optimizer's own attributes and state; adds tensors that a graph reads."""
        counted = [
            (name, self._constant(value, tensors))
            for name, value in vars(optimizer).items()
            if name not in _OF_PYTORCH and not (isinstance(value, _COLLECTIONS) and not value)
        ]
        self._count_in(optimizer.state, tensors, counted)
        return counted

    def _count_in(self, state: Any, tensors: list[torch.Tensor], counted: list[Any]) -> None:
        """Of a collection, however deep; quicker than ``tree_leaves``."""
        for each in state.values() if isinstance(state, dict) else state:
            if isinstance(each, torch.Tensor) and _is_on(each, self._device):
                tensors.append(each)
            elif isinstance(each, tuple | list | dict):
                self._count_in(each, tensors, counted)
            else:
                counted.append(self._constant(each, tensors))

    def _constant(self, value: Any, tensors: list[torch.Tensor], nested: int = _NESTED) -> Any:
        """A value as a constant of a graph, to be compared by ``==``; adds tensors that it reads to ``tensors``.

        Of objects it is which ones they are; of a collection, what is in it; of few numbers on the host, which.
        """
        kind = type(value)  # objects may answer for another, or fail to
        if kind in _PLAIN:
            return plain(value)
        if kind in weakref.ProxyTypes:  # which asks what it refers to for its class, and may be gone
            return kind, _Identity(value)
        if issubclass(kind, np.generic):
            return kind, value.dtype, value.tobytes()
        if issubclass(kind, torch.Tensor):
            return kind, self._numbers(value, tensors)
        collection = issubclass(kind, _COLLECTIONS)
        if collection and len(value) <= _MANY and nested:
            constants = [self._constant(each, tensors, nested - 1) for each in value]
            if issubclass(kind, dict):
                items = [self._constant(each, tensors, nested - 1) for each in value.values()]
                return kind, tuple(constants), tuple(items)
            return kind, frozenset(constants) if issubclass(kind, set | frozenset) else tuple(constants)
        return kind, len(value) if collection else None, _Identity(value)

    def _numbers(self, tensor: torch.Tensor, tensors: list[torch.Tensor]) -> Any:
        """Few numbers on the host, which a step may have read; a graph reads others: adds these to ``tensors``."""
        if is_lazy(tensor):
            return id(tensor)
        if not _is_on(tensor, self._device) and _is_read_by_python(tensor):
            return tensor.dtype, repr(tensor.tolist())
        tensors.append(tensor)
        return None


def plain(value: Any) -> tuple[Any, ...]:
    """A number, a string or the like, to be compared by ``==``: 1, 1.0 and True differ, and NaN is itself."""
    return type(value), value if value == value else "nan"


class _Identity:
    """Equal to that of the same object only, which it keeps alive only where it cannot be referred to weakly."""

    def __init__(self, of: object) -> None:
        try:
            self._of: object = weakref.ref(of)  # an object has one, as long as that is kept
        except TypeError:
            self._of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._of is other._of

    def __hash__(self) -> int:
        return id(self._of)


def _has_address(tensor: torch.Tensor) -> bool:
    """Whether it has strides and an address, unlike sparse and nested tensors, and some of ``torch.func``."""
    try:
        tensor.data_ptr()
        return tensor.layout is torch.strided and not tensor.is_nested
    except RuntimeError:
        return False


def _is_read_by_python(tensor: torch.Tensor) -> bool:
    """Whether a step may read its numbers as Python's: a small one of a usual kind."""
    kind = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and not tensor.is_quantized
    return kind and _has_address(tensor) and tensor.numel() <= _MANY and tensor.dtype in _NUMBERS


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device


def _hooks(of: Any, names: tuple[str, ...]) -> list[list[int]]:
    """Numbers of the hooks, which are given to no other."""
    return [list(getattr(of, name, None) or ()) for name in names]


def _with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These and all below, each once; quicker than ``Module.modules``."""
    each_once = dict.fromkeys(modules)
    queue = list(each_once)
    for module in queue:
        for child in map(_dereferenced, module._modules.values()):
            if child is not None and child not in each_once:
                each_once[child] = None
                queue.append(child)
    return queue


# --- the search -----------------------------------------------------------------------------------------------------

#: how many variables, attributes and items after one another lead from a step to a network
_DEPTH = 4
_SOUGHT = nn.Module, torch.optim.Optimizer
_OPAQUE = types.ModuleType, type, torch.Tensor, Watched, _Identity


def _search(step: Any, within: dict[int, Any] | None = None) -> tuple[list[Any], dict[int, Any], list[Any]]:
    """The networks and optimizers to which a step refers; ``within``: by these objects only.

    The modules of a network count as the network, so that what one of them refers to is found as well.

    Returns:
        them; the objects by which it refers to them, by id; and the ways to them: from which of these objects, by which
        of its references, to which. There they have numbers, so a container made anew leads the same way.
    """
    found: list[Any] = []
    #: by the id of what they refer to, with the name of the reference; all of them, since each may change
    referrers: dict[int, list[tuple[Any, Any]]] = {}

    def is_new(each: Any, by: Any, name: Any) -> bool:
        new = id(each) not in referrers
        referrers.setdefault(id(each), []).append((by, name))
        return new

    def note(each: Any, by: Any, name: Any) -> list[Any]:
        """Notes who refers to an object; returns the objects from which to go on."""
        if not is_new(each, by, name):
            return []
        if not issubclass(type(each), _SOUGHT):
            return [each]
        found.append(each)
        modules = _with_children([each]) if isinstance(each, nn.Module) else [each]
        inner = [child for child in modules[1:] if within is None or id(child) in within]
        return [each, *(child for child in inner if is_new(child, each, None))]

    level = note(step, None, None)
    for _ in range(_DEPTH):
        below: list[Any] = []
        for value in level:
            for name, each in _references_of(value) if within is None or id(value) in within else ():
                below += note(_dereferenced(each), value, name)
        level = below
    holders: dict[int, Any] = {}
    edges = []
    queue = list(found)
    for each in queue:
        for by, name in referrers[id(each)]:
            if by is None:
                continue
            edges.append((id(by), name, id(each)))
            if id(by) not in holders:
                holders[id(by)] = by
                queue.append(by)
    number = {each: count for count, each in enumerate(dict.fromkeys(map(id, queue)))}
    return found, holders, [(number[by], name, number[each]) for by, name, each in edges]


def _dereferenced(value: Any) -> Any:
    """What a weak reference or proxy refers to, None if that is gone; any other object itself."""
    if type(value) in weakref.ProxyTypes:
        try:
            return value.__reduce_ex__.__self__
        except (ReferenceError, AttributeError):  # gone, or of a class
            return None
    return value() if type(value) is weakref.ref else value


def _references_of(value: Any) -> Collection[tuple[Any, Any]]:
    """The objects to which one refers by a variable, an attribute or an item; none if it cannot be looked at.

    Each comes with the name of the reference: that of the variable or attribute, the index or key, None in a set.
    """
    try:
        return _references(value)
    except Exception:  # a user's object may raise anything when it is looked at, and the search goes on without it
        return ()


def _references(value: Any) -> Collection[tuple[Any, Any]]:
    if isinstance(value, types.FunctionType):
        cells = []
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not assigned yet
                cells.append((name, cell.cell_contents))
        defaults = [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
        variables = [(name, value.__globals__.get(name)) for name in _names(value.__code__)]
        return [*cells, *defaults, *variables, *vars(value).items()]
    if isinstance(value, types.MethodType):
        owner = value.__self__
        own = vars(owner).items() if isinstance(owner, type) else [("__self__", owner)]
        return [*own, ("__func__", value.__func__)]
    if isinstance(value, weakref.WeakMethod):
        method = value()  # a new one each time
        return () if method is None else [("__self__", method.__self__), ("__func__", method.__func__)]
    if isinstance(value, functools.partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if isinstance(value, _COLLECTIONS):
        return _items(value) if len(value) <= _MANY else ()
    if isinstance(value, _OPAQUE):
        return ()
    attributes = _own(value)
    if isinstance(value, _SOUGHT):
        own = [each for each in attributes.items() if each[0] not in ("_modules", "state", "param_groups")]
        return [*own, ("forward", getattr(type(value), "forward", None))]
    return [*attributes.items(), ("__call__", type(value).__call__ if callable(value) else None)]


def _items(value: Any) -> list[tuple[Any, Any]]:
    """The items of a collection that are no constants, with their indices or keys."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = ((key if type(key) in _PLAIN else None, each) for key, each in value.items())
    elif isinstance(value, set | frozenset):
        items = ((None, each) for each in value)
    else:
        items = enumerate(value)
    return [item for item in items if type(item[1]) not in _PLAIN]


def _own(value: Any) -> dict[str, Any]:
    """The attributes of an object itself."""
    slots, own = _slots(value), getattr(value, "__dict__", {})
    return slots | own if slots else own


def _slots(value: Any) -> dict[str, Any]:
    """The attributes of an object that its classes name in ``__slots__``."""
    found = {}
    kind: Any = type(value)
    for name, slot in _slots_of(kind):
        with contextlib.suppress(AttributeError):  # not assigned yet
            found[name] = slot.__get__(value)
    return found


@functools.lru_cache(maxsize=1000)
def _slots_of(kind: type) -> list[tuple[str, Any]]:
    classes = (vars(each).items() for each in kind.__mro__)
    slots = (each for each in itertools.chain(*classes) if isinstance(each[1], types.MemberDescriptorType))
    return [each for each in slots if each[0] != "__dict__"]  # of classes written in C


def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names in a function, with those in functions and generators inside it."""
    names = code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            names += _names(each)
    return names
