"""adlif against a plain loop, autograd and finite differences, on every backend; in stacks, from states, dropped."""

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import ErrorRatios, MaskCase, device_of, rms, seeded
from neuron_cases import BACKENDS, currents, every_backend, every_reset, every_surrogate, output_weights
from stack_cases import STACKS, Stack, loss, results

from g2g_kernels import Neurons, adlif, adlif_step, g2g_stack, lif
from g2g_kernels.ops.g2g_stack import cpu as stack_on_cpu
from g2g_kernels.ops.neurons import RESETS, run_neurons
from g2g_kernels.ops.neurons.models import MODELS
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.triton.runtime import interpreted

PARAMETERS = MODELS["adlif"].parameters
T, B, N = 17, 5, 7
Tensors = dict[str, torch.Tensor]
#: reset, surrogate, one value per neuron or per layer, held or not, from a state or not
CASES = list(itertools.product(RESETS, SURROGATES, (False, True), (False, True), (False, True)))


def drawn(per_neuron: bool, held: bool, from_state: bool, seed: int = 0) -> Tensors:
    """Lively neurons, float64: ρ, β, a, b and θ, currents, and states of which some are above θ."""
    draw, size = seeded(seed + 9), N if per_neuron else 1
    spans = ((0.4, 0.5), (0.5, 0.4), (-0.1, 0.4), (-0.2, 0.8), (0.5, 0.5))
    tensors = {"current": currents(*((B, N) if held else (T, B, N)), seed=seed)}
    for name, (least, span) in zip(PARAMETERS, spans, strict=True):
        tensors[name] = least + span * torch.rand(size, generator=draw, dtype=torch.float64)
    if from_state:
        tensors["state"] = torch.randn(2, B, N, generator=draw, dtype=torch.float64)
    return {name: tensor.float().double() for name, tensor in tensors.items()}


class Spike(torch.autograd.Function):
    """1[x > 0], whose derivative is the surrogate's."""

    @staticmethod
    def forward(ctx, x, surrogate, alpha):
        ctx.save_for_backward(x)
        ctx.derivative, ctx.alpha = SURROGATES[surrogate].derivative, alpha
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative(ctx.saved_tensors[0], ctx.alpha), None, None


def by_loop(reset: str, surrogate: str, alpha: float = 2.0, spike: Callable | None = None) -> Callable:
    """The loop over time that users write: the formula, differentiated by autograd."""

    def run(current, adapt_decay, beta, a, b, threshold, state=None):
        step = spike or (lambda t, x: Spike.apply(x, surrogate, alpha))
        adaptation, membrane = torch.zeros(2, B, N, dtype=current.dtype) if state is None else state
        spiked = torch.zeros(B, N, dtype=current.dtype) if state is None else step(-1, membrane - threshold)
        spikes = []
        for t in range(T):
            fired = (spiked > 0.5).to(current.dtype)
            if reset == "zero":
                membrane = (1 - fired) * membrane
            adaptation = adapt_decay * adaptation + a * membrane + b * spiked
            membrane = beta * membrane + (current if current.dim() == 2 else current[t]) - adaptation
            if reset == "subtract":
                membrane = membrane - threshold * fired
            spiked = step(t, membrane - threshold)
            spikes.append(spiked)
        return torch.stack(spikes), torch.stack([adaptation, membrane])

    return run


def on(backend: str, reset: str, surrogate: str, alpha: float = 2.0) -> Callable:
    def run(current, *parameters, state=None):
        tensors = [each if each is None else each.to(device_of(backend)) for each in (current, state, *parameters)]
        population = Neurons("adlif", tuple(tensors[2:]), reset, surrogate, alpha)
        steps = T if current.dim() == 2 else None
        spikes, last = run_neurons(tensors[0], population, steps, backend, tensors[1])
        return spikes.cpu(), last.cpu()

    return run


