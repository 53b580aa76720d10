"""Spikes and membranes over time with their gradient, and readouts of output neurons that do not spike: their last,
mean or largest membrane, on every backend."""

import pytest
import torch
from helpers import backends_of, seeded
from networks import Reference, small_net
from torch import nn
from torch.nn import functional as F
from training_runs import SMALL, load, run

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.ops.g2g_stack import WAYS
from g2gnet import LIF, DSTScheduler, G2GLinear, SpikingStack
from g2gnet.data import load_dataset
from g2gnet.interop import from_snntorch, to_nir, to_snntorch
from g2gnet.network_settings import SettingsError
from g2gnet.programs.report.content import inspect
from g2gnet.spiking_network import READOUTS
from g2gnet.training import TrainSettings, read_run

STEPS = 5
X = torch.rand(STEPS, 4, 12, generator=seeded(1)) * 4
LABELS = torch.arange(4)
OF_MEMBRANES = READOUTS[1:]
READ = {"last": lambda membranes: membranes[-1], "mean": lambda membranes: membranes.mean(0)}
READ["max"] = lambda membranes: membranes.max(0).values


def net_of(readout="counts", **options):
    return small_net(sizes=(12, 16, 5), readout=readout, **{"T": STEPS, "threshold": 0.4, **options})


def loss_of(membranes):
    """Cross-entropy on the membranes of the output at every step, as in snnTorch's fifth tutorial; all layers count."""
    *hidden, last = membranes
    steps = torch.arange(1.0, len(last) + 1, dtype=last.dtype)[:, None, None]
    return sum(F.cross_entropy(each, LABELS) for each in last) + sum((steps * each.square()).mean() for each in hidden)


def lateness(trains):
    """Of spikes [T, B, N] of each layer: their steps, squared, so that each step counts differently."""
    steps = torch.arange(1.0, STEPS + 1)[:, None, None]
    return sum((steps**2 * spikes).mean() for spikes in trains)


@pytest.mark.parametrize("backend", backends_of(WAYS))
@pytest.mark.parametrize(
    ("x", "options"),
    [
        (X, {}),
        (X[0], {"neuron": "synaptic", "reset": "zero", "per_neuron": True}),
        (X, {"neuron": "adlif", "recurrent": True, "rec_gain": 1.0}),
    ],
    ids=["lif", "synaptic, held", "adlif, recurrent"],
)
def test_spikes_and_membranes_over_time_and_their_gradients_are_those_of_float64(backend, x, options):
    net = net_of(backend=backend, **options)
    reference, x64 = Reference(net), x.double().expand(STEPS, 4, 12)
    expected = reference.run(x64)
    activity = net.simulate(x, membranes=True, spikes=True)
    trains = [spikes.dense() for spikes in activity.spikes]
    for number, (of_steps, train) in enumerate(zip(reference.membranes.values(), expected.values(), strict=True)):
        torch.testing.assert_close(activity.membranes[number].double(), of_steps, rtol=1e-5, atol=1e-5)
        assert torch.equal(trains[number].double(), train)
        assert train.sum() > 0
        assert torch.equal(activity.membranes[number][-1], activity.states[number][-1])
    assert torch.equal(activity.counts, net.simulate(x).counts)
    references = reference.gradients(loss_of(reference.membranes.values()) + lateness(expected.values()), expected, x64)
    (loss_of(activity.membranes) + lateness(trains)).backward()
    for name, parameter in net.named_parameters():
        # float32 against float64, through 5 steps and 3 layers
        torch.testing.assert_close(parameter.grad.double(), references[name], rtol=1e-3, atol=1e-5)
        assert parameter.grad.abs().sum() > 0 or name == "lif3.b"


