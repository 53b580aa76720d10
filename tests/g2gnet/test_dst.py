"""Dynamic sparse training against a slow description of its rules, weight by weight."""

import itertools

import pytest
import torch

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import DSTScheduler, G2GLinear, G2GNet
from g2gnet.dst import GROW_RULES, PRUNE_RULES, unit_correlation
from g2gnet.regularizer import rate_penalty, rate_target

RULES = list(itertools.product(PRUNE_RULES, GROW_RULES))


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
    rows = [mask.rows.order[a:b] for a, b in itertools.pairwise(mask.rows.bounds.tolist())]
    cols = [mask.cols.order[a:b] for a, b in itertools.pairwise(mask.cols.bounds.tolist())]
    for r, c in itertools.product(range(len(rows)), range(len(cols))):
        means[r, c] = matrix[rows[r][:, None], cols[c][None, :]].double().mean()
    return means


def spikes(*shape, seed=0, rate=0.2):
    drawn = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()
    drawn[..., :2] = 0  # two silent neurons
    return drawn


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("held", [True, False])
def test_unit_correlation_is_the_mean_over_the_units_weights(block_size, held):
    generator = torch.Generator().manual_seed(0)
    layouts = GroupLayout(30, 4, "random", generator), GroupLayout(42, 4, "interleaved")
    mask = BlockMask.sample(*layouts, block_size=block_size, generator=generator)
    pre = torch.rand(6, 42, generator=generator) - 0.3 if held else spikes(9, 6, 42, seed=1)
    post = spikes(9, 6, 30)
    expected = mean_by_unit(correlation_by_weight(pre, post), mask)
    # float32 sums of up to 54 samples
    torch.testing.assert_close(unit_correlation(pre, post, mask).double(), expected, rtol=1e-5, atol=1e-6)


def test_correlation_of_identical_trains_is_one_and_with_a_silent_neuron_zero():
    train = spikes(9, 6, 8)
    mask = BlockMask.from_dense(torch.ones(8, 8))
    correlation = unit_correlation(train, train, mask)
    expected = torch.ones(8)
    expected[:2] = 0
    torch.testing.assert_close(correlation.diagonal(), expected)


def trained_net(seed=0, p_inter=0.3, **options):
    """A net, its optimizer with state in every weight, and the last step's input and activity."""
    net = G2GNet(
        30, 40, 10, "mixer", p_inter, block_size=3, T=8, generator=torch.Generator().manual_seed(seed), **options
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=1e-4)
    x = torch.rand(6, 30, generator=torch.Generator().manual_seed(seed)) * 3
    for _ in range(2):
        activity = train_step(net, optimizer, x)
    return net, optimizer, x, activity


