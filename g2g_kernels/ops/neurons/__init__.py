"""Spiking neurons over all time steps in one call: ``lif``, ``synaptic``, ``adlif``, ``cubalif``; :func:`neurons` for
any model."""

import functools
import logging
from types import ModuleType
from typing import Any

import torch

from g2g_kernels.dispatch import Operator
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.neurons import cpu, reference
from g2g_kernels.ops.neurons.checks import check_neurons, check_parameter, check_state, check_steps
from g2g_kernels.ops.neurons.models import MODELS, RESET, RESETS, Neurons, exact_gain
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE, SURROGATES
from g2g_kernels.tracing import is_transformed

__all__ = ["MODELS", "RESETS", "SURROGATES", "Neurons", "adlif", "cubalif", "lif", "neurons", "run_neurons", "synaptic"]

logger = logging.getLogger("g2g_kernels")


def _triton() -> ModuleType:
    from g2g_kernels.ops.neurons import triton  # imports Triton, which is optional

    return triton


operator = Operator("neurons")
operator.register_module("triton", _triton)
operator.register("cpu", cpu.neurons, cpu.refuses)
operator.register("torch", reference.neurons)


def lif(
    current: torch.Tensor,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    steps: int | None = None,
    reset: str = RESET,
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
    backend: str | None = None,
) -> torch.Tensor:
    """Runs LIF neurons over time; differentiable in ``current``, ``beta`` and ``threshold``.

    With U_0 = 0, R_t = 1[U_{t−1} > θ] and S_t = 1[U_t > θ] (strict)::

        subtract:  U_t = clamp(β, 0, 1)·U_{t−1} + I_t − θ·R_t
        zero:      U_t = clamp(β, 0, 1)·(1 − R_t)·U_{t−1} + I_t
        none:      U_t = clamp(β, 0, 1)·U_{t−1} + I_t

    This is snnTorch's ``Leaky`` (Eshraghian et al. 2023) with its ``reset_delay``; no gradient passes through R.

    Args:
        current: [T, ..., N]; with ``steps``, the number T of time steps, one [..., N] that is held for all of them.
        beta, threshold: the membrane's decay per step and θ, each a scalar or [N].
        reset: ``"subtract"``, ``"zero"`` or ``"none"``.
        surrogate, alpha: the stand-in for dS/dU, a name of :data:`SURROGATES`, and its sharpness, above 0.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Returns:
        Spikes 0 or 1, [T, ..., N], in the dtype of ``current``. States of half-precision currents are float32.

    Raises:
        ValueError: for an option or a shape out of range, or an unknown backend.
        BackendError: if the forced backend cannot serve the call.

    Example:
        >>> current = torch.full((4, 1, 1), 0.6)  # [T, B, N]
        >>> lif(current, beta=0.5, threshold=1.0).flatten()
        tensor([0., 0., 1., 0.])
        >>> lif(torch.full((1, 1), 0.6), beta=0.9, threshold=1.0, steps=4).flatten()  # held
        tensor([0., 1., 0., 1.])
    """
    return neurons(current, Neurons("lif", (beta, threshold), reset, surrogate, alpha), steps, backend)


def synaptic(
    current: torch.Tensor,
    syn_decay: torch.Tensor | float,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    steps: int | None = None,
    reset: str = RESET,
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
    backend: str | None = None,
) -> torch.Tensor:
    """Runs LIF neurons with a synaptic current over time; differentiable in everything that is a tensor.

    With C_0 = U_0 = 0, R_t = 1[U_{t−1} > θ] and S_t = 1[U_t > θ] (strict)::

        C_t = clamp(γ, 0, 1)·C_{t−1} + I_t
        subtract:  U_t = clamp(β, 0, 1)·U_{t−1} + C_t − θ·R_t
        zero:      U_t = (1 − R_t)·(clamp(β, 0, 1)·U_{t−1} + C_t)
        none:      U_t = clamp(β, 0, 1)·U_{t−1} + C_t

    This is snnTorch's ``Synaptic`` (Eshraghian et al. 2023) with its ``reset_delay``: its reset to zero holds the
    membrane at 0 for the whole step, unlike that of ``Leaky``. No gradient passes through R.

    Args:
        syn_decay: decay γ of the synaptic current per step, a scalar or [N].
        current, beta, threshold, steps, reset, surrogate, alpha, backend: as for :func:`lif`, and so are the spikes
            that are returned, [T, ..., N], and the errors.

    Example:
        >>> synaptic(torch.full((1, 1), 0.4), syn_decay=0.8, beta=0.9, threshold=1.0, steps=4).flatten()
        tensor([0., 1., 0., 1.])
    """
    population = Neurons("synaptic", (syn_decay, beta, threshold), reset, surrogate, alpha)
    return neurons(current, population, steps, backend)


