"""Neurons of every model against a plain loop and snnTorch, on every backend and in stacks."""

import itertools
from collections.abc import Callable

import pytest
import torch
from covering import drawn_cases, every_pair
from helpers import ErrorRatios, device_of, rms, seeded
from neuron_cases import BACKENDS, SNNTORCH, by_snntorch, currents, every_backend, output_weights, served
from stack_cases import Stack, loss, results, stacks_on

from g2g_kernels import Neurons, adlif, adlif_step, cubalif, g2g_stack, lif_step, neurons, neurons_step, synaptic_step
from g2g_kernels.dispatch import BackendError
from g2g_kernels.ops.g2g_stack import cpu as stack_on_cpu
from g2g_kernels.ops.neurons import RESETS, run_neurons
from g2g_kernels.ops.neurons.models import MODELS, exact_gain
from g2g_kernels.ops.neurons.surrogates import SURROGATES

T, B, N = 17, 5, 7
BOTH = (False, True)
SEVERAL = ("synaptic", "adlif")  # the models with several states
PARAMETERS = {model: MODELS[model].parameters for model in MODELS}
Tensors = dict[str, torch.Tensor]
#: one value per neuron or per layer, held or not, from a state or not
KINDS = {"model": MODELS, "per_neuron": BOTH, "held": BOTH, "from_state": BOTH}
OPTIONS = {"reset": RESETS, "surrogate": SURROGATES}
#: of each parameter the least value, and by how much values differ
SPANS = {
    "syn_decay": (0.2, 0.6), "adapt_decay": (0.4, 0.5), "beta": (0.5, 0.4), "a": (-0.1, 0.4), "b": (-0.2, 0.8),
    "threshold": (0.5, 0.5), "gain": (0.3, 0.5), "refractory": (0.0, 3.0), "reset_current": (0.0, 1.0),
}  # fmt: skip


def drawn(
    model: str, per_neuron: bool, held: bool, from_state: bool, seed: int = 0, to_membrane: bool = False
) -> Tensors:
    """Lively neurons, float64: parameters, currents, and states of which some are above θ."""
    draw, size = seeded(seed + 9), N if per_neuron else 1
    tensors = {"current": currents(*((B, N) if held else (T, B, N)), seed=seed) * (0.5 if model == "synaptic" else 1)}
    for name in PARAMETERS[model]:
        least, span = SPANS[name]
        tensors[name] = least + span * torch.rand(size, generator=draw, dtype=torch.float64)
        if name in MODELS[model].fixed:
            tensors[name].round_()
    if to_membrane:
        tensors["to_membrane"] = currents(*tensors["current"].shape, seed=seed + 1) / 3
    if from_state:
        tensors["state"] = torch.randn(len(MODELS[model].states), B, N, generator=draw, dtype=torch.float64)
        if model == "cubalif":
            tensors["state"][0].round_().clamp_(min=0)
        elif MODELS[model].compared:
            tensors["state"][0] = torch.randint(0, 4, (B, N), generator=draw).minimum(
                (tensors["refractory"] - 1).clamp(min=0)
            )
    return {name: tensor.float().double() for name, tensor in tensors.items()}


def spike(x: torch.Tensor, surrogate: str, alpha: float) -> torch.Tensor:
    """1[x > 0], whose derivative is the surrogate's."""
    smooth = SURROGATES[surrogate].primitive(x, alpha)
    return (x > 0).to(x.dtype) + (smooth - smooth.detach())


