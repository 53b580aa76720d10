"""Plain PyTorch ``lif``: a loop over time in each direction. The oracle for every other backend.

Of the forward pass only the membranes are kept; spikes and resets follow from them, so that the currents can be
freed. Per step the backward pass uses, with g_t the gradient that reaches U_t and σ' the surrogate's derivative,

    g_t = σ'(U_t − θ)·∂L/∂S_t + ∂U_{t+1}/∂U_t · g_{t+1}
    ∂L/∂I_t = g_t
    ∂L/∂β = Σ_t g_t · V_{t−1}          where 0 ≤ β ≤ 1, V the membrane that decays
    ∂L/∂θ = −Σ_t (σ'(U_t − θ)·∂L/∂S_t + R_t·g_t)      (the R_t term for reset by subtraction only)

where no gradient passes through R itself. V_{t−1} is U_{t−1}, or (1 − R_t)·U_{t−1} for reset to zero.
"""

import torch
from torch.autograd.function import once_differentiable

from g2g_kernels.ops.lif.surrogates import SURROGATES


def lif(
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int | None,
    reset: str,
    surrogate: str,
    alpha: float,
) -> torch.Tensor:
    if not torch.is_grad_enabled():  # the Function would see parameters that require grad, and keep all membranes
        current, beta, threshold = current.detach(), beta.detach(), threshold.detach()
    return _LIF.apply(current, beta, threshold, steps, reset, surrogate, alpha)


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, current, beta, threshold, steps, reset, surrogate, alpha):
        held = steps is not None
        num_steps = steps if held else current.shape[0]
        shape = current.shape if held else current.shape[1:]
        dtype = torch.promote_types(current.dtype, torch.float32)  # membranes of half-precision currents in float32
        decay, theta = beta.to(dtype).clamp(0, 1), threshold.to(dtype)
        keep = any(ctx.needs_input_grad)

        spikes = current.new_empty((num_steps, *shape))
        membranes = current.new_empty((num_steps if keep else 0, *shape), dtype=dtype)
        membrane = torch.zeros(shape, dtype=dtype, device=current.device)
        fired = (membrane > theta).to(dtype)
        for t in range(num_steps):
            if reset == "zero":
                membrane *= 1 - fired
            # the order of operations is snnTorch's, so that float32 membranes are equal to the last bit
            membrane *= decay
            membrane += (current if held else current[t]).to(dtype)
            if reset == "subtract":
                membrane -= fired * theta
            fired = (membrane > theta).to(dtype)
            spikes[t] = fired
            if keep:
                membranes[t] = membrane
        if keep:
            ctx.save_for_backward(membranes, beta, threshold)
            ctx.options = held, reset, SURROGATES[surrogate].derivative, alpha, current.dtype
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes):
        membranes, beta, threshold = ctx.saved_tensors
        held, reset, derivative, alpha, current_dtype = ctx.options
        dtype = membranes.dtype
        decay, theta = beta.to(dtype).clamp(0, 1), threshold.to(dtype)
        need_current, need_beta, need_theta = ctx.needs_input_grad[:3]

        shape = membranes.shape[1:]
        zeros = torch.zeros(shape, dtype=dtype, device=membranes.device)
        grad_membrane, grad_beta, grad_theta = zeros.clone(), zeros.clone(), zeros.clone()
        grad_current = zeros.clone() if held else torch.empty_like(membranes, dtype=current_dtype)
        for t in range(len(membranes) - 1, -1, -1):
            through_spike = derivative(membranes[t] - theta, alpha).mul_(grad_spikes[t])
            grad_membrane += through_spike
            if need_current:
                if held:
                    grad_current += grad_membrane
                else:
                    grad_current[t] = grad_membrane
            before = membranes[t - 1] if t > 0 else zeros
            fired = (before > theta).to(dtype)
            if need_theta:
                grad_theta -= through_spike
                if reset == "subtract":
                    grad_theta.addcmul_(fired, grad_membrane, value=-1)
            if reset == "zero":
                before = before * (1 - fired)
            if need_beta:
                grad_beta.addcmul_(grad_membrane, before)
            grad_membrane *= decay
            if reset == "zero":
                grad_membrane *= 1 - fired
        if need_beta:
            inside = ((beta >= 0) & (beta <= 1)).to(dtype)  # the clamp's own derivative
            grad_beta = (grad_beta.sum_to_size(_as_seen(beta, shape)) * inside).reshape(beta.shape).to(beta.dtype)
        if need_theta:
            grad_theta = grad_theta.sum_to_size(_as_seen(threshold, shape)).reshape(threshold.shape).to(threshold.dtype)
        return (
            grad_current.to(current_dtype) if need_current else None,
            grad_beta if need_beta else None,
            grad_theta if need_theta else None,
            *(None,) * 4,
        )


def _as_seen(parameter: torch.Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The shape to which a gradient of ``shape`` is summed for a scalar or per-neuron parameter."""
    return (shape[-1],) if parameter.numel() > 1 else (1,)
