"""Membranes over time with their gradient, for losses on them, on every backend."""

import functools

import pytest
import torch
from helpers import backends_of, seeded
from networks import small_net
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


def membranes_in_steps(net, x):
    """The membranes [T, B, N] of each layer by ``step``."""
    state, trains = None, []
    for x_t in x.expand(STEPS, 4, 12):
        _, state = net.step(x_t, state)
        trains.append([each if isinstance(each, torch.Tensor) else each[-1] for each in state])
    return [torch.stack(of_layer) for of_layer in zip(*trains, strict=True)]


def gradients_of(net, membranes):
    names, parameters = zip(*net.named_parameters(), strict=True)
    # of a threshold that only spikes see, nothing
    found = torch.autograd.grad(loss_of(membranes), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


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
def test_membranes_and_their_gradients_are_those_of_the_network_step_by_step(backend, x, options):
    net, exact = net_of(backend=backend, **options), net_of(backend="torch", **options).double()
    activity = net.simulate(x, membranes=True)
    expected = membranes_in_steps(exact, x.double())
    for number, (membranes, of_steps) in enumerate(zip(activity.membranes, expected, strict=True)):
        torch.testing.assert_close(membranes.double(), of_steps, rtol=1e-5, atol=1e-5)
        assert torch.equal(activity.spikes[number].dense(), (membranes > 0.4).float())
        assert torch.equal(membranes[-1], activity.states[number][-1])
    assert torch.equal(activity.counts, net.simulate(x).counts)
    assert activity.rates[1].sum() > 0  # resets took place
    references = gradients_of(exact, expected)
    for name, gradient in gradients_of(net, activity.membranes).items():
        # float32 against float64, through 5 steps and 3 layers
        torch.testing.assert_close(gradient.double(), references[name], rtol=1e-3, atol=1e-5)
        assert gradient.abs().sum() > 0 or name in ("lif3.b", "lif3.threshold")


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


def test_membranes_of_half_precision_are_float32_and_nothing_is_kept_unless_wanted():
    net = net_of()
    with torch.autocast("cpu", torch.bfloat16):
        membranes = net.simulate(X, membranes=True).membranes
    assert {each.dtype for each in membranes} == {torch.float32}
    assert net.simulate(X).membranes is None
    assert net.simulate(X, chunk=2).membranes is None


def test_membranes_are_refused_where_they_cannot_be_had():
    net = net_of()
    with pytest.raises(ValueError, match=r"chunk=2 does not keep the membranes that a layer is to give; leave it out"):
        net.simulate(X, chunk=2, membranes=True)
    net.lif2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="membranes=True was given to a network whose modules are called in turn"):
        net.simulate(X, membranes=True)
