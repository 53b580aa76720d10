"""Checks of neurons in calls of public functions; numbers become tensors."""

import math
import numbers
from typing import Any

import numpy as np
import torch

from g2g_kernels.choices import check_choice
from g2g_kernels.numbers import COUNT, FLOAT32, SHARPNESS
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.neurons.models import MODELS, RESETS, Neurons, Tensors
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.tracing import replaced

#: parameters besides tensors
NUMBERS = (int, float, np.integer, np.floating)


def check_parameter(name: str, value: Any, of: str = "") -> float:
    """``value``, the parameter of neurons, as a float. (An infinite threshold is never reached.) Raises ValueError,
    naming the argument (``of`` some neurons), unless it is one number that a float32 holds, or inf."""
    if isinstance(value, torch.SymFloat):  # stands for a float in a program with dynamic shapes
        return value  # type: ignore[return-value]
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(number, numbers.Real) and not isinstance(number, bool):
        number = math.inf if isinstance(number, int) and abs(number) > FLOAT32[1] else float(number)
        if abs(number) <= FLOAT32[1] or (abs(number) == math.inf and not isinstance(value, int)):
            return number
    held = f"a number that a float32 holds, at most {FLOAT32[1]:.3g}, or inf"
    raise ValueError(f"{name}={value!r:.40}{of} must be {held}")


def check_steps(steps: int | None) -> int | None:
    """``steps`` as an int, or None. Raises ValueError for anything but None and a number of time steps."""
    return None if steps is None else COUNT.check("steps", steps)


def check_neurons(suffix: str, population: Neurons, size: int, like: torch.Tensor) -> Neurons:
    """``population`` with parameters as tensors on the device of ``like``. Raises ValueError for an unknown model, an
    option out of range, or parameters that ``size`` neurons cannot have."""
    model, parameters, reset, surrogate, alpha = population
    if not (model in MODELS and reset in RESETS and surrogate in SURROGATES):
        check_choice("model", model, MODELS, of=suffix)
        check_choice("reset", reset, RESETS, of=suffix)
        check_choice("surrogate", surrogate, SURROGATES, of=suffix)
    SHARPNESS.check("alpha", alpha, suffix)
    names = MODELS[model].parameters
    if len(parameters) != len(names):
        raise ValueError(f"{model} neurons{suffix} have {len(parameters)} parameters; expected {', '.join(names)}")
    if any([isinstance(parameter, NUMBERS) for parameter in parameters]):
        options: Any = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        parameters = tuple(
            torch.tensor(check_parameter(name, each, suffix), **options) if isinstance(each, NUMBERS) else each
            for name, each in zip(names, parameters, strict=True)
        )
        population = replaced(population, parameters=parameters)
    for name, parameter in zip(names, parameters):  # noqa: B905
        check_tensor(name, parameter, of=suffix)
        if parameter.shape not in ((), (1,), (size,)):
            shape = tuple(parameter.shape)
            raise ValueError(f"{name}{suffix} has shape {shape}; expected a scalar or [{size}], one per neuron")
    return population


def check_state(suffix: str, state: torch.Tensor, population: Neurons, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``state`` holds that model's states, each of ``shape`` [..., N]."""
    check_tensor("state", state, of=suffix)
    names = MODELS[population.model].states
    if tuple(state.shape) != (len(names), *shape):
        raise ValueError(
            f"state{suffix} has shape {tuple(state.shape)}; expected {(len(names), *shape)} ({', '.join(names)} of "
            f"every neuron and sample)"
        )


def check_states(states: Tensors, population: Neurons, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless these are that model's states before one step, each of ``shape``, the current's."""
    names = MODELS[population.model].states
    if len(states) != len(names):
        raise ValueError(f"{len(states)} states given, {population.model} neurons have {', '.join(names)}")
    for name, state in zip(names, states, strict=True):
        check_tensor(name, state)
        if tuple(state.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(state.shape)}, the current {shape}; give None for another batch")
