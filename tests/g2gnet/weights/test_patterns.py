"""Patterns of one's own and the ones that ship, against networkx, SciPy and counts by hand."""

import itertools
import math
import statistics

import networkx
import pytest
import torch
from helpers import Largest, seeded
from scipy import optimize, stats
from torch import nn

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import G2GNet, sparsify
from g2gnet.weights.densities import erk, layer_probabilities
from g2gnet.weights.patterns import PATTERNS, Distance, ErdosRenyi, Plane, SmallWorld, mask_between, pattern_mask

DRAWS = 400


def neighbours(out, into, generator):
    return (out.group_of_unit[:, None] - into.group_of_unit).abs() <= 1


def grid(out_size=48, in_size=96, block_size=4, groups=8):
    """The two sides of a layer."""
    nothing = torch.zeros(0, dtype=torch.int64)
    mask = BlockMask(GroupLayout(out_size, groups), GroupLayout(in_size, groups), nothing, nothing, block_size)
    return mask.rows, mask.cols


def test_a_pattern_of_ones_own_decides_every_layer_of_a_network():
    net = G2GNet(64, 32, 16, neighbours, block_size=2, T=4, generator=seeded(0))
    for connection, _ in net.layers():
        out_group, in_group = (torch.arange(size) // (size // 8) for size in connection.mask.shape)
        expected = (out_group[:, None] - in_group).abs() <= 1
        assert torch.equal(connection.mask.to_dense(), expected)
        assert not connection.dense_weight()[~expected].any()
    net(torch.rand(5, 64) * 3).sum().backward()
    assert net.fc1.values.grad is not None
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))  # and any model's
    before = model[0].weight.detach().clone()
    sparsify(model, pattern=neighbours, block_size=2)
    expected = (torch.arange(32)[:, None] // 4 - torch.arange(64) // 8).abs() <= 1
    assert torch.equal(model[0].dense_weight(), before * expected)


def test_units_drawn_from_probabilities_are_there_as_often_as_they_say_and_rows_are_equal_work():
    out, into = grid()
    probability = torch.rand(out.num_units, into.num_units, generator=seeded(3), dtype=torch.float64)
    probability[:, 0], probability[:, 1] = 0, 1
    found = torch.zeros_like(probability)
    for seed in range(DRAWS):
        units = pattern_mask(lambda *sides: probability, out.layout, into.layout, 4, seeded(seed)).present()
        assert ((units.sum(1) - probability.sum(1)).abs() < 1).all()
        found += units
    assert not found[:, 0].any()
    assert (found[:, 1] == DRAWS).all()
    free = (probability > 0) & (probability < 1)
    expected = probability[free] * DRAWS
    spread = (expected * (1 - probability[free])).sqrt()
    assert stats.kstest(((found[free] - expected) / spread).numpy(), stats.norm.cdf).pvalue > 1e-3


def test_erdos_renyi_units_are_independent_of_one_another():
    out, into = grid()
    counts = torch.stack([ErdosRenyi(0.2)(out, into, seeded(seed)).sum(1) for seed in range(DRAWS)]).flatten()
    most = into.num_units
    expected = stats.binom.pmf(range(most + 1), most, 0.2) * len(counts)
    observed = counts.bincount(minlength=most + 1).double().numpy()
    common = expected > 5
    rare = [[of[~common].sum()] for of in (observed, expected)]
    tested = [[*of[common], *more] for of, more in zip((observed, expected), rare, strict=True)]
    assert stats.chisquare(*tested).pvalue > 1e-3


@pytest.mark.parametrize(("groups", "linked"), [(8, 2), (8, 4), (16, 6)])
def test_a_small_world_is_the_ring_of_watts_and_strogatz_whose_rewired_links_go_anywhere_but_home(groups, linked):
    ring = SmallWorld(neighbours=linked, rewire=0.0, p_inter=0.1).links(groups, groups)
    graph = networkx.watts_strogatz_graph(groups, linked, 0)
    assert torch.equal(ring, torch.from_numpy(networkx.to_numpy_array(graph)) > 0)
    world, moved = SmallWorld(neighbours=linked, rewire=0.3, p_inter=0.1), 0
    for seed in range(DRAWS):
        links = world.links(groups, groups, seeded(seed))
        assert (links.sum(1) == linked).all()
        assert not links.diagonal().any()
        moved += int((links & ~ring).sum())
    # a moved link may come back to where one was taken away before
    assert 0.8 * 0.3 < moved / (DRAWS * groups * linked) <= 1.02 * 0.3


@pytest.mark.parametrize("p_inter", [0.0, 0.15, 0.6, 1.0])
def test_a_small_world_has_the_units_that_its_probabilities_say(p_inter):
    layouts = GroupLayout(64, 8), GroupLayout(128, 8)
    masks = [pattern_mask(SmallWorld(0.9, p_inter), *layouts, 4, seeded(seed)) for seed in range(60)]
    own = torch.arange(64)[:, None] // 8 == torch.arange(128) // 16
    dense = torch.stack([mask.to_dense() for mask in masks]).double()
    assert dense[:, own].mean() == pytest.approx(0.9, abs=0.01)
    assert dense[:, ~own].mean() == pytest.approx(p_inter, abs=0.01)


def weights_of(probability, out, into):
    """The expected density of weights, not of units."""
    return probability.repeat_interleave(out.lengths, 0).repeat_interleave(into.lengths, 1).mean().item()


@pytest.mark.parametrize("model", ["regular", "plane"])
def test_groups_of_different_sizes_have_the_weights_of_groups(model):
    """Of 12 and 12 neurons in 8 groups 20 of 144 weights are inside of groups, but 8 of 64 units."""
    groups = GroupLayout(12, 8), GroupLayout(12, 8)
    shares = [mask_between(model, *groups, (1.0, 0.0), 1, seeded(seed)).density for seed in range(100)]
    assert statistics.mean(shares) == pytest.approx(20 / 144, abs=4 * statistics.stdev(shares) / 10)
    ((p_intra, p_inter),) = layer_probabilities([(12, 12)], 0.8, 0.1, 8, "erk")
    assert (20 * p_intra + 124 * p_inter) / 144 == pytest.approx((20 * 0.8 + 124 * 0.1) / 144)


@pytest.mark.parametrize(("density", "scale"), [(0.05, 0.1), (0.256, 0.02), (0.9, 0.5), (1.0, 0.1), (0.0, 1)])
def test_a_distance_rule_falls_exponentially_and_has_its_density(density, scale):
    out, into = grid(60, 90, 3, 1)
    probability = Distance(density, scale)(out, into)
    assert weights_of(probability, out, into) == pytest.approx(density, abs=1e-9)
    places = [(torch.arange(units) + 0.5) / units for units in (out.num_units, into.num_units)]
    distance = torch.stack([(places[0][:, None] - places[1] + turn).abs() for turn in (-1, 0, 1)]).amin(0).double()
    weight = torch.exp(-distance / scale).numpy()

    def excess(log_factor):
        return (math.exp(log_factor) * weight).clip(max=1).mean() - density

    if 0 < density < 1:
        factor = math.exp(optimize.brentq(excess, -30, 60))
        assert torch.allclose(probability, torch.from_numpy((factor * weight).clip(max=1)), atol=1e-6)


@pytest.mark.parametrize(("density", "scale"), [(0.05, 0.1), (0.256, 0.3)])
def test_a_distance_on_the_plane_is_that_of_the_means_of_pixels(density, scale):
    """35 neurons fill 6 rows of 6 but for one, in ranges of up to 4; 28 of them 5 rows of 6."""
    out, into = grid(35, 28, 3, 4)
    probability = Plane(density, scale)(out, into)
    assert weights_of(probability, out, into) == pytest.approx(density, abs=1e-9)

    def places(side, rows, columns):
        found = []
        for first, end in itertools.pairwise(side.bounds.tolist()):
            pixels = [((n // columns + 0.5) / rows, (n % columns + 0.5) / columns) for n in range(first, end)]
            found.append([sum(pixel[axis] for pixel in pixels) / len(pixels) for axis in (0, 1)])
        return found

    distances = [[math.dist(a, b) for b in places(into, 5, 6)] for a in places(out, 6, 6)]
    weight = torch.exp(-torch.tensor(distances) / scale).double()
    free = probability < 1
    ratio = probability[free] / weight[free]
    assert ratio.max() / ratio.min() == pytest.approx(1, abs=1e-5)
    assert (weight[~free] * ratio.mean() >= 1 - 1e-5).all()


@pytest.mark.parametrize(
    ("weights", "shapes"),
    [(0.05, [(2048, 784), (2048, 2048), (10, 2048)]), (0.256, [(8, 8), (512, 512), (4, 512)]), (0.8, [(30, 20)]),
     (1.0, [(8, 8), (512, 512), (4, 512)])],
)  # fmt: skip
def test_erk_gives_small_layers_more_and_all_together_as_much(weights, shapes):
    sizes = [out * into for out, into in shapes]
    budget = weights * sum(sizes)
    ours = erk(shapes, budget)
    ratios = [(out + into) / (out * into) for out, into in shapes]

    def excess(factor):
        return sum(min(1, factor * ratio) * size for ratio, size in zip(ratios, sizes, strict=True)) - budget

    factor = optimize.brentq(excess, 0, 2 / min(ratios))
    assert ours == pytest.approx([min(1, factor * ratio) for ratio in ratios], rel=1e-6)


@pytest.mark.parametrize("model", ["index", "mixer", *PATTERNS])
def test_a_network_with_erk_has_as_many_weights_and_the_densities_asked_for(model):
    shapes = [(256, 256), (256, 256), (16, 256)]
    net = G2GNet(256, 256, 16, model, 0.1, density="erk", block_size=2, generator=seeded(1))
    budget = (1 / 8 + 7 / 8 * 0.1) * sum(out * into for out, into in shapes)
    for (connection, _), density in zip(net.layers(), erk(shapes, budget), strict=True):
        assert connection.mask.density == pytest.approx(density, rel=0.1)
    assert net.fc3.mask.density > 2 * net.fc2.mask.density


def test_probabilities_of_layers_stay_probabilities():
    shapes = [(2048, 784), (2048, 2048), (10, 2048)]
    ranges = [0.0, 0.2, 1.0], [0.0, 0.03, 0.5, 1.0], ["uniform", "erk"]
    for p_intra, p_inter, density in itertools.product(*ranges):
        for pair in layer_probabilities(shapes, p_intra, p_inter, 8, density):
            assert all(0 <= p <= 1 for p in pair)
    assert layer_probabilities(shapes, 1.0, 0.15, 8) == [(1.0, 0.15)] * 3


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(3, 4, dtype=torch.bool), r"torch.bool \[3, 4\]; it must return a dense tensor \[16, 24\]"),
        (torch.ones(16, 24, dtype=torch.int64), r"torch.int64 \[16, 24\]"),
        (torch.full((16, 24), 1.5), "numbers that are not from 0 to 1"),
        (torch.full((16, 24), torch.nan), "numbers that are not from 0 to 1"),
        (torch.full((16, 24), 0.5).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.eye(16, 24).to_sparse(), "of layout torch.sparse_coo on cpu"),
        (torch.empty(16, 24, device="meta"), "on meta"),
        ([[True]], "of type list"),
        (None, "of type NoneType"),
    ],
)
def test_a_pattern_that_returns_anything_else_is_refused(result, message):
    def wrong(out, into, generator):
        return result

    with pytest.raises(ValueError, match=f"the pattern wrong returned .*{message}"):
        pattern_mask(wrong, GroupLayout(48, 8), GroupLayout(96, 8), 4)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_grid_too_large_for_a_number_per_unit_is_refused_before_one_is_formed(name):
    layout = GroupLayout(8192, 8)
    with Largest() as largest, pytest.raises(ValueError, match=r"each of 67,108,864 units.*BlockMask\.sample"):
        mask_between(name, layout, layout, (0.1, 0.01), 1, seeded(0))
    assert largest.numel < 1 << 18
    assert mask_between("index", layout, layout, (0.001, 0.0), 1, seeded(0)).num_units > 8000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ErdosRenyi(1.2), "density=1.2 must be"),
        (lambda: SmallWorld(rewire=-1.0), "rewire=-1.0 must be"),
        (lambda: SmallWorld(neighbours=0), "neighbours=0 must be"),
        (lambda: Distance(0.1, 0.0), "scale=0.0 must be"),
        (lambda: G2GNet(8, 8, 8, "ring"), "model='ring' is unknown; choose one of dense, .*, or a pattern"),
        (lambda: G2GNet(8, 8, 8, neighbours, density="erk"), "density=erk has no effect with model=neighbours; "),
        (lambda: G2GNet(8, 8, 8, "dense", density="erk"), "density=erk has no effect with model=dense; "),
        (lambda: G2GNet(8, 8, 8, density="er"), "density='er' is unknown; choose one of uniform, erk"),
        (lambda: G2GNet(8, 8, 8, SmallWorld), "the pattern SmallWorld is a class; give one of its objects"),
        (lambda: sparsify(nn.Linear(8, 8), pattern="ring"), "pattern='ring' is unknown"),
        (lambda: sparsify(nn.Linear(8, 8), pattern=neighbours, density="erk"), "no effect on a pattern of your own"),
        (lambda: sparsify(nn.Linear(8, 8), pattern=SmallWorld), "SmallWorld is a class; give one of its objects"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("model", PATTERNS)
def test_patterns_are_drawn_from_the_generator_alone(model):
    first, same, other = (G2GNet(64, 64, 16, model, block_size=4, generator=seeded(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not all(a.mask.equals(b.mask) for (a, _), (b, _) in zip(first.layers(), other.layers(), strict=True))
