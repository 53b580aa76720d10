"""Gradual pruning: which weights are left after each update, and that everything that belongs to them follows."""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from training_runs import small_trainer

from g2g_kernels import BlockMask
from g2gnet import DSTScheduler, G2GLinear
from g2gnet.training import SettingsError

PRUNED = {"sparsity_mode": "dynamic", "dst_interval": 2, "dst_fraction": 0.0, "dst_stop": 0.75, "final_density": 0.1}
MISMATCH = r"has \w+ of shape \[\d+, 3, 4\] for weights of shape \[\d+, 3, 4\].*load both"


def weights_of(net):
    return sum(layer.mask.num_weights for layer in net.connections().values())


def possible(net):
    return sum(math.prod(layer.mask.shape) for layer in net.connections().values())


def trained(model="mixer", steps=1, optimizer=torch.optim.Adam, **options):
    net = small_net(model, **options)
    made = optimizer(net.parameters(), lr=1e-2)
    train(net, made, steps=steps)
    return net, made


def train(net, optimizer, *schedulers, steps=1):
    """Training steps, after each of which the schedulers step; the last loss."""
    inputs, loss = torch.rand(8, net.fc1.in_features, generator=seeded(1)) * 3, None
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(net(inputs), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return loss


def largest_unit(net):
    return max(int(layer.mask.unit_sizes.max()) for layer in net.connections().values())


def pruning(net, optimizer, final=0.05, **options):
    """Updates after steps 1 to 4 of 5, of the lowest weights alone."""
    settings = {"interval": 1, "fraction": 0.0, "stop": 0.8, "total_steps": 5, "final_density": final, **options}
    return DSTScheduler(net, optimizer, **settings)


@pytest.mark.parametrize("options", [{"model": "dense"}, {"model": "mixer"}, {"recurrent": True}], ids=str)
def test_the_number_of_weights_falls_by_the_cubic_schedule(options):
    """In quarters of the way what is above the final number is 27/64, 8/64, 1/64 and nothing of what it was."""
    net, optimizer = trained(sizes=(80, 100, 10), block_size=1, **options)
    by_layers = {"network": net} if "recurrent" in options else {}
    dst = pruning([*net.connections().values()] if by_layers else net, optimizer, **by_layers)
    first, final = weights_of(net), 0.05 * possible(net)
    for left in (27, 8, 1, 0, 0):
        train(net, optimizer, dst)
        assert -2 < weights_of(net) - final - (first - final) * left / 64 <= 0
    assert dst.pruned == first - weights_of(net)
    assert dst.grown == 0


def test_the_strongest_units_of_a_layer_stay_with_their_weights_and_moments():
    net, optimizer = trained(steps=2)
    layers = list(net.connections().values())
    dst = pruning(net, optimizer)
    train(net, optimizer)

    def by_unit(layer):
        """The score of each unit, its values and its moments."""
        state, mask = optimizer.state[layer.values], layer.mask
        values = layer.values.detach().clone()
        scores = values.abs().double().sum((1, 2)) / mask.unit_sizes
        tensors = zip(scores, values, state["exp_avg"].clone(), state["exp_avg_sq"].clone(), strict=True)
        return dict(zip(mask.flat_unit().tolist(), tensors, strict=True))

    before = list(map(by_unit, layers))
    parameters = [id(parameter) for parameter in net.parameters()]
    dst.step()
    assert [id(parameter) for parameter in net.parameters()] == parameters
    for layer, units in zip(layers, before, strict=True):
        now = by_unit(layer)
        assert layer.values.shape[0] == layer.mask.num_units == len(now) < len(units)
        torch.testing.assert_close(now, {unit: units[unit] for unit in now}, rtol=0, atol=0)
        lost = units.keys() - now.keys()
        assert max(units[unit][0] for unit in lost) <= min(units[unit][0] for unit in now)
    assert train(net, optimizer).isfinite()


def test_units_are_replaced_among_those_that_stay():
    net, optimizer = trained(sizes=(32, 64, 16))  # each layer's units are of one size
    dst = pruning(net, optimizer, fraction=0.5, grow="gradient", schedule="cosine")
    for update in range(1, 5):
        share, total, expected = (1 + math.cos(math.pi * update / 4)) / 4, dst.grown, 0
        before = {name: set(layer.mask.flat_unit().tolist()) for name, layer in net.connections().items()}
        train(net, optimizer, dst)
        for name, layer in net.connections().items():
            now = set(layer.mask.flat_unit().tolist())
            new = len(now - before[name])
            assert new == min(int(share * len(now)), math.prod(layer.mask.grid) - len(before[name]))
            expected += new
        assert dst.grown - total == expected
    assert weights_of(net) <= 0.05 * possible(net)


@pytest.mark.parametrize("seed", range(2))
def test_units_of_different_sizes_are_replaced_by_as_many_weights(seed):
    """Units have 1 × 4 to 6 × 6 weights: as many units as before would leave more weights, or some units fewer."""
    net, optimizer = trained(sizes=(30, 44, 10), block_size=8, seed=seed)
    dst = pruning(net, optimizer, 0.1, fraction=1.0, prune="random", grow="random", seed=seed)
    train(net, optimizer, dst, steps=4)
    assert 0.1 * possible(net) - largest_unit(net) < weights_of(net) <= 0.1 * possible(net)
    assert dst.grown > 0


def test_a_share_of_steps_and_of_units_is_that_of_the_decimal_number():
    """0.57 of 4,700 are 2,679, and 0.29 of 100 units 29, although their products are rounded below that."""
    layer = G2GLinear(BlockMask.from_dense(torch.arange(400).view(20, 20) % 4 == 0))
    options = {"fraction": 0.29, "prune": "random", "grow": "random", "total_steps": 4700, "stop": 0.57}
    make = functools.partial(DSTScheduler, [layer], torch.optim.SGD(layer.parameters(), lr=0.1), **options)
    with pytest.raises(ValueError, match=r"interval=2680 leaves no update in the first 0\.57 of 4700"):
        make(2680)
    assert not make(2679).next_is_due
    dst = make(1)
    assert dst.step()
    assert (layer.mask.num_units, dst.grown) == (100, 29)
    steps = {"batch_size": 20, "epochs": 10, "dst_interval": 57, "dst_stop": 0.57}  # of 100, which are 57 too
    assert small_trainer(sparsity_mode="dynamic", **steps).dst is not None


def test_a_full_layer_is_pruned_and_later_grows_by_gradient():
    """PyTorch accumulates gradients in a node that a kept graph keeps, with the shape that it had."""
    net, optimizer = trained("dense")
    dst, kept = pruning(net, optimizer, fraction=0.5, grow="gradient"), []
    for grows in (False, True, True, True):
        kept.append(train(net, optimizer, dst))
        assert (dst.grown > 0) == grows
    assert net.fc1.values.grad is None or net.fc1.values.grad.shape == net.fc1.values.shape
    kept.append(train(net, optimizer))
    assert net.fc1.values.grad.shape == net.fc1.values.shape


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_averages_have_the_units_and_keep_their_own_weights(fraction):
    net, optimizer = trained()
    averages = AveragedModel(net, avg_fn=lambda average, now, _: average + (now - average) / 4), AveragedModel(net)
    dst = pruning(net, optimizer, fraction=fraction, grow="random", averages=averages)
    for _ in range(4):
        train(net, optimizer)
        expected, layers = [], list(net.connections().values())
        for average in averages:
            average.update_parameters(net)
            expected += [layer.dense_weight() for layer in average.module.connections().values()]
        old = [layer.mask.to_dense() for layer in layers]
        dst.step()
        mine = [layer for average in averages for layer in average.module.connections().values()]
        for layer, weight, theirs, before in zip(mine, expected, 2 * layers, 2 * old, strict=True):
            assert layer.mask.equals(theirs.mask)
            assert torch.equal(layer.dense_weight(), weight * theirs.mask.to_dense() * before)


def test_tensors_that_stand_in_for_the_weights_keep_their_units():
    """Of tensors that someone else owns nobody can change the shape."""
    net, optimizer = trained()
    inputs = torch.rand(8, net.fc1.in_features) * 3
    named = itertools.chain(net.named_parameters(), net.named_buffers())
    tensors = {name: tensor.detach().clone() for name, tensor in named}
    dst = pruning(net, optimizer)
    torch.func.functional_call(net, tensors, (inputs,))
    train(net, optimizer)
    for name, parameter in net.named_parameters():  # an average, which would be rewired with the network
        tensors[name].lerp_(parameter.detach(), 0.5)
    before = torch.func.functional_call(net, tensors, (inputs,))
    for _ in range(2):
        dst.step()
        assert torch.equal(torch.func.functional_call(net, tensors, (inputs,)), before)
        train(net, optimizer)


@pytest.mark.parametrize(("fewer", "fused"), [(True, True), (False, True), (True, False)])
def test_states_of_other_weights_are_refused_before_a_step(fewer, fused):
    """Fused optimizers would write past the end of their states, or step some units with those of others."""
    kind = torch.optim.Adam if fewer else functools.partial(torch.optim.SGD, momentum=0.9)
    make = functools.partial(kind, lr=1e-2, fused=fused)
    states, net = [], small_net("mixer")
    optimizer = make(net.parameters())
    dst = pruning(net, optimizer)
    for _ in range(4):
        train(net, optimizer, dst)
        states.append(copy.deepcopy([net.state_dict(), optimizer.state_dict(), dst.state_dict()]))
    if fewer:  # forward in time
        for each, state in zip((net, optimizer, dst), states[0], strict=True):
            each.load_state_dict(state)
    then = states[-1 if fewer else 0]
    net.load_state_dict(then[0])
    copies = [copy.deepcopy([net, optimizer, dst]), pickle.loads(pickle.dumps([net, optimizer, dst]))]
    for each in (*copies, [net, optimizer, dst]):
        with pytest.raises(ValueError, match=MISMATCH):
            train(*each[:2])
    torch.testing.assert_close(net.state_dict(), then[0], rtol=0, atol=0)
    other, other_optimizer = trained(seed=1)  # another network's optimizer goes on, as does a new one
    train(other, other_optimizer)
    optimizer.load_state_dict(then[1])
    dst.load_state_dict(then[2])
    twin = small_net("mixer", seed=1)
    twin.load_state_dict(then[0])
    twin_optimizer = make(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(then[1]))
    train(net, optimizer)
    train(twin, twin_optimizer)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_only_the_optimizers_of_living_schedulers_are_asked():
    net = small_net("mixer")
    optimizer, other = (torch.optim.Adam(net.parameters(), 1e-2, fused=True) for _ in range(2))
    dst, before = pruning(net, optimizer), copy.deepcopy(net)
    train(net, optimizer, dst)
    of_before = torch.optim.Adam(before.parameters(), 1e-2, fused=True)
    dst_of_before = pruning(before, of_before)
    of_before.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=MISMATCH):
        train(before, of_before)
    for layer in before.connections().values():
        layer.values.requires_grad_(False)
    train(before, of_before)  # which steps none of them
    assert not other._optimizer_step_pre_hooks
    del dst, dst_of_before
    assert not optimizer._optimizer_step_pre_hooks
    assert not of_before._optimizer_step_pre_hooks


