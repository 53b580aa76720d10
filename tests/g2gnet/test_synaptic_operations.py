"""Synaptic operations against a count by loops over every weight, and where they are reported."""

import itertools
import pickle

import pytest
import torch
from helpers import backends_of, compiles_whole, seeded
from networks import small_net

from g2g_kernels.ops.g2g_stack import WAYS
from g2gnet import DSTScheduler
from g2gnet.inspect import Batch, analyze_network
from g2gnet.inspect.summaries import headline, layers_table

B, T = 3, 5


def network(*model, **options):
    """A network whose padding holds numbers, which are no weights."""
    options = {"p_inter": 0.3, "block_size": 2, "num_groups": 4, "T": T, "enc_scale": 4.0, **options}
    net = small_net(*model, sizes=(14, 18, 5), **options)
    for connection, _ in net.layers():
        connection.values.data.masked_fill_(~connection.mask.valid(), 9.0)
    return net


def by_loops(net, x, activity):
    """(additions, multiplications, dense) of each layer: every weight meets every input of its neuron, one by one."""
    counted, received = [], x
    for number, (connection, _) in enumerate(net.layers()):
        vectors, weights = received.reshape(-1, received.shape[-1]), connection.dense_weight()
        operations = sum(int(((vector != 0) & (row != 0)).sum()) for vector, row in itertools.product(vectors, weights))
        dense = len(vectors) * connection.in_features * connection.out_features
        spikes = set(vectors.unique().tolist()) <= {-1, 0, 1}
        counted.append((operations, 0, dense) if spikes else (0, operations, dense))
        received = activity.spikes[number].dense()
    return counted


OVER_TIME = torch.rand(T, B, 14, generator=seeded(1))
INPUTS = {
    "held": ("dense", torch.rand(B, 14, generator=seeded(1)) * (torch.rand(B, 14, generator=seeded(2)) < 0.7) * 3),
    "over time": ("index", OVER_TIME * 3),
    "spikes": ("mixer", (OVER_TIME < 0.4).float()),
    "signed spikes": ("mixer", torch.randint(-1, 2, (T, B, 14), generator=seeded(1)).float()),
    "nothing": ("dense", torch.zeros(T, B, 14)),
}


@pytest.mark.parametrize("backend", backends_of(WAYS))
@pytest.mark.parametrize(("model", "x"), INPUTS.values(), ids=INPUTS)
def test_operations_are_those_of_every_weight_and_every_input(model, x, backend):
    net = network(model, backend=backend).eval()
    activity = net.simulate(x)
    counted = activity.synaptic_operations()
    assert [tuple(layer) for layer in counted] == by_loops(net, x, activity)
    assert counted[1].accumulates > 0 or not x.any()


@pytest.mark.parametrize("spikes", [False, True])
def test_differentiable_spikes_dropout_and_weights_of_zero_are_counted_as_they_are(spikes):
    net, x = network(dropout=0.5), OVER_TIME * 4
    net.fc2.values.data[::2] = 0
    # which adds the gradient of absent units, and nothing to the operations
    dst = DSTScheduler(net, torch.optim.Adam(net.parameters()), interval=1, grow="gradient")
    activity = net.simulate(x, spikes=spikes)
    assert [tuple(layer) for layer in activity.synaptic_operations()] == by_loops(net, x, activity)
    assert dst.next_is_due
    assert any(connection.mask.has_padding for connection, _ in net.layers())


@pytest.mark.parametrize("change", ["weights", "graph", "inputs"])
def test_what_changed_after_the_run_is_not_counted_wrongly(change):
    net, x = network(), OVER_TIME.clone()
    optimizer = torch.optim.Adam(net.parameters())
    dst = DSTScheduler(net, optimizer, interval=1, grow="random")
    activity = net.simulate(x)
    activity.counts.sum().backward()
    assert activity.synaptic_operations() == activity.synaptic_operations()
    {"weights": optimizer.step, "graph": dst.step, "inputs": lambda: x.mul_(2)}[change]()
    with pytest.raises(RuntimeError, match=r"have changed since.*right after the run"):
        activity.synaptic_operations()


def test_what_is_not_counted_may_change_and_hooked_runs_are_read_where_delays_are():
    net, x = network(), OVER_TIME * 3
    _scheduler = DSTScheduler(net, torch.optim.Adam(net.parameters()), interval=1, grow="gradient")
    activity = net.simulate(x)
    before = activity.synaptic_operations()
    with torch.no_grad():
        net.lif1.beta.clamp_(0, 0.5)
        activity.state[0].zero_()
    assert torch.equal(pickle.loads(pickle.dumps(activity)).counts, activity.counts)  # while the scheduler observes
    assert activity.synaptic_operations()[0][:2] == before[0][:2]
    late = network(delay=3)
    late.fc1.register_forward_hook(lambda *_: None)
    activity = late.simulate(x)
    activity.spikes[0].dense().zero_()
    with pytest.raises(RuntimeError, match="have changed since"):
        activity.synaptic_operations()
    assert network(delay=3).simulate(x[:, :0]).synaptic_operations()[0][:2] == (0, 0)


@pytest.mark.ci
@compiles_whole
def test_a_compiled_run_says_that_it_does_not_know():
    net = network().eval()
    run = torch.compile(lambda x: net.simulate(x), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"was compiled or traced.* run it uncompiled"):
        run(OVER_TIME).synaptic_operations()


def test_the_analysis_has_them_per_sample_over_all_batches():
    net = network().eval()
    batches = [torch.rand(samples, 14, generator=seeded(samples)) for samples in (4, 3)]
    labels = torch.tensor([0, 1, 2, 0])
    runs = [Batch(x, net.simulate(x), labels[: len(x)]) for x in batches]
    totals = torch.zeros(3, 3)
    for x, activity, _ in runs:
        totals += torch.tensor(by_loops(net, x, activity))
    analysis = analyze_network(net, runs, 5)
    found = [(layer.accumulates, layer.multiplies, layer.dense_operations) for layer in analysis.layers]
    torch.testing.assert_close(torch.tensor(found), totals / 7)
    assert analysis.synaptic_operations == pytest.approx(totals[:, :2].sum().item() / 7)
    assert f"{round(analysis.synaptic_operations):,} synaptic operations per image" in headline(analysis)
    rows = {row[0]: row[1:] for row in layers_table(analysis).rows}
    assert rows["synaptic operations per image: additions"][1] == f"{round(totals[1, 0].item() / 7):,}"
    assert rows["synaptic operations per image: multiplications"][0] == f"{round(totals[0, 1].item() / 7):,}"
    assert analysis.as_dict()["layers"]["lif2"]["accumulates"] == found[1][0]
