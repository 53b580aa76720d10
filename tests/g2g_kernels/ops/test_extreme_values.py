"""Infinite and undefined thresholds, decays and currents: every backend, and steps one by one, give the same."""

import itertools
import math

import pytest
import torch
from covering import every_pair
from helpers import backends_of, chained, device_of, seeded
from neuron_cases import BACKENDS as OF_NEURONS
from neuron_cases import served

from g2g_kernels import BlockMask, GroupLayout, Neurons, g2g_stack, neurons, neurons_step
from g2g_kernels.ops import g2g_stack as g2g_stack_module
from g2g_kernels.ops.neurons.models import MODELS, RESETS
from g2g_kernels.ops.neurons.surrogates import SURROGATES

# of NumPy, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
INF, NAN = math.inf, math.nan
T, B, N = 7, 3, 5


def parameters(model: str, **values: float) -> list[torch.Tensor]:
    usual = {"syn_decay": 0.8, "adapt_decay": 0.9, "beta": 0.9, "a": 0.05, "b": 0.1, "threshold": 1.0, "gain": 0.4}
    usual |= {"refractory": 2.0, "reset_current": 0.0, **values}
    of = MODELS[model]
    return [torch.tensor([usual[name]]).requires_grad_(name not in of.fixed) for name in of.parameters]


def spikes_of(backend: str, current: torch.Tensor, population: Neurons) -> torch.Tensor:
    """``"step"``: by steps, one at a time."""
    if backend != "step":
        own = tuple(tensor.to(device_of(backend)) for tensor in population.parameters)
        return neurons(current.to(device_of(backend)), population._replace(parameters=own), backend=backend).cpu()
    spikes, state = [], None
    for each in current:
        spike, state = neurons_step(each, state, population)
        spikes.append(spike)
    return torch.stack(spikes)


def outcome(backend: str, model: str, reset: str, surrogate: str, current: torch.Tensor, **values: float):
    """Spikes, and the gradients of the current and of each parameter."""
    current = current.clone().requires_grad_()
    population = Neurons(model, tuple(parameters(model, **values)), reset, surrogate, 2.0)
    result = spikes_of(backend, current, population)
    weight = torch.randn(T, B, N, generator=seeded(3))
    leaves = [current, *[each for each in population.parameters if each.requires_grad]]
    return [result.detach(), *torch.autograd.grad((result * weight).sum(), leaves)]


def currents() -> torch.Tensor:
    return torch.randn(T, B, N, generator=seeded(1)) * 1.2


def spoiled(value: float) -> torch.Tensor:
    current = currents()
    current[2, 0, 1] = value
    return current


BACKENDS = [*OF_NEURONS, "step"]


def backends(model: str) -> list[str]:
    return [backend for backend in BACKENDS if served({"backend": backend, "model": model})]


@every_pair(model=MODELS, reset=RESETS, surrogate=SURROGATES)
def test_neurons_of_infinite_threshold_never_fire_and_give_no_gradient(model, reset, surrogate):
    for backend in backends(model):
        parts = outcome(backend, model, reset, surrogate, currents(), threshold=INF)
        assert not any(part.any() for part in parts), backend


@every_pair(
    lambda case: (
        (not {"adapt_decay", "a", "b"} & {case.get("given", ("",))[0]} or case.get("model", "adlif") == "adlif")
        # −∞ is what refractory neurons compare with their threshold
        and (case.get("given") != ("threshold", -INF) or MODELS[case.get("model", "lif")].compared is None)
    ),
    given=(
        *itertools.product(("threshold", "beta", "current"), (INF, -INF, NAN)),
        *itertools.product(("adapt_decay", "a", "b"), (INF, NAN)),
    ),
    model=MODELS, reset=RESETS, surrogate=SURROGATES,
)  # fmt: skip
def test_what_is_not_finite_means_the_same_on_every_backend(given, model, reset, surrogate):
    name, value = given
    given, values = (spoiled(value), {}) if name == "current" else (currents(), {name: value})
    wanted = outcome("torch", model, reset, surrogate, given, **values)
    assert set(wanted[0].unique().tolist()) <= {0.0, 1.0}
    for backend in backends(model):
        for part, of_torch in zip(outcome(backend, model, reset, surrogate, given, **values), wanted, strict=True):
            assert torch.allclose(part, of_torch, rtol=1e-4, atol=1e-4, equal_nan=True), backend


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_decay_that_is_no_number_reaches_every_gradient(surrogate):
    """Not 0, which would train on in silence."""
    for backend in BACKENDS:
        _, to_current, to_beta, _ = outcome(backend, "lif", "subtract", surrogate, currents(), beta=NAN)
        assert to_current[0].isnan().all(), backend
        assert to_beta.isnan().all(), backend


@pytest.mark.parametrize("model", MODELS)
def test_an_infinite_current_of_the_last_step_spoils_no_parameter(model):
    """Eleven steps fill no two segments of the kernels."""
    current = torch.rand(11, 2, 3, generator=seeded(0))
    current[-1, 0, 1] = INF
    found = {}
    for backend in backends(model):
        own = tuple(parameters(model))
        spikes_of(backend, current, Neurons(model, own, "none")).sum().backward()
        found[backend] = torch.cat([each.grad for each in own if each.requires_grad])
    assert found["torch"].isfinite().all()
    for backend, grads in found.items():
        assert torch.allclose(grads, found["torch"], rtol=1e-4), backend


def test_an_infinite_current_is_discharged_by_a_reset_to_zero():
    for backend in BACKENDS:
        current = torch.zeros(4, 1, 1)
        current[0] = INF
        population = Neurons("lif", tuple(parameters("lif")), "zero")
        assert spikes_of(backend, current, population).flatten().tolist() == [1.0, 0.0, 0.0, 0.0], backend


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_stack_whose_last_layer_never_fires_gives_zeros_and_finite_gradients(reset, surrogate):
    draw = seeded(0)
    mask = BlockMask.full(GroupLayout(6, 2), GroupLayout(6, 2), 3)
    x = torch.rand(T, B, 6, generator=draw)
    for backend in backends_of(g2g_stack_module.WAYS):
        leaves = [mask.pack(torch.randn(6, 6, generator=seeded(number))).requires_grad_() for number in range(2)]
        own = (Neurons("lif", tuple(parameters("lif", threshold=theta)), reset, surrogate) for theta in (0.5, INF))
        layers = [
            chained(k, *of, None, each) for k, (*of, each) in enumerate(zip(leaves, [mask] * 2, own, strict=True))
        ]
        activity = g2g_stack(x, layers, backend=backend)
        assert torch.equal(activity.counts, torch.zeros(B, 6))
        assert 0 < activity.spikes[0].dense().mean() < 1
        grads = torch.autograd.grad(activity.counts.sum(), leaves)
        assert not any(grad.any() for grad in grads), backend
