"""Averages of the weights of a network that is rewired, by whatever walks over a model and its copy."""

import copy
import functools
import gc
import pickle

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from g2gnet import DSTScheduler, copies, sync_wiring, tie_wiring, untie_wiring

DECAY = 0.8


network = functools.partial(small_net, sizes=(32, 40, 10), p_inter=1 / 7, block_size=3, T=4, enc_scale=3.0)


def averaged_model(**options):
    def make(net):
        average = AveragedModel(net, **options)
        return average.module, lambda: average.update_parameters(net)

    return make


def by_hand(walk, update):
    """An average as many write it: ``update(average's tensor, network's)`` on all that ``walk`` finds in both."""

    def make(net):
        average = copy.deepcopy(net)

        @torch.no_grad()
        def step():
            for mine, theirs in zip(walk(average), walk(net), strict=True):
                update(mine, theirs)

        return average, step

    return make


def mean(mine, theirs):
    mine.copy_(DECAY * mine + (1 - DECAY) * theirs)


def mean_of_floats(mine, theirs):
    mine.lerp_(theirs, 1 - DECAY) if mine.is_floating_point() else mine.copy_(theirs)


EMA = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}
AVERAGES = {
    "AveragedModel": averaged_model(**EMA),
    "AveragedModel with buffers": averaged_model(**EMA, use_buffers=True),
    "all of the state": by_hand(lambda net: net.state_dict().values(), mean),  # timm's ModelEmaV2
    "floats of the state": by_hand(lambda net: net.state_dict().values(), mean_of_floats),  # ModelEmaV3
    "parameters": by_hand(lambda net: net.parameters(), mean),
}


