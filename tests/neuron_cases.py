"""Currents, parameters and neurons clear of their threshold, for the tests of neurons alone."""

import math
from typing import Any

import pytest
import snntorch
import torch
from helpers import backends_of, device_of, lif_by_autograd, seeded
from snntorch import surrogate as snn_surrogate

from g2g_kernels import lif
from g2g_kernels.ops.neurons import MODELS, RESETS, operator
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.triton.runtime import interpreted, unavailable

#: snnTorch's surrogates that have the same formula, α being their slope
SNNTORCH = {"atan": snn_surrogate.atan, "fast_sigmoid": snn_surrogate.fast_sigmoid, "sigmoid": snn_surrogate.sigmoid}

SYNAPTIC = ("alpha", "beta", "threshold")  # snnTorch's names

#: the backends that run neurons alone, Triton's interpreter included
BACKENDS = [*backends_of(operator), *(["triton"] if interpreted() and unavailable() is None else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_reset = pytest.mark.parametrize("reset", RESETS)
every_surrogate = pytest.mark.parametrize("surrogate", SURROGATES)

T, B, N = 23, 5, 7
GRADIENTS = ("current.grad", "beta.grad", "threshold.grad")


def served(case: dict[str, Any]) -> bool:
    """Whether a case's backend runs its model."""
    return case.get("backend") != "triton" or MODELS[case.get("model", "lif")].compared is None


def currents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Currents that make about a quarter of the spikes at β = 0.9, θ = 1, some of them after several resets."""
    return (torch.randn(*shape, generator=seeded(seed), dtype=torch.float64) * 0.8 + 0.25).to(dtype)


def parameters(
    per_neuron: bool, dtype: torch.dtype = torch.float64, size: int = N
) -> tuple[torch.Tensor, torch.Tensor]:
    """β and θ, per neuron or per layer."""
    if not per_neuron:
        return torch.tensor([0.9], dtype=dtype), torch.tensor([0.7], dtype=dtype)
    drawn = torch.rand(2, size, generator=seeded(9), dtype=torch.float64)
    return (0.5 + 0.5 * drawn[0]).to(dtype), (0.5 + drawn[1]).to(dtype)


def output_weights(*shape: int) -> torch.Tensor:
    """∂loss/∂spikes, of values that float32 holds exactly: snnTorch's spikes, and so their gradients, are float32."""
    return torch.randn(*shape, generator=seeded(5)).double()


def gradients(run, current, beta, threshold, grad_spikes) -> dict[str, torch.Tensor]:
    """Spikes and gradients of ``run(current, beta, threshold)``, float64 on the CPU but for the gradients' dtypes."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (current, beta, threshold)]
    spikes = run(*leaves)
    (spikes * grad_spikes.to(spikes)).sum().backward()
    return {"spikes": spikes.detach()} | {name: leaf.grad for name, leaf in zip(GRADIENTS, leaves, strict=True)}


def by_snntorch(reset: str, spike_grad=None, steps: int | None = None):
    """The loop over time that snnTorch's users write, of LIF or of synaptic neurons: spikes and the last states."""

    def run(current, *own, state=None):
        kind, names = (snntorch.Leaky, ("beta", "threshold")) if len(own) == 2 else (snntorch.Synaptic, SYNAPTIC)
        neuron = kind(**dict(zip(names, own, strict=True)), spike_grad=spike_grad, reset_mechanism=reset)
        # registered as buffers above, so that the caller's own leaves receive the gradients
        assert neuron.beta is own[-2]
        assert neuron.threshold is own[-1]
        over_time = current if steps is None else current.expand(steps, *current.shape)
        states, spikes = [torch.zeros_like(over_time[0]) for _ in own[1:]], []
        for current_t in over_time:
            spike, *states = neuron(current_t, *states)
            spikes.append(spike)
        return torch.stack(spikes).to(current.dtype), torch.stack(states)

    return run


def lif_on(backend: str | None, **options):
    def run(*tensors):
        tensors = [tensor.to(device_of(backend)) for tensor in tensors]
        return lif(*tensors, backend=backend, **options).cpu()

    return run


def check_one_step_by_hand(backend: str, reset: str) -> None:
    """U_1 = I_1, since U_0 = 0 (and no reset with θ > 0): S = 1[I > θ], ∂S/∂I = σ'(I − θ) = −∂S/∂θ, ∂S/∂β = 0."""
    current = torch.tensor([[-1.0, 0.5, 1.0, 1.25, 3.0]], dtype=torch.float32)
    run, own = lif_on(backend, reset=reset), (torch.tensor([0.9]), torch.tensor([1.0]))
    results = gradients(run, current, *own, torch.ones(1, 5))
    slope = 1 / (1 + (math.pi * (current - 1)) ** 2)
    assert results["spikes"].tolist() == [[0, 0, 0, 1, 1]]
    torch.testing.assert_close(results["current.grad"], slope)
    torch.testing.assert_close(results["threshold.grad"], -slope.sum(1))
    assert results["beta.grad"].tolist() == [0]


def check_gradients_alone(run, tensors, grad_spikes) -> None:
    """Those of some of ``tensors`` are the same as those of all."""
    every = gradients(run, *tensors, grad_spikes)
    for needed in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [tensor.clone().requires_grad_(number in needed) for number, tensor in enumerate(tensors)]
        (run(*leaves) * grad_spikes.float()).sum().backward()
        for number, (leaf, name) in enumerate(zip(leaves, GRADIENTS, strict=True)):
            assert torch.equal(leaf.grad, every[name]) if number in needed else leaf.grad is None, (name, needed)


def clear_of_threshold(current, beta, threshold, reset: str, by: float = 1e-4) -> torch.Tensor:
    """bool [..., N], the neurons whose float64 membrane keeps clear of θ at all steps. A float32 membrane of about 1 is
    wrong by some 1e-6 after T steps; nearer to θ than that the spike may differ, and with it the rest of that neuron's
    history."""
    tensors = current.double(), beta.double(), threshold.double()
    _, membranes = lif_by_autograd(*tensors, reset, SURROGATES["atan"].primitive, 2.0)
    clear = ((membranes - threshold).abs() > by).all(0)
    assert clear.float().mean() > 0.9
    return clear
