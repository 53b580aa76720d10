"""One time step of LIF neurons, for loops that cannot have all steps at once: online input, recurrent networks.

Plain PyTorch operations on every device, differentiated by autograd. Over a whole sequence :func:`g2g_kernels.lif`
computes the same, faster and with less memory.
"""

import torch

from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.ops.lif import check_options, check_parameter
from g2g_kernels.ops.lif.surrogates import SURROGATES


def lif_step(
    current: torch.Tensor,
    membrane: torch.Tensor | None,
    beta: torch.Tensor | float,
    threshold: torch.Tensor | float,
    reset: str = "subtract",
    surrogate: str = "atan",
    alpha: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advances LIF neurons by one step; differentiable in ``current``, ``membrane``, ``beta`` and ``threshold``.

    Steps from t = 1 to T give the spikes of ``lif`` over all T to the last bit, and its gradients.

    Args:
        current: input currents I_t [..., N].
        membrane: U_{t−1} [..., N] as the last step returned it; None at the first step, where it is 0.
        beta, threshold, reset, surrogate, alpha: as for :func:`g2g_kernels.lif`.

    Returns:
        spikes S_t [..., N], 0 or 1 in the dtype of ``current``, and the membrane U_t [..., N], float32 for
        half-precision currents.

    Raises:
        ValueError: for an option or a shape out of range.
    """
    check_options(None, reset, surrogate, alpha)
    check_tensor("current", current)
    beta, threshold = (
        check_parameter(name, value, current.shape[-1], current)
        for name, value in (("beta", beta), ("threshold", threshold))
    )
    dtype = torch.promote_types(current.dtype, torch.float32)
    if membrane is None:
        membrane = torch.zeros_like(current, dtype=dtype)
    elif membrane.shape != current.shape:
        raise ValueError(
            f"membrane has shape {tuple(membrane.shape)}, the current {tuple(current.shape)}; "
            "give None to begin with another batch"
        )
    beta, theta = beta.to(dtype), threshold.to(dtype)
    # clamped, with a slope at 0 and 1 themselves whatever torch.clamp has there (PyTorch 2.15 has none)
    decay = torch.where((beta >= 0) & (beta <= 1), beta, beta.detach().clamp(0, 1))

    fired = (membrane > theta).to(dtype)  # R_t: a comparison, so no gradient passes through it
    if reset == "zero":
        membrane = membrane * (1 - fired)
    membrane = membrane * decay + current.to(dtype)
    if reset == "subtract":
        membrane = membrane - fired * theta
    spikes = (membrane > theta).to(dtype)
    if torch.is_grad_enabled():
        smooth = SURROGATES[surrogate].primitive(membrane - theta, alpha)
        spikes = spikes + (smooth - smooth.detach())  # the value of the step, the derivative of the surrogate
    return spikes.to(current.dtype), membrane