def by_loop(model: str, reset: str, surrogate: str, alpha: float) -> Callable:
    """The loop over time that users write: the formula, differentiated by autograd."""

    def run(current, *parameters, state=None, to_membrane=None):
        own = dict(zip(PARAMETERS[model], parameters, strict=True))
        onto = torch.zeros_like(current) if to_membrane is None else to_membrane
        beta, threshold, base = own["beta"], own["threshold"], model.removeprefix("refractory_")
        zeros = torch.zeros(len(MODELS[model].states), B, N, dtype=current.dtype)
        *other, membrane = zeros if state is None else state
        if model == "cubalif":
            return by_cuba_loop(current, onto, own, other, membrane, reset, lambda x: spike(x, surrogate, alpha))
        # steps that are left; known: the last step was not refractory
        period, left = own.get("refractory", torch.zeros(1)).clamp(min=1) - 1, zeros[0]
        if base != model:
            left, *other = other
        known = (left == 0).to(current.dtype)
        left = (left - 1).clamp(min=0)
        spiked = zeros[-1] if state is None else known * spike(membrane - threshold, surrogate, alpha)
        left = torch.where(spiked > 0.5, period, left)
        spikes = []
        for t in range(T):
            now, extra = (each if each.dim() == 2 else each[t] for each in (current, onto))
            fired, free = (spiked > 0.5).to(current.dtype), (left == 0).to(current.dtype)
            kept, now = 1 - fired if reset == "zero" else 1, now * free
            held = membrane * kept - (threshold * fired if reset == "subtract" else 0)
            if base == "synaptic":
                other = [own["syn_decay"] * other[0] + now]
                membrane = kept * (beta * membrane + other[0] + extra)
            elif base == "adlif":
                other = [own["adapt_decay"] * other[0] + own["a"] * kept * membrane + own["b"] * spiked]
                membrane = beta * kept * membrane + now - other[0]
            else:
                membrane = beta * kept * membrane + now
            if reset == "subtract":
                membrane = membrane - threshold * fired
            membrane = free * membrane + (1 - free) * held
            spiked = free * spike(membrane - threshold, surrogate, alpha)
            # after the first refractory step R − 1, after the last 1
            was, left = left, torch.where(spiked > 0.5, period, (left - 1).clamp(min=0))
            spikes.append(spiked)
        return torch.stack(spikes), torch.stack([*([was] if base != model else []), *other, membrane])

    return run


def by_cuba_loop(current, onto, own, other, membrane, reset: str, spike: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """The four parts of a step in order, each where it applies."""
    (waiting, synaptic_current), spikes = other, []
    for t in range(T):
        now, extra = (each if each.dim() == 2 else each[t] for each in (current, onto))
        ready = (waiting == 0).to(current.dtype)
        charged = own["beta"] * membrane + own["gain"] * synaptic_current
        membrane = ready * charged + (1 - ready) * membrane
        synaptic_current = ready * own["syn_decay"] * synaptic_current + (1 - ready) * synaptic_current
        spikes.append(ready * spike(charged - own["threshold"]))
        fired = (spikes[-1] > 0.5).to(current.dtype)
        waiting = fired * (own["refractory"].clamp(min=1) - 1) + (1 - fired) * (waiting - 1).clamp(min=0)
        synaptic_current = synaptic_current + ready * (1 - fired) * now
        membrane = membrane + ready * (1 - fired) * extra
        synaptic_current = synaptic_current * (1 - fired * own["reset_current"])
        if reset != "none":
            membrane = membrane - fired * (own["threshold"] if reset == "subtract" else membrane)
    return torch.stack(spikes), torch.stack([waiting, synaptic_current, membrane])


def on(backend: str, model: str, reset: str, surrogate: str, alpha: float = 2.0) -> Callable:
    def run(current, *parameters, state=None, to_membrane=None):
        tensors = [each if each is None else each.to(device_of(backend)) for each in (current, state, *parameters)]
        own = () if to_membrane is None else (to_membrane.to(device_of(backend)),)
        population = Neurons(model, tuple(tensors[2:]), reset, surrogate, alpha)
        steps = T if current.dim() == 2 else None
        spikes, last = run_neurons(tensors[0], population, steps, backend, tensors[1], *own)
        return spikes.cpu(), last.cpu()

    return run


#: parameters without a gradient
FIXED = {name for model in MODELS.values() for name in model.fixed}


def outcome(run: Callable, tensors: Tensors) -> Tensors:
    """Spikes, the last states, and every gradient of a loss on both."""
    leaves = {name: tensor.detach().clone().requires_grad_(name not in FIXED) for name, tensor in tensors.items()}
    named = {name: leaves[name] for name in ("state", "to_membrane") if name in leaves}
    spikes, last = run(*(leaf for name, leaf in leaves.items() if name not in named), **named)
    states = torch.randn(last.shape, generator=seeded(6)).to(last)
    ((spikes * output_weights(T, B, N).to(spikes)).sum() + (last * states).sum()).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if name not in FIXED}
    return {"spikes": spikes.detach(), "last": last.detach()} | grads


