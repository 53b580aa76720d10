"""Weights that stand in place of a layer's own, or that something else computes: the wiring comes with them, and the
padding of packed weights is nobody's business."""

import copy
import functools

import pytest
import torch
from helpers import saved_and_read, seeded
from networks import small_net
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from g2gnet import LIF, DSTScheduler, Projection, SpikingNetwork
from g2gnet.base.tensor_files import read_tensors, write_tensors

X = torch.rand(6, 32, generator=seeded(9))
HIDDEN = torch.rand(5, 40, generator=seeded(8))


network = functools.partial(small_net, sizes=(32, 40, 10), p_inter=1 / 7, block_size=3, T=4, enc_scale=3.0)


@pytest.mark.parametrize(("device", "options"), [("cpu", {}), ("meta", {}), ("cpu", {"p_inter": 0.15, "T": 6})])
def test_a_functional_call_with_a_networks_state_is_that_network(device, options):
    """Of another wiring, on a device without numbers, with other units and steps; nothing of it stays."""
    net, host = network(seed=1), network(**options).to(device)
    before = copy.deepcopy(host)
    dst = DSTScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), interval=1, fraction=0.3, grow="random")
    for _ in range(2):
        assert torch.equal(functional_call(host, net.state_dict(), (X,)), net(X))
        dst.step()
    assert host.T == before.T
    if device == "cpu":
        assert torch.equal(host(X), before(X))
        assert host.fc2.mask.equals(before.fc2.mask)


def test_weights_alone_are_those_of_the_networks_own_units_and_averages_of_wirings_refused():
    net, host = network(), network(seed=1)
    expected = copy.deepcopy(host)
    with torch.no_grad():
        for mine, theirs in zip(expected.parameters(), net.parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(functional_call(host, dict(net.named_parameters()), (X,)), expected(X))
    states = net.state_dict(), host.state_dict()
    with pytest.raises(ValueError, match="average of networks with different wirings"):
        functional_call(host, {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items()}, (X,))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_assigned_weights_come_with_their_wiring_and_device_and_numbers_that_are_not_there_are_refused(device):
    net = network()
    other = network(seed=1).to(device)
    if device == "meta":
        with pytest.raises(RuntimeError, match=r"fc1\.values is on the device meta"):
            net.load_state_dict(other.state_dict())
        assert torch.equal(net.fc2.mask.to_dense(), network().fc2.mask.to_dense())
    other.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(other(X), net(X))
    assert torch.equal(other.fc2.mask.to_dense(), net.fc2.mask.to_dense())


class Half(nn.Module):
    def forward(self, values):
        return values / 2


class GainOfPair(nn.Module):
    """As on docs/connectome.md: a signed count of each weight, times a gain of its pair of cell types."""

    def __init__(self, pair, count):
        super().__init__()
        self.register_buffer("pair", pair)
        self.register_buffer("count", count)

    def forward(self, gain):
        return (gain.exp()[self.pair] * self.count).view(-1, 1, 1)

    def right_inverse(self, values):
        return torch.zeros(int(self.pair.max()) + 1)


def test_a_gain_for_each_pair_of_cell_types_has_the_sum_of_the_gradients_of_its_weights():
    draw, size = seeded(3), 40
    pre, post = (torch.randint(size, (300,), generator=draw) for _ in range(2))
    cues = Projection.from_edges("input", "cells", range(6), range(6), 1.0, sizes=(6, size))
    (brain,) = Projection.from_edges("cells", "cells", pre, post, 1.0, 2, sizes=(size, size))
    net = SpikingNetwork({"cells": LIF(threshold=0.6)}, [*cues, brain], "cells", T=20)
    layer, edges = net.cells_to_cells, net.cells_to_cells.mask.edges()
    types = torch.arange(size) % 3
    pair = types[edges.source] * 3 + types[edges.target]
    count = torch.randint(1, 9, pair.shape, generator=draw) * torch.where(types[edges.source] == 0, -0.1, 0.1)
    gains = torch.randn(9, generator=draw) / 4
    with torch.no_grad():
        layer.values.copy_((gains.exp()[pair] * count).view(-1, 1, 1))
    x = torch.rand(20, 4, 6, generator=draw)
    plain = net.simulate(x)
    plain.rates["cells"].square().sum().backward()
    expected = torch.zeros(9).index_add(0, pair, (layer.values.grad * layer.values.detach()).flatten())
    net.zero_grad()
    parametrize.register_parametrization(layer, "values", GainOfPair(pair, count))
    learned = layer.parametrizations["values"].original
    learned.data.copy_(gains)
    activity = net.simulate(x)
    activity.rates["cells"].square().sum().backward()
    assert torch.equal(activity.counts, plain.counts)
    assert plain.counts[:, 6:].any()
    torch.testing.assert_close(learned.grad, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r".* are computed by a parametrization"):
        DSTScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), prune="set", grow="random")