def adlif(
    current: torch.Tensor,
    adapt_decay: torch.Tensor | float,
    beta: torch.Tensor | float,
    a: torch.Tensor | float,
    b: torch.Tensor | float,
    threshold: torch.Tensor | float,
    steps: int | None = None,
    reset: str = RESET,
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
    backend: str | None = None,
) -> torch.Tensor:
    """Runs adaptive LIF neurons over time; differentiable in everything that is a tensor.

    With w_0 = U_0 = 0, R_t = 1[U_{t−1} > θ] and S_t = 1[U_t > θ] (strict)::

        w_t = clamp(ρ, 0, 1)·w_{t−1} + a·V_{t−1} + b·S_{t−1}
        subtract:  U_t = clamp(β, 0, 1)·V_{t−1} + I_t − w_t − θ·R_t,    V = U
        zero:      U_t = clamp(β, 0, 1)·V_{t−1} + I_t − w_t,            V_{t−1} = (1 − R_t)·U_{t−1}
        none:      U_t = clamp(β, 0, 1)·V_{t−1} + I_t − w_t,            V = U

    This is the adaptive neuron of Bittar and Garner (2022), whose reset is by subtraction. Reset to zero discharges the
    membrane before the step, so that neither U nor w sees what was in it. That is SE-adLIF, the symplectic Euler
    rule of Baronig et al. (2024): I_t is their current times 1 − β, and a and b are theirs times (1 − β)(1 − ρ). The
    gradient passes through b·S_{t−1} by the surrogate, and not through R.

    Args:
        adapt_decay: decay ρ of the adaptation w per step, a scalar or [N].
        a, b: what the membrane and a spike add to the adaptation, each a scalar or [N], of either sign.
        current, beta, threshold, steps, reset, surrogate, alpha, backend: as for :func:`lif`, and so are the spikes
            that are returned, [T, ..., N], and the errors.

    Example:
        >>> adaptive = {"adapt_decay": 0.9, "beta": 0.9, "a": 0.0, "b": 0.5, "threshold": 1.0}
        >>> adlif(torch.full((1, 1), 0.6), **adaptive, steps=8).flatten()
        tensor([0., 1., 0., 0., 0., 0., 0., 1.])
    """
    population = Neurons("adlif", (adapt_decay, beta, a, b, threshold), reset, surrogate, alpha)
    return neurons(current, population, steps, backend)


