"""``lif``: leaky integrate-and-fire neurons over all time steps in one call."""

from types import ModuleType

import torch

from g2g_kernels.dispatch import Operator
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.lif import cpu, reference
from g2g_kernels.ops.lif.surrogates import SURROGATES

RESETS = ("subtract", "zero", "none")


def _triton() -> ModuleType:
    from g2g_kernels.ops.lif import triton  # imports Triton, which not everyone has

    return triton


operator = Operator("lif")
operator.register_module("triton", _triton)
operator.register("cpu", cpu.lif, cpu.refuses)
operator.register("torch", reference.lif)


def lif(
    current: torch.Tensor,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    steps: int | None = None,
    reset: str = "subtract",
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Runs LIF neurons over time; differentiable in ``current``, ``beta`` and ``threshold``.

    With U_0 = 0, R_t = 1[U_{t−1} > θ] and S_t = 1[U_t > θ] (strict)::

        subtract:  U_t = clamp(β, 0, 1)·U_{t−1} + I_t − θ·R_t
        zero:      U_t = clamp(β, 0, 1)·(1 − R_t)·U_{t−1} + I_t
        none:      U_t = clamp(β, 0, 1)·U_{t−1} + I_t

    This is snnTorch's ``Leaky`` (Eshraghian et al. 2023) with its ``reset_delay``; no gradient passes through R.

    Args:
        current: input currents [T, ..., N]; with ``steps`` given, one current [..., N] held for all steps.
        beta: membrane decay per step, a scalar or [N].
        threshold: firing threshold θ, a scalar or [N].
        steps: the number of time steps T of a held current; None if ``current`` has a time dimension.
        reset: ``"subtract"``, ``"zero"`` or ``"none"``.
        surrogate: the stand-in for dS/dU: ``"atan"``, ``"fast_sigmoid"``, ``"sigmoid"`` or ``"triangle"``.
        alpha: the sharpness α of the surrogate, above 0.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Returns:
        Spikes 0 or 1, [T, ..., N], in the dtype of ``current``. Membranes of half-precision currents are float32.

    Raises:
        ValueError: for an option or a shape out of range, or an unknown backend.
        BackendError: if the forced backend cannot serve the call.
    """
    check_options(steps, reset, surrogate, alpha)
    check_tensor("current", current)
    if current.dim() < (1 if steps is not None else 2):
        raise ValueError(f"current has shape {tuple(current.shape)}; expected [T, ..., N], or [..., N] with steps")
    beta, threshold = (
        check_parameter(name, value, current.shape[-1], current)
        for name, value in (("beta", beta), ("threshold", threshold))
    )
    return operator(current, beta, threshold, steps, reset, surrogate, alpha, backend=backend)


def check_options(steps: int | None, reset: str, surrogate: str, alpha: float) -> None:
    """Raises ValueError for a LIF option out of range."""
    if steps is not None and (not isinstance(steps, (int, torch.SymInt)) or steps < 1):
        raise ValueError(f"steps={steps} must be at least 1")
    if reset not in RESETS:
        raise ValueError(f"reset={reset!r} is unknown; choose one of {', '.join(RESETS)}")
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate={surrogate!r} is unknown; choose one of {', '.join(SURROGATES)}")
    if not isinstance(alpha, (int, float, torch.SymFloat)) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be above 0")


def check_parameter(name: str, value: torch.Tensor | float, neurons: int, like: torch.Tensor) -> torch.Tensor:
    """``value`` as a tensor beside ``like``; raises ValueError unless it is a scalar or has one entry a neuron."""
    if isinstance(value, (int, float)):
        value = torch.tensor(value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    check_tensor(name, value)
    if tuple(value.shape) not in ((), (1,), (neurons,)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected a scalar or [{neurons}], one a neuron")
    return value
