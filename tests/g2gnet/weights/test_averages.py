"""Copies of a network that is rewired: averages that are tied to it follow, all others stay as they are."""

import copy
import functools
import gc
import pickle

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from g2gnet import DSTScheduler, G2GLinear, sync_wiring, tie_wiring, untie_wiring

DECAY = 0.8
MIXED = r"average of networks with different wirings.*averages=\[average\]"
X = torch.rand(8, 32, generator=seeded(2))

network = functools.partial(small_net, sizes=(32, 40, 10), p_inter=1 / 7, block_size=3, T=4, enc_scale=3.0)


class AverageOfState(nn.Module):
    """An average of all that a state has, as timm's ModelEmaV2."""

    def __init__(self, net):
        super().__init__()
        self.module = copy.deepcopy(net)

    @torch.no_grad()
    def update_parameters(self, net):
        for mine, theirs in zip(self.module.state_dict().values(), net.state_dict().values(), strict=True):
            mine.copy_(DECAY * mine + (1 - DECAY) * theirs)


EMA = functools.partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
AVERAGES = {"parameters": EMA, "and buffers": functools.partial(EMA, use_buffers=True), "state": AverageOfState}


def trained(net, steps=11, after_step=lambda: None, averages=()):
    """Trains, and rewires every three steps."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    dst = DSTScheduler(net, optimizer, interval=3, fraction=0.3, grow="random", averages=averages)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(X), torch.arange(8)).backward()
        optimizer.step()
        after_step()
        dst.step()


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_that_of_the_units_that_the_network_has(make):
    net = network()
    wrapper = make(net)
    average = wrapper.module
    wrapper.update_parameters(net)  # the first time, AveragedModel copies
    expected = net.fc2.dense_weight().detach().clone()

    def after_step():
        wrapper.update_parameters(net)
        # units that went are no part of it, those that came started at zero
        expected.mul_(net.fc2.mask.to_dense()).lerp_(net.fc2.dense_weight().detach(), 1 - DECAY)
        torch.testing.assert_close(average.fc2.dense_weight().detach(), expected)

    trained(net, after_step=after_step, averages=[wrapper])
    for name, connection in net.connections().items():
        assert average.get_submodule(name).mask.equals(connection.mask)
    again = network(seed=5)
    again.load_state_dict(average.state_dict())
    for twin in (again, pickle.loads(pickle.dumps(average)), copy.deepcopy(average)):
        assert torch.equal(twin(X), average(X))


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_average_that_nobody_tied_is_reported_and_refused_once_wirings_mix(make, caplog):
    net, alone = network(), network()
    wrapper = make(net)

    def three_updates():
        trained(net, after_step=lambda: wrapper.update_parameters(net))
        wrapper.module(X)

    if make is EMA:  # PyTorch then copies buffers: the weights alone are averaged
        three_updates()
        wrapper.update_parameters(net)
        assert same_wiring(wrapper.module, net)
        trained(alone)
        assert torch.equal(net(X), alone(X))
    else:
        with pytest.raises(ValueError, match=MIXED):
            three_updates()
    assert caplog.text.count("averages=[average]") == 1


def rewired(net, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DSTScheduler(net, optimizer, interval=1, fraction=0.3, grow="random", **options).step()


def same_wiring(one, other):
    return torch.equal(one.fc2.mask.flat_unit(), other.fc2.mask.flat_unit())


def test_a_copy_of_which_nobody_said_what_it_is_is_reported_once_for_each_scheduler(caplog):
    def reports():
        return [record for record in caplog.records if "averages=[average]" in record.message]

    net = network()
    tied, untied, synchronised = (copy.deepcopy(net) for _ in range(3))
    untie_wiring(untied)
    sync_wiring(net, synchronised)
    dead = copy.deepcopy(net)
    del dead
    gc.collect()
    rewired(net, averages=[tied])
    assert not reports()
    average = AveragedModel(net)
    for expected in (1, 2):
        trained(net)  # three updates
        assert len(reports()) == expected
    assert "tie_wiring" in reports()[0].message
    assert not same_wiring(net, average.module)


def test_a_tie_ends_where_it_cannot_hold(caplog):
    net = network()
    pruned, itself = copies = [copy.deepcopy(net) for _ in range(2)]
    for average in copies:
        tie_wiring(net, average)
    prune.l1_unstructured(pruned.fc2, "values", 0.3)
    rewired(itself)
    assert "rewired by itself" in caplog.text
    expected = [each.fc2.dense_weight().detach().clone() for each in copies]
    rewired(net)
    assert "something computes its weights" in caplog.text
    assert all(torch.equal(each.fc2.dense_weight(), weight) for each, weight in zip(copies, expected, strict=True))
    with pytest.raises(ValueError, match=r"fc2.*computed"):
        tie_wiring(net, pruned)


def test_a_scheduler_is_copied_and_pickled_with_its_averages():
    net = network()
    average, optimizer = AveragedModel(net), torch.optim.SGD(net.parameters(), lr=0.1)
    dst = DSTScheduler(net, optimizer, interval=1, fraction=0.3, grow="random", averages=[average])
    for duplicate in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        twin, its_average, its_dst = duplicate((net, average, dst))
        its_dst.step()
        assert its_dst.pruned > 0
        assert same_wiring(its_average.module, twin)
        assert not same_wiring(net, twin)


def test_ties_are_refused_between_networks_that_do_not_correspond():
    net, average = network(), network()
    optimizer = torch.optim.SGD(net.parameters())
    for call, error, message in (
        (lambda: tie_wiring(net, nn.Sequential(average)), ValueError, "same names"),
        (lambda: sync_wiring(net, net), ValueError, "pass two networks"),
        (lambda: sync_wiring(net, network(block_size=4)), ValueError, r"fc1.*packed weights"),
        (lambda: tie_wiring(net, [average]), TypeError, "a list is no module"),
        (lambda: tie_wiring(average, net), ValueError, "untie_wiring"),
        (lambda: DSTScheduler([net.fc1], optimizer, averages=[average]), ValueError, "averages= needs the model"),
        (lambda: DSTScheduler(net, optimizer, averages=average), TypeError, r"averages=\[average\]"),
    ):
        with pytest.raises(error, match=message):
            call()
        tie_wiring(net, average)


def tensors(net):
    return [*net.parameters(), *net.buffers()]


@pytest.mark.parametrize("training", [False, True])
def test_what_is_written_into_buffers_is_read_at_the_next_call(training):
    net, other = network(), network().train(training)
    for _ in range(2):
        rewired(net)
        for _ in range(2):  # equal content, as in every step of data-parallel training, rebuilds nothing
            before = other.fc2.mask.changes
            with torch.no_grad():
                for mine, theirs in zip(tensors(other), tensors(net), strict=True):
                    mine.copy_(theirs)
            assert torch.equal(other(X), net(X))
            assert other.fc2.mask.equals(net.fc2.mask)
        assert other.fc2.mask.changes == before
    with torch.no_grad():
        other.fc2.mask.wiring.lerp_(network(seed=2).fc2.mask.wiring, 0.5)
    with pytest.raises(ValueError, match=MIXED):
        other(X)
    for mine, theirs in zip(tensors(other), tensors(net), strict=True):
        mine.data.copy_(theirs)  # which is not counted, as in torch.distributed.broadcast
    other.load_state_dict(other.state_dict())
    assert torch.equal(other(X), net(X))


def test_one_mask_in_two_layers_is_two_masks():
    mask, other = (network(seed=seed).fc2.mask for seed in range(2))
    net = nn.Sequential(*(G2GLinear(mask, generator=seeded(seed)) for seed in range(2)))
    units = mask.flat_unit().clone()
    assert DSTScheduler([net[0]], torch.optim.SGD(net.parameters()), 1, 0.5, "random", "random").step()
    assert not torch.equal(net[0].mask.flat_unit(), units)
    for each in (net[1].mask, mask):
        assert torch.equal(each.flat_unit(), units)
    net[0].load_state_dict(G2GLinear(other).state_dict())  # two wirings, which one state has
    again = nn.Sequential(G2GLinear(mask), G2GLinear(mask))
    again.load_state_dict(net.state_dict())
    for mine, theirs in zip(again, net, strict=True):
        assert torch.equal(mine.dense_weight(), theirs.dense_weight())
    with pytest.raises(AttributeError, match="mask cannot be assigned: it belongs to the weights"):
        net[0].mask = mask


@pytest.mark.parametrize("seed", [0, 1])
def test_a_load_of_other_units_in_training_drops_their_gradient_and_warns_of_momentum(seed, caplog):
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    net.load_state_dict(network(seed=1).state_dict())  # before training
    net(X).sum().backward()
    optimizer.step()
    net.load_state_dict(network(seed=seed).state_dict())
    assert (net.fc2.values.grad is None) == (seed == 0) == ("load the optimizer's state" in caplog.text)


@pytest.mark.parametrize("decay", [0.99, 0.99999])
def test_one_unit_of_another_wiring_in_an_average_is_no_rounding(decay):
    net = network()
    average, mask = copy.deepcopy(net), net.fc2.mask
    # to the place beside it, so that the numbers are as alike as they can be
    units = mask.flat_unit().tolist()
    slot = next(slot for slot, unit in enumerate(units) if unit % mask.grid[1] in range(1, 5) and unit + 1 not in units)
    net.fc2.rewire_(torch.tensor([slot]), torch.tensor([units[slot] + 1]), torch.tensor(True))
    average.fc2.mask.wiring.mul_(decay).add_(mask.wiring, alpha=1 - decay)
    with pytest.raises(ValueError, match=MIXED):
        average(X)
