"""lif on Triton: on the GPU where there is one, else on the CPU, in Triton's interpreter (hence the small sizes)."""

import itertools

import neuron_cases
import pytest
import torch
from helpers import ErrorRatios, device_of, rms
from neuron_cases import GRADIENTS, by_snntorch, clear_of_threshold, currents, gradients, lif_on, output_weights
from snntorch import surrogate

from g2g_kernels import BackendError, Neurons, lif
from g2g_kernels.ops.neurons import MODELS, RESETS
from g2g_kernels.ops.neurons.call import NeuronsCall
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.triton.runtime import interpreted, recorded
from g2g_kernels.triton.runtime import unavailable as triton_unavailable

if triton_unavailable() is None:
    from g2g_kernels.ops.neurons import triton

pytestmark = pytest.mark.skipif(triton_unavailable() is not None, reason=str(triton_unavailable()))

every_reset = pytest.mark.parametrize("reset", RESETS)
DEVICE = device_of("triton")


def parameters(neurons: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """β and θ, one a neuron or (None) one a layer."""
    return neuron_cases.parameters(neurons is not None, torch.float32, neurons or 1)


#: T, B, N: segments that T does and does not fill, tiles that B and N do and do not fill
SIZES = ((2, 9, 5), (7, 1, 33), (10, 5, 7), (11, 9, 13), (12, 70, 9), (21, 3, 131))


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "per neuron"])
def test_errors_are_at_most_1_5_times_those_of_plain_pytorch(per_neuron, dtype):
    """Over all resets and surrogates, every size twice, held currents and others in turn."""
    ratios = ErrorRatios()
    for number, (reset, slope) in enumerate(itertools.product(RESETS, SURROGATES)):
        steps, batch, neurons = SIZES[number % len(SIZES)]
        held = number % 2 == per_neuron
        current = currents(*((batch, neurons) if held else (steps, batch, neurons)), seed=number).to(dtype)
        beta, threshold = parameters(neurons if per_neuron else None)
        clear = clear_of_threshold(current.expand(steps, batch, neurons), beta, threshold, reset)
        # no gradient enters a history that may differ from that in float64
        weights = (output_weights(steps, batch, neurons) * clear).to(dtype)
        options = {"steps": steps if held else None, "reset": reset, "surrogate": slope, "alpha": 1.5 + number / 4}
        run_plain = lif_on("torch", **options)
        exact = gradients(run_plain, current.double(), beta.double(), threshold.double(), weights.double())
        plain = gradients(run_plain, current, beta, threshold, weights)
        actual = gradients(lif_on("triton", **options), current, beta, threshold, weights)
        assert torch.equal(actual["spikes"][:, clear].double(), exact["spikes"][:, clear])
        for name in GRADIENTS:
            ratios.add(name, actual[name], plain[name], exact[name])
    ratios.check(cases=len(RESETS) * len(SURROGATES))


@every_reset
def test_one_step_by_hand(reset):
    neuron_cases.check_one_step_by_hand("triton", reset)


def test_the_decay_is_rounded_before_the_current_is_added():
    """A fused multiply-add rounds once, and fires where snnTorch's two roundings leave the membrane at θ exactly."""
    beta, threshold = torch.tensor([0.9]), torch.ones(1)
    first = torch.linspace(4, 6, 2001)
    second = threshold - beta * first  # exact in float32, and so is the sum: 1
    assert ((beta.double() * first.double() + second.double()).float() > threshold).float().mean() > 0.2
    spikes = lif_on("triton", reset="none")(torch.stack([first, second]), beta, threshold)
    assert spikes[0].all()
    assert not spikes[1].any()