def test_frozen_weights_count_as_weights_also_of_layers_that_are_frozen_later():
    net, optimizer = trained(steps=0)
    early = pruning(net, optimizer)
    net.fc1.values.requires_grad_(False)
    dst, frozen = pruning(net, optimizer, final=0.2), net.fc1.mask.num_weights
    train(net, optimizer)
    too_few = r"final_density=0\.05 is less than the .* of all in frozen ones; raise it"
    for refused in (early.step, lambda: pruning(net, optimizer, final=0.05)):
        units = [layer.mask.num_units for layer in net.connections().values()]
        with pytest.raises(ValueError, match=too_few):
            refused()
        assert [layer.mask.num_units for layer in net.connections().values()] == units
    train(net, optimizer, dst, steps=5)
    assert net.fc1.mask.num_weights == frozen
    assert 0.2 * possible(net) - largest_unit(net) < weights_of(net) <= 0.2 * possible(net)
    for layer in net.connections().values():
        layer.values.requires_grad_(False)
    with pytest.raises(ValueError, match=r"final_density=0\.05 prunes nothing: all layers are frozen"):
        early.step()
    rewiring = DSTScheduler(net, optimizer, 1, 0.5, "random", "random")
    assert rewiring.step()
    assert rewiring.pruned == 0


def test_nothing_to_prune_is_refused_in_the_first_step():
    net, optimizer = trained()
    with pytest.raises(ValueError, match=r"final_density=0\.9 is no less than the 0\.\d+ that training begins with"):
        pruning(net, optimizer, final=0.9).step()
    done = pruning(net, optimizer, final=0.9)  # of a run that was stopped when it had that many
    done.load_state_dict({"steps": 1, "pruned": 9, "grown": 0})
    done.step()
    assert done.pruned == 9


