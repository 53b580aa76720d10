"""Dynamic sparse training against a slow description of its rules, weight by weight."""

import copy
import functools
import itertools
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from helpers import backends_of, seeded
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from g2g_kernels import BlockMask, GroupLayout, lif
from g2g_kernels.cpu import library
from g2g_kernels.ops.g2g_stack import WAYS, recurrent_lists
from g2gnet import LIF, DSTScheduler, G2GLinear, G2GNet, Projection, SpikingNetwork, sparsify
from g2gnet.dst import replacement
from g2gnet.dst import rules as rules_module
from g2gnet.dst import scheduler as scheduler_module
from g2gnet.dst.replacement import highest
from g2gnet.dst.rules import GROW_RULES, PRUNE_RULES, unit_correlation, unit_gradient
from g2gnet.dst.unit_gradients import UnitGradients


class Dense(NamedTuple):
    """A layer as matrices [out, in], before an update."""

    mask: BlockMask
    weight: torch.Tensor
    gradient: torch.Tensor
    correlation: torch.Tensor


#: what a rule's score of each unit should be, slowly; a random one has none
ORACLES = {
    "prune": {
        "set": lambda dense: mean_by_unit(dense.weight.abs(), dense.mask),
        "hebb": lambda dense: mean_by_unit(dense.correlation, dense.mask),
        "random": None,
    },
    "grow": {
        "hebb": lambda dense: mean_by_unit(dense.correlation, dense.mask),
        "gradient": lambda dense: mean_by_unit(dense.gradient.square(), dense.mask).sqrt(),
        "random": None,
    },
}
RULES = list(itertools.product(ORACLES["prune"], ORACLES["grow"]))
#: each rule at least once
EACH_RULE = list(itertools.zip_longest(PRUNE_RULES, GROW_RULES, fillvalue="random"))
FULL = BlockMask.full(GroupLayout(9), GroupLayout(9))
LISTS = pytest.param("lists", marks=pytest.mark.skipif("cpu" not in backends_of(WAYS), reason="not compiled"))


@pytest.mark.parametrize(("kind", "rules"), [("prune", PRUNE_RULES), ("grow", GROW_RULES)])
def test_every_rule_has_an_oracle(kind, rules):
    missing = set(rules) - set(ORACLES[kind])
    assert not missing, f"no oracle of {kind}={missing}: give ORACLES[{kind!r}] of {__file__} its score, written slowly"


def correlation_by_weight(pre, post):
    """Σ post_i·pre_j / (‖post_i‖·‖pre_j‖) over all samples, [out, in], 0 where either is silent; in float64."""
    if pre.dim() == 2:
        pre = pre.expand(len(post), *pre.shape)
    pre, post = pre.reshape(-1, pre.shape[-1]).double(), post.reshape(-1, post.shape[-1]).double()
    product = post.T @ pre
    norms = post.norm(dim=0)[:, None] * pre.norm(dim=0)[None, :]
    return torch.where(norms > 0, product / norms, 0.0)


def mean_by_unit(matrix, mask):
    """The mean of a dense [out, in] matrix over each unit of the grid, clipped units over the weights they have."""
    means = torch.zeros(mask.grid, dtype=torch.float64)
    rows, cols = (side.order.split(side.lengths.tolist()) for side in (mask.rows, mask.cols))
    for (r, row), (c, col) in itertools.product(enumerate(rows), enumerate(cols)):
        means[r, c] = matrix[row[:, None], col].double().mean()
    return means


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("held", [True, False])
def test_unit_correlation_is_the_mean_over_the_units_weights(block_size, held):
    generator = seeded(0)
    layouts = GroupLayout(30, 4, "random", generator), GroupLayout(42, 4, "interleaved")
    mask = BlockMask.sample(*layouts, block_size=block_size, generator=generator)
    pre, post = ((torch.rand(9, 6, size, generator=generator) < 0.2).float() for size in (42, 30))
    pre[..., :2] = post[..., :2] = 0  # silent neurons
    pre = torch.rand(6, 42, generator=generator) - 0.3 if held else pre
    expected = mean_by_unit(correlation_by_weight(pre, post), mask)
    # float32 sums of up to 54 samples
    torch.testing.assert_close(unit_correlation(pre, post, mask).double(), expected, rtol=1e-5, atol=1e-6)


