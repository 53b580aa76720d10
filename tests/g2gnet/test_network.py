"""G2GNet: its graph, its input forms, and equality with the same network in snnTorch."""

import dataclasses
import functools
import inspect
import math

import networks
import numpy as np
import pytest
import torch
from covering import every_pair
from helpers import backends_of, seeded

from g2g_kernels import BackendError
from g2g_kernels.ops import g2g_stack
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2gnet import G2GNet, SpikingStack, Synaptic
from g2gnet.encoding import SampleForm
from g2gnet.interop import to_snntorch
from g2gnet.network_settings import PARAMETERS, NetworkSettings
from g2gnet.weights.patterns import SPARSE

small_net = functools.partial(networks.small_net, T=12)


def assert_near(ours, theirs):
    """Within 1e-5 of the gradient's norm: snnTorch's gradients pass through float32 spikes, single entries that nearly
    cancel therefore have a larger relative error of their own."""
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)
    assert torch.linalg.vector_norm(theirs) > 0


def test_dense_has_every_unit_and_sparse_models_the_groups_of_their_name():
    dense = small_net("dense", num_groups=64)  # it takes any number
    assert all(connection.mask.is_full for connection, _ in dense.layers())
    assert dense(torch.rand(2, 30)).shape == (2, 10)
    for model, outer, middle in (
        ("index", "index", "index"), ("random", "random", "random"), ("mixer", "index", "interleaved")
    ):  # fmt: skip
        kinds = [(c.mask.rows.layout.kind, c.mask.cols.layout.kind) for c, _ in small_net(model).layers()]
        assert kinds == [(outer, outer), (middle, middle), (outer, outer)]


def test_the_constructor_has_the_names_and_defaults_of_the_settings():
    arguments = inspect.signature(G2GNet).parameters
    shared = arguments.keys() - {"input_dim", "num_classes", "backend", "generator", "parameters"}
    fields = {field.name: field.default for field in dataclasses.fields(NetworkSettings)}
    assert shared == fields.keys() - set(PARAMETERS)  # which are among the neurons' parameters
    for name in shared - {"hidden_dim"}:  # which has none
        assert arguments[name].default == fields[name], name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "dense", "per_neuron": True, "threshold": 0.5, "reset": "zero"},
        {
            "model": "mixer", "p_inter": 0.3, "p_intra": 0.8, "num_groups": 5, "block_size": 3, "T": 7, "enc": "rate",
            "enc_scale": 2.0, "enc_bias": 0.5, "neuron": "synaptic", "beta": 0.7, "syn_decay": 0.4,
            "surrogate": "triangle", "alpha": 3.0, "dropout": 0.25, "init_gain": 2.0,
        },
        {"standardize": True},
    ],
    ids=["defaults", "dense", "all others", "standardised"],
)  # fmt: skip
def test_a_network_from_settings_is_the_one_of_the_constructor(options):
    ours = G2GNet.from_settings(NetworkSettings(**{"hidden_dim": 40, **options}), 30, 10, "torch", seeded(1))
    theirs = G2GNet(30, 40, 10, backend="torch", generator=seeded(1), **options)
    assert repr(ours) == repr(theirs)
    for name in ("T", "enc", "enc_scale", "enc_bias", "standardize", "dropout", "backend"):
        assert getattr(ours, name) == getattr(theirs, name), name
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    samples = torch.rand(5, 30)
    assert torch.equal(ours.eval()(samples, seeded(2)), theirs.eval()(samples, seeded(2)))


