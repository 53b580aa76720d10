"""g2g_stack: the stack equals its parts, whose judges are snnTorch and dense weights, and float64 on every backend."""

import gc
import weakref

import numpy as np
import pytest
import torch
from covering import drawn_cases, every_pair
from helpers import ErrorRatios, as_near, backends_of, changed, device_of, rms
from stack_cases import SHARES, STACKS, B, Stack, T, check_compact, check_one_output, clear_stack, loss, results
from torch.fx.experimental.proxy_tensor import make_fx

from g2g_kernels import Activity, g2g_linear, g2g_stack, lif
from g2g_kernels.ops.g2g_stack import WAYS
from g2g_kernels.ops.neurons import RESETS
from g2g_kernels.ops.neurons.surrogates import SURROGATES

every_backend = pytest.mark.parametrize("backend", backends_of(WAYS))
HELD_OR_NOT = (None, 9)


def composed(stack: Stack, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """The same from ``lif(g2g_linear(·))`` layer by layer, counts and rates from the spikes."""
    leaves = stack.leaves(dtype)
    x, steps, spikes = leaves["x"], stack.steps, []
    for layer in stack.layers(leaves):
        (feed,) = layer.connections
        current = g2g_linear(x, feed.values, feed.mask, feed.bias, backend="torch")
        x = lif(current, *layer.neurons.parameters, steps, backend="torch", **options)
        if layer.dropped is not None:
            x = x * ~layer.dropped
        spikes.append(x)
        steps = None
    counts, rates = spikes[-1].sum(0), [layer_spikes.mean((0, 1)) for layer_spikes in spikes]
    loss(counts, rates).backward()
    return results(counts, rates, [layer_spikes.detach() for layer_spikes in spikes], leaves)


def assert_lively(named: dict[str, torch.Tensor]) -> None:
    """Every layer fires, none all the time, and every tensor has a gradient: else a comparison says little."""
    for name, tensor in named.items():
        if name.startswith("spikes"):
            assert 0.02 < tensor.float().mean() < 0.9, f"{name}: rate {tensor.float().mean():.2f}"
        if name.endswith(".grad"):
            assert tensor.any(), name


@every_pair(
    cases=STACKS, steps=HELD_OR_NOT, reset=RESETS, surrogate=SURROGATES, alpha=(2.0, 1.3), per_neuron=(False, True),
    bias=(False, True), dropout=(0.0, 0.3),
)  # fmt: skip
def test_stack_equals_its_parts(cases, steps, reset, surrogate, alpha, per_neuron, bias, dropout):
    stack = Stack(STACKS[cases], steps, per_neuron, bias, seed=1, dropout=dropout)
    options = {"reset": reset, "surrogate": surrogate, "alpha": alpha}
    expected = composed(stack, torch.float64, **options)
    if not dropout:
        assert_lively(expected)
    for k, dropped in enumerate(stack.dropped if dropout else ()):
        assert not expected[f"spikes{k}"][:, dropped].any()
    for name, actual in stack.run(torch.float64, "torch", **options).items():
        # float64 rounding: counts and rates may be summed in another order
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-13, msg=name)
        if name.startswith("spikes"):
            assert torch.equal(actual, expected[name])


@every_backend
def test_counts_and_rates_have_gradients_where_these_are_wanted(backend):
    stack = Stack(STACKS["mixer"], T)
    leaves = stack.leaves(torch.float32, device_of(backend))
    activity = g2g_stack(leaves["x"], stack.layers(leaves), T, backend=backend)
    assert isinstance(activity, Activity)
    assert not any(spikes.dense().requires_grad for spikes in activity.spikes)
    assert activity.counts.requires_grad
    assert all(rate.requires_grad for rate in activity.rates)
    with torch.no_grad():
        without = g2g_stack(leaves["x"], stack.layers(leaves), T, backend=backend)
    assert not without.counts.requires_grad
    assert torch.equal(without.counts, activity.counts)
    assert all(map(torch.equal, *([spikes.dense() for spikes in of.spikes] for of in (without, activity))))


