"""G2GLinear, LIF and Synaptic as modules: initial values, saving, and life inside other modules."""

import copy
import functools
import math

import pytest
import scipy.sparse
import snntorch
import torch

from g2g_kernels import BlockMask, GroupLayout, adlif, cubalif, g2g_linear, lif, synaptic
from g2gnet import LIF, AdLIF, CubaLIF, G2GLinear, Synaptic


def sample_mask(out_size=50, in_size=98, block_size=8, **options):
    generator = torch.Generator().manual_seed(0)
    layouts = (GroupLayout(size, 8, "random", generator) for size in (out_size, in_size))
    return BlockMask.sample(*layouts, block_size=block_size, generator=generator, **options)


def test_initial_weights_are_uniform_within_the_bound_of_each_neurons_active_fan_in():
    mask = sample_mask(400, 784, block_size=16)
    layer = G2GLinear(mask, generator=torch.Generator().manual_seed(1))
    weight, present = layer.dense_weight().detach(), mask.to_dense()
    bound = present.sum(1).double().rsqrt()[:, None]
    scaled = (weight / bound)[present]
    assert scaled.abs().max() <= 1
    assert scaled.abs().max() > 0.999
    # uniform in ±1: mean 0 (standard error 0.58/√n), variance 1/3
    n = scaled.numel()
    assert abs(scaled.mean()) < 5 * 0.58 / n**0.5
    assert scaled.var() == pytest.approx(1 / 3, abs=5 * 0.3 / n**0.5)
    assert torch.equal(weight != 0, present)


def test_initial_bias_is_uniform_within_the_bound_of_the_mean_fan_in_and_finite_without_inputs():
    mask = sample_mask(2000, 784, block_size=16)
    bias = G2GLinear(mask, generator=torch.Generator().manual_seed(1)).bias.detach()
    bound = mask.to_dense().sum(1).double().mean().item() ** -0.5
    assert 0.99 * bound < bias.abs().max() <= bound
    layer = G2GLinear(sample_mask(p_intra=0.0, p_inter=0.0))
    assert layer.values.numel() == 0
    assert torch.isfinite(layer.bias).all()
    assert torch.equal(layer(torch.ones(3, 98)), layer.bias.expand(3, 50))


def test_modules_call_the_operators():
    layer, same = G2GLinear(sample_mask()), functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    x = torch.rand(5, 3, 98)
    current = g2g_linear(x, layer.values, layer.mask, layer.bias)
    same(layer(x), current)
    options = {"reset": "zero", "surrogate": "sigmoid", "alpha": 3.0}
    neurons = LIF(neurons=50, **options)
    same(neurons(current), lif(current, neurons.beta, neurons.threshold, **options))
    options = {"reset": "none", "surrogate": "boxcar", "alpha": 1.0}
    neurons = Synaptic(syn_decay=0.5, beta=0.75, **options)
    same(neurons(current), synaptic(current, 0.5, 0.75, neurons.threshold, **options))
    assert repr(neurons) == "Synaptic(reset='none', surrogate='boxcar', alpha=1.0)"
    neurons = AdLIF(a=0.125, reset="zero")
    same(neurons(current), adlif(current, 0.95, 0.9, 0.125, neurons.b, neurons.threshold, reset="zero"))
    neurons = CubaLIF(beta=0.5, syn_decay=0.5, threshold=0.1, refractory=2, reset_current=True)
    same(neurons(current), cubalif(current, 0.5, 0.5, 0.1, refractory=2, reset_current=True))


def test_lif_keeps_scalars_or_one_value_a_neuron_learnable_or_not():
    assert LIF().beta.shape == (1,)
    assert LIF(neurons=7, beta=0.8).beta.tolist() == pytest.approx([0.8] * 7)
    assert Synaptic(neurons=7, syn_decay=0.25).syn_decay.tolist() == [0.25] * 7
    theirs = snntorch.Leaky(beta=0.7, threshold=1.5).state_dict()  # without a dimension
    scalars = {name: theirs[name] for name in ("beta", "threshold")}
    assert all(value.shape == () for value in scalars.values())
    for loaded in (LIF(), LIF(learn_beta=False)):
        loaded.load_state_dict(scalars)
        found = {name: value.tolist() for name, value in loaded.by_name.items()}
        assert found == {"beta": [pytest.approx(0.7)], "threshold": [1.5]}
    fixed = LIF(learn_beta=False, learn_threshold=True)
    assert [name for name, _ in fixed.named_parameters()] == ["threshold"]
    assert set(fixed.state_dict()) == {"beta", "threshold"}


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "lil"])
def test_a_scipy_matrix_is_a_layer_and_back(kind, block_size):
    matrix = scipy.sparse.random(37, 29, density=0.1, random_state=1, format="coo")
    matrix.data[:5] = 0  # stored zeros are connections
    dense = torch.as_tensor(matrix.toarray(), dtype=torch.float32)
    layer = G2GLinear.from_scipy(matrix.asformat(kind), block_size, bias=[*range(37)])
    assert torch.equal(layer.dense_weight(), dense)
    x = torch.rand(3, 29)
    assert torch.allclose(layer(x), x @ dense.T + torch.arange(37.0), atol=1e-6)
    if block_size == 1 and kind == "coo":
        assert layer.mask.num_weights == matrix.nnz
    twice = scipy.sparse.coo_matrix(([1.0, 2.0], ([0, 0], [3, 3])), (4, 5))
    assert G2GLinear.from_scipy(twice, block_size).dense_weight()[0, 3] == 3
    assert torch.equal(BlockMask.from_dense((dense != 0).to_sparse(), 1).to_dense(), dense != 0)


