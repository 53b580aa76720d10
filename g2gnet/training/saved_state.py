"""Checks the content of a checkpoint before a trainer loads it."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from g2gnet.training.checkpoints import check_number

#: what a trainer's ``load_state_dict`` raises for a state that does not fit
UNFIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def check_position(state: dict[str, Any], batches: int) -> None:
    """Raises ValueError unless epochs, of ``batches`` steps, and steps fit; ``progress`` is None between two epochs."""
    epoch, step = state["epoch"], state["step"]
    for name in ("epoch", "step"):
        check_number(name, state[name], low=0, whole=True)
    inside = step - epoch * batches
    if inside != 0 if state["progress"] is None else not 0 < inside <= batches:
        raise ValueError(f"epoch={epoch} and step={step} are at odds: an epoch has {batches} steps")


def check_like(name: str, saved: Any, like: torch.Tensor, low: float = -math.inf) -> torch.Tensor:
    """``saved`` on the device of ``like``; ValueError unless it is a tensor of its shape and dtype, from ``low`` on."""
    if not isinstance(saved, torch.Tensor) or saved.shape != like.shape or saved.dtype != like.dtype:
        what = f"{saved.dtype} {tuple(saved.shape)}" if isinstance(saved, torch.Tensor) else type(saved).__name__
        raise ValueError(f"{name} is {what}, not {like.dtype} {tuple(like.shape)}")
    if (saved < low).any():
        raise ValueError(f"{name} has {saved.min().item():.4g}, which is below {low}")
    return saved.to(like.device)


def check_progress(saved: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """The saved progress of an epoch, whose entries must be like ``mine``; else an exception in ``UNFIT``."""
    found: dict[str, Any] = {}
    for name, like in mine.items():
        then, place = saved[name], f"progress/{name}"
        if isinstance(like, dict):  # of units, of which gradual pruning may have left fewer
            for key, units in like.items():
                shape = then[key].numel() if isinstance(then[key], torch.Tensor) else len(units)
                found.setdefault(name, {})[key] = check_like(f"{place}/{key}", then[key], units.new_empty(shape), 0)
        elif isinstance(like, torch.Tensor):
            found[name] = check_like(place, then, like, low=0)
        else:
            check_number(place, then, low=0)
            found[name] = then
    return found


def load_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """Loads the state of ``model``, dtypes included, which PyTorch would convert; else an exception in ``UNFIT``."""
    for name, like in model.state_dict().items():
        tensor = saved.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, not {like.dtype}")
    model.load_state_dict(saved)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: Collection[str], step: int) -> None:
    """Loads the ``state_dict()`` of an optimizer that has done ``step`` steps; its options do not change. Each
    parameter has tensors of these ``names``, all of its shape except ``step``. Raises ValueError for any other state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = saved["state"]
    if state.keys() != set(range(len(parameters))):
        raise ValueError(f"the optimizer's state is of other parameters than the {len(parameters)} of the network")
    for number, parameter in enumerate(parameters):
        if state[number].keys() != set(names):
            raise ValueError(f"optimizer state {number} has {sorted(state[number])}, not {sorted(names)}")
        for name, value in state[number].items():
            like = torch.zeros(()) if name == "step" else parameter.detach()
            place = f"optimizer state {number}/{name}"
            check_like(place, value, like, low=0 if name == "exp_avg_sq" else -math.inf)
            if name == "step" and value != min(step, 1 << 24):  # a float32 counts no further
                raise ValueError(f"{place} is {value.item():g}, after {step} steps")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