@every_backend
def test_backend_against_float64(backend):
    """Errors are small, and at most 1.5 times those of plain PyTorch. Of 60 samples, sums over T·B have 540 terms."""
    ratios = ErrorRatios()
    options = {"cases": STACKS, "reset": RESETS, "surrogate": SURROGATES, "dropout": (0.0, 0.3), "batch": (5, 60)}
    cases = drawn_cases(options | {"steps": HELD_OR_NOT})
    for name, case in cases.items():
        print(name)
        options = {"reset": case["reset"], "surrogate": case.pop("surrogate")}
        stack = clear_stack(STACKS[case.pop("cases")], **case)
        exact, plain = (stack.run(dtype, "torch", **options) for dtype in (torch.float64, torch.float32))
        actual = stack.run(torch.float32, backend, **options)
        if not case["dropout"]:
            assert_lively(exact)
        assert actual.keys() == exact.keys()
        for name, expected in exact.items():
            if name.startswith(("spikes", "counts")):
                assert torch.equal(actual[name].double(), expected), name
            else:
                # float32 rounding through three layers and nine steps
                assert as_near(actual[name], plain[name], expected, 1e-4), name
                ratios.add(name, actual[name], plain[name], expected)
    ratios.check(len(cases))


@every_pair(
    backend=backends_of(WAYS), surrogate=("triangle", "boxcar"), alpha=SHARES, shape=((None, 5), (9, 1), (1, 3))
)
def test_from_no_neuron_that_passes_a_gradient_on_to_all(backend, surrogate, alpha, shape):
    check_compact(backend, STACKS["random single weights"], surrogate, alpha, *shape)


@every_backend
def test_silent_and_saturated_layers(backend):
    """No spike at all, and a spike of every neuron at every step."""
    stack = Stack(STACKS["ragged index"], T)
    for k in range(3):
        stack.tensors[f"threshold{k}"].fill_(1e6)
    silent = stack.run(torch.float32, backend)
    assert not any(silent[f"spikes{k}"].any() for k in range(3))
    assert all(tensor.isfinite().all() for tensor in silent.values())
    for k in range(3):
        stack.tensors[f"threshold{k}"].fill_(0.5)
        stack.tensors[f"bias{k}"].fill_(100.0)
    saturated = stack.run(torch.float32, backend)
    assert all(saturated[f"spikes{k}"].all() for k in range(3))
    assert saturated["counts"].tolist() == [[T] * 10] * B


@every_backend
def test_input_need_not_be_contiguous(backend):
    stack = Stack(STACKS["random single weights"], None)
    contiguous = stack.run(torch.float32, backend)
    leaves = stack.leaves(torch.float32, device_of(backend))
    batch_first = leaves["x"].detach().transpose(0, 1).contiguous().requires_grad_()
    x = batch_first.transpose(0, 1)
    assert not x.is_contiguous()
    activity = g2g_stack(x, stack.layers(leaves), backend=backend)
    loss(activity.counts, activity.rates).backward()
    assert torch.equal(activity.counts.cpu(), contiguous["counts"])
    expected = contiguous["x.grad"].transpose(0, 1)
    assert rms(batch_first.grad.cpu() - expected) <= 1e-5 * rms(expected)  # float32 rounding


@pytest.mark.parametrize("needed", ["x", "values1", "bias0", "beta2", "threshold0"])
@every_backend
def test_one_gradient_alone(backend, needed):
    stack = Stack(STACKS["mixer"], T)
    expected = stack.run(torch.float32, backend)[f"{needed}.grad"]
    leaves = stack.leaves(torch.float32, device_of(backend))
    tensors = {name: leaf if name == needed else leaf.detach() for name, leaf in leaves.items()}
    activity = g2g_stack(tensors["x"], stack.layers(tensors), T, backend=backend)
    loss(activity.counts, activity.rates).backward()
    assert rms(tensors[needed].grad.cpu() - expected) <= 1e-6 * rms(expected)  # float32 rounding


@pytest.mark.parametrize("used", ["counts", "rates0", "rates2"])
@every_backend
def test_one_output_alone(backend, used):
    check_one_output(STACKS["mixer"], used, backend)


@every_backend
def test_autocast_to_bfloat16(backend):
    """Counts and rates are float32, and so are the gradients of float32 parameters."""
    stack = Stack(STACKS["ragged index"], T)
    with torch.autocast(device_of(backend), torch.bfloat16):
        named = stack.run(torch.float32, backend)
    assert_lively(named)
    assert torch.equal(named["counts"], named["spikes2"].float().sum(0))
    assert named["counts"].dtype == torch.float32
    for k in range(3):
        assert named[f"rates{k}"].dtype == torch.float32
        torch.testing.assert_close(named[f"rates{k}"], named[f"spikes{k}"].float().mean((0, 1)))
    for name, tensor in named.items():
        if name.endswith(".grad"):
            assert tensor.dtype == torch.float32, name
            assert tensor.isfinite().all(), name
    # weights rounded to 8 bits move some membranes across θ, but not many: most spikes are those of float32
    assert (named["spikes0"].float() == stack.run(torch.float32, backend)["spikes0"]).float().mean() > 0.97


