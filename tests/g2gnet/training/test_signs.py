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


def network(block_size: int = 1) -> SpikingNetwork:
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
    options = {"interval": 3, "fraction": 0.3, "grow": "random", "averages": [average]}
    scheduler = DSTScheduler(net, optimizer, **options)
    train(net, optimizer, 12, scheduler.step, lambda: average.update_parameters(net))
    assert scheduler.grown > 0
    assert kept(net)
    assert kept(average.module)
    inputs = net.connections()["input_to_a"].weight
    assert (inputs > 0).any()
    assert (inputs < 0).any()  # of which nothing was said


def test_a_weight_at_its_border_is_0_and_returns():
    layer = G2GLinear(BlockMask.full(GroupLayout(1, 1), GroupLayout(2, 1), block_size=1), bias=False)
    layer.values.data = torch.tensor([0.1, -0.1])[:, None, None]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    keep_signs(layer, optimizer)
    x = torch.tensor([[1.0, 1.0]])
    layer(-x).sum().backward()  # raises both
    layer.values.grad *= -1  # lowers both by 1
    optimizer.step()
    assert layer.values.flatten().tolist() == [0.0, pytest.approx(-1.1)]
    layer.values.grad.fill_(-0.5)
    optimizer.step()
    assert layer.values.flatten().tolist() == [0.5, pytest.approx(-0.6)]


def test_signs_are_those_of_loaded_weights_and_given_ones_turn_weights():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sizes = {name: each.weight.abs() for name, each in net.connections().items()}
    with pytest.raises(ValueError, match=r"neuron 0 of a has weights of both signs .*give signs"):
        keep_signs(net, optimizer)
    handle = keep_signs(net, optimizer, {"a": SIGNS})
    found = {name: each.weight.abs() for name, each in net.connections().items()}
    torch.testing.assert_close(found, sizes, rtol=0, atol=0)
    loaded = network()
    loaded.load_state_dict(net.state_dict())
    found = keep_signs(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1)).signs["a"]
    present = sum(each.abs().sum(0) for name, each in sizes.items() if name != "input_to_a") > 0
    assert torch.equal(found[present].long(), SIGNS[present])
    handle.remove()
    train(net, torch.optim.SGD(net.parameters(), lr=5.0), 3)
    assert not kept(net)


def test_a_neuron_of_sign_0_is_free():
    net = network()
    free = SIGNS.clone()
    free[:12] = 0
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    keep_signs(net, optimizer, {"a": free})
    train(net, optimizer, 5)
    assert kept(net, free)
    assert not kept(net)


@pytest.mark.parametrize(
    ("signs", "why"),
    [
        ({"b": SIGNS}, "no such source, only a, out|no such source, only a"),
        ({"a": SIGNS[:3]}, r"signs of a are torch.int64 \[3\]; give a tensor of 24"),
        ({"a": SIGNS < 0}, r"signs of a are torch.bool"),
        ({}, "signs is empty"),
        ({"a": SIGNS * 2}, "must be 1, −1 or 0"),
        ({"a": [1] * 24}, "list; give a tensor"),
    ],
)
def test_what_are_no_signs_is_refused(signs, why):
    net = network()
    with pytest.raises(ValueError, match=why):
        keep_signs(net, torch.optim.SGD(net.parameters(), lr=0.1), signs)


def test_modules_and_optimizers_that_have_no_such_weights_are_refused():
    net, linear = network(), torch.nn.Linear(3, 3)
    of_inputs = torch.optim.SGD(net.input_to_a.parameters(), lr=0.1)
    for given, message in (
        ((linear, torch.optim.SGD(linear.parameters(), lr=0.1)), "has no G2GLinear layer"),
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


def test_a_network_inside_of_a_module_has_the_signs_of_its_populations():
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    assert list(keep_signs(torch.nn.Sequential(net), optimizer, {"a": SIGNS}).signs) == ["a"]
    assert kept(net)
