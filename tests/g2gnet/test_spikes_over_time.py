"""Losses on when neurons fire: spikes of every layer with their gradient, on every backend."""

import functools

import pytest
import torch
from helpers import backends_of, seeded
from networks import small_net
from torch import nn

from g2g_kernels.ops.g2g_stack import operator
from g2gnet import DSTScheduler

STEPS = 7
X = torch.rand(STEPS, 5, 30, generator=seeded(1)) * 3


net_of = functools.partial(small_net, T=STEPS, threshold=0.5)


def lateness(spikes):
    """Of spikes [T, B, N]: their steps, squared, so that each step counts differently."""
    return (torch.arange(1.0, len(spikes) + 1, dtype=spikes.dtype)[:, None, None] ** 2 * spikes).mean()


@pytest.mark.parametrize("backend", backends_of(operator))
@pytest.mark.parametrize("x", [X, X[0]], ids=["over time", "held"])
def test_gradients_of_spikes_over_time_are_those_of_the_network_step_by_step(backend, x):
    net = net_of(backend=backend, neuron="synaptic", per_neuron=True)
    activity = net.simulate(x, spikes=True)
    sum(lateness(spikes.dense()) for spikes in activity.spikes).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()

    state, trains = None, [[] for _ in range(3)]
    for x_t in x.expand(STEPS, 5, 30):
        spikes, after = x_t, []
        for (connection, neurons), before, train in zip(net.layers(), state or (None,) * 3, trains, strict=True):
            spikes, state_of_layer = neurons.step(connection(spikes), before)
            after.append(state_of_layer)
            train.append(spikes)
        state = after
    sum(lateness(torch.stack(train)) for train in trains).backward()
    for kept, train in zip(activity.spikes, trains, strict=True):
        assert torch.equal(kept.dense().detach(), torch.stack(train).detach())
        assert torch.stack(train).sum() > 0
    for name, parameter in net.named_parameters():
        # float32 sums in two orders, through 7 steps and 3 layers
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", backends_of(operator))
def test_counts_rates_and_their_gradients_are_the_same_with_and_without(backend):
    results = []
    for spikes in (False, True):
        net = net_of(backend=backend, dropout=0.3)
        activity = net.simulate(X, dropped=net.drop(5, seeded(2)), spikes=spikes)
        (activity.counts.square().sum() + 10 * activity.rates[0].sum()).backward()
        results.append([activity.counts.detach(), *activity.rates, *(parameter.grad for parameter in net.parameters())])
        assert activity.spikes[0].dense().requires_grad == spikes
    # float32 sums in two orders, through 7 steps and 3 layers
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_units_are_rewired_by_such_activity_as_by_any():
    states = []
    for spikes in (False, True):
        net = net_of(backend="torch")
        dst = DSTScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), interval=1, prune="hebb")
        activity = net.simulate(X, spikes=spikes)
        nn.functional.cross_entropy(activity.counts, torch.arange(5)).backward()
        assert dst.step()
        states.append(net.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)