def outcome(run: Callable, tensors: Tensors) -> Tensors:
    """Spikes, the last states, and every gradient of a loss on both."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    spikes, last = run(*(leaves[name] for name in ("current", *PARAMETERS)), state=leaves.get("state"))
    weights = output_weights(T, B, N).to(spikes)
    states = torch.randn(last.shape, generator=seeded(6)).to(last)
    ((spikes * weights).sum() + (last * states).sum()).backward()
    return {"spikes": spikes.detach(), "last": last.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_near(actual: Tensors, expected: Tensors, bound: float) -> None:
    assert torch.equal(actual["spikes"].double(), expected["spikes"].double())
    assert 0.05 < expected["spikes"].mean() < 0.8
    for name, exact in expected.items():
        assert exact.any(), name
        assert rms(actual[name] - exact) <= bound * rms(exact), name


# --- the formula --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reset", "surrogate", "per_neuron", "held", "from_state"), CASES)
def test_gradients_equal_those_of_a_plain_loop_in_float64(reset, surrogate, per_neuron, held, from_state):
    tensors = drawn(per_neuron, held, from_state)
    expected = outcome(by_loop(reset, surrogate, 1.5), tensors)
    assert_near(outcome(on("torch", reset, surrogate, 1.5), tensors), expected, 1e-11)


@every_surrogate
@every_reset
def test_gradients_equal_finite_differences_with_the_primitive_as_the_spike(reset, surrogate):
    """S + primitive(U − θ) − primitive(U⁰ − θ⁰), with S and U⁰ of the undisturbed run: equal to S there, and smooth."""
    tensors = drawn(False, False, True)
    primitive = SURROGATES[surrogate].primitive
    undisturbed: dict[int, torch.Tensor] = {}

    def record(t, x):
        undisturbed[t] = x
        return (x > 0).double()

    def smooth(t, x):
        return (undisturbed[t] > 0).double() + primitive(x, 2.0) - primitive(undisturbed[t], 2.0)

    order = ("current", *PARAMETERS)
    by_loop(reset, surrogate, spike=record)(*(tensors[name] for name in order), state=tensors["state"])
    weights, states = output_weights(T, B, N), torch.randn(2, B, N, generator=seeded(6)).double()

    def loss_of(moved: Tensors) -> float:
        spikes, last = by_loop(reset, surrogate, spike=smooth)(*(moved[name] for name in order), state=moved["state"])
        return ((spikes * weights).sum() + (last * states).sum()).item()

    found = outcome(on("torch", reset, surrogate), tensors)
    for name, tensor in tensors.items():
        direction = torch.randn(tensor.shape, generator=seeded(8), dtype=torch.float64)
        up, down = (loss_of(tensors | {name: tensor + sign * 1e-6 * direction}) for sign in (1, -1))
        along = (found[name] * direction).sum().item()
        assert along == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "per neuron"])
@every_reset
def test_steps_give_the_spikes_and_gradients_of_the_whole(reset, per_neuron):
    def step_by_step(current, *own, state=None):
        spikes = []
        for current_t in current:
            spike, state = adlif_step(current_t, state, *own, reset=reset)
            spikes.append(spike)
        return torch.stack(spikes), torch.stack(state)

    for from_state in (False, True):
        tensors = drawn(per_neuron, False, from_state)
        assert_near(outcome(step_by_step, tensors), outcome(on("torch", reset, "atan"), tensors), 1e-11)


@every_reset
@every_backend
def test_without_adaptation_it_is_lif(backend, reset):
    """a = b = 0 leaves w at zero; a held current, a threshold above and one below zero."""
    tensors = {name: tensor.float() for name, tensor in drawn(True, True, False).items()}
    current, beta = tensors["current"], tensors["beta"]
    for threshold in (tensors["threshold"], torch.tensor(-0.1)):
        expected = lif(current, beta, threshold, T, reset, backend=backend)
        actual = adlif(current, 0.9, beta, 0.0, 0.0, threshold, T, reset, backend=backend)
        assert torch.equal(actual, expected)


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


@every_backend
def test_decays_are_clamped_and_the_other_parameters_are_free(backend):
    tensors = {name: tensor.float() for name, tensor in drawn(True, False, False).items()}
    tensors["adapt_decay"] = torch.tensor([-0.3, 0.2, 1.2, 0.5, 0.5, 0.5, 0.5])
    tensors["beta"] = torch.tensor([0.5, 0.5, 0.5, -0.3, 0.2, 1.2, 0.5])
    tensors["a"] = torch.tensor([0.1, -0.1, 0.0, 0.2, 0.1, 0.3, -0.2])
    tensors["b"] = torch.tensor([-0.5, 2.0, 0.0, 0.2, 0.1, 0.3, -0.2])
    found = outcome(on(backend, "subtract", "atan"), tensors)
    assert [bool(g) for g in found["adapt_decay"]] == [False, True, False, True, True, True, True]
    assert [bool(g) for g in found["beta"]] == [True, True, True, False, True, False, True]
    assert found["a"].all()
    assert found["b"].all()
    inside = tensors | {name: tensors[name].clamp(0, 1) for name in ("adapt_decay", "beta")}
    assert torch.equal(found["spikes"], outcome(on(backend, "subtract", "atan"), inside)["spikes"])


# --- every backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch(backend):
    """In every combination (in the interpreter, which is slow, in every seventh); spikes are equal to the last bit."""
    ratios = ErrorRatios()
    cases = CASES[::7] if backend == "triton" and interpreted() else CASES
    for number, (reset, surrogate, *kind) in enumerate(cases):
        exact_tensors = drawn(*kind, seed=number)
        tensors = {name: tensor.float() for name, tensor in exact_tensors.items()}
        options = (reset, surrogate, 1 + number % 5 / 4)
        exact = outcome(on("torch", *options), exact_tensors)
        plain, actual = outcome(on("torch", *options), tensors), outcome(on(backend, *options), tensors)
        assert torch.equal(actual["spikes"], plain["spikes"]), (reset, surrogate, *kind)
        assert torch.equal(actual["last"], plain["last"]), (reset, surrogate, *kind)
        if not torch.equal(exact["spikes"].float(), plain["spikes"]):
            continue  # a membrane within rounding of its threshold
        for name in ("current", *PARAMETERS):
            ratios.add(name, actual[name], plain[name], exact[name])
    compared = {count for _, count in ratios.means().values()}
    assert min(compared) >= 0.9 * len(cases)
    ratios.check(cases=min(compared))


# --- in stacks ----------------------------------------------------------------------------------------------------

#: for the interpreter, to which every unit is a call
SMALL_STACKS = {
    "ragged index": (MaskCase(14, 9, 2, "index", "index", 4), MaskCase(10, 14, 2, "index", "index", 4),
                     MaskCase(6, 10, 2, "index", "index", 4)),
    "random single weights": (MaskCase(14, 9, 3, "random", "random", 1), MaskCase(10, 14, 3, "random", "random", 1),
                              MaskCase(6, 10, 3, "random", "random", 1)),
}  # fmt: skip


def adaptive(stack: Stack, leaves: Tensors, reset: str = "subtract", surrogate: str = "atan") -> list:
    """The stack's layers, all adaptive but the second; with states if the leaves have them."""
    layers = stack.layers(leaves, reset=reset, surrogate=surrogate)
    for k in (0, 2):
        own = tuple(leaves[f"{name}{k}"] for name in PARAMETERS)
        layers[k] = layers[k]._replace(
            population=Neurons("adlif", own, reset, surrogate, 1.5), state=leaves.get(f"state{k}")
        )
    return layers


