"""Resets the optimizer state of grown units, for any optimizer, and refuses states of another number of units.

It handles states of the weights' shape (moments, slow weights), also with leading dimensions, and the codes of 8-bit
optimizers (bitsandbytes), however deeply optimizers are wrapped. Initial values are found by trial: an optimizer of the
same class takes two steps on weights of its own. In any other state (another shape, a tensor of another class, an
object, a queue, an attribute of the optimizer) it is unknown which numbers belong to which unit, so it is refused
unless the user passes a function that resets it.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

#: ``reset_state(optimizer, values, fresh)``: resets the state of the new units of the packed weights ``values``, those
#: where ``fresh``, bool [num_units], is true
ResetState = Callable[[Any, torch.nn.Parameter, torch.Tensor], None]

#: what 8-bit optimizers keep besides their codes: tables, and scales of whole blocks of codes
_BESIDE_CODES = re.compile(r"(qmap|absmax|max|new_max|gnorm_vec|unorm_vec)\d*")


class _Kept(NamedTuple):
    """A state tensor with one number per weight."""

    name: str
    tensor: torch.Tensor
    table: torch.Tensor | None  # for an 8-bit state: the number that each code stands for


class OptimizerState:
    """The state of an optimizer, and of those that it wraps, for the weights of rewired layers.

    Args:
        optimizer: an optimizer, or an object that wraps some: as attributes of any name (``base_optimizer``,
            ``optimizer``), in lists or dicts.
        weights: the packed weights of the layers.
        reset: resets states of other shapes.
        fewer: whether units will be removed (:meth:`keep_`), which states of other shapes, and codes, cannot follow.

    Raises:
        ValueError: for a state that cannot be reset, with its name.
    """

    def __init__(
        self,
        optimizer: Any,
        weights: Iterable[torch.nn.Parameter],
        reset: ResetState | None = None,
        fewer: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._fewer = fewer
        self._reset = reset
        #: initial values, by the names of class and state; zero where unknown
        self._initial: dict[tuple[str, str], float] = {}
        weights = list(weights)
        for parameter in weights:
            self.check(parameter)
        for inner in self._optimizers():
            if not _wrapped(inner):
                self._probe(inner, weights)

    def _optimizers(self) -> Iterator[Any]:
        """The optimizer and all that it wraps."""
        pending, seen = [self._optimizer], set()
        while pending:
            optimizer = pending.pop()
            if id(optimizer) not in seen:
                seen.add(id(optimizer))
                yield optimizer
                pending += _wrapped(optimizer)

    def check(self, parameter: torch.nn.Parameter) -> None:
        """Raises ValueError if the state of this parameter cannot be reset."""
        for inner in self._optimizers():
            self._check(inner, parameter, {**_state_of(inner, parameter), **_named_state(inner)})

    def _check(self, optimizer: Any, parameter: torch.nn.Parameter, state: dict[str, Any]) -> None:
        unknown = sorted(_unknown(state, parameter, codes=not self._fewer))
        if unknown and self._fewer:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {', '.join(unknown)} in a form other than plain tensors of the "
                f"weights' shape, {list(parameter.shape)}, so it cannot follow weights that become fewer; leave "
                "final_density= out, or use an optimizer whose states have the weights' shape (SGD, Adam, ...)"
            )
        if unknown and self._reset is None:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {', '.join(unknown)} in a form other than plain tensors of the "
                f"weights' shape, {list(parameter.shape)}, so the part that belongs to grown units is unknown; pass "
                "reset_state=, a function (optimizer, values, fresh), or use an optimizer whose states have the "
                "weights' shape (SGD, Adam, ...)"
            )

    def _probe(self, optimizer: Any, weights: list[torch.nn.Parameter]) -> None:
        """Runs an optimizer of this class on weights like these, first with a gradient of zero."""
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        # one of each shape: some optimizers keep small weights, or those of odd sizes, in another way
        for like in {parameter.shape: parameter for parameter in weights if id(parameter) in group_of}.values():
            self._probe_on(optimizer, like, group_of[id(like)])

    def _probe_on(self, optimizer: Any, like: torch.nn.Parameter, group: dict[str, Any]) -> None:
        parameter = torch.nn.Parameter(torch.zeros_like(like))
        try:
            known = inspect.signature(type(optimizer).__init__).parameters
            options = {name: value for name, value in group.items() if name in known and name != "params"}
            with torch.random.fork_rng([like.device] if like.is_cuda else []), torch.enable_grad():
                twin = type(optimizer)([parameter], **options)
                first = _state_after_step(twin, parameter, 0.0)
                initial = {
                    (type(optimizer).__name__, kept.name): float(kept.tensor.flatten()[0])
                    for kept in _kept(first, like.shape)
                    if kept.table is None and _is_constant(kept.tensor)
                }
                before = _attributes(twin, parameter)
                second = _state_after_step(twin, parameter, 1.0)
                after = _attributes(twin, parameter)
        except Exception:  # a class that cannot be created like this is checked once it has a state
            return
        self._initial |= initial
        self._check(optimizer, parameter, {**second, **_named_state(twin), **_changed(before, after)})

    def keep_(self, parameter: torch.nn.Parameter, kept: torch.Tensor) -> Callable[[], None]:
        """Keeps the state of the slots where ``kept``, bool [num_units], is true, before the weights follow.

        Returns:
            a function that takes it back.
        """
        with ExitStack() as undo:
            for inner in self._optimizers():
                state = _state_of(inner, parameter)
                for name, tensor, _ in list(_kept(state, parameter.shape)):
                    undo.callback(state.__setitem__, name, tensor)
                    state[name] = tensor[..., kept.to(tensor.device), :, :]
            return undo.pop_all().close

    def reset_(self, parameter: torch.nn.Parameter, slots: torch.Tensor, apply: torch.Tensor) -> Callable[[], None]:
        """Resets the state of some slots if ``apply``, a bool scalar, is true. Does not wait for the device.

        Returns:
            a function that takes it back. If an error is raised, nothing has changed.
        """
        with ExitStack() as undo:
            for inner in self._optimizers():
                for name, tensor, table in _kept(_state_of(inner, parameter), parameter.shape):
                    value: Any = self._initial.get((type(inner).__name__, name), 0.0)
                    if table is not None:
                        value = table.abs().argmin().to(tensor)
                    place = slots.to(tensor.device)
                    now = tensor[..., place, :, :]
                    undo.callback(_write, tensor, place, now)
                    _write(tensor, place, torch.where(apply.to(tensor.device), value, now).to(tensor.dtype))
            if self._reset is not None:
                for inner in self._optimizers():
                    undo.callback(_restore, *_saved(_state_of(inner, parameter)))
                fresh = torch.zeros(len(parameter), dtype=torch.bool, device=slots.device)
                fresh[slots] = apply
                self._reset(self._optimizer, parameter, fresh)
            return undo.pop_all().close


def _refuse_states_of_other_weights(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raises ValueError if a fused optimizer has states of another number of units than its weights have.

    It does not compare shapes, and would write past the end of the smaller tensor; all others say so themselves.
    """
    for group in optimizer.param_groups:
        for weights in group["params"] if group.get("fused") else ():
            if weights.dim() != 3 or not weights.requires_grad:  # packed weights are [num_units, unit_rows, unit_cols]
                continue
            for name, state in _state_of(optimizer, weights).items():
                if isinstance(state, torch.Tensor) and state.dim() == 3 and state.shape != weights.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} has {name} of shape {list(state.shape)} for weights of shape "
                        f"{list(weights.shape)}: one was loaded without the other, or is of another time; load both "
                        "(state_dict), or make a new optimizer"
                    )