@every_reset
def test_thresholds_at_and_below_zero(reset):
    """U_0 = 0 already exceeds a negative threshold: such a neuron starts with a reset. All is as in snnTorch."""
    threshold = torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0, -1.0, 0.25])
    tensors = currents(11, 5, 7, dtype=torch.float32) - 0.3, torch.tensor([0.875]), threshold, output_weights(11, 5, 7)
    snn = by_snntorch(reset, surrogate.atan(2.0))
    theirs, ours = (gradients(run, *tensors) for run in (lambda *own: snn(*own)[0], lif_on("triton", reset=reset)))
    assert torch.equal(ours["spikes"], theirs["spikes"])
    for name in GRADIENTS:  # float32 rounding over 11 steps
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_counts_rates_and_their_gradients():
    """uint8 spikes and counts of several tiles; gradients through counts and rates, alone and beside ∂L/∂S."""
    ratios = ErrorRatios()
    for shape, held in itertools.product([(13, 70, 9), (4, 5, 130)], [False, True]):
        steps, batch, neurons = shape
        current = currents(*(shape[1:] if held else shape), seed=7, dtype=torch.float32)
        tensors = [current, *parameters(neurons)]
        to_spikes, to_counts, to_rates = output_weights(*shape), output_weights(*shape[1:]), output_weights(neurons)
        run = lif_on("torch", steps=steps if held else None)
        expected = run(*tensors)

        current, *own = (tensor.to(DEVICE) for tensor in tensors)
        spikes = torch.full(shape, 77, dtype=torch.uint8, device=DEVICE)
        checkpoints = torch.empty(triton.checkpoint_shape(MODELS["lif"], *shape), device=DEVICE)
        counts = torch.empty(shape[1:], device=DEVICE)
        here = NeuronsCall(current, Neurons("lif", tuple(own)), steps if held else 0)
        triton.launch_forward(here, spikes, checkpoints, counts)
        assert torch.equal(spikes.cpu(), expected.to(torch.uint8))
        assert torch.equal(counts.cpu(), expected.sum(0))

        for through_spikes in (True, False):
            weights = to_counts + to_rates / (steps * batch) + through_spikes * to_spikes
            exact = gradients(run, *(tensor.double() for tensor in tensors), weights)
            plain = gradients(run, *tensors, weights.float())
            assert torch.equal(exact["spikes"].float(), expected)
            to_current = torch.empty_like(current)
            reaching = (to_spikes if through_spikes else None), to_counts, to_rates
            upstream = triton.Upstream(*(None if grad is None else grad.float().to(DEVICE) for grad in reaching))
            *sums, bias = triton.launch_backward(here, checkpoints, upstream, to_current)
            dims = 0 if held else (0, 1)  # of a held current the gradient is summed over time
            torch.testing.assert_close(bias, to_current.sum(dims), rtol=1e-5, atol=1e-5)  # float32 rounding
            for name, grad in zip(GRADIENTS, (to_current, *sums), strict=True):
                ratios.add(name, grad.cpu(), plain[name], exact[name])
    ratios.check(cases=8)


@every_reset
def test_margins_give_the_gradients_of_currents(reset):
    """What the backward pass of a fused layer keeps; of one step, of full segments and of others."""
    for number, shape in enumerate([(1, 5, 9), (10, 9, 5), (3, 70, 9), (11, 3, 131)]):
        _, batch, neurons = shape
        current, *own = (
            tensor.to(DEVICE) for tensor in (currents(*shape, seed=7, dtype=torch.float32), *parameters(neurons))
        )
        first = torch.randn(1, batch, neurons, device=DEVICE) if number % 2 else None
        run = NeuronsCall(current, Neurons("lif", tuple(own), reset), 0, first)
        checkpoints = torch.empty(triton.checkpoint_shape(MODELS["lif"], *shape), device=DEVICE)
        membranes, spikes = torch.empty_like(current), torch.empty_like(current)
        last = triton.launch_forward(run, spikes, checkpoints, membranes=membranes)
        assert torch.equal(membranes[-1], last[0])
        assert torch.equal(membranes > own[1], spikes > 0)
        upstream = triton.Upstream(output_weights(*shape).float().to(DEVICE), last=torch.randn_like(last))
        margins, found = own[1] - membranes, []
        is_margin = margins.abs() <= membranes.abs()
        bits = torch.where(is_margin, margins, membranes).half().view(torch.int16) & -2 | is_margin
        for kept in (current, bits.view(torch.half)):
            to_current, to_first = torch.empty_like(current), torch.empty_like(last)
            to_given, of_margins = None if first is None else to_first, kept is not current
            of_kept = run._replace(current=kept)
            sums = triton.launch_backward(of_kept, checkpoints, upstream, to_current, to_given, margins=of_margins)
            found.append((to_current, sums, *(() if first is None else (to_first,))))
        for theirs, ours in zip(*found, strict=True):  # eleven bits, the last of which is no digit
            assert rms(ours - theirs) <= 1e-3 * rms(theirs)


@pytest.mark.skipif(not interpreted(), reason="a compiled kernel calls no Python")
def test_partial_sums_are_apart_by_64_bits(monkeypatch):
    """Programs × neurons × parameters may reach 2³¹ where neurons × samples do not."""
    formats, store = [], triton.store_partials

    def seen(here, apart, *others):
        formats.append(apart.dtype.name)
        store(here, apart, *others)

    monkeypatch.setattr(triton, "store_partials", seen)
    gradients(lif_on("triton"), currents(2, 3, 5, dtype=torch.float32), *parameters(5), output_weights(2, 3, 5))
    assert formats == ["int64"]