def train_step(net, optimizer, x, target=None):
    activity = net.simulate(x)
    loss = torch.nn.functional.cross_entropy(activity.counts, torch.arange(len(x)))
    if target:
        loss = loss + rate_penalty(activity.rates[:-1], target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return activity


def sparse_layers(net):
    return [connection for connection, _ in net.layers()]


def units_of(mask):
    return set(zip(mask.unit_row.tolist(), mask.unit_col.tolist(), strict=True))


@pytest.mark.parametrize(("prune", "grow"), RULES)
def test_an_update_follows_its_rules(prune, grow):
    net, optimizer, x, activity = trained_net()
    layers = sparse_layers(net)
    before = [(units_of(layer.mask), layer.dense_weight().detach().clone(), layer.mask.density) for layer in layers]
    trains = [x, *(record.dense() for record in activity.spikes)]
    correlations = [
        mean_by_unit(correlation_by_weight(trains[i], trains[i + 1]), layer.mask) for i, layer in enumerate(layers)
    ]
    weights = [mean_by_unit(layer.dense_weight().detach().abs(), layer.mask) for layer in layers]

    scheduler = DSTScheduler(layers, optimizer, interval=1, fraction=0.2, prune=prune, grow=grow)
    assert scheduler.step(x, activity)

    replaced = 0
    for layer, (old, old_weight, _), correlation, weight in zip(layers, before, correlations, weights, strict=True):
        new = units_of(layer.mask)
        pruned, grown = old - new, new - old
        count = min(int(0.2 * len(old)), layer.mask.grid[0] * layer.mask.grid[1] - len(old))
        replaced += count
        assert len(new) == len(old)
        assert len(pruned) == len(grown) == count > 0
        inactive = set(itertools.product(range(layer.mask.grid[0]), range(layer.mask.grid[1]))) - old
        assert grown <= inactive
        if prune != "random":
            score = weight if prune == "set" else correlation
            kept = old - pruned
            # a tie may go either way; float32 scores are compared with float64 ones
            assert max(score[unit] for unit in pruned) <= min(score[unit] for unit in kept) + 1e-6
        if grow == "hebb":
            passed_over = inactive - grown
            assert min(correlation[unit] for unit in grown) >= max(correlation[unit] for unit in passed_over) - 1e-6

        # kept weights are untouched, pruned and grown ones are zero, and so is the grown ones' optimizer state
        kept_mask = unit_mask(layer.mask, old & new)
        assert torch.equal(layer.dense_weight().detach(), old_weight * kept_mask)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = layer.mask.unpack(optimizer.state[layer.values][name])
            assert (moment[unit_mask(layer.mask, grown)] == 0).all()
            assert (moment[kept_mask] != 0).any()
    assert scheduler.pruned == scheduler.grown == replaced


def unit_mask(mask, units):
    """bool [out, in], true in the given units."""
    dense = torch.zeros(mask.shape, dtype=torch.bool)
    rows, cols = mask.rows.bounds.tolist(), mask.cols.bounds.tolist()
    for r, c in units:
        dense[mask.rows.order[rows[r] : rows[r + 1], None], mask.cols.order[None, cols[c] : cols[c + 1]]] = True
    return dense


@pytest.mark.parametrize(("prune", "grow"), RULES)
@pytest.mark.parametrize("block_size", [64, 16])
def test_no_rule_drifts_towards_small_units(prune, grow, block_size):
    """50 updates leave the density within 1 %, with groups of 98 inputs, which neither 64 nor 16 divides."""
    net = G2GNet(
        784, 512, 10, "mixer", block_size=block_size, T=4, generator=torch.Generator().manual_seed(0), enc_scale=3.0
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    x = torch.rand(10, 784, generator=torch.Generator().manual_seed(0))
    scheduler = DSTScheduler(net, optimizer, interval=1, prune=prune, grow=grow)
    before = [layer.mask.density for layer in sparse_layers(net)]
    for _ in range(50):
        train_step(net, optimizer, net.encode(x))
        scheduler.step()
    assert scheduler.pruned > 0
    for layer, density in zip(sparse_layers(net)[:2], before, strict=False):
        assert layer.mask.density == pytest.approx(density, rel=0.01)


def test_ties_are_broken_by_a_uniform_seeded_draw():
    """With all weights equal every unit is pruned equally often, and the same seed prunes the same units."""
    mask = BlockMask.sample(GroupLayout(16, 2), GroupLayout(16, 2), p_inter=0.5, block_size=4)
    times_pruned = torch.zeros(mask.num_units)
    for seed in range(300):
        layer = G2GLinear(BlockMask(GroupLayout(16, 2), GroupLayout(16, 2), mask.unit_row, mask.unit_col, 4))
        torch.nn.init.ones_(layer.values)
        scheduler = DSTScheduler([layer], torch.optim.SGD([layer.values]), 1, 0.25, "set", "random", seed)
        scheduler.step(torch.rand(2, 16), None)
        times_pruned += (layer.values == 0).all(2).all(1)
    expected = 300 * int(0.25 * mask.num_units) / mask.num_units
    assert (times_pruned - expected).abs().max() < 5 * expected**0.5


def test_the_seed_decides_and_different_updates_draw_differently():
    drawn = []
    for seed in (1, 1, 2):
        net, optimizer, x, activity = trained_net()
        scheduler = DSTScheduler(sparse_layers(net), optimizer, 1, 0.2, "random", "random", seed)
        scheduler.step(x, activity)
        first = units_of(net.fc2.mask)
        scheduler.step(x, activity)
        drawn.append((first, units_of(net.fc2.mask)))
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_updates_come_every_interval_steps_and_reuse_the_same_memory():
    net, optimizer, x, activity = trained_net()
    scheduler = DSTScheduler(sparse_layers(net), optimizer, interval=3)
    tensors = [net.fc2.values, net.fc2.mask.unit_row, net.fc2.mask.row_ptr, net.fc2.mask.col_slot]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert [scheduler.step(x, activity) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert [tensor.data_ptr() for tensor in tensors] == addresses


@pytest.mark.parametrize("target", [None, rate_target(20, 20, 10)], ids=["plain", "with regulariser"])
def test_training_goes_on_through_updates_and_a_resume(target):
    """Ten steps with updates equal five, a save into fresh objects, and five more, to the last bit."""

    def build():
        net, optimizer, x, _ = trained_net()
        return net, optimizer, x, DSTScheduler(sparse_layers(net), optimizer, interval=2, prune="hebb")

    def train(parts, steps):
        net, optimizer, x, scheduler = parts
        for _ in range(steps):
            scheduler.step(x, train_step(net, optimizer, x, target))

    through = build()
    train(through, 10)
    first, second = build(), build()
    train(first, 5)
    for old, new in zip((first[0], first[1], first[3]), (second[0], second[1], second[3]), strict=True):
        new.load_state_dict(old.state_dict())
    train(second, 5)
    for name, tensor in through[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name
    assert second[3].state_dict() == through[3].state_dict()
    assert through[3].pruned > 0


def test_a_nearly_full_layer_grows_no_more_than_there_is_room_for():
    net, optimizer, x, activity = trained_net(p_inter=0.97)
    before = [layer.mask.num_units for layer in sparse_layers(net)]
    DSTScheduler(sparse_layers(net), optimizer, 1, fraction=1.0).step(x, activity)
    for layer, count in zip(sparse_layers(net), before, strict=True):
        assert len(units_of(layer.mask)) == layer.mask.num_units == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": "magnitude"}, "prune='magnitude' is unknown; choose one of set, random, hebb"),
        ({"grow": "set"}, "grow='set' is unknown; choose one of hebb, random"),
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"fraction": 0.0}, "fraction=0.0 must be above 0"),
        ({"fraction": 1.1}, "fraction=1.1 must be above 0 and at most 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    net, optimizer, _, _ = trained_net()
    with pytest.raises(ValueError, match=message):
        DSTScheduler(sparse_layers(net), optimizer, **options)


def test_a_full_network_is_refused():
    net = G2GNet(30, 40, 10, "dense")
    with pytest.raises(ValueError, match="none can grow"):
        DSTScheduler(sparse_layers(net), torch.optim.Adam(net.parameters()))
