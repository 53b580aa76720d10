"""The judge's own computation: the formulas in plain PyTorch, in float64, differentiated by autograd.

It shares no code with :mod:`g2g_kernels` or with any peer: dense weights, one loop over time, the surrogate written as
the smooth step that it is the derivative of. The batch passes through in pieces, since samples only meet in sums, so
that the graph over all time steps stays small.

β and θ are taken as one a neuron here, so that their gradients come as the terms whose sum a shared β or θ receives.
"""

import contextlib
import math

import torch
from torch.nn import functional as F

from benchmarks.workload import NeuronInputs, Prepared

#: named tensors; of a network "loss", "counts" [B, C] and the gradients "fc1.weight" [out, in] … "lif3.threshold",
#: of neurons alone "spikes" and the gradients "current" [T, B, N], "beta" and "threshold"
Results = dict[str, torch.Tensor]

CHUNK = 32  # samples in a piece

#: precisions: "float64" is the truth; "fp32" and "bf16" (products in bfloat16) show what rounding alone does to it
DTYPES = {"float64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}


def _spike(x: torch.Tensor) -> torch.Tensor:
    """1[x > 0], with the derivative of atan's smooth step at α = 2."""
    smooth = torch.atan(math.pi * x) / math.pi
    return (x > 0).to(x.dtype) + (smooth - smooth.detach())


def _lif(currents: list[torch.Tensor], beta: torch.Tensor, theta: torch.Tensor, reset: str) -> list[torch.Tensor]:
    """The spikes for a list of currents, one a time step.

    ``"after decay"``: U_t = β·U_{t−1} + I_t − θ·R_t, as snnTorch and g2g have it; ``"before decay"``:
    U_t = β·(U_{t−1} − θ·R_t) + I_t, as SpikingJelly has it. No gradient passes through R.
    """
    decay = beta.clamp(0, 1)
    taken = theta if reset == "after decay" else decay * theta
    membrane = torch.zeros_like(currents[0])
    spikes = []
    for current in currents:
        fired = (membrane > theta).to(membrane.dtype)
        membrane = decay * membrane + current - taken * fired
        spikes.append(_spike(membrane - theta))
    return spikes


def network_results(prepared: Prepared, reset: str = "after decay", precision: str = "float64") -> Results:
    """Loss, spike counts and gradients of the workload's network on its batch."""
    dtype = DTYPES[precision]
    parameters: dict[str, torch.Tensor] = {}
    for number, (connection, neurons) in enumerate(prepared.network("torch").layers(), 1):
        assert connection.bias is not None
        for name, tensor in {
            f"fc{number}.weight": connection.dense_weight(),
            f"fc{number}.bias": connection.bias,
            f"lif{number}.beta": neurons.beta.expand(connection.out_features),
            f"lif{number}.threshold": neurons.threshold.expand(connection.out_features),
        }.items():
            parameters[name] = tensor.detach().to(dtype, copy=True).requires_grad_()

    def product(number: int, x: torch.Tensor) -> torch.Tensor:
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            return F.linear(x, parameters[f"fc{number}.weight"], parameters[f"fc{number}.bias"]).to(dtype)

    loss, counts = torch.zeros((), dtype=dtype), []
    for images, labels in zip(prepared.images.to(dtype).split(CHUNK), prepared.labels.split(CHUNK), strict=True):
        currents = [product(1, images)] * prepared.workload.T
        for number in (1, 2, 3):
            spikes = _lif(currents, parameters[f"lif{number}.beta"], parameters[f"lif{number}.threshold"], reset)
            if number < 3:
                currents = list(product(number + 1, torch.stack(spikes)))
        count = torch.stack(spikes).sum(0)
        piece = F.cross_entropy(count, labels, reduction="sum") / len(prepared.labels)
        piece.backward()
        loss += piece.detach()
        counts.append(count.detach())
    gradients = {name: tensor.grad for name, tensor in parameters.items() if tensor.grad is not None}
    return {"loss": loss, "counts": torch.cat(counts), **gradients}


def neuron_results(inputs: NeuronInputs, reset: str = "after decay", precision: str = "float64") -> Results:
    """Spikes and gradients of LIF neurons alone."""
    dtype = DTYPES[precision]
    neurons = inputs.current.shape[-1]
    beta, threshold = (
        value.to(dtype).expand(neurons).clone().requires_grad_() for value in (inputs.beta, inputs.threshold)
    )
    spikes = torch.empty(inputs.current.shape, dtype=torch.bool)
    gradient = torch.empty(inputs.current.shape)
    for first in range(0, inputs.current.shape[1], CHUNK):
        part = slice(first, first + CHUNK)
        current = inputs.current[:, part].to(dtype).requires_grad_()
        fired = _lif(list(current), beta, threshold, reset)
        torch.autograd.backward(fired, list(inputs.grad_spikes[:, part].to(dtype)))
        assert current.grad is not None
        spikes[:, part] = torch.stack(fired) > 0.5
        gradient[:, part] = current.grad
    assert beta.grad is not None
    assert threshold.grad is not None
    return {"spikes": spikes, "current": gradient, "beta": beta.grad, "threshold": threshold.grad}
