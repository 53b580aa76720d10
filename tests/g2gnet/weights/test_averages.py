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

from g2gnet import DSTScheduler, sync_wiring, tie_wiring, untie_wiring

DECAY = 0.8


network = functools.partial(small_net, sizes=(32, 40, 10), p_inter=1 / 7, block_size=3, T=4, enc_scale=3.0)


def averaged_model(**options):
    def make(net):
        average = AveragedModel(net, **options)
        return average, lambda: average.update_parameters(net)

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


def trained(net, steps=11, after_step=lambda: None, averages=()):
    """Trains, and rewires every three steps."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    dst = DSTScheduler(net, optimizer, interval=3, fraction=0.3, grow="random", averages=averages)
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
    wrapper, step = make(net)
    average = getattr(wrapper, "module", wrapper)
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

    trained(net, after_step=after_step, averages=[wrapper])
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


def rewired(net, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DSTScheduler(net, optimizer, interval=1, fraction=0.3, grow="random", **options).step()


def same_wiring(one, other):
    return torch.equal(one.fc2.mask.flat_unit(), other.fc2.mask.flat_unit())


def test_a_copy_is_a_network_of_its_own_whatever_is_written_to_it():
    """Put away, read from a file, trained, rounded in place, untied again."""
    net = network()
    put_away, loaded, assigned, apart, rounded, untied = copies = [copy.deepcopy(net) for _ in range(6)]
    loaded.load_state_dict(copy.deepcopy(net.state_dict()))
    assigned.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    optimizer = torch.optim.SGD(apart.parameters(), lr=0.1)
    apart(torch.rand(4, 32, generator=seeded(2))).square().sum().backward()
    optimizer.step()
    for layer in (rounded.fc1, rounded.fc2, rounded.fc3):
        layer.values.data.mul_(64).round_().div_(64)
    tie_wiring(net, untied)
    untie_wiring(untied)
    states = [copy.deepcopy(each.state_dict()) for each in copies]
    trained(net)
    for each, state in zip(copies, states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in each.state_dict().items())
    assert not same_wiring(net, put_away)


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_network_that_is_no_copy_is_kept_in_step_by_hand_or_by_a_tie(tied):
    """A target network that a constructor made, and whose parameters are averaged one by one."""
    net, target = network(), network(seed=1)
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


def test_networks_of_other_groups_share_no_unit():
    """The same number of a unit means other neurons."""
    net, target = network(model="random"), network(model="random", seed=1)
    target.fc2.values.grad = torch.ones_like(target.fc2.values)
    sync_wiring(net, target)
    assert torch.equal(target.fc2.dense_weight(), net.fc2.dense_weight())
    assert not target.fc2.values.grad.any()


def state_in_another_order(net):
    """The same weights, in other slots."""
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layer = copy.deepcopy(net.fc2)
    order = torch.randperm(layer.mask.num_units, generator=seeded(3))
    layer.mask.relabel_(torch.arange(len(order)), layer.mask.unit_row[order], layer.mask.unit_col[order])
    return state | {"fc2.values": layer.values.detach()[order], "fc2.mask.wiring": layer.mask.state_dict()["wiring"]}


@pytest.mark.parametrize("into", ["network", "average"])
def test_the_same_units_in_another_order_keep_the_average(into):
    net = network()
    average = copy.deepcopy(net)
    tie_wiring(net, average)
    average.fc2.values.data.mul_(0.5)
    expected = average.fc2.dense_weight().detach().clone()
    each = {"network": net, "average": average}[into]
    each.load_state_dict(state_in_another_order(each))
    assert torch.equal(average.fc2.dense_weight(), expected)
    assert same_wiring(net, average)
    rewired(net)
    assert same_wiring(net, average)


@pytest.mark.parametrize("into", ["network", "average"])
def test_other_units_end_a_tie_with_a_warning_and_leave_the_average_alone(into, caplog):
    net = network()
    average = copy.deepcopy(net)
    tie_wiring(net, average)
    before = copy.deepcopy(average.state_dict())
    each = {"network": net, "average": average}[into]
    each.load_state_dict(network(seed=1).state_dict())
    assert len([record for record in caplog.records if "call tie_wiring again" in record.message]) == 1
    if into == "network":
        assert all(torch.equal(tensor, before[name]) for name, tensor in average.state_dict().items())
    assert not same_wiring(net, average)
    rewired(net)
    assert not same_wiring(net, average)


def test_a_tie_ends_where_it_cannot_hold(caplog):
    net = network()
    pruned, itself = (copy.deepcopy(net) for _ in range(2))
    for average in (pruned, itself):
        tie_wiring(net, average)
    prune.l1_unstructured(pruned.fc2, "values", 0.3)
    rewired(itself)
    expected = [each.fc2.dense_weight().detach().clone() for each in (pruned, itself)]
    assert "rewired by itself" in caplog.text
    rewired(net)
    assert "something computes its weights" in caplog.text
    for each, weight in zip((pruned, itself), expected, strict=True):
        assert torch.equal(each.fc2.dense_weight(), weight)
    with pytest.raises(ValueError, match=r"fc2.*computed"):
        tie_wiring(net, pruned)


def test_a_scheduler_is_copied_and_pickled_with_its_averages():
    net = network()
    average = AveragedModel(net)
    dst = DSTScheduler(
        net, torch.optim.SGD(net.parameters(), lr=0.1), interval=1, fraction=0.3, grow="random", averages=[average]
    )
    everything = net, average, dst
    for net, average, dst in (copy.deepcopy(everything), pickle.loads(pickle.dumps(everything))):
        dst.step()
        assert dst.pruned > 0
        assert same_wiring(average.module, net)
    assert not same_wiring(everything[0], net)


def test_averages_need_the_model():
    net = network()
    with pytest.raises(ValueError, match="averages= needs the model"):
        DSTScheduler([net.fc1], torch.optim.SGD(net.parameters()), averages=[copy.deepcopy(net)])
    with pytest.raises(TypeError, match=r"averages=\[average\]"):
        DSTScheduler(net, torch.optim.SGD(net.parameters()), averages=copy.deepcopy(net))


def test_copies_that_are_freed_in_the_middle_of_an_update_do_not_disturb_it():
    net = network()
    average, freed = copy.deepcopy(net), copy.deepcopy(net)
    for each in (average, freed):
        tie_wiring(net, each)
    held = [freed]
    freed.itself = held  # a cycle, which only the garbage collector frees
    rewire = net.fc3.rewire_
    net.fc3.rewire_ = lambda *arguments: (held.clear(), gc.collect(), rewire(*arguments))[2]
    del freed, each
    rewired(net)
    assert not held
    assert same_wiring(average, net)


def test_a_state_that_someone_keeps_is_one_network_at_any_time():
    net, other = network(), network(seed=1)
    kept = net.state_dict()
    assigned = copy.deepcopy(net.state_dict())
    for change in (
        lambda: rewired(net),
        lambda: net.load_state_dict(other.state_dict()),
        lambda: net.load_state_dict(assigned, assign=True),  # from here on the state has what was then
        lambda: rewired(net),
    ):
        change()
        states = [assigned] if net.fc2.values.data_ptr() == assigned["fc2.values"].data_ptr() else [kept]
        for state in states:
            again = network(seed=2)
            again.load_state_dict(state)
            assert torch.equal(again.fc2.dense_weight(), net.fc2.dense_weight())


def test_ties_are_refused_between_networks_that_do_not_correspond():
    net, average = network(), network()
    with pytest.raises(ValueError, match="same names"):
        tie_wiring(net, nn.Sequential(average))
    with pytest.raises(ValueError, match="must be two"):
        sync_wiring(net, net)
    with pytest.raises(ValueError, match=r"fc1.*packed weights"):
        sync_wiring(net, network(block_size=4))
    with pytest.raises(TypeError, match="a list is no module"):
        tie_wiring(net, [average])
    tie_wiring(net, average)
    with pytest.raises(ValueError, match="untie_wiring"):
        tie_wiring(average, net)


def copied(target, source):
    """Parameters and buffers, one by one, as DistributedDataParallel sends them."""
    with torch.no_grad():
        for mine, theirs in zip(
            [*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()], strict=True
        ):
            mine.copy_(theirs)


@pytest.mark.parametrize("training", [False, True])
def test_what_is_written_into_buffers_is_read_at_the_next_call(training):
    net, other = network(), network().train(training)
    x = torch.rand(8, 32, generator=seeded(2))
    for _ in range(3):
        rewired(net)
        copied(other, net)
        assert other.fc2.mask.equals(net.fc2.mask)
        assert torch.equal(other(x), net(x))
    before, tensors = other.fc2.mask.changes, other.fc2.mask.tensors()
    copied(other, net)  # equal content, as in every step of data-parallel training, rebuilds nothing
    other(x)
    assert (other.fc2.mask.changes, other.fc2.mask.tensors()) == (before, tensors)
    with torch.no_grad():
        other.fc2.mask.wiring.lerp_(network(seed=2).fc2.mask.wiring, 0.5)
    with pytest.raises(ValueError, match=r"average of networks with different wirings.*averages=\[average\]"):
        other(x)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    rewired(net)
    for mine, theirs in zip([*other.parameters(), *other.buffers()], [*net.parameters(), *net.buffers()], strict=True):
        mine.data.copy_(theirs)  # which is not counted, as in torch.distributed.broadcast
    other.load_state_dict(other.state_dict())
    assert torch.equal(other(x), net(x))


def test_an_average_over_buffers_of_a_network_that_stays_as_it_is_may_round():
    net = network()
    average = copy.deepcopy(net)
    mine, theirs = average.fc2.mask.wiring, net.fc2.mask.wiring
    for decay in (0.9998, 0.99999):
        for _ in range(3000):  # between two calls
            mine.mul_(decay).add_(theirs, alpha=1 - decay)
        assert not torch.equal(mine, theirs)
        assert average.fc2.mask.equals(net.fc2.mask)
    assert torch.equal(average.state_dict()["fc2.mask.wiring"], net.fc2.mask.wiring)


@pytest.mark.parametrize("decay", [0.99, 0.9999, 0.99999])
def test_one_unit_of_another_wiring_in_an_average_is_no_rounding(decay):
    net = network()
    average, mask = copy.deepcopy(net), net.fc2.mask
    # to the place beside it, so that the numbers are as alike as they can be
    units = mask.flat_unit().tolist()
    slot = next(slot for slot, unit in enumerate(units) if unit % mask.grid[1] in range(1, 5) and unit + 1 not in units)
    net.fc2.rewire_(torch.tensor([slot]), torch.tensor([units[slot] + 1]), torch.tensor(True))
    average.fc2.mask.wiring.mul_(decay).add_(mask.wiring, alpha=1 - decay)
    with pytest.raises(ValueError, match=r"average of networks with different wirings.*averages=\[average\]"):
        average(torch.rand(8, 32))


def test_indices_are_no_buffers_and_follow_the_network():
    net = network()
    assert all(buffer.is_floating_point() for buffer in net.buffers())
    net.to(torch.bfloat16)
    assert net.fc2.mask.unit_row.dtype == torch.int32
    assert net.fc2.mask.wiring.dtype == torch.float32
    net.to("meta").to_empty(device="cpu")
    net.load_state_dict(network(seed=3).state_dict())
    assert torch.equal(net.fc2.mask.to_dense(), network(seed=3).fc2.mask.to_dense())
