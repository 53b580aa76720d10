"""Checks the content of a checkpoint before anything in it is used or loaded."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from g2g_kernels.numbers import Number
from g2gnet.weights.whole_buffers import WholeBuffers

#: exceptions that checking and loading raise for a state that does not fit
UNFIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
#: entries of every state besides its network
POSITION = {"epoch": 0, "step": 0}
#: entries of every epoch's record, besides one or both of the accuracies
MEASURES = {"epoch": 0, "train_loss": 0.0, "train_acc": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}
JUDGED = ("test_acc", "val_acc")
#: entries of a finished run with held-out images
TESTED = {"test_acc": 0.0, "best": {"epoch": 0, "val_acc": 0.0, "test_acc": 0.0}}


def check_form(place: str, saved: Any, like: Any, low: float = -math.inf) -> Any:
    """``saved``, from a file, on the device of ``like``. Raises ValueError, naming the place, unless it has the entries
    of a dictionary, the shape and dtype of a tensor (of int64 vectors any length), the kind of a number, from ``low``.
    """
    if isinstance(like, dict):
        if not isinstance(saved, dict):
            raise ValueError(f"{place} is a {type(saved).__name__}")
        if lacks := [name for name in like if name not in saved]:
            raise ValueError(f"{place} lacks {lacks[0]}")
        return {name: check_form(f"{place}/{name}", saved[name], each, low) for name, each in like.items()}
    if isinstance(like, torch.Tensor):
        if not isinstance(saved, torch.Tensor) or saved.dtype != like.dtype or _shape(saved) != _shape(like):
            what = f"{saved.dtype} {tuple(saved.shape)}" if isinstance(saved, torch.Tensor) else type(saved).__name__
            raise ValueError(f"{place} is {what}, not {like.dtype} {tuple(like.shape)}")
        if (saved < low).any():
            raise ValueError(f"{place} has {saved.min().item():.4g}, which is below {low}")
        return saved.to(like.device)
    number = Number(low, whole=isinstance(like, int))
    wanted = number.refuses(saved) if isinstance(saved, int | float) else str(number)  # tensors are no numbers here
    if wanted:
        raise ValueError(f"{place}={saved!r:.40} is not {wanted}")
    return saved


def _shape(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The shape that must match; None for a list of numbers, such as units, which pruning may shorten."""
    return None if tensor.dtype == torch.int64 and tensor.ndim == 1 else tuple(tensor.shape)


def check_history(history: Any, epochs: int) -> None:
    """Raises an exception in ``UNFIT`` unless ``history``, from a file, has a record of each of the ``epochs``."""
    for record in history:
        judged = [name for name in JUDGED if name in record] or JUDGED[:1]
        check_form("the record of an epoch", record, {**MEASURES, **dict.fromkeys(judged, 0.0)}, low=0)
        check_form("units", units := record.get("units", {}), dict.fromkeys(units, 0), low=0)
    if [record["epoch"] for record in history] != list(range(1, epochs + 1)):
        raise ValueError(f"history does not hold one record for each of {epochs} epochs")


def check_tested(tested: Any) -> None:
    """Raises ValueError unless ``tested``, from a file, is empty or has the form of :data:`TESTED`."""
    check_form("tested", tested, TESTED if tested else {}, low=0)


def load_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """Loads the state of ``model``. Raises an exception in ``UNFIT`` if it does not fit, dtypes included, which PyTorch
    would convert. Buffers that modules check themselves (:class:`WholeBuffers`) may have the form of older versions."""
    modules = [(path, module) for path, module in model.named_modules() if isinstance(module, WholeBuffers)]
    checked = {f"{path}.{name}".removeprefix(".") for path, module in modules for name in module.checked()}
    for name, like in model.state_dict().items():
        tensor = saved.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.dtype != like.dtype and name not in checked:
            raise ValueError(f"{name} is {tensor.dtype}, not {like.dtype}")
    model.load_state_dict(saved)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: Collection[str], step: int) -> None:
    """Loads the ``state_dict()`` of an optimizer after ``step`` steps, without its options. Each parameter has tensors
    of these ``names``, all of its shape except ``step``. Raises an exception in ``UNFIT`` for any other state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = saved["state"]
    if state.keys() != set(range(len(parameters))):
        raise ValueError(f"the optimizer's state is of other parameters than the {len(parameters)} of the network")
    for number, parameter in enumerate(parameters):
        place = f"optimizer state {number}"
        if state[number].keys() != set(names):
            raise ValueError(f"{place} has {sorted(state[number])}, not {sorted(names)}")
        for name, value in state[number].items():
            like = torch.zeros(()) if name == "step" else parameter.detach()
            check_form(f"{place}/{name}", value, like, low=0 if name == "exp_avg_sq" else -math.inf)
            if name == "step" and value != min(step, 1 << 24):  # a float32 counts no further
                raise ValueError(f"{place}/{name} is {value.item():g}, after {step} steps")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