# a state may come to other weights in many ways (loading, copies, an optimizer that no scheduler knows), but it is
# used in one place
register_optimizer_step_pre_hook(_refuse_states_of_other_weights)


def _wrapped(optimizer: Any) -> list[Any]:
    """The optimizers among an optimizer's attributes."""
    found = []
    for value in getattr(optimizer, "__dict__", {}).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [each for each in inside if hasattr(each, "param_groups") and hasattr(each, "step")]
    return found


def _state_of(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, Any]:
    state = getattr(optimizer, "state", None)
    own = state.get(parameter) if isinstance(state, dict) else None
    return own if isinstance(own, dict) else {}


def _named_state(optimizer: Any) -> dict[str, Any]:
    """What an optimizer's state holds under keys that are no parameters."""
    state = getattr(optimizer, "state", None)
    return {
        f"state of {repr(key) if isinstance(key, str) else type(key).__name__}": value
        for key, value in (state.items() if isinstance(state, dict) else ())
        if not isinstance(key, torch.Tensor)
    }


def _has_weights_shape(tensor: Any, shape: torch.Size) -> bool:
    """Whether it is a plain tensor with one number per weight; others (quantised, sharded) may not be indexed."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.shape[-len(shape) :] == shape


def _write(tensor: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    tensor[..., slots, :, :] = rows


def _saved(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[tuple[torch.Tensor, torch.Tensor]]]:
    """A state, its entries and copies of the tensors in it, for :func:`_restore`."""
    return state, dict(state), [(tensor, tensor.clone()) for tensor in _tensors(state)]


def _restore(state: dict[str, Any], entries: dict[str, Any], copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    state.clear()
    state.update(entries)
    for tensor, before in copies:
        tensor.copy_(before)


def _kept(state: dict[str, Any], shape: torch.Size) -> Iterator[_Kept]:
    """The tensors of a parameter's state that have one number per weight."""
    for name, value in state.items():
        if not _has_weights_shape(value, shape):
            continue
        table = state.get(name.replace("state", "qmap")) if isinstance(name, str) else None
        if value.is_floating_point() or value.dtype == torch.bool:
            yield _Kept(name, value, None)
        elif isinstance(table, torch.Tensor) and "state" in name:
            yield _Kept(name, value, table)


