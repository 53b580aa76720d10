"""lif against snnTorch's own Leaky, on every backend, and what every model has in test_models; surrogates."""

import itertools
import math
import weakref

import neuron_cases
import pytest
import torch
from helpers import ErrorRatios, backends_of, clamps_alike, lif_by_autograd, rms, skip_where_refused
from neuron_cases import GRADIENTS, SNNTORCH, B, N, T, by_snntorch, currents, gradients, lif_on, parameters
from torch.utils._python_dispatch import TorchDispatchMode

from g2g_kernels import lif
from g2g_kernels.ops.neurons import RESETS, operator
from g2g_kernels.ops.neurons.surrogates import SURROGATES

every_backend = pytest.mark.parametrize("backend", backends_of(operator))
every_reset = neuron_cases.every_reset


def check_against_snntorch(current, beta, threshold, reset):
    """Compares spikes and gradients; returns ours."""
    tensors = current, beta, threshold, neuron_cases.output_weights(T, B, N)
    theirs = gradients(lambda *own: by_snntorch(reset, SNNTORCH["atan"](2.0))(*own)[0], *tensors)
    ours = gradients(lif_on("torch", reset=reset), *tensors)
    assert torch.equal(ours["spikes"], theirs["spikes"])
    for name in GRADIENTS:
        assert ours[name].shape == theirs[name].shape
        which = clamps_alike(beta) if name == "beta.grad" else ...
        torch.testing.assert_close(ours[name][which], theirs[name][which], rtol=1e-11, atol=1e-12)
    return ours


@every_reset
def test_a_membrane_exactly_at_the_threshold_does_not_fire(reset):
    """The comparison is strict, in the spike as in the reset (β = 1/2, so that every value is exact). U = 1, 1, 1, 1.5,
    then by reset −1.25, 1.375, 1.1875 or −1, 1.5, 1.5 or −0.25, 1.875, 2.4375."""
    tensors = torch.tensor([[1.0], [0.5], [0.5], [1.0], [-1.0], [2.0], [1.5]]), torch.tensor([0.5]), torch.tensor([1.0])
    spikes = lif(*tensors, reset=reset, backend="torch")
    assert spikes.flatten().tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert torch.equal(spikes, by_snntorch(reset)(*tensors)[0])


@every_reset
def test_beta_is_clamped_with_a_gradient_between_0_and_1_and_thresholds_may_be_below_zero(reset):
    """At 0 and 1 themselves there is none, as in the torch.clamp of PyTorch 2.15. U_0 = 0 already exceeds a negative
    threshold, so that such a neuron starts with a reset, as snnTorch's does."""
    beta = torch.tensor([-0.3, 0.0, 0.5, 0.9, 1.0, 1.0001, 1.7], dtype=torch.float64)
    current, threshold = currents(T, B, N), torch.tensor([0.8], dtype=torch.float64)
    ours = check_against_snntorch(current, beta, threshold, reset)
    assert [bool(g) for g in ours["beta.grad"]] == [False, False, True, True, False, False, False]
    assert torch.equal(ours["spikes"], lif(current, beta.clamp(0, 1), threshold, reset=reset, backend="torch"))
    threshold = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0, -1.0, 0.3], dtype=torch.float64)
    check_against_snntorch(current - 0.3, torch.tensor([0.9], dtype=torch.float64), threshold, reset)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 7.0])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_derivative_is_that_of_the_primitive(surrogate, alpha):
    """Central differences with h = 1e-6: their own error is h²·|f'''|/6 + ε/h < 1e-8 for these functions. The points
    keep clear of the kinks at 0 (fast sigmoid, triangle) and ±1/α (triangle, boxcar)."""
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    x = x[(x.abs() > 1e-3) & ((x.abs() - 1 / alpha).abs() > 1e-3)]
    derivative, primitive, _ = SURROGATES[surrogate]
    h = 1e-6
    difference = (primitive(x + h, alpha) - primitive(x - h, alpha)) / (2 * h)
    torch.testing.assert_close(derivative(x, alpha), difference, rtol=1e-7, atol=1e-8)
    assert difference.max() > 0.1


def test_derivatives_at_alpha_2_by_hand():
    """Values at x = 0 and x = ±1/2, where α·x is ±1."""
    by_hand = {
        "atan": (1.0, 1 / (1 + (math.pi / 2) ** 2)), "fast_sigmoid": (1.0, 0.25), "triangle": (2.0, 0.0),
        "sigmoid": (0.5, 2 * math.e / (1 + math.e) ** 2), "boxcar": (1.0, 0.0),
    }  # fmt: skip
    assert set(by_hand) == set(SURROGATES)
    for surrogate, (peak, at_a_half) in by_hand.items():
        actual = SURROGATES[surrogate].derivative(torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64), 2.0)
        expected = torch.tensor([at_a_half, peak, at_a_half], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(4, 1), (6, 3), (3, 1, 9), (1, 4, 6), (9, 2, 3, 5)], ids=str)