def trained_net(p_inter=0.3):
    """A net, its optimizer with state in every weight, and the last step's input and activity."""
    net = G2GNet(30, 40, 10, "mixer", p_inter, block_size=3, T=8, generator=seeded(0))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-4)
    x = torch.rand(6, 30, generator=seeded(0)) * 3
    for _ in range(2):
        activity = train_step(net, optimizer, x)
    return net, optimizer, x, activity


def train_step(net, optimizer, x):
    activity = net.simulate(x)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(activity.counts, torch.arange(len(x))).backward()
    optimizer.step()
    return activity


def dense_gradients(net, x):
    """∂L/∂W of each layer with a dense weight, [out, in], for the loss of :func:`train_step`."""
    weights, spikes, steps = [], x, net.T
    for connection, neurons in net.layers():
        weights.append(connection.dense_weight().detach().requires_grad_())
        current = torch.nn.functional.linear(spikes, weights[-1], connection.bias)
        options = neurons.reset, neurons.surrogate, neurons.alpha
        spikes, steps = lif(current, neurons.beta, neurons.threshold, steps, *options, backend="torch"), None
    return torch.autograd.grad(torch.nn.functional.cross_entropy(spikes.sum(0), torch.arange(len(x))), weights)


def sparse_layers(net):
    return [connection for connection, _ in net.layers()]


def units_of(mask):
    return set(zip(mask.unit_row.tolist(), mask.unit_col.tolist(), strict=True))


def update(prune, grow):
    """Makes an update of a fifth: the optimizer, the scheduler, and each layer with its units and matrices before."""
    net, optimizer, x, _ = trained_net()
    layers = sparse_layers(net)
    scheduler = DSTScheduler(layers, optimizer, interval=1, fraction=0.2, prune=prune, grow=grow)
    gradients = dense_gradients(net, x)
    activity = train_step(net, optimizer, x)
    trains = itertools.pairwise([x, *(record.dense() for record in activity.spikes)])
    before = [
        (layer, units_of(layer.mask), Dense(layer.mask, layer.dense_weight().detach().clone(), *matrices))
        for layer, *matrices in zip(layers, gradients, itertools.starmap(correlation_by_weight, trains), strict=True)
    ]
    assert scheduler.step(x, activity)
    return optimizer, scheduler, before


def check_choice(prune, grow, dense, old, new, candidates):
    """That of the old units those of the lowest scores are gone, and of the candidates those of the highest grew."""
    assert len(new) == len(old)
    assert new - old <= candidates
    # a tie may go either way; float32 scores are compared with float64 ones
    for score_of, lower, higher in (
        (ORACLES["prune"][prune], old - new, old & new),
        (ORACLES["grow"][grow], candidates - new, new - old),
    ):
        if score_of:
            score = score_of(dense)
            assert max(score[unit] for unit in lower) <= min(score[unit] for unit in higher) + 1e-6