@pytest.mark.parametrize("backend", backends_of(WAYS))
def test_counts_rates_and_their_gradients_are_the_same_with_and_without_spikes_over_time(backend):
    results = []
    for spikes in (False, True):
        net = net_of(backend=backend, dropout=0.3)
        activity = net.simulate(X, dropped=net.drop(4, seeded(2)), spikes=spikes)
        (activity.counts.square().sum() + 10 * activity.rates[0].sum()).backward()
        results.append([activity.counts.detach(), *activity.rates, *(parameter.grad for parameter in net.parameters())])
        assert activity.spikes[0].dense().requires_grad == spikes
    # float32 sums in two orders, through 5 steps and 3 layers
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_membranes_of_dropped_neurons_are_zero_and_parts_are_the_whole():
    net = net_of(dropout=0.5)
    dropped = net.drop(4, seeded(2))
    whole = net.simulate(X, dropped=dropped, membranes=True)
    for membranes, of_layer in zip(whole.membranes, dropped, strict=False):
        assert not membranes[:, of_layer].any()
        assert membranes[:, ~of_layer].all()
    first = net.simulate(X[:2], dropped=dropped, membranes=True)
    second = net.simulate(X[2:], first.state, dropped=dropped, membranes=True)
    joined = tuple(map(torch.cat, zip(first.membranes, second.membranes, strict=True)))
    torch.testing.assert_close(joined, tuple(whole.membranes))


def test_membranes_of_half_precision_are_float32_and_are_kept_where_they_are_wanted_and_can_be_had():
    net = net_of()
    with torch.autocast("cpu", torch.bfloat16):
        membranes = net.simulate(X, membranes=True).membranes
    assert {each.dtype for each in membranes} == {torch.float32}
    assert net.simulate(X).membranes is net.simulate(X, chunk=2).membranes is None
    net.lif2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="membranes=True was given to a network whose modules are called in turn"):
        net.simulate(X, membranes=True)