@every_pair(model=("dense", *SPARSE), neuron=("lif", "synaptic"), per_neuron=(False, True))
def test_the_network_equals_snntorchs(model, per_neuron, neuron):
    net = small_net(model, per_neuron=per_neuron, neuron=neuron, backend="torch").double()
    theirs, trains = to_snntorch(net).double(), ([], [], [])

    def kept(module, inputs, spikes):
        train = trains[int(module is theirs.lif2) + 2 * int(module is theirs.lif3)]
        train.append(spikes.double())  # snnTorch casts spikes to float32
        return train[-1]

    for cells in (theirs.lif1, theirs.lif2, theirs.lif3):
        cells.register_forward_hook(kept)
    ours, x = (torch.rand(6, 30, dtype=torch.float64, generator=seeded(1)).mul(3).requires_grad_() for _ in range(2))
    activity = net.simulate(ours)
    for counts in (activity.counts, sum(theirs(x) for _ in range(net.T))):
        torch.nn.functional.cross_entropy(counts, torch.arange(6)).backward()

    for spikes, train in zip(activity.spikes, trains, strict=True):
        assert torch.equal(spikes.dense(), torch.stack(train))
        assert spikes.dense().any()
    assert_near(ours.grad, x.grad)
    for number, (connection, neurons) in enumerate(net.layers(), 1):
        linear, cells = theirs.get_submodule(f"fc{number}"), theirs.get_submodule(f"lif{number}")
        assert_near(connection.values.grad, connection.mask.pack(getattr(linear, "weight_orig", linear.weight).grad))
        assert_near(connection.bias.grad, linear.bias.grad)
        for name, value in neurons.by_name.items():
            assert_near(value.grad, getattr(cells, "alpha" if name == "syn_decay" else name).grad.view_as(value))


def test_init_gain_multiplies_the_initial_weights_of_the_second_and_third_layer():
    usual, larger = (G2GNet(20, 24, 10, block_size=3, init_gain=gain, generator=seeded(0)) for gain in (1, 3))
    for name, value in usual.state_dict().items():
        expected = 3 * value if name in ("fc2.values", "fc3.values") else value
        assert torch.equal(larger.state_dict()[name], expected)


def test_surrogate_and_alpha_are_those_of_the_hidden_layers():
    net = small_net(surrogate="triangle", alpha=4.0)
    found = [(neurons.surrogate, neurons.alpha) for _, neurons in net.layers()]
    assert found == [("triangle", 4.0), ("triangle", 4.0), ("atan", 2.0)]
    nets = [small_net(surrogate=of_hidden, backend="torch") for of_hidden in ("atan", "boxcar")]
    for net in nets:
        torch.nn.functional.cross_entropy(net(torch.rand(6, 30, generator=seeded(1)) * 3), torch.arange(6)).backward()
    # the output layer's own gradient has no other surrogate in it, that of what lies below has
    assert torch.equal(*(net.fc3.values.grad for net in nets))
    assert not torch.equal(*(net.fc2.values.grad for net in nets))


def test_the_neurons_parameters_begin_where_one_says():
    net = small_net(neuron="synaptic", syn_decay=0.5, beta=0.95, learn_threshold=False)
    for _, neurons in net.layers():
        assert isinstance(neurons, Synaptic)
        assert (neurons.syn_decay.item(), neurons.beta.item()) == (0.5, pytest.approx(0.95))
        assert [name for name, _ in neurons.named_parameters()] == ["syn_decay", "beta"]


def test_samples_are_encoded_and_reach_the_first_layer_once_if_they_are_currents(monkeypatch):
    shapes, x, over_time = [], torch.rand(5, 30), torch.rand(3, 5, 30)

    def spy(call, chunk):
        shapes.append(tuple(call.x.shape))
        return g2g_stack.run(call, chunk)

    monkeypatch.setattr("g2gnet.spiking_network.run", spy)
    net = small_net(enc_scale=2.0, enc_bias=0.5)
    for given in (x, over_time):
        assert net(given).shape == (5, 10)
    small_net(enc="rate")(x)
    assert shapes == [(5, 30), (3, 5, 30), (12, 5, 30)]
    assert torch.equal(net.encode(x), 2 * x + 0.5)
    assert net.encode(over_time) is over_time


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_of_another_dtype_are_named_with_the_remedy(dtype):
    net, x = small_net(), torch.rand(4, 30)
    for call in (net, net.fc1, lambda x: net.simulate(x, spikes=True)):
        with pytest.raises(BackendError, match=rf"x is {dtype} and the weights are torch.float32; give x.to\(torch"):
            call(x.to(dtype))
    assert net(x.to(dtype).to(torch.float32)).shape == (4, 10)
    if dtype != torch.float64:
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x.to(dtype)).shape == (4, 10)


@pytest.mark.parametrize("samples", [12, 5])
def test_time_comes_first_whatever_the_number_of_samples(samples, caplog):
    """A last batch of just T samples is one as any other: in halves, as in truncated backpropagation, and whole."""
    net, x = small_net(T=12, recurrent=True), torch.rand(12, samples, 30, generator=seeded(1)) * 3
    first = net.simulate(x[:7])
    second = net.simulate(x[7:], first.state)
    each = torch.cat([net(x[:, [sample]]) for sample in range(samples)])
    torch.testing.assert_close(first.output + second.output, each)
    torch.testing.assert_close(net(x), each)
    assert not caplog.text