def cubalif(
    current: torch.Tensor,
    syn_decay: torch.Tensor | float,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    steps: int | None = None,
    reset: str = "zero",
    surrogate: str = SURROGATE,
    alpha: float = ALPHA,
    backend: str | None = None,
    *,
    refractory: torch.Tensor | float = 0,
    reset_current: bool = False,
) -> torch.Tensor:
    """Runs current-based LIF neurons with exponential synapses over time, integrated exactly; differentiable in
    ``current``, ``syn_decay``, ``beta`` and ``threshold``.

    τ·du/dt = −u + g and τ_syn·dg/dt = −g, with α = exp(−dt/τ_syn) (``syn_decay``) and β = exp(−dt/τ), are exact over a
    step (Rotter and Diesmann 1999). In each step, in this order::

        1. u ← β·u + c·g,  g ← α·g        c = (β − α)·ln β / (ln α − ln β)
        2. S_t = 1[u > θ] (strict)
        3. g ← g + I_t                    where there is no spike
        4. where there is one: u ← 0 (``zero``), u − θ (``subtract``) or u (``none``), and g ← 0 with ``reset_current``

    After a spike in t the steps t + 1 … t + R − 1 are refractory, R = ``refractory``: u and g stay, there is no spike,
    and what arrives is lost, as it is in the step of the spike. This is the model of Shiu et al. (2024), in Brian2's
    order. No gradient passes through resets, refractory steps and lost currents.

    Args:
        refractory: R, steps after a spike until the first current that counts; a scalar or [N].
        reset_current: whether a spike sets g to 0, too.
        current, syn_decay, beta, threshold, steps, reset, surrogate, alpha, backend: as for :func:`synaptic`, and so
            are the spikes that are returned, [T, ..., N], and the errors. ``triton`` does not serve it.

    Example:
        >>> cubalif(torch.full((1, 1), 2.0), syn_decay=0.8, beta=0.9, threshold=1.0, steps=8).flatten()
        tensor([0., 0., 0., 0., 1., 0., 0., 1.])
    """
    check_tensor("current", current)
    like: Any = {"dtype": torch.promote_types(current.dtype, torch.float32), "device": current.device}
    decays = [
        each if isinstance(each, torch.Tensor) else torch.tensor(check_parameter(name, each), **like)
        for name, each in (("syn_decay", syn_decay), ("beta", beta))
    ]
    refractory = torch.as_tensor(refractory).to(**like)
    parameters = (*decays, exact_gain(*decays), refractory, float(reset_current), threshold)
    return neurons(current, Neurons("cubalif", parameters, reset, surrogate, alpha), steps, backend)


def neurons(
    current: torch.Tensor, population: Neurons, steps: int | None = None, backend: str | None = None
) -> torch.Tensor:
    """Runs neurons of any model over time; differentiable in ``current`` and the population's parameters.

    Args:
        current, steps, backend: as for :func:`lif`, and so are the spikes returned, [T, ..., N], and errors.
        population: the model, its parameters, reset and surrogate.

    Example:
        >>> population = Neurons("synaptic", (torch.tensor([0.8]), torch.tensor([0.9]), torch.tensor([1.0])))
        >>> neurons(torch.full((1, 1), 0.4), population, steps=4).flatten()
        tensor([0., 1., 0., 1.])
    """
    return run_neurons(current, population, steps, backend)[0]


def run_neurons(
    current: torch.Tensor,
    population: Neurons,
    steps: int | None = None,
    backend: str | None = None,
    state: torch.Tensor | None = None,
    to_membrane: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`neurons` of a ``current`` from a ``state`` on, [states, ..., N] in the model's order (None: all 0);
    differentiable in that, too, and in ``to_membrane``, of the current's shape, which the membrane takes where the
    current goes to a synaptic current. Returns spikes [T, ..., N] and the states after the last step, float32 for
    half-precision currents."""
    steps = check_steps(steps)
    check_tensor("current", current)
    if current.dim() < (1 if steps is not None else 2):
        raise ValueError(f"current has shape {tuple(current.shape)}; expected [T, ..., N], or [..., N] with steps")
    population = check_neurons("", population, current.shape[-1], current)
    if state is not None:
        check_state("", state, population, current.shape if steps is not None else current.shape[1:])
    if is_transformed((current, state, to_membrane, *population.parameters)):
        _say_that_it_takes_steps()
        return in_steps(current, population, steps, state, None, to_membrane)
    if to_membrane is not None:
        return operator(current, population, steps, state, to_membrane, backend=backend)
    return operator(current, population, steps, state, backend=backend)


@functools.cache
def _say_that_it_takes_steps() -> None:
    logger.warning(
        "inside torch.func transforms and torch.jit.trace, neurons run step by step on plain PyTorch operations, which "
        "is slower and takes more memory"
    )