def test_sizes_may_be_symbols():
    stack = Stack(STACKS["one unit a group"], None)
    layers, x = stack.layers(stack.tensors), stack.tensors["x"]
    options = {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True}
    traced = make_fx(lambda x: g2g_stack(x, layers).counts, **options)(x)
    assert torch.equal(traced(x), g2g_stack(x, layers).counts)


def test_a_call_that_was_right_keeps_nothing_alive_and_lets_nothing_else_pass():
    stack = Stack(STACKS["one unit a group"], None)
    layers = stack.layers(stack.tensors)
    x = stack.tensors["x"]

    observer = type("Observer", (), {"__call__": lambda self, x, y: y})()
    g2g_stack(x, [changed(layers[0], observer=observer), *layers[1:]], backend="torch")
    kept = weakref.ref(observer)
    del observer
    gc.collect()
    assert kept() is None
    right = changed(layers[0], alpha=np.float32(1.0))
    g2g_stack(x, [right, *layers[1:]], backend="torch")
    for wrong in (np.float32(-1.0), True, float("nan")):
        wrong = changed(right, alpha=wrong)
        with pytest.raises(ValueError, match="alpha"):
            g2g_stack(x, [wrong, *layers[1:]], backend="torch")
    steps = torch.tensor(1)
    for given in (1, steps):
        g2g_stack(x[0], layers, given, backend="torch")
    steps.fill_(0)
    for wrong in (True, steps):
        with pytest.raises(ValueError, match="steps="):
            g2g_stack(x[0], layers, wrong, backend="torch")
    of_iterator, of_list = (g2g_stack(x[0], each, 1, backend="torch").counts for each in (iter(layers), layers))
    assert torch.equal(of_iterator, of_list)
    for nothing in (iter(()), [], None):
        with pytest.raises(ValueError, match="populations is empty"):
            g2g_stack(x[0], nothing, 1, backend="torch")


DROPPED = r"dropped of population 1 must be bool \(5, 26\), one entry per sample and neuron"


@pytest.mark.parametrize(
    ("number", "name", "value", "message"),
    [
        (0, "values", torch.zeros(1, 4, 4), r"values have shape \(1, 4, 4\)"),
        (1, "bias", torch.zeros(38), r"bias of a connection to population 1 has shape \(38,\), .* has 26 outputs"),
        (2, "beta", torch.zeros(9), r"beta of population 2 has shape \(9,\); expected a scalar or \[10\]"),
        (0, "threshold", torch.zeros(2, 38), r"threshold of population 0 has shape \(2, 38\)"),
        *((1, "dropped", torch.zeros(*shape, dtype=torch.bool), DROPPED) for shape in ((B, 25), (26,))),
        *((1, "dropped", value, DROPPED) for value in (torch.zeros(B, 26), 0.2)),
        (1, None, None, "a connection to population 1 has 26 inputs but receives 38"),
    ],
)
def test_layers_that_do_not_fit_are_refused(number, name, value, message):
    stack = Stack(STACKS["ragged index"], T)
    layers = stack.layers(stack.tensors)
    layers[number] = changed(layers[number], **{name: value}) if name else changed(layers[2], source=0)  # other inputs
    with pytest.raises(ValueError, match=message):
        g2g_stack(stack.tensors["x"], layers, T)


@pytest.mark.parametrize(
    ("shape", "steps", "options", "message"),
    [
        ((T, B, 21), T, {}, r"x has shape \(9, 5, 21\); expected \[T, B, in\], or \[B, in\] with steps"),
        ((B, 21), None, {}, r"x has shape \(5, 21\); expected"),
        ((B, 20), T, {}, "a connection to population 0 has 21 inputs but receives 20"),
        ((B, 21), 0, {}, "steps=0 must be a whole number of at least 1"),
        ((B, 21), T, {"reset": "soft"}, "reset='soft' of population 0 is unknown"),
        ((B, 21), T, {"alpha": 0}, "alpha=0 of population 0 must be a number above 0"),
    ],
)
def test_options_out_of_range_are_refused(shape, steps, options, message):
    stack = Stack(STACKS["ragged index"], T)
    with pytest.raises(ValueError, match=message):
        g2g_stack(torch.zeros(shape), stack.layers(stack.tensors, **options), steps)