def assert_near(actual: Tensors, expected: Tensors, bound: float) -> None:
    assert torch.equal(actual["spikes"].double(), expected["spikes"].double())
    assert 0.05 < expected["spikes"].mean() < 0.8
    for name, exact in expected.items():
        assert exact.any(), name
        assert rms(actual[name] - exact) <= bound * rms(exact), name


@every_pair(**KINDS, **OPTIONS)
def test_gradients_equal_those_of_a_plain_loop_in_float64(model, reset, surrogate, per_neuron, held, from_state):
    tensors = drawn(model, per_neuron, held, from_state)
    expected = outcome(by_loop(model, reset, surrogate, 1.5), tensors)
    assert_near(outcome(on("torch", model, reset, surrogate, 1.5), tensors), expected, 1e-11)


@every_pair(
    model=("synaptic", "cubalif", "refractory_synaptic"),
    **{name: KINDS[name] for name in KINDS if name != "model"},
    **OPTIONS,
)
def test_a_current_onto_the_membrane_is_that_of_a_plain_loop_in_float64(
    model, reset, surrogate, per_neuron, held, from_state
):
    tensors = drawn(model, per_neuron, held, from_state, to_membrane=True)
    expected = outcome(by_loop(model, reset, surrogate, 1.5), tensors)
    assert_near(outcome(on("torch", model, reset, surrogate, 1.5), tensors), expected, 1e-11)
    if "cpu" in BACKENDS:
        single = {name: tensor.float() for name, tensor in tensors.items()}
        with pytest.raises(BackendError, match="takes no currents onto the membrane"):
            outcome(on("cpu", model, reset, surrogate), single)


BY_SNNTORCH = ("lif", "synaptic")


@every_pair(
    model=BY_SNNTORCH, reset=RESETS, held=BOTH, per_neuron=BOTH,
    of=(("atan", 2.0), ("atan", 5.0), ("fast_sigmoid", 3.0), ("sigmoid", 4.0)),
)  # fmt: skip
def test_gradients_equal_snntorch_in_float64(model, reset, held, per_neuron, of):
    """Spikes identical; everything else is float64 in snnTorch too, so only float64 rounding separates the two. (Its
    sigmoid multiplies the spikes' float32 gradient by the slope, which is exact for a slope of 4.)"""
    (surrogate, alpha), tensors = of, drawn(model, per_neuron, held, False)
    expected = outcome(by_snntorch(reset, SNNTORCH[surrogate](alpha), T if held else None), tensors)
    assert_near(outcome(on("torch", model, reset, surrogate, alpha), tensors), expected, 1e-11)


@every_pair(backend=BACKENDS, model=BY_SNNTORCH, reset=RESETS, per_neuron=BOTH)
def test_spikes_equal_snntorch_in_float32(backend, model, reset, per_neuron):
    """To the last bit: the same operations in the same order."""
    for seed in range(10):
        tensors = [tensor.float() for tensor in drawn(model, per_neuron, False, False, seed).values()]
        assert torch.equal(on(backend, model, reset, "atan")(*tensors)[0], by_snntorch(reset)(*tensors)[0])