@pytest.mark.parametrize("options", [{}, {"sequence": "own"}, {"recurrent": True, "feedback": True}], ids=str)
def test_batch_first_is_the_same_run_and_says_what_a_shape_does_not(options):
    net, x = small_net(**options), torch.rand(12, 5, 30, generator=seeded(1)) * 3
    expected, given = net.simulate(x, spikes=True), x.transpose(0, 1).contiguous()
    for counts in (net(given, batch_first=True), net.simulate(given, batch_first=True).counts, net(x)):
        assert torch.equal(counts, expected.counts)
    held = torch.rand(5, 30)
    stack = SpikingStack(list(small_net().layers()), T=12)
    assert torch.equal(stack(held, batch_first=True), stack(held))
    assert torch.equal(stack(given, batch_first=True), stack(x))
    # the first half of a run, of as many samples as there are steps
    square = torch.rand(7, 12, 30, generator=seeded(2)) * 3
    first = net.simulate(square, batch_first=False)
    assert first.counts.shape == (12, 10)
    assert torch.equal(first.counts, torch.cat([net.simulate(square[:, [n]]).counts for n in range(12)]))
    assert net.simulate(square, first.state).counts.shape == (12, 10)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((5, 6), np.uint8, {"standardize": True}), ((30,), np.float64, {}), ((2, 15), ">f4", {"dropout": 0.5}),
        ((6, 5), np.uint8, {"sequence": "rows", "T": 6, "standardize": True}),
        ((4, 5), np.int16, {"sequence": "own", "T": 4}),
        ((4, 5), np.float16, {"sequence": "own", "T": 4, "input_taps": 2, "readout": "last"}),
        ((30,), np.float32, {"enc": "rate"}),
    ],
    ids=str,
)  # fmt: skip
def test_predictions_are_those_of_the_encoded_samples_and_leave_the_mode(kind, shape, dtype, options):
    inputs = 5 * options.get("input_taps", 1) if "sequence" in options else 30
    net = small_net(sizes=(inputs, 40, 10), threshold=0.5, **options).double()
    net.lif2.eval()
    if net.standardize:
        net.input_mean.fill_(0.4)
        net.input_deviation.fill_(0.3)
    if "sequence" in options:
        net.input_order.copy_(net.input_order.flip(0))
    scale = 200 if np.dtype(dtype).kind in "iu" else 1
    samples = (scale * np.random.default_rng(0).random((23, *shape))).astype(dtype)
    if dtype == ">f4" and kind is torch.as_tensor:
        samples = samples.astype(np.float32)
    samples.setflags(write=kind is torch.as_tensor)  # arrays may be read-only
    net.trained_on = SampleForm.of(samples.reshape(23, 1, *shape))  # an axis of size 1 may be left out
    found, of_flat = (net.predict(kind(each), 10, seeded(3)) for each in (samples, samples.reshape(23, -1)))
    assert torch.equal(found.logits, of_flat.logits)
    assert [module.training for module in net.modules()].count(False) == 1
    assert not net.lif2.training
    flat = torch.from_numpy(samples.astype(np.float32)).flatten(1).div(255 if dtype == np.uint8 else 1).double()
    draw = seeded(3)
    expected = torch.cat([net.eval()(part, draw) for part in flat.split(10)])
    assert expected.unique().numel() > 2
    assert torch.equal(found.logits, expected)
    assert torch.equal(found.classes, expected.argmax(1))
    assert not found.logits.requires_grad


def test_a_state_of_another_number_of_time_steps_is_refused_by_name():
    net = small_net(T=12)
    state, averaged = net.state_dict(), {**net.state_dict(), "steps": torch.tensor(12.5)}
    message = "steps: saved by a network with 12 time steps, this one has 9; load it into one with T=12"
    for into in (small_net(T=9), SpikingStack(list(small_net().layers()), T=9)):
        with pytest.raises(RuntimeError, match=message):
            into.load_state_dict(state)
    with pytest.raises(RuntimeError, match="steps holds numbers that are not whole"):
        net.load_state_dict(averaged)
    state.pop("steps")  # as it was saved before, and as the message says
    other = small_net(seed=1, T=9)
    other.load_state_dict(state)
    assert other.T == 9
    nested = torch.nn.Sequential(small_net(seed=1, T=12))
    nested.load_state_dict(torch.nn.Sequential(net).state_dict())
    for each in (other, nested[0]):
        assert torch.equal(each.fc1.values, net.fc1.values)