def _unknown(state: dict[str, Any], parameter: torch.nn.Parameter, codes: bool) -> list[str]:
    """The names of everything else in a parameter's state that holds a tensor with more than one number.

    Args:
        codes: whether 8-bit states are known.
    """
    known = {kept.name for kept in _kept(state, parameter.shape) if codes or kept.table is None}
    coded = codes and any(kept.table is not None for kept in _kept(state, parameter.shape))
    return [
        str(name)
        for name, value in state.items()
        if name not in known
        and not (coded and _BESIDE_CODES.fullmatch(str(name)))
        and any(tensor.numel() > 1 and tensor is not parameter for tensor in _tensors(value))
    ]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value (in dicts, lists, queues, attributes of objects), each once; arrays as tensors."""
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, (str, bytes, type)) or hasattr(each, "__get__"):
            continue  # functions and classes hold no state
        seen.add(id(each))
        if hasattr(each, "__tensor_flatten__"):  # a tensor made of others, which may not know how to copy itself
            pending += [getattr(each, name) for name in each.__tensor_flatten__()[0]]
        elif isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, np.ndarray):
            if each.dtype.kind in "biuf":
                yield torch.from_numpy(each)
        else:
            if isinstance(each, Collection):
                pending += each.values() if isinstance(each, Mapping) else each
            pending += getattr(each, "__dict__", {}).values()
            pending += [getattr(each, slot, None) for slot in getattr(type(each), "__slots__", ())]


def _is_constant(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _state_after_step(optimizer: Any, parameter: torch.nn.Parameter, gradient: float) -> dict[str, Any]:
    """The parameter's state after a step with that gradient."""

    def closure() -> torch.Tensor:
        parameter.grad = torch.full_like(parameter, gradient)
        return (parameter.detach() * gradient).sum()

    closure()
    optimizer.step(closure)
    return _state_of(optimizer, parameter)


def _attributes(optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, list[torch.Tensor]]:
    """Copies of the tensors that an optimizer keeps outside of its state, by attribute or option of a group."""
    groups = [value for group in optimizer.param_groups for value in group.items() if value[0] != "params"]
    attributes = [item for item in vars(optimizer).items() if item[0] not in ("state", "param_groups", "defaults")]
    return {
        f"attribute {name}": [
            tensor.detach().clone()
            for tensor in _tensors(value)
            if tensor is not parameter and tensor is not parameter.grad
        ]
        for name, value in attributes + groups
    }


def _changed(
    before: dict[str, list[torch.Tensor]], after: dict[str, list[torch.Tensor]]
) -> dict[str, list[torch.Tensor]]:
    """Those of ``after`` that a step has changed: state, not tables."""

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return len(one) == len(other) and all(map(torch.equal, one, other))

    return {name: tensors for name, tensors in after.items() if not same(before.get(name, []), tensors)}