@every_pair(model=MODELS, reset=RESETS, surrogate=SURROGATES, per_neuron=BOTH, from_state=BOTH)
def test_steps_give_the_spikes_and_gradients_of_the_whole(model, reset, surrogate, per_neuron, from_state):
    def any_step(current, states, *own):
        return neurons_step(current, states, Neurons(model, own[:-3], *own[-3:]))

    steps = {"lif": lif_step, "synaptic": synaptic_step, "adlif": adlif_step}  # of those without a refractory period
    step = steps.get(model, any_step)

    def step_by_step(current, *own, state=None):
        spikes, state = [], state[0] if model == "lif" and from_state else state  # a membrane alone is no tuple
        for current_t in current:
            spike, state = step(current_t, state, *own, reset, surrogate, 1.5)
            spikes.append(spike)
        return torch.stack(spikes), torch.stack([state] if model == "lif" else state)

    tensors = drawn(model, per_neuron, False, from_state)
    assert_near(outcome(step_by_step, tensors), outcome(on("torch", model, reset, surrogate, 1.5), tensors), 1e-11)


def test_the_gain_is_that_of_the_exact_solution_of_the_equations():
    """τ·du/dt = −u + g, τ_syn·dg/dt = −g over a step of 1, by a matrix exponential; and its derivatives."""
    draws = torch.rand(200, 2, generator=seeded(1), dtype=torch.float64) * 30 + 0.05
    draws[:50, 1] = draws[:50, 0] * (1 + torch.logspace(-16, 0, 50, dtype=torch.float64))  # equal but for the last bits
    system = torch.zeros(200, 2, 2, dtype=torch.float64)
    system[:, 0, 0], system[:, 0, 1], system[:, 1, 1] = -1 / draws[:, 0], 1 / draws[:, 0], -1 / draws[:, 1]
    exact = torch.linalg.matrix_exp(system)
    syn_decay, beta = exact[:, 1, 1].clone().requires_grad_(), exact[:, 0, 0].clone().requires_grad_()
    torch.testing.assert_close(exact_gain(syn_decay, beta), exact[:, 0, 1], rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(exact_gain, (syn_decay[::7], beta[::7]))
    edges = torch.tensor([0.0, 0.5, 1.0, 0.0]), torch.tensor([0.5, 0.0, 0.5, 0.0])
    assert exact_gain(*edges).tolist() == [0, 0.5, 0.5, 0]
    assert exact_gain(torch.tensor(0.5), torch.tensor(1.0)) == 0


@every_backend
def test_a_step_of_current_based_neurons_by_hand(backend):
    """α = β = ½: c = −½·ln ½ = 0.3466. A current of 4 in step 0 makes u 1.386 > 1 in step 1. With R = 3 nothing arrives
    in the steps 1, 2 and 3; that of step 4 makes u > 1 in step 5, unless less is left of g than is missing."""
    if backend == "triton":
        with pytest.raises(BackendError, match="'cubalif' resets them at once"):
            cubalif(torch.zeros(2, 1, 1, device=device_of(backend)), 0.5, 0.5, 1.0, backend=backend)
        return
    current = torch.tensor([4.0, 9, 9, 9, 4, 0, 0, 0]).reshape(8, 1, 1)
    found = [
        cubalif(current, 0.5, 0.5, 1.0, refractory=3, reset_current=reset, backend=backend).flatten().tolist()
        for reset in (True, False)
    ]
    # g is 4 before step 1 and, if it stays, 2 after it, until step 4: u_4 = 0.693, g_4 = 1 + 4, u_5 = 0.347 + 1.733
    assert found == [[0, 1, 0, 0, 0, 1, 0, 0]] * 2
    current[4] = 2.5  # without what is left, u_5 = 0.866
    found = [
        cubalif(current, 0.5, 0.5, 1.0, refractory=3, reset_current=reset, backend=backend)[5].item()
        for reset in (True, False)
    ]
    assert found == [0, 1]


@every_pair(
    # synaptic holds the membrane of a reset to zero for the whole step
    lambda case: {"reset": "zero", "model": "synaptic"}.items() - case.items(),
    model=SEVERAL, backend=BACKENDS, reset=RESETS, threshold=("per neuron", -0.1),
)  # fmt: skip
def test_without_what_it_adds_a_model_is_lif(model, backend, reset, threshold):
    """γ = 0 leaves C_t = I_t; a = b = 0 leaves w at zero."""
    tensors = {name: tensor.float() for name, tensor in drawn("adlif", True, True, False).items()}
    theta = tensors["threshold"] if threshold == "per neuron" else torch.tensor(threshold)
    own = {"lif": (tensors["beta"],), "synaptic": (0.0, tensors["beta"]), "adlif": (0.9, tensors["beta"], 0.0, 0.0)}
    spikes = [
        neurons(tensors["current"], Neurons(name, (*own[name], theta), reset), T, backend=backend)
        for name in ("lif", model)
    ]
    assert torch.equal(*spikes)


@every_backend
def test_one_step_after_a_spike_by_hand(backend):
    """U_0 = 2 > θ = 1: w_1 = 0.5·0.25 + 0.25·2 + 0.5 = 1.125, U_1 = 0.5·2 + 3 − 1.125 − 1 = 1.875."""
    state = torch.tensor([[[0.25]], [[2.0]]], device=device_of(backend))
    population = Neurons("adlif", (0.5, 0.5, 0.25, 0.5, 1.0))
    current = torch.tensor([[[3.0]]], device=device_of(backend))
    spikes, last = run_neurons(current, population, backend=backend, state=state)
    assert spikes.item() == 1
    assert last.flatten().tolist() == [1.125, 1.875]
    _, last = run_neurons(current, population._replace(reset="zero"), backend=backend, state=state)
    assert last.flatten().tolist() == [0.625, 2.375]  # both of them see a membrane of 0


@every_backend
def test_the_spike_before_a_run_without_a_state_is_a_constant(backend):
    """From a state of zeros, θ also decides S_0 = 1[0 > θ], by its surrogate: −b·σ'(−θ)·∂L/∂w_1."""
    current = torch.zeros(1, 1, 1, device=device_of(backend))
    grads = []
    for state in (None, torch.zeros(2, 1, 1, device=device_of(backend))):
        theta = torch.tensor(1.0, device=device_of(backend), requires_grad=True)
        population = Neurons("adlif", (0.5, 0.5, 0.25, 0.5, theta), surrogate="triangle", alpha=0.5)
        _, last = run_neurons(current, population, backend=backend, state=state)
        last[0].sum().backward()
        grads.append(theta.grad.item())
    assert grads == [0, -0.5 * 0.25]


@every_pair(served, model=MODELS, backend=BACKENDS)
def test_decays_are_clamped_and_the_other_parameters_are_free(model, backend):
    tensors = {name: tensor.float() for name, tensor in drawn(model, True, False, False).items()}
    ranges = [-0.3, 0.2, 1.2, 0.0, 1.0, 0.5, 0.5], [0.5, 0.5, 0.5, -0.3, 0.2, 1.2, 0.5]
    decays = dict(zip(MODELS[model].decays, ranges, strict=False))
    free = {"a": [0.1, -0.1, 0.0, 0.2, 0.1, 0.3, -0.2], "b": [-0.5, 2.0, 0.0, 0.2, 0.1, 0.3, -0.2]}
    free = {name: value for name, value in free.items() if name in tensors}
    tensors |= {name: torch.tensor(value) for name, value in {**decays, **free}.items()}
    found = outcome(on(backend, model, "subtract", "atan"), tensors)
    for name, values in decays.items():
        assert [bool(g) for g in found[name]] == [0 < value < 1 for value in values], name
    assert all(found[name].all() for name in free)
    inside = tensors | {name: tensors[name].clamp(0, 1) for name in decays}
    assert torch.equal(found["spikes"], outcome(on(backend, model, "subtract", "atan"), inside)["spikes"])


@every_backend
def test_adaptive_neurons_that_reset_to_zero_are_those_of_the_symplectic_euler_rule(backend):
    """SE-adLIF as Baronig et al. (2024) write it: the adaptation from the new membrane, after the reset."""
    steps, alpha, beta, a, b = 200, 0.9, 0.98, 3.0, 5.0
    current = 3 * torch.randn(steps, 3, 7, generator=seeded(0)) + 2
    membrane = adaptation = torch.zeros(3, 7, dtype=torch.float64)
    expected = []
    for each in current.double():
        membrane = alpha * membrane + (1 - alpha) * (each - adaptation)
        spikes = (membrane > 1).double()
        membrane = membrane * (1 - spikes)
        adaptation = beta * adaptation + (1 - beta) * (a * membrane + b * spikes)
        expected.append(spikes)
    share = (1 - alpha) * (1 - beta)
    on = current.to(device_of(backend))
    found = adlif((1 - alpha) * on, beta, alpha, share * a, share * b, 1.0, reset="zero", backend=backend)
    assert torch.stack(expected).sum() > 100
    assert torch.equal(found.cpu().double(), torch.stack(expected))


@pytest.mark.ci
@every_pair(served, backend=[name for name in BACKENDS if name != "torch"], model=MODELS)
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch(model, backend):
    """Spikes and states are equal to the last bit."""
    ratios = ErrorRatios()
    cases = drawn_cases(KINDS | OPTIONS | {"model": (model,)})
    for number, (name, case) in enumerate(cases.items()):
        print(name)
        options = model, case.pop("reset"), case.pop("surrogate"), 1 + number % 5 / 4
        for seed in itertools.count(number):  # until no membrane is within rounding of its threshold
            exact_tensors = drawn(**case, seed=seed)
            tensors = {name: tensor.float() for name, tensor in exact_tensors.items()}
            exact, plain = (outcome(on("torch", *options), each) for each in (exact_tensors, tensors))
            if torch.equal(exact["spikes"].float(), plain["spikes"]):
                break
        actual = outcome(on(backend, *options), tensors)
        assert torch.equal(actual["spikes"], plain["spikes"])
        assert torch.equal(actual["last"], plain["last"])
        for name in ("current", *(name for name in PARAMETERS[model] if name not in MODELS[model].fixed)):
            ratios.add(name, actual[name], plain[name], exact[name])
    ratios.check(len(cases))


def with_models(stack: Stack, models: tuple[str, ...], seed: int, states: bool) -> Stack:
    """The stack with the parameters, and states, of layers of these models."""
    draw, least = seeded(seed), {"syn_decay": 0.3, "adapt_decay": 0.6, "a": 0.0, "b": 0.05, "gain": 0.4}
    for k, model in enumerate(models):
        size = stack.masks[k].shape[0]
        for name in set(MODELS[model].parameters) & set(least):
            stack.tensors[f"{name}{k}"] = least[name] + 0.3 * torch.rand(size, generator=draw)
        for number, name in enumerate(MODELS[model].fixed):
            stack.tensors[f"{name}{k}"] = torch.arange(float(size)) % (4 - 2 * number)
        if states and model != "lif":
            stack.tensors[f"state{k}"] = torch.randn(len(MODELS[model].states), B, size, generator=draw) * 0.5
            if model == "cubalif":
                stack.tensors[f"state{k}"][0].round_().clamp_(min=0)
    return stack


def run_stack(
    stack: Stack, models: tuple[str, ...], dtype: torch.dtype, backend: str, first: str = "subtract", chunk=None
) -> Tensors:
    """Results of a stack whose layers have resets, from the first one on, and surrogates of their own."""
    leaves = stack.leaves(dtype, device_of(backend))
    layers = stack.layers(leaves)
    for k, model in enumerate(models):
        own = tuple(leaves[f"{name}{k}"] for name in MODELS[model].parameters)
        reset, surrogate = RESETS[(RESETS.index(first) + k) % 3], ("triangle", "atan", "fast_sigmoid")[k]
        population = Neurons(model, own, reset, surrogate, 1.5)
        layers[k] = layers[k]._replace(neurons=population, state=leaves.get(f"state{k}"))
    activity = g2g_stack(leaves["x"], layers, stack.steps, backend=backend, chunk=chunk)
    states = sum((state * torch.randn(state.shape, generator=seeded(4)).to(state)).sum() for state in activity.states)
    (loss(activity.counts, activity.rates) + states).backward()
    return results(activity.counts, activity.rates, [spikes.dense() for spikes in activity.spikes], leaves)


@every_pair(
    lambda case: case.get("backend") != "triton" or "cubalif" not in case.get("models", ()),
    backend=BACKENDS,
    models=(
        ("adlif", "lif", "adlif"), ("synaptic", "lif", "synaptic"), ("synaptic", "adlif", "lif"),
        ("cubalif", "lif", "cubalif"),
    ),
    first=RESETS,
    steps=(None, 9),
    # chunks are run again in the backward pass, in which the tensors of tests/execute_kernels.sh are on no GPU
    chunk=(None, pytest.param(4, id="chunks", marks=pytest.mark.driver)),
)  # fmt: skip
def test_layers_of_several_models_from_states_with_dropped_neurons(backend, models, first, steps, chunk):
    case = stacks_on(backend)["ragged index" if chunk else "random single weights"]
    for seed in range(20):
        stack = with_models(Stack(case, steps, seed=1000 * seed, dropout=0.2), models, seed, states=chunk is None)
        exact, plain = (run_stack(stack, models, dtype, "torch", first) for dtype in (torch.float64, torch.float32))
        if all(torch.equal(exact[f"spikes{k}"], plain[f"spikes{k}"].double()) for k in range(3)):
            break
    actual = run_stack(stack, models, torch.float32, backend, first, chunk)
    for name, expected in exact.items():
        if name.startswith(("spikes", "counts")):
            assert torch.equal(actual[name].double(), expected), name
            assert expected.any(), name
        else:
            # float32 rounding through three layers and nine steps
            assert rms(actual[name] - expected) <= 1e-4 * rms(expected), name
    for k, dropped in enumerate(stack.dropped):
        assert not actual[f"spikes{k}"][:, dropped].any()


@every_backend
def test_a_dropped_neuron_that_would_oscillate_gets_no_gradient(backend):
    """a = 3 makes w and U swing ever further; what comes of it is taken away, and gradients are exactly zero."""
    models = ("adlif", "lif", "adlif")
    stack = with_models(Stack(stacks_on(backend)["ragged index"], None), models, 0, states=False)
    stack.tensors["a0"] = torch.full_like(stack.tensors["a0"], 3.0)
    before = run_stack(stack, models, torch.float32, backend)
    assert before["spikes0"][..., 5].any()
    stack.dropped[0] = torch.zeros(B, stack.masks[0].shape[0], dtype=torch.bool)
    stack.dropped[0][:, 5] = True
    after = run_stack(stack, models, torch.float32, backend)
    assert not after["spikes0"][..., 5].any()
    for name in ("bias0", *(f"{name}0" for name in PARAMETERS["adlif"])):
        assert before[f"{name}.grad"][5] != 0, name
        assert after[f"{name}.grad"][5] == 0, name
    assert not stack.masks[0].unpack(after["values0.grad"])[5].any()
    assert not stack.masks[1].unpack(after["values1.grad"])[:, 5].any()


def test_its_input_gradients_take_the_product():
    """The spike before is fed back, so that gradients of currents are no sum of decaying events."""
    assert "adlif" in stack_on_cpu._why_product("adlif", "subtract", "triangle", False)
    assert stack_on_cpu._why_product("lif", "subtract", "triangle", False) is None