@every_backend
def test_any_number_of_dimensions(backend, shape):
    """[T, N], [T, B, N] and more, T = 1 and B = 1 among them."""
    current = currents(*shape, seed=4, dtype=torch.float32)
    beta, threshold = torch.tensor(0.875), torch.tensor(0.75)
    weights = neuron_cases.output_weights(*shape)
    exactly = current.double(), beta.double(), threshold.double(), weights
    exact = gradients(lambda *t: lif_by_autograd(*t, "subtract", SURROGATES["atan"].primitive, 2.0)[0], *exactly)
    assert neuron_cases.clear_of_threshold(current, beta, threshold, "subtract").all()
    actual = gradients(lif_on(backend), current, beta, threshold, weights)
    assert torch.equal(actual["spikes"].double(), exact["spikes"])
    for name in GRADIENTS:
        assert actual[name].shape == exact[name].shape
        assert rms(actual[name] - exact[name]) <= 1e-5 * rms(exact[name]), name  # float32 rounding over T steps


@every_reset
@every_backend
def test_one_step_by_hand(backend, reset):
    neuron_cases.check_one_step_by_hand(backend, reset)


@every_backend
def test_current_and_gradient_need_not_be_contiguous(backend):
    current, (beta, threshold) = currents(T, B, N, seed=2, dtype=torch.float32), parameters(True, torch.float32)
    weights = neuron_cases.output_weights(T, B, N)
    contiguous = gradients(lif_on(backend), current, beta, threshold, weights)
    for order, back in (((1, 0, 2), (1, 0, 2)), ((2, 0, 1), (1, 2, 0)), ((0, 2, 1), (0, 2, 1))):
        given, upstream = (tensor.permute(order).contiguous().permute(back) for tensor in (current, weights.float()))
        assert not given.is_contiguous()
        leaves = [given.requires_grad_(), beta.clone().requires_grad_(), threshold.clone()]
        spikes = lif_on(backend)(*leaves)
        spikes.backward(upstream)
        assert torch.equal(spikes, contiguous["spikes"])
        assert torch.equal(leaves[0].grad, contiguous["current.grad"])
        # summed over the batch, perhaps in another order: float32 rounding
        torch.testing.assert_close(leaves[1].grad, contiguous["beta.grad"], rtol=1e-5, atol=0)
    leaf = current.clone().requires_grad_()  # of a sum the gradient is one element, expanded to [T, B, N]
    lif_on(backend)(leaf, beta, threshold).sum().backward()
    expected = gradients(lif_on(backend), current, beta, threshold, torch.ones(T, B, N))
    assert torch.equal(leaf.grad, expected["current.grad"])


@pytest.mark.parametrize("backend", [None, *backends_of(operator)])
def test_gradients_have_the_dtype_and_shape_of_their_tensor(backend):
    """float64 parameters with float32 currents, one of them 0-dimensional, the other [1]."""
    beta = torch.tensor(0.9, dtype=torch.float64)
    threshold = torch.tensor([0.7], dtype=torch.float64)
    current, weights = currents(T, B, N, dtype=torch.float32), neuron_cases.output_weights(T, B, N)
    with skip_where_refused():
        results = gradients(lif_on(backend), current, beta, threshold, weights)
    assert (results["beta.grad"].dtype, results["beta.grad"].shape) == (torch.float64, ())
    assert (results["threshold.grad"].dtype, results["threshold.grad"].shape) == (torch.float64, (1,))
    assert results["current.grad"].dtype == torch.float32