@pytest.mark.parametrize("prune", ["set", "random"])
def test_layers_keep_as_many_as_stand_out_in_them_whatever_their_scale(prune):
    kept = []
    for scale in (1.0, 0.01):
        net, _ = trained("dense", sizes=(20, 24, 10), block_size=1)
        net.fc2.values.data *= scale
        layers = list(net.connections().values())
        sizes = [layer.values.detach().abs().flatten().tolist() for layer in layers]
        # size² over the sum of squares of the units at least as large
        scores = [[x * x / sum(y * y for y in of_layer if y >= x) for x in of_layer] for of_layer in sizes]
        pruning(net, torch.optim.SGD(net.parameters()), final=0.1, prune=prune).step()
        least = sorted(itertools.chain(*scores), reverse=True)[weights_of(net) - 1]
        assert [layer.mask.num_units for layer in layers] == [sum(x >= least for x in of_layer) for of_layer in scores]
        kept.append([layer.mask.flat_unit().tolist() for layer in layers])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("prune", ["set", "random", "hebb"])
def test_no_layer_loses_its_last_unit(prune):
    """Not even one whose units are all zero, as those that have just grown are until a gradient reaches them."""
    net, _ = trained("dense", sizes=(20, 24, 10), block_size=4)
    layers = list(net.connections().values())
    layers[-1].values.data.zero_()
    least = sum(int(layer.mask.unit_sizes.max()) for layer in layers) / possible(net)
    with pytest.raises(ValueError, match=f"is less than the {least:.4g} of one unit in each layer; raise it"):
        pruning(net, torch.optim.SGD(net.parameters()), final=0.9 * least)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    train(net, optimizer, pruning(net, optimizer, final=1.1 * least, prune=prune), steps=4)
    assert [layer.mask.num_units for layer in layers] == [1] * len(layers)