def test_more_tiles_of_neurons_than_the_second_axis_of_a_grid_has(monkeypatch):
    """CUDA's have 65,535 programs along it, of 8,388,480 neurons; a third axis has the others, in whole multiples."""
    current = torch.empty(2, 9, 3 << 22, device="meta")
    run = NeuronsCall(current, Neurons("lif", (torch.empty(1, device="meta"),) * 2), 0)
    with recorded() as launches:
        triton.launch_forward(run, current)
        triton.launch_backward(run, None, triton.Upstream(current), current)
    assert [launch.grid for launch in launches] == [(3, 1 << 15, 3)] * 2  # tiles of 4 samples and 128 neurons

    launch, tensors = triton.launch, (currents(3, 5, 600, dtype=torch.float32), *parameters(600))
    given = *tensors, output_weights(3, 5, 600)
    expected = gradients(lif_on("triton"), *given)
    monkeypatch.setattr(triton, "launch", lambda kernel, grid, **options: launch(kernel, (grid[0], 2, 3), **options))
    actual = gradients(lif_on("triton"), *given)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_checkpoints_are_the_membranes_between_segments():
    """No more than a state every tenth step is kept, or two every fifth; none without gradients."""
    lif_model, synaptic_model = MODELS["lif"], MODELS["synaptic"]
    lengths = [triton.checkpoint_shape(lif_model, steps, 2, 3)[0] for steps in (1, 10, 11, 20, 25, 50)]
    assert lengths == [0, 0, 1, 1, 2, 4]
    assert triton.checkpoint_shape(synaptic_model, 50, 2, 3) == (9, 2, 2, 3)  # every fifth step, of two states
    current = currents(25, 4, 3, dtype=torch.float32).to(DEVICE)
    beta, threshold = torch.tensor(0.9, device=DEVICE), torch.tensor(100.0, device=DEVICE)  # never fires
    call = NeuronsCall(current, Neurons("lif", (beta, threshold)), 0)
    spikes, _, kept = triton.FORWARD.function(call, True)
    membrane, membranes = torch.zeros_like(current[0]), []
    for current_t in current:
        membrane = beta * membrane + current_t
        membranes.append(membrane)
    assert torch.equal(kept[:, 0], torch.stack([membranes[8], membranes[17]]))  # three segments of 9 steps
    without, _, nothing = triton.FORWARD(call)
    assert torch.equal(without, spikes)
    assert nothing.numel() == 0


@pytest.mark.parametrize("shape", [(4, 1), (3, 1, 9), (9, 2, 3, 5)], ids=str)
def test_any_number_of_dimensions_and_no_particular_strides(shape):
    current, weights = currents(*shape, seed=4, dtype=torch.float32), output_weights(*shape)
    beta, threshold = torch.tensor(0.875), torch.tensor(0.75)
    expected = gradients(lif_on("torch"), current, beta, threshold, weights)
    backwards = current.permute(*range(len(shape) - 1, -1, -1)).contiguous().permute(*range(len(shape) - 1, -1, -1))
    actual = gradients(lif_on("triton"), backwards, beta, threshold, weights)
    assert torch.equal(actual["spikes"], expected["spikes"])
    for name in GRADIENTS:
        assert actual[name].shape == expected[name].shape
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)  # float32 rounding


def test_some_gradients_alone():
    tensors = [currents(11, 5, 7, seed=2, dtype=torch.float32), *parameters(7)]
    neuron_cases.check_gradients_alone(lif_on("triton"), tensors, output_weights(11, 5, 7))


def test_results_are_reproducible():
    """Nothing is added in an order that chance decides: several tiles of samples, twice, to the last bit."""
    current, weights = currents(11, 150, 7, seed=2, dtype=torch.float32), output_weights(11, 150, 7)
    first, second = (gradients(lif_on("triton"), current, *parameters(None), weights) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"current": torch.zeros(4, 0, 5, device=DEVICE)}, "needs currents that are not empty"),
        ({"current": torch.zeros(4, 2, 5, dtype=torch.float64, device=DEVICE)}, "not torch.float64"),
        ({"beta": torch.zeros(1, dtype=torch.float64, device=DEVICE)}, "not torch.float64"),
        pytest.param({"current": torch.zeros(4, 2, 5, device="meta")}, "not on meta", marks=pytest.mark.driver),
        ({"current": torch.zeros(1, 1, 1).expand(3, 1 << 16, 1 << 15)}, "serves fewer than 2³¹"),
    ],
    ids=["empty", "double", "double beta", "device", "huge"],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(changed, reason):
    tensors = {"current": torch.zeros(4, 2, 5), "beta": torch.full((1,), 0.9), "threshold": torch.ones(1)}
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()} | changed
    with pytest.raises(BackendError, match=reason):
        lif(**tensors, backend="triton")


@pytest.mark.skipif(not interpreted(), reason="on a GPU Triton is the first choice")
def test_the_interpreter_serves_nobody_who_did_not_ask_for_it(caplog):
    with caplog.at_level("DEBUG", "g2g_kernels"):
        spikes = lif(currents(3, 2, 5, dtype=torch.float32), 0.9, 1.0)
    assert spikes.grad_fn is None
    assert not any("runs by triton" in message for message in caplog.messages)
