"""Spikes and membranes over time with their gradient, for losses on them, on every backend."""

import functools

import pytest
import torch
from helpers import backends_of, seeded
from networks import Reference, small_net
from torch.nn import functional as F

from g2g_kernels.ops.g2g_stack import operator

STEPS = 5
X = torch.rand(STEPS, 4, 12, generator=seeded(1)) * 4
LABELS = torch.arange(4)


net_of = functools.partial(small_net, sizes=(12, 16, 5), T=STEPS, threshold=0.4)


def loss_of(membranes):
    """Cross-entropy on the membranes of the output at every step, as in snnTorch's fifth tutorial; all layers count."""
    *hidden, last = membranes
    steps = torch.arange(1.0, len(last) + 1, dtype=last.dtype)[:, None, None]
    return sum(F.cross_entropy(each, LABELS) for each in last) + sum((steps * each.square()).mean() for each in hidden)


def lateness(trains):
    """Of spikes [T, B, N] of each layer: their steps, squared, so that each step counts differently."""
    steps = torch.arange(1.0, STEPS + 1)[:, None, None]
    return sum((steps**2 * spikes).mean() for spikes in trains)


@pytest.mark.parametrize("backend", backends_of(operator))
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


@pytest.mark.parametrize("backend", backends_of(operator))
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
    with pytest.raises(ValueError, match=r"chunk=2 does not keep the membranes that a layer is to give; leave it out"):
        net.simulate(X, chunk=2, membranes=True)
    net.lif2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="membranes=True was given to a network whose modules are called in turn"):
        net.simulate(X, membranes=True)
