"""synaptic against snnTorch's own Synaptic and against autograd, on every backend; either model in one stack."""

import itertools

import pytest
import snntorch
import torch
from helpers import ErrorRatios, device_of, rms, seeded
from neuron_cases import BACKENDS, SNNTORCH, currents, every_backend, every_reset, every_surrogate, output_weights
from stack_cases import STACKS, Stack, T, loss, results

from g2g_kernels import Neurons, g2g_stack, lif, synaptic, synaptic_step
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.triton.runtime import interpreted

scalar_or_per_neuron = pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "per neuron"])
held_or_varying = pytest.mark.parametrize("held", [False, True], ids=["varying", "held"])

NAMES = ("current.grad", "syn_decay.grad", "beta.grad", "threshold.grad")
STEPS, B, N = 17, 5, 7


def parameters(per_neuron: bool) -> list[torch.Tensor]:
    """γ, β and θ, one a neuron or one a layer, float64."""
    draw, size = seeded(9), N if per_neuron else 1
    spans = ((0.2, 0.6), (0.5, 0.4), (0.5, 1.0))
    return [least + span * torch.rand(size, generator=draw, dtype=torch.float64) for least, span in spans]


def drawn(held: bool, seed: int = 0) -> torch.Tensor:
    """Currents of which about a fifth make spikes."""
    return currents(*((B, N) if held else (STEPS, B, N)), seed=seed) * 0.5