@pytest.mark.parametrize("steps", [None, T])
@every_backend
def test_gradients_asked_for_alone_are_the_same(backend, steps):
    shape = (T, B, N) if steps is None else (B, N)
    tensors = currents(*shape, dtype=torch.float32), *parameters(True, torch.float32)
    neuron_cases.check_gradients_alone(lif_on(backend, steps=steps), tensors, neuron_cases.output_weights(T, B, N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [None, T], ids=["varying", "held"])
def test_half_precision_currents_have_float32_membranes(dtype, steps):
    """Spikes are those of the same currents in float32, not those of a loop in half precision."""
    shape = (60, N) if steps else (T, 60, N)
    half = currents(*shape, seed=8).to(dtype)
    beta, threshold = parameters(True, torch.float32)
    weights = neuron_cases.output_weights(T, 60, N).to(dtype)
    run = lif_on("torch", steps=steps)
    ours = gradients(run, half, beta, threshold, weights)
    single = gradients(run, half.float(), beta, threshold, weights)
    expected = {name: single[name].to(dtype) for name in ("spikes", "current.grad")}
    assert ours["beta.grad"].dtype == torch.float32
    torch.testing.assert_close(ours, single | expected, rtol=0, atol=0)
    of_neurons = beta.to(dtype), threshold.to(dtype), "subtract", SURROGATES["atan"].primitive, 2.0
    in_half, _ = lif_by_autograd(half.expand(T, 60, N), *of_neurons)
    assert not torch.equal(ours["spikes"], in_half)  # the difference is there to be seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, *backends_of(operator)])
def test_half_precision_on_every_backend(backend, dtype):
    ratios = ErrorRatios()
    for reset, seed in itertools.product(RESETS, range(4)):
        half = currents(T, B, N, seed=seed).to(dtype)
        beta, threshold = parameters(True, torch.float32)
        clear = neuron_cases.clear_of_threshold(half, beta, threshold, reset)
        weights = (neuron_cases.output_weights(T, B, N) * clear).to(dtype)
        run, run_plain = lif_on(backend, reset=reset), lif_on("torch", reset=reset)
        exact = gradients(run_plain, half.double(), beta.double(), threshold.double(), weights.double())
        plain = gradients(run_plain, half, beta, threshold, weights)
        with skip_where_refused():
            actual = gradients(run, half, beta, threshold, weights)
        assert torch.equal(actual["spikes"][:, clear].double(), exact["spikes"][:, clear])
        for name in GRADIENTS:
            ratios.add(name, actual[name], plain[name], exact[name])
    ratios.check(cases=12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [None, T], ids=["varying", "held"])
def test_only_membranes_are_kept_for_the_backward_pass(dtype, steps):
    """One [T, B, N] tensor of float32 beside β and θ: neither the currents nor the spikes."""
    leaf = currents(*((B, N) if steps else (T, B, N)), dtype=dtype).requires_grad_()
    beta, threshold = (tensor.requires_grad_() for tensor in parameters(True, torch.float32))
    current = leaf + 0  # an intermediate result, as in a network; addition itself keeps nothing
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        spikes = lif(current, beta, threshold, steps=steps, backend="torch")
    kept = [tensor for tensor in kept if tensor.untyped_storage().nbytes() > tensor.itemsize]  # not one zero for all
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(N,), (N,), (T, B, N)]
    membranes = max(kept, key=torch.Tensor.numel)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (current, spikes)}
    assert membranes.untyped_storage().data_ptr() not in storages
    kept_alive = weakref.ref(current)
    del current
    assert kept_alive() is None  # nothing in the graph holds on to the currents
    spikes.sum().backward()
    assert leaf.grad.abs().max() > 0


class Allocations(TorchDispatchMode):
    """Notes the memory of every result that has as many elements as ``given``, and that of ``given``."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.least, self.storages = given.numel(), {given.untyped_storage().data_ptr(): given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.least:
            self.storages[result.untyped_storage().data_ptr()] = result  # kept, so that no address is used twice
        return result


def test_without_gradients_no_membranes_are_kept(plain_memory):
    """Under no_grad the spikes are the only [T, B, N] tensor, although β and θ require gradients."""
    current = currents(T, B, N, dtype=torch.float32)
    beta, threshold = (tensor.requires_grad_() for tensor in parameters(True, torch.float32))
    with torch.no_grad(), Allocations(current) as allocations:
        spikes = lif(current, beta, threshold, backend="torch")
    assert len(allocations.storages) == 2
    assert not spikes.requires_grad
    with Allocations(current) as allocations:
        trained = lif(current, beta, threshold, backend="torch")
    assert len(allocations.storages) == 3
    assert torch.equal(trained, spikes)


def test_memory_starts_as_nan():
    """The fixture of every_test.py is at work."""
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [-(2**31)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"current": torch.zeros(5)}, r"current has shape \(5,\); expected \[T, ..., N\], or \[..., N\] with steps"),
        ({"current": torch.zeros(4, 2, 5).long()}, "current must be a floating-point tensor, not torch.int64"),
        ({"beta": torch.zeros(4)}, r"beta has shape \(4,\); expected a scalar or \[5\], one per neuron"),
        ({"threshold": torch.ones(2)}, r"threshold has shape \(2,\); expected a scalar or \[5\]"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"reset": "hard"}, "reset='hard' is unknown; choose one of subtract, zero, none"),
        ({"surrogate": "relu"}, "surrogate='relu' is unknown; choose one of atan, fast_sigmoid, sigmoid, triangle"),
        ({"alpha": 0.0}, "alpha=0.0 must be a number above 0"),
        ({"alpha": math.nan}, "alpha=nan must be a number above 0"),
        ({"backend": "numpy"}, "backend='numpy' is not a backend"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lif(**{"current": torch.zeros(4, 2, 5), "beta": 0.9, "threshold": 1.0} | change)