@pytest.mark.parametrize(
    ("prune", "grow", "large"), [*((*each, False) for each in RULES), *((*each, True) for each in EACH_RULE)]
)
def test_an_update_follows_its_rules(prune, grow, large, monkeypatch):
    """If the grid is too large for a score of each unit, the best of drawn candidates grow."""
    drawn, draw = [], scheduler_module.draw_candidates
    monkeypatch.setattr(scheduler_module, "draw_candidates", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    if large:
        monkeypatch.setattr(replacement, "LARGEST_GRID", 0)
    optimizer, scheduler, before = update(prune, grow)
    replaced = 0
    for (layer, old, dense), numbers in zip(before, drawn, strict=True):
        new, candidates = units_of(layer.mask), set(itertools.product(*map(range, layer.mask.grid))) - old
        if large:
            absent, candidates = candidates, {divmod(number, layer.mask.grid[1]) for number in numbers.tolist()}
            assert candidates <= absent
            assert len(numbers) == len(candidates) == min(len(old), len(absent))
        count = min(int(0.2 * len(old)), len(candidates))
        replaced += count
        assert len(new - old) == count > 0
        check_choice(prune, grow, dense, old, new, candidates)

        # kept weights are untouched, pruned and grown ones are zero, and so is the grown ones' optimizer state
        kept_mask = unit_mask(layer.mask, old & new)
        assert torch.equal(layer.dense_weight().detach(), dense.weight * kept_mask)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = layer.mask.unpack(optimizer.state[layer.values][name])
            assert (moment[unit_mask(layer.mask, new - old)] == 0).all()
            assert (moment[kept_mask] != 0).any()
    assert scheduler.pruned == scheduler.grown == replaced


def unit_mask(mask, units):
    """bool [out, in], true in the given units."""
    row, col = torch.tensor(list(units)).T
    return BlockMask(mask.rows.layout, mask.cols.layout, row, col, mask.block_size).to_dense()


@pytest.mark.parametrize("network", [True, False])
def test_inputs_of_other_samples_than_the_activitys_are_refused_and_change_nothing(network):
    """As those of ``simulate(x, batch_first=True)``, in which time is second."""
    net, x = G2GNet(30, 40, 10, block_size=4, T=6), torch.rand(5, 6, 30)
    activity, before = net.simulate(x, batch_first=True), units_of(net.fc2.mask)
    scheduler = DSTScheduler(sparse_layers(net), torch.optim.SGD(net.parameters()), 1, network=net if network else None)
    with pytest.raises(ValueError, match=r"inputs are \[5, 6, 30\], and the activity is of 5 samples; .* \[T, B, in\]"):
        scheduler.step(x, activity)
    assert units_of(net.fc2.mask) == before
    assert scheduler.step(x.transpose(0, 1), activity)


def test_ties_are_broken_by_a_uniform_seeded_draw():
    """With all weights equal every unit is pruned equally often, and the same seed prunes the same units."""
    mask = BlockMask.sample(GroupLayout(16, 2), GroupLayout(16, 2), p_inter=0.5, block_size=4)
    times_pruned = torch.zeros(mask.num_units)
    for seed in range(150):
        layer = G2GLinear(copy.deepcopy(mask))
        torch.nn.init.ones_(layer.values)
        scheduler = DSTScheduler([layer], torch.optim.SGD([layer.values]), 1, 0.25, "set", "random", seed)
        scheduler.step(torch.rand(2, 16), None)
        times_pruned += (layer.values == 0).all(2).all(1)
    expected = 150 * int(0.25 * mask.num_units) / mask.num_units
    assert (times_pruned - expected).abs().max() < 5 * expected**0.5


def test_the_seed_decides_and_different_updates_draw_differently():
    drawn = []
    for seed in (1, 1, 2):
        net, optimizer, x, activity = trained_net()
        scheduler, units = DSTScheduler(sparse_layers(net), optimizer, 1, 0.2, "random", "random", seed), []
        for _ in range(2):
            scheduler.step(x, activity)
            units.append(units_of(net.fc2.mask))
        drawn.append(units)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_updates_come_every_interval_steps_and_reuse_the_same_memory():
    net, optimizer, x, _ = trained_net()
    scheduler = DSTScheduler(sparse_layers(net), optimizer, interval=3, grow="gradient")
    tensors = [net.fc2.values, net.fc2.mask.unit_row, net.fc2.mask.row_ptr, net.fc2.mask.col_slot]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for step in range(1, 8):
        assert (net.fc2.observer is not None) == (step % 3 == 0)  # gradients of absent units are formed only when due
        assert scheduler.step(x, train_step(net, optimizer, x)) == (step % 3 == 0)
    assert [tensor.data_ptr() for tensor in tensors] == addresses


@pytest.mark.parametrize("backend", [*backends_of(WAYS), LISTS])
@pytest.mark.parametrize(("dropout", "chunk"), [(0.0, None), (0.4, 3)])
def test_gradients_of_units_are_those_of_the_network_with_every_unit(backend, dropout, chunk, monkeypatch):
    in_lists, loops, run = backend == "lists", [], recurrent_lists._run
    if in_lists:
        monkeypatch.setattr(library, "LIST_COST", 0.0)
        monkeypatch.setattr(recurrent_lists, "_run", lambda layer, *given: (loops.append(layer), run(layer, *given))[1])
        backend = "cpu"
    monkeypatch.setattr(rules_module, "BAND", 100)  # one block row at a time
    options = {"model": "random", "num_groups": 3, "block_size": 4, "T": 7, "recurrent": True, "rec_gain": 1.0}
    net = G2GNet(20, 26, 7, p_inter=0.3, backend=backend, dropout=dropout, generator=seeded(1), **options)
    dense = copy.deepcopy(net).double()
    x = torch.rand(7, 5, 20, generator=seeded(2)) * 2
    dropped = net.drop(5, seeded(3)) if dropout else None
    counts = net.simulate(x, dropped=dropped).counts
    for name, layer in net.connections().items():
        every = BlockMask.full(layer.mask.rows.layout, layer.mask.cols.layout, 4)
        twin = G2GLinear.from_linear(dense.get_submodule(name).to_linear(), every)
        twin.backend = "torch"
        setattr(dense, name, twin)
        layer.observer = UnitGradients()
    dense.backend = "torch"
    assert torch.equal(net.simulate(x, dropped=dropped).counts, counts)  # whoever observes changes nothing
    for stack, inputs in ((net, x), (dense, x.double())):
        for part in inputs.split(3, 1):  # gradients of two backward passes
            of_part = dropped and [each[: part.shape[1]] for each in dropped]
            part = part.detach().requires_grad_()
            loss = stack.simulate(part, chunk=chunk, dropped=of_part).counts.square().sum()
            torch.autograd.grad(loss, part, retain_graph=True)  # a pass for inputs alone does not count
            loss.backward()
    assert bool(loops) == in_lists  # no step by itself
    for name, layer in net.connections().items():
        gradient = dense.connections()[name].mask.unpack(dense.connections()[name].values.grad)
        expected = mean_by_unit(gradient.square(), layer.mask).sqrt().flatten()
        assert expected.max() > 0
        found = unit_gradient(layer.observer.seen(), layer.mask).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        some = torch.arange(0, len(expected), 3)
        with torch.inference_mode():
            found = unit_gradient(layer.observer.seen(), layer.mask, units=some).double()
        torch.testing.assert_close(found, expected[some], rtol=1e-4, atol=1e-5 * float(expected.max()))
        layer.observer = UnitGradients()
    with torch.no_grad():  # neither without gradients nor in evaluation
        net.simulate(x)
    net.eval().simulate(x.requires_grad_()).counts.sum().backward()
    assert not any(layer.observer.seen() for layer in net.connections().values())


def own_model(**options):
    """A user's model of linear layers, sparse, with an optimizer and a scheduler."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 24), torch.nn.Tanh(), torch.nn.Linear(24, 12))
    sparsify(model, 0.3, num_groups=4, block_size=3, generator=seeded(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, DSTScheduler(model, optimizer, **options)


def test_a_step_of_which_nothing_was_recorded_is_refused():
    for what, options in (("gradient", {"grow": "gradient"}), ("activity", {})):
        model, optimizer, scheduler = own_model(interval=1, **options)
        with pytest.raises(RuntimeError, match=rf"no {what} of layer 0 was recorded in this step.* needs it"):
            scheduler.step()
    model, optimizer, first = own_model(interval=1, grow="gradient")
    second = DSTScheduler(model, optimizer, interval=1, grow="gradient")
    model(torch.rand(8, 20)).sum().backward()
    with pytest.raises(RuntimeError, match=r"another DSTScheduler .* has taken over layer 0; .* the last one only"):
        first.step()
    assert second.step()


def reuses_a_buffer(model, x):
    buffer = torch.empty_like(x[:4])
    for part in x.split(4):
        model(buffer.copy_(part)).square().sum().backward()


def changes_a_gradient(model, x):
    hidden = model[0](x)
    hidden.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    model[2](hidden.relu_()).square().sum().backward()


def wants_gradients_of_inputs_first(model, x):
    x = x.clone().requires_grad_()
    hidden = model[0](x)
    y = model[2](hidden.tanh()).square().sum()
    direction = torch.autograd.grad(y, (x, hidden), retain_graph=True)[0].sign()
    y.backward(retain_graph=True)
    model((x + 0.1 * direction).detach()).square().sum().backward()


def penalizes_the_dense_weight(model, x):
    (model(x).square().sum() + (model[0].weight @ model[0].weight.T).square().sum()).backward()


@pytest.mark.parametrize(
    "step", [reuses_a_buffer, changes_a_gradient, wants_gradients_of_inputs_first, penalizes_the_dense_weight]
)
def test_the_gradient_by_which_units_grow_is_the_one_that_trains(step):
    model, _, _ = own_model(interval=1, grow="gradient")
    x = torch.rand(16, model[0].in_features, generator=seeded(3))
    dense = copy.deepcopy(model).double()
    for place in (0, 2):
        dense[place] = dense[place].to_linear()
    step(model, x)
    step(dense, x.double())
    for place in (0, 2):
        expected = mean_by_unit(dense[place].weight.grad.square(), model[place].mask).sqrt().flatten()
        found = unit_gradient(model[place].observer.seen(), model[place].mask).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def penalizes_the_gradient(model, x):
    (of_inputs,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    of_inputs.square().sum().backward()


def wants_the_gradients_of_samples(model, x):
    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(model.named_parameters()), x)


def wants_a_jacobian_of_the_weights(model, x):
    y = model(x)[0]
    torch.autograd.grad(y, model[0].values, torch.eye(len(y)), is_grads_batched=True)


@pytest.mark.parametrize(
    ("step", "named"),
    [
        (penalizes_the_gradient, r"the gradient of a gradient \(create_graph=True\)"),
        (wants_the_gradients_of_samples, r"gradients in batches \(torch.func.vmap, "),
        (wants_a_jacobian_of_the_weights, r"gradients in batches \(torch.func.vmap, "),
    ],
)
def test_gradients_that_are_not_seen_are_refused(step, named):
    model, _, scheduler = own_model(interval=1, grow="gradient")
    step(model, torch.rand(4, model[0].in_features).requires_grad_())
    model(torch.rand(4, model[0].in_features)).sum().backward()
    with pytest.raises(RuntimeError, match=named):
        scheduler.step()


def test_scores_are_not_rounded_by_autocast_and_graphs_that_are_kept_hold_no_samples():
    scores = []
    for autocast in (False, True):
        model, _, scheduler = own_model(interval=1, grow="gradient")
        observer = model[0].observer
        scheduler.grow = scheduler.grow._replace(score=lambda seen: scores.append(seen.gradient) or seen.gradient)
        model(torch.rand(16, model[0].in_features, generator=seeded(3))).square().sum().backward()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin[0].observer is None  # a copy takes no part in the step
        with torch.autocast("cpu", torch.bfloat16, autocast):
            scheduler.step()
        assert not observer.seen()
        assert not observer.inputs
    for exact, found in zip(scores[:2], scores[2:], strict=True):
        assert torch.equal(exact, found)


@pytest.mark.parametrize(("rules", "bad"), list(zip(RULES, itertools.cycle((math.nan, math.inf, -math.inf)))))
def test_an_update_with_a_number_that_is_not_finite_is_left_out_and_said(rules, bad, caplog):
    model, optimizer, scheduler = own_model(interval=1, fraction=0.3, prune=rules[0], grow=rules[1])
    x = torch.randn(16, 20, generator=seeded(2))
    x[3, 5] = bad
    units = [units_of(model[place].mask) for place in (0, 2)]
    model(x).square().sum().backward()
    optimizer.step()
    assert scheduler.step()
    uses_it = rules != ("random", "random")
    assert (scheduler.pruned == 0) == uses_it
    assert ("no unit was replaced, because scores of" in caplog.text) == uses_it
    for place, before in zip((0, 2), units, strict=True):
        assert (units_of(model[place].mask) == before) == uses_it
    state = model.state_dict()
    state = {name: tensor.nan_to_num() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    copy.deepcopy(model).load_state_dict(state)  # no unit is named twice


def test_what_is_not_a_number_comes_last_but_before_what_is_excluded():
    draw = seeded(0)
    cost = torch.tensor([2.0, math.nan, -math.inf, 1.0, math.inf, 0.0])
    last = torch.tensor([False, False, False, False, False, True])
    order = highest(-cost, 6, draw, last).tolist()
    assert order[:3] == [2, 3, 0]
    assert set(order[3:5]) == {1, 4}
    assert order[5] == 5


@pytest.mark.parametrize("equal", [False, True])
def test_of_many_costs_the_lowest_are_found_without_a_turn_for_each(equal, monkeypatch):
    cost = torch.randperm(5000, generator=seeded(0)).float() - 2500
    cost = (cost / 50).round() if equal else cost
    last = torch.rand(5000, generator=seeded(1)) < 0.3
    expected = highest(-cost, 420, seeded(2), last)
    monkeypatch.setattr(replacement, "MANY", 100)
    drawn = [highest(-cost, 420, seeded(seed), last) for seed in range(200)]
    for found in drawn:
        assert torch.equal(cost[found], cost[expected])
        assert not last[found].any()
        assert len(found.unique()) == 420
    if not equal:
        assert torch.equal(drawn[0], expected)
        return
    border = ((cost == cost[expected].max()) & ~last).nonzero()[:, 0]
    chosen = torch.stack(drawn).flatten().bincount(minlength=5000)[border]
    mean = 420 - int((cost[expected] < cost[expected].max()).sum())
    assert 0 < mean < len(border)
    assert (chosen - 200 * mean / len(border)).abs().max() < 5 * (200 * mean / len(border)) ** 0.5


@pytest.mark.parametrize(
    ("prune", "grow", "use_reentrant"), [("hebb", "hebb", False), ("hebb", "hebb", True), ("set", "gradient", True)]
)
def test_a_checkpointed_model_is_rewired_as_any_other(prune, grow, use_reentrant):
    wired = []
    for checkpointed in (False, True):
        model, optimizer, scheduler = own_model(interval=1, fraction=0.3, prune=prune, grow=grow)
        for step in range(3):
            x = torch.randn(16, 20, generator=seeded(step)).requires_grad_()
            optimizer.zero_grad()
            (checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)).square().sum().backward()
            optimizer.step()
            scheduler.step()
        wired.append([units_of(model[place].mask) for place in (0, 2)])
    assert wired[0] == wired[1]


def test_the_share_falls_as_a_cosine_up_to_the_last_update():
    """S is the last multiple of 10 in the first 75 % of 100 steps; there the cosine is zero."""
    net, optimizer, _, _ = trained_net()
    options = {"schedule": "cosine", "stop": 0.75, "total_steps": 100}
    scheduler, replaced = DSTScheduler([net.fc2], optimizer, 10, 0.4, "random", "random", **options), {}
    for step in range(1, 101):
        before = scheduler.pruned
        if scheduler.step():
            replaced[step] = scheduler.pruned - before
    units = net.fc2.mask.num_units
    assert replaced == {s: int(0.4 * (1 + math.cos(math.pi * s / 70)) / 2 * units) for s in range(10, 71, 10)}
    assert replaced[70] == 0 < replaced[60] < replaced[10]


def test_a_nearly_full_layer_grows_no_more_than_there_is_room_for():
    net, optimizer, x, activity = trained_net(p_inter=0.97)
    before = [layer.mask.num_units for layer in sparse_layers(net)]
    DSTScheduler(sparse_layers(net), optimizer, 1, fraction=1.0).step(x, activity)
    assert [len(units_of(layer.mask)) for layer in sparse_layers(net)] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": "magnitude"}, f"prune='magnitude' is unknown; choose one of {', '.join(PRUNE_RULES)}"),
        ({"interval": 0}, "interval=0 must be a whole number of at least 1"),
        ({"total_steps": -5}, "total_steps=-5 must be a whole number of at least 1"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"fraction": 1.1}, "fraction=1.1 must be a number above 0 and at most 1"),
        ({"fraction": 0.0}, "fraction=0.0 must be a number above 0 and at most 1"),
        ({"stop": 0.0, "total_steps": 9}, "stop=0.0 must be a number above 0 and at most 1"),
        ({"final_density": 1.5, "total_steps": 9}, "final_density=1.5 must be a number above 0 and at most 1"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; choose one of constant, cosine"),
        ({"schedule": "cosine"}, "schedule='cosine', stop=1.0 and final_density=None need total_steps"),
        ({"final_density": 0.1}, "schedule='constant', stop=1.0 and final_density=0.1 need total_steps"),
        ({"stop": 0.5, "total_steps": 1999}, "interval=1000 leaves no update in the first 0.5 of 1999 steps"),
        ({"model": torch.nn.Linear(3, 4)}, r"no sparse layer to rewire; g2gnet.sparsify\(model\) creates them"),
        ({"model": G2GNet(30, 40, 10, "dense")}, "none can grow"),
        ({"model": G2GNet(30, 40, 10)}, "optimizer does not hold the weights of layer 0, 40 × 30"),
        ({"model": 2 * [G2GLinear(FULL)]}, "0 and 1 have the same weights"),
        ({"model": [torch.nn.Linear(3, 4)]}, "Linear is among the layers, which must be G2GLinear, or G2GConv2d with"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    net, optimizer, _, _ = trained_net()
    with pytest.raises((ValueError, TypeError), match=message):
        DSTScheduler(**{"model": sparse_layers(net), "optimizer": optimizer, **options})


def test_a_connection_of_two_projections_is_judged_by_what_both_carry():
    masks = {
        name: BlockMask.sample(GroupLayout(16, 2), GroupLayout(16, 2), 0.6, 0.3, 1, seeded(place))
        for place, name in enumerate(("in", "twice", "out"))
    }
    layers = {name: G2GLinear(mask, bias=False, generator=seeded(0)) for name, mask in masks.items()}
    ends = ("input", "a", "in"), ("a", "b", "twice"), ("b", "b", "twice"), ("b", "out", "out")
    edges = [Projection(source, target, layers[name], delay=int(source == target)) for source, target, name in ends]
    net = SpikingNetwork({name: LIF(threshold=0.3) for name in ("a", "b", "out")}, edges, "out", T=5)
    rewired, x = [], 3 * torch.rand(4, 16, generator=seeded(1))
    for by_hand in (False, True):
        twin = copy.deepcopy(net)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        connections = [*dict.fromkeys(twin.connections().values())]
        given, options = (connections, {"network": twin}) if by_hand else (twin, {})
        dst = DSTScheduler(given, optimizer, 1, 0.3, "hebb", "hebb", **options)
        activity = twin.simulate(x, spikes=True)
        activity.counts.sum().backward()
        dst.step(*((x, activity) if by_hand else ()))
        rewired.append(twin.a_to_b.mask.flat_unit())
    assert torch.equal(*rewired)


def test_layers_that_no_update_changes_are_named_at_construction(caplog):
    net = trained_net()[0]
    full = BlockMask.full(net.fc2.mask.rows.layout, net.fc2.mask.cols.layout, 3)
    net.fc1.values.requires_grad_(False)
    net.fc2 = G2GLinear(full)
    optimizer = torch.optim.SGD([net.fc2.values, net.fc3.values], lr=0.1)
    options = {"interval": 1, "prune": "random", "grow": "random"}
    frozen = "layer {}, 40 × 30, is left out of dynamic sparse training: it is frozen"
    whole = "layer {}, 40 × 40, is left out of dynamic sparse training: all of its units exist, so none can grow"
    for model, names in ((net, ("fc1", "fc2")), (sparse_layers(net), (0, 1))):
        caplog.clear()
        dst = DSTScheduler(model, optimizer, **options)
        assert caplog.messages == [frozen.format(names[0]), whole.format(names[1])]
    caplog.clear()
    DSTScheduler(sparse_layers(net), optimizer, **options, network=net)
    assert caplog.messages == [frozen.format("fc1"), whole.format("fc2")]
    units = [layer.mask.flat_unit().clone() for layer in sparse_layers(net)]
    assert dst.step()
    now = [layer.mask.flat_unit() for layer in sparse_layers(net)]
    assert [*map(torch.equal, units, now)] == [True, True, False]
    caplog.clear()
    DSTScheduler(net, optimizer, **options, final_density=0.3, total_steps=9)  # takes units away from full layers, too
    assert caplog.messages == [frozen.format("fc1")]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, functools.partial(prune.l1_unstructured, amount=0.5)])
def test_a_layer_whose_weights_something_computes_is_refused_by_name_before_and_in_an_update(wrap):
    message = "the weights of layer 1, 64 × 64, are computed by a parametrization.*; remove that, or give .* other la"
    net, late = (G2GNet(64, 64, 10, block_size=8, T=5, generator=seeded(0)) for _ in range(2))
    options = {"interval": 1, "prune": "random", "grow": "random"}
    dst = DSTScheduler(late, torch.optim.SGD(late.parameters(), lr=0.1), **options)
    units = late.fc1.mask.flat_unit().clone()
    for each in (net, late):
        wrap(each.fc2, "values")
    with pytest.raises(ValueError, match=message):
        DSTScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)
    with pytest.raises(ValueError, match=message):
        dst.step()
    assert torch.equal(late.fc1.mask.flat_unit(), units)
    others = DSTScheduler([net.fc1, net.fc3], torch.optim.SGD(net.parameters(), lr=0.1), **options)
    assert others.step()
    assert others.grown > 0