def gradients(run, tensors, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Spikes and gradients of ``run(current, syn_decay, beta, threshold)``."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    spikes = run(*leaves)
    (spikes * weights.to(spikes)).sum().backward()
    return {"spikes": spikes.detach()} | {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def by_snntorch(current, syn_decay, beta, threshold, held: bool, reset: str, spike_grad) -> torch.Tensor:
    """The loop over time that snnTorch's users write."""
    neuron = snntorch.Synaptic(
        alpha=syn_decay, beta=beta, threshold=threshold, spike_grad=spike_grad, reset_mechanism=reset
    )
    synaptic_current, membrane = torch.zeros(2, B, N, dtype=current.dtype)
    spikes = []
    for t in range(STEPS):
        spike, synaptic_current, membrane = neuron(current if held else current[t], synaptic_current, membrane)
        spikes.append(spike)
    return torch.stack(spikes).to(current.dtype)


def by_autograd(current, syn_decay, beta, threshold, held: bool, reset: str, surrogate: str) -> torch.Tensor:
    """Spikes of the formula, differentiated by autograd through the surrogate's primitive."""
    synaptic_current, membrane = torch.zeros(2, B, N, dtype=current.dtype)
    spikes = []
    for t in range(STEPS):
        fired = (membrane > threshold).to(current.dtype)
        synaptic_current = syn_decay.clamp(0, 1) * synaptic_current + (current if held else current[t])
        membrane = beta.clamp(0, 1) * membrane + synaptic_current
        if reset == "subtract":
            membrane = membrane - threshold * fired
        if reset == "zero":
            membrane = (1 - fired) * membrane
        smooth = SURROGATES[surrogate].primitive(membrane - threshold, 2.0)
        spikes.append((membrane > threshold).to(current.dtype) + (smooth - smooth.detach()))
    return torch.stack(spikes)


def on(backend: str, held: bool, **options):
    def run(*tensors):
        steps = STEPS if held else None
        return synaptic(*(t.to(device_of(backend)) for t in tensors), steps=steps, backend=backend, **options).cpu()

    return run


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert torch.equal(actual["spikes"].double(), expected["spikes"].double())
    assert 0.05 < expected["spikes"].mean() < 0.7
    for name in NAMES:
        assert expected[name].any(), name
        assert rms(actual[name] - expected[name]) <= bound * rms(expected[name]), name


# --- snnTorch and autograd are the judges -------------------------------------------------------------------------


@scalar_or_per_neuron
@held_or_varying
@pytest.mark.parametrize("surrogate", SNNTORCH)
@every_reset
def test_gradients_equal_snntorch_in_float64(reset, surrogate, held, per_neuron):
    """Spikes identical; everything else is float64 in snnTorch too, so only float64 rounding separates the two."""
    tensors, weights = [drawn(held), *parameters(per_neuron)], output_weights(STEPS, B, N)
    theirs = gradients(lambda *t: by_snntorch(*t, held, reset, SNNTORCH[surrogate](2.0)), tensors, weights)
    ours = gradients(on("torch", held, reset=reset, surrogate=surrogate), tensors, weights)
    assert_near(ours, theirs, 1e-11)


@scalar_or_per_neuron
@held_or_varying
@every_surrogate
@every_reset
def test_gradients_equal_autograd_through_the_primitive(reset, surrogate, held, per_neuron):
    tensors, weights = [drawn(held, seed=1), *parameters(per_neuron)], output_weights(STEPS, B, N)
    expected = gradients(lambda *t: by_autograd(*t, held, reset, surrogate), tensors, weights)
    assert_near(gradients(on("torch", held, reset=reset, surrogate=surrogate), tensors, weights), expected, 1e-11)


@every_reset
@every_backend
def test_spikes_equal_snntorch_in_float32(backend, reset):
    """To the last bit: the same operations in the same order."""
    tensors = [tensor.float() for tensor in (drawn(False, seed=3), *parameters(True))]
    spikes = on(backend, False, reset=reset)(*tensors)
    assert torch.equal(spikes, by_snntorch(*tensors, False, reset, None))


@every_reset
def test_decays_are_clamped_and_have_no_gradient_outside_0_to_1(reset):
    tensors = [drawn(False), torch.tensor([-0.3, 0.2, 1.2, 0.5, 0.5, 0.5, 0.5]).double(),
               torch.tensor([0.5, 0.5, 0.5, -0.3, 0.2, 1.2, 0.5]).double(), torch.tensor([0.8]).double()]  # fmt: skip
    for backend in BACKENDS:
        of = [tensor if backend == "torch" else tensor.float() for tensor in tensors]
        ours = gradients(on(backend, False, reset=reset), of, output_weights(STEPS, B, N))
        assert [bool(g) for g in ours["syn_decay.grad"]] == [False, True, False, True, True, True, True], backend
        assert [bool(g) for g in ours["beta.grad"]] == [True, True, True, False, True, False, True], backend


@scalar_or_per_neuron
@every_reset
def test_steps_give_the_spikes_and_gradients_of_the_whole(reset, per_neuron):
    tensors, weights = [drawn(False), *parameters(per_neuron)], output_weights(STEPS, B, N)

    def step_by_step(current, *own):
        spikes, states = [], None
        for current_t in current:
            spike, states = synaptic_step(current_t, states, *own, reset=reset)
            spikes.append(spike)
        return torch.stack(spikes)

    expected = gradients(on("torch", False, reset=reset), tensors, weights)
    assert_near(gradients(step_by_step, tensors, weights), expected, 1e-11)


def test_without_decay_of_the_current_it_is_lif():
    """γ = 0 leaves C_t = I_t; resets to zero differ, since this one holds the membrane for the whole step."""
    current, (_, beta, threshold) = drawn(False), parameters(True)
    for reset in ("subtract", "none"):
        assert torch.equal(
            synaptic(current, 0.0, beta, threshold, reset=reset), lif(current, beta, threshold, reset=reset)
        )


# --- every backend ------------------------------------------------------------------------------------------------


@scalar_or_per_neuron
@held_or_varying
@every_reset
@every_backend
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch(backend, reset, held, per_neuron):
    """Over all surrogates and four draws (in the interpreter, which is slow, two)."""
    ratios, draws = ErrorRatios(), 2 if backend == "triton" and interpreted() else 4
    for surrogate, seed in itertools.product(SURROGATES, range(draws)):
        exact_tensors, weights = [drawn(held, seed=seed), *parameters(per_neuron)], output_weights(STEPS, B, N)
        tensors = [tensor.float() for tensor in exact_tensors]
        exact_tensors = [tensor.double() for tensor in tensors]
        options = {"reset": reset, "surrogate": surrogate, "alpha": 1.5 + seed / 4}
        exact = gradients(on("torch", held, **options), exact_tensors, weights)
        plain = gradients(on("torch", held, **options), tensors, weights)
        actual = gradients(on(backend, held, **options), tensors, weights)
        assert torch.equal(exact["spikes"].float(), plain["spikes"])  # no membrane within rounding of its threshold
        assert torch.equal(actual["spikes"], plain["spikes"])
        for name in NAMES:
            ratios.add(name, actual[name], plain[name], exact[name])
    ratios.check(cases=draws * len(SURROGATES))


def mixed(stack: Stack, leaves: dict[str, torch.Tensor]) -> list:
    """The stack's layers, each with a model, reset and surrogate of its own."""
    layers = stack.layers(leaves)
    options = (
        ("synaptic", "zero", "boxcar", 1.3),
        ("lif", "subtract", "triangle", 2.0),
        ("synaptic", "none", "atan", 3.0),
    )
    for k, (model, *rest) in enumerate(options):
        own = layers[k].population.parameters
        own = (leaves[f"syn_decay{k}"], *own) if model == "synaptic" else own
        layers[k] = layers[k]._replace(population=Neurons(model, own, *rest))
    return layers


@pytest.mark.parametrize("steps", [None, T], ids=["varying", "held"])
@pytest.mark.parametrize("case", ["ragged index", "mixer"])
@every_backend
def test_layers_of_either_model_in_one_stack(backend, case, steps):
    def run(dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
        device = device_of(backend)
        leaves = stack.leaves(dtype, device)
        for mask in stack.masks:
            mask.to(device)
        activity = g2g_stack(leaves["x"], mixed(stack, leaves), steps, backend=backend)
        loss(activity.counts, activity.rates).backward()
        return results(activity.counts, activity.rates, [spikes.dense() for spikes in activity.spikes], leaves)

    for seed in range(20):
        stack = Stack(STACKS[case], steps, seed=1000 * seed)
        for k in (0, 2):
            stack.tensors[f"syn_decay{k}"] = 0.3 + 0.4 * torch.rand(stack.masks[k].shape[0], generator=seeded(seed))
        exact, plain = run(torch.float64, "torch"), run(torch.float32, "torch")
        if all(torch.equal(exact[f"spikes{k}"], plain[f"spikes{k}"].double()) for k in range(3)):
            break
    actual = run(torch.float32, backend)
    for name, expected in exact.items():
        if name.startswith(("spikes", "counts")):
            assert torch.equal(actual[name].double(), expected), name
            assert expected.any(), name
        else:
            # float32 rounding through three layers and nine steps
            assert rms(actual[name] - expected) <= 1e-4 * rms(expected), name
