"""Dale's law: weights keep the sign of their source through training, rewiring, averages and a reload."""

import copy
import pickle

import pytest
import torch
from helpers import seeded
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, DSTScheduler, G2GLinear, Projection, SpikingNetwork, keep_signs

SIGNS = torch.where(torch.arange(24) % 4 == 3, -1, 1)


def network(block_size=1):
    draw = seeded(0)

    def joined(out, into, **options):
        layouts = GroupLayout(out, 2, kind="random", generator=draw), GroupLayout(into, 2)
        mask = BlockMask.sample(*layouts, p_intra=0.6, p_inter=0.3, block_size=block_size, generator=draw)
        return G2GLinear(mask, generator=draw, **options)

    first, last = Projection("input", "a", joined(24, 10)), Projection("a", "out", joined(5, 24))
    recurrent = Projection("a", "a", joined(24, 24, bias=False), delay=1)
    return SpikingNetwork({"a": LIF(), "out": LIF()}, [first, recurrent, last], "out", T=6)


def kept(net: torch.nn.Module, signs: torch.Tensor = SIGNS) -> bool:
    return all(bool((net.get_submodule(name).weight * signs >= 0).all()) for name in ("a_to_a", "a_to_out"))


def train(net, optimizer, steps: int, *then) -> None:
    draw = seeded(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(2 * torch.rand(6, 10, generator=draw)) - 3).square().mean().backward()
        optimizer.step()
        for each in then:
            each()


@pytest.mark.parametrize("block_size", [1, 5])
def test_signs_hold_through_training_rewiring_and_averages(block_size):
    net = network(block_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    keep_signs(net, optimizer, {"a": SIGNS})
    assert kept(net)
    average.update_parameters(net)
    average.module.load_state_dict(net.state_dict())
    scheduler = DSTScheduler(net, optimizer, interval=3, fraction=0.3, grow="random", averages=[average])
    train(net, optimizer, 12, scheduler.step, lambda: average.update_parameters(net))
    assert scheduler.grown > 0
    assert kept(net)
    assert kept(average.module)
    signs = net.connections()["input_to_a"].weight.sign()
    assert {-1, 1} <= {*signs.flatten().tolist()}  # of inputs nothing was said


def test_a_weight_at_its_border_is_0_and_returns():
    layer = G2GLinear(BlockMask.full(GroupLayout(1, 1), GroupLayout(2, 1), block_size=1), bias=False)
    layer.values.data = torch.tensor([0.1, -0.1])[:, None, None]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    keep_signs(layer, optimizer)
    for gradient, expected in ((1.0, [0.0, -1.1]), (-0.5, [0.5, -0.6])):  # lowers both, and raises both
        layer.values.grad = torch.full_like(layer.values, gradient)
        optimizer.step()
        assert layer.values.flatten().tolist() == pytest.approx(expected)


def test_signs_are_those_of_loaded_weights_and_given_ones_turn_weights():
    net, loaded = network(), network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sizes = {name: each.weight.abs() for name, each in net.connections().items()}
    with pytest.raises(ValueError, match=r"neuron 0 of a has weights of both signs .*give signs"):
        keep_signs(net, optimizer)
    keep_signs(net, optimizer, {"a": SIGNS})
    assert all(torch.equal(each.weight.abs(), sizes[name]) for name, each in net.connections().items())
    loaded.load_state_dict(net.state_dict())
    found = keep_signs(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1)).signs["a"]
    present = sum(each.abs().sum(0) for name, each in sizes.items() if name != "input_to_a") > 0
    assert torch.equal(found[present].long(), SIGNS[present])
    keep_signs(net, optimizer, {"a": -SIGNS})  # as of another state: the first signs hold no more
    train(net, optimizer, 3)
    assert kept(net, -SIGNS)
    assert all((net.get_submodule(name).weight != 0).any() for name in ("a_to_a", "a_to_out"))
    keep_signs(net.a_to_a, optimizer, 0 * SIGNS)
    train(net, optimizer, 9)
    assert (net.a_to_out.weight * SIGNS <= 0).all()
    assert not (net.a_to_a.weight * SIGNS <= 0).all()


def test_a_neuron_of_sign_0_is_free_also_in_a_network_inside_of_a_module():
    net, free = network(), SIGNS.clone()
    free[:12] = 0
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    assert list(keep_signs(torch.nn.Sequential(net), optimizer, {"a": free}).signs) == ["a"]
    train(net, optimizer, 5)
    assert kept(net, free)
    assert not kept(net)


def test_what_are_no_signs_and_no_such_weights_are_refused():
    net, linear = network(), torch.nn.Linear(3, 3)
    of_net, of_inputs, of_linear = (torch.optim.SGD(each.parameters(), 0.1) for each in (net, net.input_to_a, linear))
    for given, message in (
        ((net, of_net, {"b": SIGNS}), "no such source, only a, out|no such source, only a"),
        ((net, of_net, {"a": SIGNS[:3]}), r"signs of a are torch.int64 \[3\]; give a tensor of 24"),
        ((net, of_net, {"a": SIGNS < 0}), r"signs of a are torch.bool"),
        ((net, of_net, {}), "signs is empty"),
        ((net, of_net, {"a": SIGNS * 2}), "must be 1, −1 or 0"),
        ((net, of_net, {"a": [1] * 24}), "list; give a tensor"),
        ((linear, of_linear), "has no G2GLinear layer"),
        ((net, of_inputs, {"a": SIGNS}), "does not hold the weights from a"),
        ((net, None, {"a": SIGNS}), r"NoneType; give the torch\.optim\.Optimizer"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            keep_signs(*given)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda all_three: pickle.loads(pickle.dumps(all_three))])
def test_copies_of_network_optimizer_and_signs_keep_them(twin_of):
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    net, optimizer, handle = twin_of((net, optimizer, keep_signs(net, optimizer, {"a": SIGNS})))
    train(net, optimizer, 3)
    assert kept(net)
    handle.remove()
    handle.remove()  # does nothing
    train(net, optimizer, 3)
    assert not kept(net)
