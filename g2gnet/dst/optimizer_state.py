"""Resets the optimizer's state for new units, by a table of initial values by the state's name, whatever the optimizer.

It resets states of the packed weights' shape, with or without dimensions before these, and codes of 8 bits
(bitsandbytes). Scalars stay. Any other state is refused by name: nobody knows which of its numbers belong to a unit.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

#: the initial state of new units: a number; a function of the new units' weights [n, unit_rows, unit_cols] that returns
#: their state; or None, which leaves the state as it is
Initial = float | Callable[[torch.Tensor], torch.Tensor] | None

#: moments, accumulated gradients, and past copies of the weights; new weights start at zero, so these do too
ZERO = {
    "acc_delta", "approx_hessian", "avg_grad", "ax", "ema", "exp_avg", "exp_avg_diff", "exp_avg_grad", "exp_avg_slow",
    "exp_avg_sq", "exp_avg_var", "exp_inf", "fim", "grad_avg", "grad_sum_sq", "grok_exp_avg", "last_grad",
    "lookahead_slow_buff", "m", "max_exp_avg_sq", "max_exp_avg_var", "moments", "momentum", "momentum_buffer",
    "mov_avg_grad", "mov_avg_param", "neg_exp_avg", "neg_momentum", "neg_pre_grad", "old_p", "p0", "pbar",
    "pos_momentum", "prev", "prev_param", "previous_grad", "s", "sk", "slow_buffer", "slow_params", "square_avg",
    "state1", "state2", "v", "x0", "z",
}  # fmt: skip
#: states that begin with an option of the weights' group
OPTION = {"sum": "initial_accumulator_value", "step_size": "lr"}
#: codes of 8 bits, by the table of the numbers that they stand for; new units get the code of zero
CODES = {"state1": "qmap1", "state2": "qmap2"}
#: those tables, and scales of whole blocks of codes, which stay
WITH_CODES = {
    *CODES.values(), "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec",
}  # fmt: skip
#: a state of all parameters together, which is kept as the first one's
OF_ALL = {"prev_flat_grad"}


class OptimizerState:
    """The optimizers' state of the weights of rewired layers. ``reset`` has initial values that the table lacks or that
    replace its own. ``fewer``: units will be removed (:meth:`keep_`), which is refused for codes."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        reset: Mapping[str, Initial] | None = None,
        fewer: bool = False,
    ) -> None:
        self.optimizers = list(dict.fromkeys(optimizer)) if isinstance(optimizer, Sequence) else [optimizer]
        self._reset, self._fewer = dict(reset or {}), fewer
        self._watch()

    def _watch(self) -> None:
        for optimizer in self.optimizers:
            if "_optimizer_step_pre_hooks" in vars(optimizer):  # wrappers may have none
                weakref.finalize(self, optimizer.register_step_pre_hook(_refuse_states_of_other_weights).remove)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()

    def check(self, parameter: torch.nn.Parameter) -> None:
        """Raises ValueError, which names it, for a state of these weights that cannot be reset."""
        states = [id(optimizer.state) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            kind = type(optimizer).__name__
            for name, inner in vars(optimizer).items():
                if isinstance(inner, torch.optim.Optimizer) and id(inner.state) not in states:
                    raise ValueError(
                        f"{kind} wraps {type(inner).__name__}, which has a state of its own; give the scheduler both: "
                        f"[optimizer, optimizer.{name}]"
                    )
            if unknown := sorted(self._unknown(optimizer, parameter), key=str):
                values = ", ".join(f"{name!r}: value" for name in unknown)
                raise ValueError(
                    f"{kind} keeps {', '.join(map(str, unknown))} in a form other than plain tensors of the weights' "
                    f"shape, {list(parameter.shape)}, or by an unknown name; pass reset_state={{{values}}}: for plain "
                    f"tensors with {len(parameter)} rows a number, or a function of the new units' weights"
                    f"{'' if self._fewer else '; for others None, which leaves them'}; or use another optimizer"
                )

    def _unknown(self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Iterator[Any]:
        mine = optimizer.state.get(parameter)
        known = {name for state, name, *_ in self._states(parameter) if state is mine}
        if known & CODES.keys():
            known |= WITH_CODES
        if not self._fewer:
            known |= {name for name, value in self._reset.items() if value is None}
        for key, state in optimizer.state.items():
            if not isinstance(key, torch.Tensor):
                yield from () if key in known or _is_scalar(state) else [key]
            elif key is parameter:
                yield from (name for name, value in state.items() if name not in known and not _is_scalar(value))
            else:
                yield from OF_ALL & state.keys() - known

    def _states(self, parameter: torch.nn.Parameter) -> Iterator[tuple[dict[str, Any], str, torch.Tensor, int, Any]]:
        """The states of units: their dict and name, the tensor, its dimension of units, and the initial value."""
        for optimizer in self.optimizers:
            state = optimizer.state.get(parameter, {})
            for name, tensor in list(state.items()):
                if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # quantised or sharded, maybe not indexed
                    continue
                of_weights = tensor.shape[-parameter.dim() :] == parameter.shape
                initial: Any = None
                if name in self._reset:
                    initial = self._reset[name] if of_weights or tensor.shape[:1] == parameter.shape[:1] else None
                elif of_weights and tensor.is_floating_point():
                    groups = (each for each in optimizer.param_groups if any(p is parameter for p in each["params"]))
                    initial = 0.0 if name in ZERO else next(groups, {}).get(OPTION.get(name, ""))
                elif of_weights and name in CODES and not self._fewer:
                    initial = state[CODES[name]].abs().argmin()
                if initial is not None:
                    yield state, name, tensor, tensor.dim() - parameter.dim() if of_weights else 0, initial

    def keep_(self, parameter: torch.nn.Parameter, kept: torch.Tensor) -> Callable[[], None]:
        """Keeps the state of slots where ``kept``, bool [num_units], is true; weights follow. Returns the undoing."""
        with ExitStack() as undo:
            for state, name, tensor, dim, _ in self._states(parameter):
                undo.callback(state.__setitem__, name, tensor)
                state[name] = tensor.index_select(dim, kept.nonzero()[:, 0].to(tensor.device))
            return undo.pop_all().close

    def reset_(self, parameter: torch.nn.Parameter, slots: torch.Tensor, apply: torch.Tensor) -> Callable[[], None]:
        """Resets the state of some slots if ``apply``, a bool scalar, is true, without waiting for the device. Returns
        the undoing; after an error nothing has changed."""
        with ExitStack() as undo:
            for _, _, tensor, dim, initial in self._states(parameter):
                units, place = tensor.movedim(dim, 0), slots.to(tensor.device)
                now = units[place]
                value = initial(parameter.detach()[slots]) if callable(initial) else initial
                undo.callback(units.__setitem__, place, now)
                units[place] = torch.where(apply.to(units.device), value, now).to(units.dtype)
            return undo.pop_all().close


def _is_scalar(value: Any) -> bool:
    """Whether a state belongs to no unit: counts, norms, options."""
    if isinstance(value, torch.Tensor):
        return value.numel() <= 1
    if isinstance(value, Mapping | list | tuple):
        return all(map(_is_scalar, value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, int | float | str)


def _refuse_states_of_other_weights(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raises ValueError if an optimizer has states of another number of units than its weights. A fused optimizer would
    write past the end of the smaller tensor."""
    for weights in (weights for group in optimizer.param_groups for weights in group["params"]):
        if weights.dim() in (3, 5) and weights.requires_grad:  # packed weights, those of kernels have five dimensions
            for name, state in optimizer.state.get(weights, {}).items():
                known = isinstance(state, torch.Tensor) and (name in ZERO or name in OPTION)
                if known and state.dim() >= weights.dim() and state.shape[-weights.dim() :] != weights.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} has {name} of shape {list(state.shape)} for weights of shape "
                        f"{list(weights.shape)}; load both from one state_dict, or make a new optimizer"
                    )