def trained(net, steps=11, after_step=lambda: None):
    """Trains, and rewires every three steps."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    dst = DSTScheduler(net, optimizer, interval=3, fraction=0.3, grow="random")
    x, labels = torch.rand(8, 32, generator=seeded(1)), torch.arange(8)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
        after_step()
        dst.step()


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_that_of_the_units_that_the_network_has(make):
    net = network()
    average, step = make(net)
    expected = None
    copies = []

    def after_step():
        nonlocal expected
        weight, present = net.fc2.dense_weight().detach().clone(), net.fc2.mask.to_dense()
        if expected is None:  # AveragedModel begins with a copy, the others with the network as it was
            before = average.fc2.dense_weight().detach().clone()
            step()
            expected = weight if torch.equal(average.fc2.dense_weight(), weight) else before.lerp(weight, 1 - DECAY)
        else:
            step()
            # units that went are no part of it, those that came started at zero
            expected = (expected * present).lerp(weight, 1 - DECAY)
        torch.testing.assert_close(average.fc2.dense_weight().detach(), expected)
        copies.append(copy.deepcopy(average))

    trained(net, after_step=after_step)
    for mine, theirs in ((average.fc1, net.fc1), (average.fc2, net.fc2), (average.fc3, net.fc3)):
        assert torch.equal(mine.mask.to_dense(), theirs.mask.to_dense())
        assert torch.equal(mine.mask.row_slot, theirs.mask.row_slot)
    x = torch.rand(8, 32, generator=seeded(2))
    again = network(seed=5)
    again.load_state_dict(average.state_dict())
    for twin in (again, pickle.loads(pickle.dumps(average)), copy.deepcopy(average)):
        assert torch.equal(twin(x), average(x))
    # what was put away of the average stays as it was
    assert not torch.equal(copies[0].fc2.mask.to_dense(), average.fc2.mask.to_dense())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_that_begins_late_gets_the_wiring_with_the_weights(use_buffers):
    net = network()
    average = AveragedModel(net, use_buffers=use_buffers)
    trained(net, steps=7)
    average.update_parameters(net)
    x = torch.rand(8, 32, generator=seeded(2))
    assert torch.equal(average(x), net(x))
    assert torch.equal(average.module.fc2.mask.to_dense(), net.fc2.mask.to_dense())


def test_copies_that_are_no_averages_stay_as_they_are():
    """One that is put away, one that is read from a file, and one that is trained by itself."""
    net = network()
    put_away, loaded, apart = (copy.deepcopy(net) for _ in range(3))
    loaded.load_state_dict(copy.deepcopy(net.state_dict()))
    optimizer = torch.optim.SGD(apart.parameters(), lr=0.1)
    apart(torch.rand(4, 32, generator=seeded(2))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()  # no trace of it is left but in the weights
    states = [copy.deepcopy(each.state_dict()) for each in (put_away, loaded, apart)]
    trained(net)
    for each, state in zip((put_away, loaded, apart), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in each.state_dict().items())
    assert not torch.equal(net.fc2.mask.to_dense(), apart.fc2.mask.to_dense())


def rewired(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DSTScheduler(net, optimizer, interval=1, fraction=0.3, grow="random").step()


def same_wiring(one, other):
    return torch.equal(one.fc2.mask.flat_unit(), other.fc2.mask.flat_unit())


def test_a_copy_that_is_said_to_be_a_network_of_its_own_stays_as_it_is():
    """A best epoch whose weights are rounded, the population of an evolution strategy."""
    net = network()
    rounded, average = (copy.deepcopy(net) for _ in range(2))
    untie_wiring(rounded)
    for each in (rounded, average):
        each.fc2.values.data.mul_(64).round_().div_(64)
    expected = rounded.fc2.dense_weight().detach().clone()
    rewired(net)
    assert torch.equal(rounded.fc2.dense_weight(), expected)
    assert same_wiring(average, net)
    assert not same_wiring(rounded, net)


def test_a_copy_that_counts_as_an_average_is_reported_once(caplog, monkeypatch):
    monkeypatch.setattr(copies, "_say_that_copies_follow", functools.cache(copies._say_that_copies_follow.__wrapped__))
    net = network()
    average = copy.deepcopy(net)
    average.fc2.values.data.mul_(0.5)
    average.fc1.values.data.mul_(0.5)
    for _ in range(2):
        rewired(net)
    assert len([record for record in caplog.records if "untie_wiring" in record.message]) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_that_is_no_copy_is_kept_in_step_by_hand_or_by_a_tie(tied):
    """A target network that a constructor made, and whose parameters are averaged one by one."""
    net, target = network(), network()
    target.load_state_dict(net.state_dict())
    if tied:
        tie_wiring(net, target)
    for _ in range(3):
        rewired(net)
        if not tied:
            sync_wiring(net, target)
        before = target.fc2.dense_weight().detach().clone()
        with torch.no_grad():
            net.fc2.values.add_(1)
            for mine, theirs in zip(target.parameters(), net.parameters(), strict=True):
                mine.data.mul_(DECAY).add_(theirs.data, alpha=1 - DECAY)
        assert same_wiring(target, net)
        torch.testing.assert_close(target.fc2.dense_weight(), before.lerp(net.fc2.dense_weight(), 1 - DECAY))


def test_copies_that_are_freed_in_the_middle_of_an_update_do_not_disturb_it():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    held = []

    def frees(weights):
        held.clear()
        gc.collect()
        return weights

    optimizer.state[net.fc1.values]["momentum_buffer"] = torch.zeros_like(net.fc1.values)
    options = {"fraction": 0.3, "grow": "random", "reset_state": {"momentum_buffer": frees}}
    dst = DSTScheduler(net, optimizer, interval=1, **options)
    average, freed = copy.deepcopy(net), copy.deepcopy(net)
    for each in (average, freed):
        for layer in (each.fc1, each.fc2, each.fc3):
            layer.values.data.mul_(0.5)
    freed.itself = [freed]  # a cycle, which only the garbage collector frees
    held.append(freed)
    del freed, each, layer
    dst.step()
    assert not held
    assert dst.pruned > 0
    assert same_wiring(average, net)


def thawed(net):
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    apart = copy.deepcopy(net)
    for each in (net, apart):
        for parameter in each.parameters():
            parameter.requires_grad_(True)
    return apart


def assigned(net):
    apart = copy.deepcopy(net)
    apart.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return apart


@pytest.mark.parametrize("make", [copy.deepcopy, thawed, assigned])
@pytest.mark.parametrize("how", ["backward", "autograd.grad"])
def test_a_copy_that_is_trained_is_a_network_of_its_own_however_it_was_made(make, how):
    net = network()
    apart = make(net)
    loss = apart(torch.rand(4, 32, generator=seeded(2))).square().sum()
    if how == "backward":
        loss.backward()
        gradients = [parameter.grad for parameter in apart.parameters()]
    else:
        gradients = torch.autograd.grad(loss, list(apart.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(apart.parameters(), gradients, strict=True):
            parameter.sub_(0.1 * gradient)
    apart.zero_grad()
    expected = apart.fc2.dense_weight().detach().clone()
    rewired(net)
    assert torch.equal(apart.fc2.dense_weight(), expected)
    assert not same_wiring(apart, net)


def test_a_copy_whose_weights_are_pruned_or_tied_when_they_are_computed():
    net = network()
    pruned = copy.deepcopy(net)
    prune.l1_unstructured(pruned.fc2, "values", 0.3)
    expected = pruned.fc2.dense_weight().detach().clone()
    rewired(net)
    assert torch.equal(pruned.fc2.dense_weight(), expected)
    with pytest.raises(ValueError, match=r"fc2.*computed"):
        tie_wiring(net, pruned)


def test_a_state_whose_tensors_became_the_networks_follows_it():
    net = network()
    state = copy.deepcopy(net.state_dict())
    net.load_state_dict(state, assign=True)
    rewired(net)
    again = network(seed=1)
    again.load_state_dict(state)
    assert same_wiring(again, net)
    assert torch.equal(again.fc2.dense_weight(), net.fc2.dense_weight())


def test_ties_are_refused_between_networks_that_do_not_correspond():
    net = network()
    with pytest.raises(ValueError, match="same names"):
        tie_wiring(net, AveragedModel(net))
    with pytest.raises(ValueError, match="must be two"):
        sync_wiring(net, net)
    with pytest.raises(ValueError, match=r"fc1.*packed weights"):
        sync_wiring(net, network(block_size=4))


def test_weights_of_another_process_come_with_their_wiring():
    """As DistributedDataParallel sends parameters and buffers; what is no wiring is ignored."""
    net, other = network(), network(seed=1)
    assert net.fc2.mask.num_units == other.fc2.mask.num_units
    assert not torch.equal(net.fc2.mask.to_dense(), other.fc2.mask.to_dense())
    with torch.no_grad():
        for mine, theirs in zip(
            [*net.parameters(), *net.buffers()], [*other.parameters(), *other.buffers()], strict=True
        ):
            mine.copy_(theirs)
    x = torch.rand(8, 32, generator=seeded(2))
    assert torch.equal(net(x), other(x))
    before = net.fc2.mask.to_dense()
    net.eval()
    with torch.no_grad():
        net.fc2.mask.wiring.lerp_(network(seed=2).fc2.mask.wiring, 0.5)
    assert torch.equal(net(x), other(x))
    assert torch.equal(net.fc2.mask.to_dense(), before)


def test_indices_are_no_buffers_and_follow_the_network():
    net = network()
    assert all(buffer.is_floating_point() for buffer in net.buffers())
    net.to(torch.bfloat16)
    assert net.fc2.mask.unit_row.dtype == torch.int32
    assert net.fc2.mask.wiring.dtype == torch.float32
    net.to("meta").to_empty(device="cpu")
    net.load_state_dict(network(seed=3).state_dict())
    assert torch.equal(net.fc2.mask.to_dense(), network(seed=3).fc2.mask.to_dense())