def test_a_run_records_what_is_left():
    trainer = small_trainer(**PRUNED)
    first = {name: layer.mask.num_units for name, layer in trainer.net.connections().items()}
    for _ in range(trainer.settings.epochs):
        began = {name: layer.mask.num_units for name, layer in trainer.net.connections().items()}
        record = trainer.train_epoch()
        for name, units in record["units"].items():
            assert record["units_kept"][name] == units / began[name]
            assert record["initial_units_kept"][name] == units / first[name]
    assert record["units_pruned"] == sum(first.values()) - sum(record["units"].values())
    for final, message in ((0.9, r"=0\.9 is no less than the 0\.2"), (1e-6, "one unit in each layer; raise it")):
        with pytest.raises(SettingsError, match=message):
            small_trainer(**(PRUNED | {"final_density": final}))


def test_what_cannot_follow_is_refused(monkeypatch):
    net, optimizer = trained()
    factored = torch.optim.SGD(net.parameters(), lr=0.1)
    factored.state[net.fc1.values]["blocks"] = torch.zeros(9)  # whose units nobody knows
    with pytest.raises(ValueError, match=r"keeps blocks in a form.*reset_state=\{'blocks': value\}.*weights; or"):
        pruning(net, factored, reset_state={"blocks": None})
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, net: torch.nn.Module.__init__(self))
    with pytest.raises(ValueError, match="DistributedDataParallel keeps buffers"):
        pruning(torch.nn.Sequential(net, DistributedDataParallel(net)), optimizer)