@pytest.mark.parametrize("model", ["index", "random", "mixer"])
@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_fewer_classes_than_groups_are_read_out_and_learned(model, num_classes):
    """With the default groups; without weights between groups every hidden group still leads to some class."""
    net = G2GNet(30, 40, num_classes, model, p_inter=0.0, block_size=2, T=6, threshold=0.5, generator=seeded(0))
    assert net.fc3.mask.rows.layout.num_groups == num_classes
    assert net.fc3.mask.cols.layout.num_groups == 8
    assert net.fc3.mask.to_dense().sum(0).eq(1).all()
    (net(torch.rand(16, 30, generator=seeded(1)) * 3) - 3).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.fc1.parameters())


def test_all_neurons_are_there_in_evaluation_and_others_are_dropped_at_each_call_in_training():
    net = G2GNet(20, 24, 10, block_size=3, T=7, dropout=0.25, generator=seeded(0))
    x = torch.rand(40, 20, generator=seeded(1)) * 4
    whole = net.eval()(x)
    net.dropout = 0.0
    assert torch.equal(net.train()(x), whole)
    net.dropout = 0.25
    assert not torch.equal(net(x), net(x))
    dropped = net.drop(4000, seeded(0))
    assert [(each.shape, each.dtype) for each in dropped] == [((4000, 24), torch.bool)] * 2
    assert (torch.cat(dropped, 1).double().mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), 0.999999, "0.5"])
def test_a_dropout_that_keeps_no_neuron_is_refused_whenever_it_is_set(dropout):
    message = r"dropout=.* must be a number from 0 to 0.99998"
    with pytest.raises(ValueError, match=message):
        G2GNet(20, 24, 10, block_size=3, dropout=dropout)
    net = G2GNet(20, 24, 10, block_size=3, dropout=0.25)
    with pytest.raises(ValueError, match=message):
        net.dropout = dropout
    assert net.dropout == 0.25


@pytest.mark.parametrize("dropout", [1e-6, 0.3, 0.95, 0.99998])
def test_what_the_kept_neurons_send_makes_up_for_those_that_are_dropped(dropout):
    """To the last of the 16 bits that draw them: at 0.99998 one of 65,536 draws keeps a neuron."""
    net = G2GNet(20, 24, 10, block_size=3, dropout=dropout)
    bits = torch.arange(1 << 16, dtype=torch.int32)
    kept = 1 - ((bits - (1 << 15)) < round(dropout * (1 << 16)) - (1 << 15)).double().mean().item()
    x = torch.rand(4, 20)
    call = net._call(x, None, None, net.drop(4), False, False, None)
    values = dict(net.named_parameters())["fc2.values"]
    torch.testing.assert_close(call.populations[1].connections[0].values * kept, values, rtol=1e-5, atol=0)
    if dropout > 0.9999:
        dropped = torch.cat(net.drop(20000, seeded(0)), 1)
        assert 0 < (~dropped).sum() < 40


@every_pair(
    backend=backends_of(g2g_stack.WAYS), surrogate=SURROGATES, block_size=(1, 4), held=(True, False),
    options=({}, {"recurrent": True}, {"delay": 2}, {"delay": 2, "learn_delay": True}, {"feedback": True}),
)  # fmt: skip
def test_an_input_of_nan_that_a_weight_reads_reaches_the_gradients(backend, surrogate, block_size, held, options):
    """Training stops there, rather than go on in silence. (What no weight reads: docs/limits.md.)"""
    net = small_net(block_size=block_size, surrogate=surrogate, p_intra=0.3, p_inter=0.0, backend=backend, **options)
    x = torch.rand(*(() if held else (12,)), 4, 30, generator=seeded(1)) * 3
    x[..., 2, net.fc1.mask.to_dense().any(0).nonzero()[0]] = math.nan
    net(x).sum().backward()
    undefined = {name for name, parameter in net.named_parameters() if parameter.grad.isnan().any()}
    assert {"fc1.values", "fc1.bias", "lif1.beta", "lif1.threshold"} <= undefined