def with_adaptation(stack: Stack, seed: int, states: bool) -> Stack:
    draw = seeded(seed)
    for k in (0, 2):
        size = stack.masks[k].shape[0]
        for name, least in (("adapt_decay", 0.6), ("a", 0.0), ("b", 0.05)):
            stack.tensors[f"{name}{k}"] = least + 0.3 * torch.rand(size, generator=draw)
        if states:
            stack.tensors[f"state{k}"] = torch.randn(2, B, size, generator=draw) * 0.5
    return stack


def run_stack(stack: Stack, dtype: torch.dtype, backend: str, chunk: int | None = None, **options) -> Tensors:
    device = device_of(backend)
    leaves = stack.leaves(dtype, device)
    for mask in stack.masks:
        mask.to(device)
    activity = g2g_stack(leaves["x"], adaptive(stack, leaves, **options), stack.steps, backend=backend, chunk=chunk)
    states = sum((state * torch.randn(state.shape, generator=seeded(4)).to(state)).sum() for state in activity.states)
    (loss(activity.counts, activity.rates) + states).backward()
    return results(activity.counts, activity.rates, [spikes.dense() for spikes in activity.spikes], leaves)


@pytest.mark.parametrize(
    # chunks are run again in the backward pass, in which the tensors of tests/execute_kernels.sh are on no GPU
    "chunk",
    [pytest.param(None, id="whole"), pytest.param(4, id="chunks", marks=pytest.mark.driver)],
)
@pytest.mark.parametrize("steps", [None, 9], ids=["varying", "held"])
@every_reset
@every_backend
def test_adaptive_layers_in_a_stack_from_states_with_dropped_neurons(backend, reset, steps, chunk):
    options = {"reset": reset, "surrogate": "triangle" if chunk else "atan"}
    stacks = SMALL_STACKS if backend == "triton" and interpreted() else STACKS
    for seed in range(20):
        case = stacks["ragged index" if chunk else "random single weights"]
        stack = with_adaptation(Stack(case, steps, seed=1000 * seed, dropout=0.2), seed, states=chunk is None)
        exact, plain = (run_stack(stack, dtype, "torch", **options) for dtype in (torch.float64, torch.float32))
        if all(torch.equal(exact[f"spikes{k}"], plain[f"spikes{k}"].double()) for k in range(3)):
            break
    actual = run_stack(stack, torch.float32, backend, chunk, **options)
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
    stack = with_adaptation(Stack(STACKS["mixer"], None), 0, states=False)
    stack.tensors["a0"] = torch.full_like(stack.tensors["a0"], 3.0)
    before = run_stack(stack, torch.float32, backend)
    assert before["spikes0"][..., 5].any()
    stack.dropped[0] = torch.zeros(B, stack.masks[0].shape[0], dtype=torch.bool)
    stack.dropped[0][:, 5] = True
    after = run_stack(stack, torch.float32, backend)
    assert not after["spikes0"][..., 5].any()
    for name in ("bias0", *(f"{name}0" for name in PARAMETERS)):
        assert before[f"{name}.grad"][5] != 0, name
        assert after[f"{name}.grad"][5] == 0, name
    assert not stack.masks[0].unpack(after["values0.grad"])[5].any()
    assert not stack.masks[1].unpack(after["values1.grad"])[:, 5].any()


def test_its_input_gradients_take_the_product():
    """The spike before is fed back, so that gradients of currents are no sum of decaying events."""
    assert "adlif" in stack_on_cpu._why_product("adlif", "subtract", "triangle", False)
    assert stack_on_cpu._why_product("lif", "subtract", "triangle", False) is None