WRAPPED = {
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "values", Half()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "values"),
    "pruning": lambda layer: prune.l1_unstructured(layer, "values", amount=0.5),
    "the old weight_norm": lambda layer: nn.utils.weight_norm(layer, "values"),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_something_computes_are_saved_and_loaded_with_the_same_wiring_only(wrap):
    layers = [network().fc2, network().fc2, network(seed=1).fc2]
    with torch.no_grad():
        layers[1].values.mul_(3)
    for layer in layers:
        wrap(layer)
    first, second, other = layers
    if wrap is WRAPPED["a parametrization"]:
        assert torch.equal(copy.deepcopy(first)(HIDDEN), first(HIDDEN))
        wrap(plain := network().fc2)
        parametrize.remove_parametrizations(plain, "values")
        for each in (first, plain):
            assert torch.equal(each.dense_weight(), network().fc2.dense_weight() / 2)
        assert isinstance(plain.values, nn.Parameter)
    x, before = HIDDEN.clone().requires_grad_(), first.values.detach().clone()
    if wrap is WRAPPED["pruning"]:
        assert (before != 0).sum() == before.numel() // 2
    first(x).sum().backward()
    assert x.grad.abs().sum() > 0
    torch.optim.SGD(first.parameters(), lr=0.1).step()  # of weights that are computed anew in each call
    assert (first(HIDDEN) - torch.nn.functional.linear(HIDDEN, first.dense_weight(), first.bias)).abs().max() < 1e-4
    assert ((first.values != before) == (before != 0)).float().mean() > 0.9
    second.load_state_dict(saved_and_read(first.state_dict()))
    assert torch.equal(second(HIDDEN), first(HIDDEN))
    with pytest.raises(RuntimeError, match="mask differs"):
        other.load_state_dict(first.state_dict())
    assert torch.equal(other.mask.to_dense(), network(seed=1).fc2.mask.to_dense())


def test_the_state_for_distributed_checkpoints_is_the_networks():
    net, other = network(), network(seed=1)
    state = get_model_state_dict(net)
    assert state.keys() == net.state_dict().keys()
    set_model_state_dict(other, state)
    assert torch.equal(other(X), net(X))


def padded(fill):
    net = network()
    for connection, _ in net.layers():
        assert connection.mask.has_padding
        connection.values.data.masked_fill_(~connection.mask.valid(), fill)
    return net


@pytest.mark.parametrize("fill", [5.0, torch.nan])
def test_padding_is_zero_in_what_is_saved_and_loading_takes_anything(fill, tmp_path):
    clean, net, again = network(), padded(fill), network(seed=1)
    given = {name: tensor.clone() for name, tensor in net.named_parameters()}
    write_tensors(tmp_path / "net.pth", net.state_dict())
    torch.testing.assert_close(read_tensors(tmp_path / "net.pth"), dict(clean.state_dict()), rtol=0, atol=0)
    again.load_state_dict({**clean.state_dict(), **given})
    assert torch.equal(again(X), clean(X))
    assert torch.equal(again.state_dict()["fc2.values"], clean.state_dict()["fc2.values"])


@pytest.mark.parametrize("fill", [1e3, torch.nan])
def test_padding_counts_in_no_score(fill):
    results = []
    for net in (network(), padded(fill)):
        optimizer = torch.optim.Adam(net.parameters())
        dst = DSTScheduler(net, optimizer, interval=1, grow="gradient")
        net(X).square().sum().backward()
        optimizer.step()
        dst.step()
        assert dst.pruned > 0
        results.append(net.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)