def test_initial_values_of_neurons_may_be_tensors_or_time_constants():
    beta = torch.tensor([0.1, 0.2, 0.3])
    neurons = LIF(3, beta=beta, threshold=torch.tensor(0.5), learn_beta=False)
    assert torch.equal(neurons.beta, beta)
    assert neurons.beta is not beta
    assert torch.equal(neurons.threshold.detach(), torch.full((3,), 0.5))
    for given in (beta.double().numpy(), beta.tolist()):
        assert torch.equal(LIF(3, beta=given, learn_beta=False).beta, beta)
    tau = torch.tensor([10.0, 20.0, 40.0])
    assert LIF(tau=tau[0], dt=torch.tensor(2.0)).beta.item() == pytest.approx(math.exp(-0.2))
    for given in (tau, tau.numpy()):
        assert torch.equal(LIF(3, tau=given, dt=2.0).beta, torch.exp(-2.0 / tau.double()).float())
    neurons = Synaptic(tau=20.0, tau_syn=5.0, dt=0.5)
    assert neurons.beta.item() == pytest.approx(math.exp(-0.025))
    assert neurons.syn_decay.item() == pytest.approx(math.exp(-0.1))
    assert AdLIF(tau_adapt=100.0, dt=1.0, learn_adapt_decay=False).adapt_decay.item() == pytest.approx(math.exp(-0.01))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"refractory": 2.2, "dt": 0.1}, [22]), ({"refractory": 3, "neurons": 2}, [3, 3]), ({}, [0]),
        ({"refractory": torch.tensor([0.1, 0.26]).numpy(), "neurons": 2, "dt": 0.1, "tau": 20.0}, [1, 3]),
        ({"refractory": 1.5}, "refractory=1.5 is no whole number of steps; give dt"),
        ({"refractory": -1}, "-1.0 must be a number from 0"), ({"refractory": math.nan}, "nan must be"),
        ({"refractory": [1, 2]}, r"a tensor \[2\]; give one number, or give the number of neurons first"),
        ({"refractory": [1, 2], "neurons": 3}, r"a tensor \[2\]; give \[3\]"),
        ({"refractory": 1, "dt": 0}, "dt=0 must be a number above 0"),
    ],
)  # fmt: skip
def test_a_refractory_period_is_a_whole_number_of_steps(given, steps):
    if isinstance(steps, str):
        with pytest.raises(ValueError, match=steps):
            CubaLIF(**given)
        return
    neurons = CubaLIF(**given)
    assert neurons.refractory.tolist() == steps
    assert neurons.reset == "zero"
    assert [name for name, _ in neurons.named_parameters()] == ["syn_decay", "beta", "threshold"]
    other = CubaLIF(given.get("neurons"), reset_current=True)
    other.load_state_dict(neurons.state_dict())
    assert (other.refractory.tolist(), other.reset_current.item()) == (steps, 0)
    for kind in (LIF, Synaptic, AdLIF):
        neurons, plain = kind(**given), kind(given.get("neurons"))
        assert plain.refractory is None
        if not any(steps):
            assert neurons.model_name == kind.model.name
            continue
        assert neurons.refractory.tolist() == steps
        assert neurons.model_name == f"refractory_{kind.model.name}"
        assert {*neurons.state_dict()} - {*plain.state_dict()} == {"refractory"}


def test_a_gain_that_is_kept_has_no_graph():
    """A copy after an evaluation, and two backward passes of decays that were frozen after it."""
    neurons = CubaLIF(threshold=0.2)
    with torch.no_grad():
        kept = neurons.gain
    assert not kept.requires_grad
    torch.testing.assert_close(copy.deepcopy(neurons).gain, kept, rtol=0, atol=0)
    neurons.syn_decay.requires_grad_(False)
    neurons.beta.requires_grad_(False)
    current = torch.rand(5, 3, 8, requires_grad=True)
    for _ in range(2):
        neurons(current).sum().backward()
    assert current.grad.isfinite().all()


@pytest.mark.parametrize("size", [(40, 40, 40), (1, 40, 40), (40, 1, 1), (1, 1, 1)])
def test_adaptive_neurons_are_kept_where_they_do_not_grow_by_themselves(size):
    """Beyond the bounds an eigenvalue of (w, U) from step to step exceeds 1, and within them none does."""
    draw = torch.Generator().manual_seed(0)
    neurons = AdLIF(40)
    for name, count, low, high in zip(("a", "adapt_decay", "beta"), size, (-1, -0.1, -0.1), (6, 1.1, 1.1), strict=True):
        neurons.by_name[name].data = low + (high - low) * torch.rand(count, generator=draw, dtype=torch.float64)

    def growth() -> torch.Tensor:
        a, rho, beta = torch.broadcast_tensors(neurons.a, neurons.adapt_decay.clamp(0, 1), neurons.beta.clamp(0, 1))
        steps = torch.stack([torch.stack([rho, a], -1), torch.stack([-rho, beta - a], -1)], -2)
        return torch.linalg.eigvals(steps.detach()).abs().amax(-1)

    before, given = growth(), neurons.a.detach().clone()
    neurons.keep_stable_()
    assert growth().max() <= 1 + 1e-6
    if size == (40, 40, 40):
        assert torch.equal(neurons.a != given, before > 1 + 1e-9)
    fixed = AdLIF(4, a=-1.0, learn_a=False)
    fixed.keep_stable_()
    assert (fixed.a == -1).all()  # what was given stays
