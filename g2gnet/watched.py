"""What a training step refers to, and what of that a CUDA graph of it cannot change."""

import collections
import contextlib
import enum
import functools
import types
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from g2g_kernels.sides import Indices
from g2g_kernels.wiring import version

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
_PLAIN = frozenset(CONSTANTS) - {enum.Enum}
_COLLECTIONS = tuple, list, dict, collections.OrderedDict, set, frozenset
#: items of a collection that are looked at, and how many collections inside one another
_MANY, _NESTED = 100, 3
#: the attributes of a module that are compared by themselves
_WATCHED = frozenset(("_parameters", "_buffers", "_modules"))
#: attributes with the hooks of a tensor and of an optimizer
_OF_TENSORS = "_backward_hooks", "_post_accumulate_grad_hooks"
_OF_OPTIMIZERS = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"


class Settings(NamedTuple):
    """What a graph cannot change; equal where one graph does.

    Attributes:
        which: the networks' modules and the optimizers.
        attributes: of each module, by name.
        groups: the settings of each group of each optimizer, by name.
        roles: which parameters each module has.
        learned: of each parameter, whether it is learned, has a gradient, and its hooks.
        hooks: of the optimizers.
        layouts: shapes, strides and dtypes of all tensors.
        places: which they are and where.
        odd: sparse and nested tensors, and how often each was written to.
    """

    which: Any
    attributes: list[tuple[str, dict[str, Any]]]
    groups: list[dict[str, Any]]
    roles: Any
    learned: Any
    hooks: Any
    layouts: Any
    places: Any
    odd: Any

    def difference(self, other: "Settings") -> str:
        """What differs, in words: the first that is found."""
        if self.which == other.which:
            for (module, mine), (_, others) in zip(self.attributes, other.attributes, strict=True):
                for name in {**mine, **others}:
                    if mine.get(name) != others.get(name):
                        return f"the attribute {name!r} of {module}"
            for mine, others in zip(self.groups, other.groups, strict=False):
                for name in {**mine, **others}:
                    if mine.get(name) != others.get(name):
                        return f"the setting {name!r} of an optimizer"
        names = {"which": "which networks and optimizers there are", "hooks": "hooks"}
        found = next((name for name in self._fields if getattr(self, name) != getattr(other, name)), "")
        return names.get(found, "which tensors there are, where they are, or whether they have gradients")