@pytest.mark.parametrize("readout", ["counts", "last", "max"])
@pytest.mark.parametrize("backend", backends_of(WAYS))
def test_membranes_of_chosen_neurons_are_those_of_all_and_have_their_gradient(backend, readout):
    net, found = net_of(readout=readout, backend=backend).eval(), []
    some = {"lif1": [3, 0, 3], net.populations[-1]: torch.arange(net.sizes[-2]) % 2 == 1}
    for chosen, chunk in ((True, None), (some, None), (some, 2), (True, 3)):
        activity = net.simulate(X, membranes=chosen, silenced={"lif2": [1]}, chunk=chunk)
        first, hidden, *_, output = activity.membranes
        if chosen is True:
            assert not hidden[..., 1].any()
            first, output = first[..., [3, 0, 3]], output[..., 1::2]
        else:
            assert hidden is None
            assert first.shape == (STEPS, 4, 3)
        loss = (first * torch.arange(3)).sum() + output.square().sum() + activity.output.sum()
        found.append([first, output, activity.output, *torch.autograd.grad(loss, [*net.parameters()])])
    assert first.any()
    for others in found[1:]:
        for ours, theirs in zip(found[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def membranes_in_steps(net, x):
    """[T, B, C], of the output neurons."""
    state, membranes = None, []
    for x_t in x.expand(STEPS, 4, 12):
        membrane, state = net.step(x_t, state)
        membranes.append(membrane)
    return torch.stack(membranes)


@pytest.mark.parametrize("backend", backends_of(WAYS))
@pytest.mark.parametrize(
    ("x", "options"),
    [(X, {"per_neuron": True}), (X[0], {"neuron": "synaptic", "reset": "zero"}), (X, {"neuron": "adlif", "b": 0.3})],
    ids=["lif", "synaptic, held", "adlif"],
)
@pytest.mark.parametrize("readout", OF_MEMBRANES)
def test_a_readout_and_its_gradients_are_those_of_neurons_that_only_integrate(backend, x, options, readout):
    net, exact = net_of(readout, backend=backend, **options), net_of(readout, backend="torch", **options).double()
    membranes = membranes_in_steps(exact, x.double())
    assert exact.lif3.reset == "none"
    assert (membranes > 0.4).any()  # where neurons would spike
    expected = READ[readout](membranes)
    torch.testing.assert_close(net(x).double(), expected, rtol=1e-5, atol=1e-5)
    F.cross_entropy(expected, LABELS).backward()
    F.cross_entropy(net(x), LABELS).backward()
    for (name, parameter), reference in zip(net.named_parameters(), exact.parameters(), strict=True):
        # float32 against float64, through 5 steps and 3 layers
        torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-3, atol=1e-5, msg=name)
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("readout", OF_MEMBRANES)
def test_a_readout_is_that_of_snntorchs_membranes_without_a_reset(readout):
    net = net_of(readout)
    theirs = to_snntorch(net)
    assert (theirs.lif3.reset_mechanism, theirs.lif1.reset_mechanism) == ("none", "subtract")
    membranes = torch.stack([theirs(x)[1] for x in X])
    torch.testing.assert_close(net.simulate(X, membranes=True).membranes[-1], membranes)
    torch.testing.assert_close(net(X), READ[readout](membranes))
    F.cross_entropy(READ[readout](membranes), LABELS).backward()
    F.cross_entropy(net(X), LABELS).backward()
    for number in (1, 2, 3):
        ours, linear = net.get_submodule(f"fc{number}"), theirs.get_submodule(f"fc{number}")
        torch.testing.assert_close(ours.mask.unpack(ours.values.grad), linear.weight_orig.grad * linear.weight_mask)
        beta = theirs.get_submodule(f"lif{number}").beta.grad
        torch.testing.assert_close(net.get_submodule(f"lif{number}").beta.grad.squeeze(), beta)


def test_a_network_from_snntorch_counts_only_spikes_that_are_meant():
    net = net_of("mean")
    theirs = to_snntorch(net)
    with pytest.raises(ValueError, match="lif3 has no reset; give readout='last', 'mean' or 'max'"):
        from_snntorch(theirs, T=STEPS)
    torch.testing.assert_close(from_snntorch(theirs, T=STEPS, readout="mean")(X), net(X))
    assert from_snntorch(theirs, T=STEPS, readout="counts")(X).any()
    for given in (theirs, to_snntorch(net_of("counts"))):
        with pytest.raises(ValueError, match="readout='sum' is unknown"):
            from_snntorch(given, T=STEPS, readout="sum")
    theirs.lif3.reset_mechanism = "subtract"
    with pytest.raises(ValueError, match=r"readout='max' is of membranes that are not reset, but lif3 .*'subtract'"):
        from_snntorch(theirs, T=STEPS, readout="max")


@pytest.mark.parametrize("readout", OF_MEMBRANES)
def test_neurons_that_integrate_have_no_spikes_and_their_membranes_by_steps(readout):
    net = net_of(readout)
    activity = net.simulate(X)
    assert not activity.counts.any()
    assert not activity.rates[-1].any()
    assert activity.spikes[-1].dense().shape == (STEPS, 4, 5)
    assert not activity.spikes[-1].dense().any()
    assert activity.rates[1].any()
    assert activity.membranes is None
    torch.testing.assert_close(activity.output, net(X))
    membranes = membranes_in_steps(net, X)
    torch.testing.assert_close(membranes, net.simulate(X, membranes=True).membranes[-1])
    torch.testing.assert_close(READ[readout](membranes), activity.readout)
    torch.testing.assert_close(net.simulate(X[2:], net.simulate(X[:2]).state).output, READ[readout](membranes[2:]))


@pytest.mark.skipif("cpu" not in backends_of(WAYS), reason="the CPU kernels were not built")
def test_in_bfloat16_the_cpu_kernels_take_the_currents_of_single_steps():
    outcomes = []
    for backend in (None, "cpu"):  # alone, neurons run on PyTorch's operations
        net = net_of("mean", neuron="adlif", backend=backend, dropout=0.2)
        dropped = [torch.rand(4, 16, generator=seeded(4)) < 0.2 for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            activity = net.simulate(X, membranes=True, spikes=True, dropped=dropped)
        F.cross_entropy(activity.output, LABELS).backward()
        outcomes.append([activity.output, *activity.membranes, *(each.grad for each in net.parameters())])
        assert [each.dense().dtype for each in activity.spikes[:-1]] == [torch.bfloat16] * 2
    torch.testing.assert_close(*outcomes)


def test_what_cannot_be_read_is_refused_by_name():
    net = net_of("mean")
    optimizer, activity = torch.optim.Adam(net.parameters()), net.simulate(X)
    DSTScheduler(net, optimizer, prune="set", grow="gradient")
    of_layers = DSTScheduler([net.fc1, net.fc2, net.fc3], optimizer, prune="hebb", grow="random", interval=1)
    mask = BlockMask.full(GroupLayout(8, 1), GroupLayout(8, 1), 4)
    recurrent, foreign = (G2GLinear(mask), LIF(), G2GLinear(mask, bias=False)), (G2GLinear(mask), nn.ReLU())
    for call, message in (
        (lambda: net_of("sum"), "readout='sum' is unknown; choose one of counts, last, mean, max"),
        (lambda: to_nir(net), "readout='mean' cannot be written to NIR"),
        (lambda: DSTScheduler(net, optimizer, prune="set", grow="hebb"), "a correlation needs output spikes"),
        (lambda: of_layers.step(X, activity), "a correlation needs output spikes; this activity is a readout"),
        (lambda: SpikingStack([recurrent], 5, readout="last"), "'last' is of neurons that do not spike, but rec1"),
        (lambda: SpikingStack([foreign], 5, readout="last"), "and lif1 is a ReLU"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert of_layers.steps == 0
    assert DSTScheduler([net.fc1, net.fc2], optimizer, prune="hebb", grow="random", interval=1).step(X, activity)
    with pytest.raises(AttributeError):
        net.readout = "largest"
    net.fc3.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="readout='mean' was given to a network whose modules are called in turn"):
        net(X)
    for options, match in (
        ({"sparsity_mode": "dynamic"}, "cg=hebb: a correlation needs output spikes"),
        ({"sparsity_mode": "dynamic", "cp": "hebb", "cg": "random"}, "cp=hebb: a correlation"),
    ):
        with pytest.raises(SettingsError, match=match):
            TrainSettings(model="index", readout="max", **options)
    TrainSettings(model="index", readout="max", chunk=3, sparsity_mode="dynamic", cg="random")


@pytest.mark.parametrize(
    "options",
    [
        {"readout": "last", "chunk": 3, "enforce_sparsity": True, "warmup_epochs": 0},
        {"readout": "mean", "sparsity_mode": "dynamic", "cg": "gradient", "dst_interval": 2, "precision": "bf16"},
        {"readout": "max", "neuron": "adlif", "recurrent": True, "dropout": 0.2},
    ],
    ids=lambda options: options["readout"],
)
def test_networks_with_a_readout_learn(options, tmp_path, caplog):
    files = run(tmp_path, **options, epochs=4, lr=5e-3)
    history = load(files)["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["train_acc"] > 0.3  # of ten classes
    assert list(history[-1]["firing_rate"]) == list(history[-1]["silent"]) == ["lif1", "lif2"]
    assert "silent" not in caplog.text
    saved = read_run(files.checkpoint)
    data = load_dataset(SMALL["dataset"]).limited(SMALL["limit_train"], SMALL["limit_test"])
    found = inspect(saved, saved.network(), data, SMALL["limit_test"])
    assert found.analysis.accuracy == history[-1]["test_acc"] == int(found.confusion.trace()) / SMALL["limit_test"]
    assert found.analysis.layers[-1].firing_rate == 0