class Watched:
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

    def settings(self) -> Settings:
        """What a graph cannot change: which they are, where their tensors are, and their other settings."""
        # variables may have been assigned anew; looking only where some were found is quick
        self._found, _ = _search(self._step, self._holders)
        self._modules = _with_children([each for each in self._found if isinstance(each, nn.Module)])
        self._optimizers = [each for each in self._found if isinstance(each, torch.optim.Optimizer)]
        parameters = self.parameters()
        buffers = [each for module in self._modules for each in module._buffers.values() if each is not None]
        tensors = [each for each in parameters + buffers if not is_lazy(each)]
        # masks count their changes, which a graph reads from their tensors
        attributes = [
            (type(module).__name__, self._attributes(module, tensors))
            for module in self._modules
            if not isinstance(module, Indices)
        ]
        groups = [self._of_group(group, tensors) for each in self._optimizers for group in each.param_groups]
        for optimizer in self._optimizers:
            _add_tensors(optimizer.state, tensors)
        # by which module; which they are follows from their places
        roles = [list(map(id, module._parameters.values())) for module in self._modules]
        learned = [(each.requires_grad, each.grad is None, _hooks(each, _OF_TENSORS)) for each in parameters]
        hooks = [_hooks(optimizer, _OF_OPTIMIZERS) for optimizer in self._optimizers]
        odd = []
        try:
            laid_out = _layouts(tensors), _places(tensors)
        except RuntimeError:
            odd = [(_Identity(each), version(each)) for each in tensors if not _is_plain(each)]
            plain = list(filter(_is_plain, tensors))
            laid_out = _layouts(plain), _places(plain)
        which = list(map(_Identity, (*self._modules, *self._optimizers)))
        return Settings(which, attributes, groups, roles, learned, hooks, *laid_out, odd)

    def _attributes(self, module: nn.Module, tensors: list[torch.Tensor]) -> dict[str, Any]:
        """The attributes of a module as constants of a graph; adds tensors that it reads to ``tensors``."""
        found = {}
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _PLAIN and value == value:  # most, and quicker than by a call
                found[name] = kind, value
            elif name not in _WATCHED and not (kind in _COLLECTIONS and not value):
                found[name] = self._constant(value, tensors)
        return found

    def _of_group(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> dict[str, Any]:
        """The settings of a group of an optimizer, in the same way."""
        return {
            name: len(value) if name == "params" else self._constant(value, tensors) for name, value in group.items()
        }

    def _constant(self, value: Any, tensors: list[torch.Tensor], nested: int = _NESTED) -> Any:
        """A value as a constant of a graph, to be compared by ``==``; adds tensors that it reads to ``tensors``.

        Of objects it is which ones they are; of a collection, what is in it.
        """
        kind = type(value)
        if kind in _PLAIN:
            return kind, value if value == value else "nan"
        if isinstance(value, np.generic):
            return kind, value.tobytes()
        if isinstance(value, torch.Tensor):
            on_host = not _is_on(value, self._device) and _is_plain(value)
            if on_host and value.numel() <= _MANY:  # the step may have read its numbers
                return kind, value.dtype, repr(value.tolist())
            tensors.append(value)
            return kind
        if isinstance(value, _COLLECTIONS) and len(value) <= _MANY and nested:
            constants = [self._constant(each, tensors, nested - 1) for each in value]
            if isinstance(value, dict):
                items = [self._constant(each, tensors, nested - 1) for each in value.values()]
                return kind, tuple(constants), tuple(items)
            return kind, frozenset(constants) if isinstance(value, set | frozenset) else tuple(constants)
        return kind, len(value) if isinstance(value, _COLLECTIONS) else None, _Identity(value)

    def numbers(self) -> list[Any]:
        """What optimizers keep in their state for Python to read and change, as a step that they count."""
        leaves = tree_leaves([list(optimizer.state.values()) for optimizer in self._optimizers])
        on_host = [each for each in leaves if not isinstance(each, torch.Tensor) or not _is_on(each, self._device)]
        numbers = [each.item() if isinstance(each, torch.Tensor) and each.ndim == 0 else each for each in on_host]
        return [each for each in numbers if isinstance(each, CONSTANTS)]


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


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has strides and an address."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    return tensor.device == device


def _add_tensors(state: Any, tensors: list[torch.Tensor]) -> None:
    """Adds those of an optimizer's state to ``tensors``; quicker than ``tree_leaves``."""
    for each in state.values() if isinstance(state, dict) else state:
        if isinstance(each, torch.Tensor):
            tensors.append(each)
        elif isinstance(each, tuple | list | dict):
            _add_tensors(each, tensors)


def _hooks(of: Any, names: tuple[str, ...]) -> list[list[int]]:
    """Numbers of the hooks, which are given to no other."""
    return [list(getattr(of, name, None) or ()) for name in names]


def _with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These and all below, each once; quicker than ``Module.modules``."""
    each_once = dict.fromkeys(modules)
    queue = list(each_once)
    for module in queue:
        for child in module._modules.values():
            if child is not None and child not in each_once:
                each_once[child] = None
                queue.append(child)
    return queue


def _layouts(tensors: list[torch.Tensor]) -> list[Any]:
    return [(each.shape, each.stride(), each.dtype) for each in tensors]


def _places(tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    """Which tensors these are, and where: a new one may have the address and the id of one that is gone.

    A tensor has one weak reference, whose id is no other's while these are kept. Ids come first: where they are equal,
    so are the references, and ``==`` of tensors is not called.
    """
    references = list(map(weakref.ref, tensors))
    return list(map(id, references)), references, list(map(torch.Tensor.data_ptr, tensors))


# --- the search -----------------------------------------------------------------------------------------------------

#: how many variables, attributes and items after one another lead from a step to a network
_DEPTH = 4
_SOUGHT = nn.Module, torch.optim.Optimizer
_OPAQUE = types.ModuleType, type, torch.Tensor


def _search(step: Any, within: dict[int, Any] | None = None) -> tuple[list[Any], dict[int, Any]]:
    """The networks and optimizers to which a step refers, and by which objects; ``within``: by those only.

    The modules of a network count as the network, so that what one of them refers to is found as well.
    """
    found: list[Any] = []
    holder: dict[int, Any] = {}

    def with_modules(each: Any, by: Any) -> list[Any]:
        holder[id(each)] = by
        if isinstance(each, _SOUGHT):
            found.append(each)
        if not isinstance(each, nn.Module):
            return [each]
        below = [child for child in _with_children([each])[1:] if id(child) not in holder]
        below = below if within is None else [child for child in below if id(child) in within]
        holder.update((id(child), each) for child in below)
        return [each, *below]

    level = with_modules(_referent(step), None)
    for _ in range(_DEPTH):
        below: list[Any] = []
        for value in level:
            for each in _referred(value) if within is None or id(value) in within else ():
                each = _referent(each)
                if id(each) not in holder:
                    below += with_modules(each, value)
        level = below
    holders: dict[int, Any] = {}
    for each in found:
        while (each := holder[id(each)]) is not None:
            holders[id(each)] = each
    return found, holders


def _referent(value: Any) -> Any:
    """What a weak reference or proxy refers to, None if that is gone; any other object itself."""
    if type(value) in weakref.ProxyTypes:
        try:
            return value.__reduce_ex__.__self__
        except ReferenceError:
            return None
    return value() if isinstance(value, weakref.ref) else value


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
    return [*attributes.values(), type(value).__call__ if callable(value) else None]


def _slots(value: Any) -> dict[str, Any]:
    """The attributes of an object that its classes name in ``__slots__``."""
    found = {}
    for each in type(value).__mro__:
        slots = vars(each).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{each.__name__.lstrip('_')}{name}" if private else name  # as Python calls it
            if hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names in a function, with those in functions and generators inside it."""
    names = code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            names += _names(each)
    return names
