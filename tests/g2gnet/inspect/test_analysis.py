"""The analysis: each quantity against values worked out by hand, a slow float64 definition, and its limits."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import MASK_CASES, packed_randn, seeded

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import G2GNet
from g2gnet.inspect import (
    SpikeSums,
    analyze_network,
    chance_coherence,
    coherence,
    count_correlation,
    cross_group_share,
    firing_rates,
    group_density,
    group_means,
    input_group_entropy,
    temporal_synchrony,
)
from g2gnet.inspect.spike_statistics import pearson

T, B, N, C = 11, 40, 13, 4
LAYOUTS = {
    "index": GroupLayout(N, 3),
    "interleaved": GroupLayout(N, 3, "interleaved"),
    "random": GroupLayout(N, 5, "random", seeded(1)),
    "one group": GroupLayout(N, 1),
}


def correlated_spikes(steps=T, samples=B, neurons=N, seed=0):
    """Spikes with tuning to the class, an onset, and a drive shared by neurons: all that has to be told apart."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, C, samples)
    tuning = draw.uniform(0.1, 0.5, (C, neurons))[labels]
    onset = 0.3 * np.exp(-np.arange(steps) / 3)[:, None, None] * draw.uniform(0, 1, neurons)
    shared = 0.3 * (draw.uniform(size=(steps, samples, 1)) < 0.3) * draw.uniform(0, 1, neurons)
    spikes = draw.uniform(size=(steps, samples, neurons)) < tuning + onset + shared
    spikes[..., 2] = False  # a silent neuron
    return spikes.astype(np.float64), labels


def sums_of(spikes, labels, layout):
    return SpikeSums.of(torch.from_numpy(spikes), torch.from_numpy(labels), C, layout)


def noise_by_loop(spikes, labels):
    """e_n(t, b): less the mean over steps, less the mean over the class at each step, plus the mean over both."""
    e = np.empty_like(spikes)
    for b in range(spikes.shape[1]):
        same = spikes[:, labels == labels[b]]
        e[:, b] = spikes[:, b] - spikes[:, b].mean(0) - same.mean(1) + same.mean((0, 1))
    return e


def pairs(layout, g, h):
    members = [np.flatnonzero(layout.group_of.numpy() == group) for group in (g, h)]
    return [(i, j) for i, j in itertools.product(*members) if i != j]


def test_firing_rates_and_correlations_by_hand():
    spikes = np.zeros((4, 2, 3))
    spikes[0, 0, 0] = spikes[1, 0, 0] = spikes[3, 1, 0] = 1  # 3 of 8
    spikes[:, :, 2] = 1
    layout = GroupLayout(3, 2)  # groups 0, 0, 1
    rates = firing_rates(sums_of(spikes, np.array([0, 1]), layout))
    assert rates.tolist() == [0.375, 0.0, 1.0]
    assert group_means(rates, layout).tolist() == [0.1875, 1.0]
    x = torch.tensor([1.0, 2.0, 4.0, math.nan])
    assert pearson(x, -2 * x) == pytest.approx(-1)
    assert pearson(x, torch.tensor([1.0, 5.0, 2.0, 7.0])) == pytest.approx(np.corrcoef([1, 2, 4], [1, 5, 2])[0, 1])
    assert math.isnan(pearson(x, torch.full((4,), 0.1)))
    assert math.isnan(pearson(x[:2], x[:2]))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_synchrony_equals_its_definition_over_pairs(layout):
    spikes, labels = correlated_spikes()
    e = noise_by_loop(spikes, labels)
    expected = []
    for g in range(layout.num_groups):
        members = layout.group_of.numpy() == g
        covariances = [(e[..., i] * e[..., j]).mean() for i, j in pairs(layout, g, g)]
        expected.append(np.mean(covariances) / np.mean(np.square(e[..., members])))
    actual = temporal_synchrony(sums_of(spikes, labels, layout))
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    assert actual.abs().max() > 0.01


@pytest.mark.parametrize(("layout", "steps"), list(zip(LAYOUTS.values(), (2, 3, 10, 11), strict=True)), ids=LAYOUTS)
def test_coherence_equals_its_definition_over_pairs(layout, steps):
    spikes, labels = correlated_spikes(steps)
    transform = np.fft.fft(noise_by_loop(spikes, labels), axis=0)[1:]
    power = np.square(np.abs(transform)).mean(1)  # [F, N]
    other = GroupLayout(N, 2, "interleaved")
    expected = np.empty((layout.num_groups, other.num_groups))
    for g, h in np.ndindex(*expected.shape):
        first, second = layout.group_of.numpy() == g, other.group_of.numpy() == h
        cross = transform[:, :, first, None] * transform[:, :, None, second].conj()
        shared = np.abs(cross.mean((1, 2, 3))).sum()
        expected[g, h] = shared / np.sqrt(power[:, first].mean(1).sum() * power[:, second].mean(1).sum())
    sums = [sums_of(spikes, labels, grouping) for grouping in (layout, other)]
    np.testing.assert_allclose(coherence(*sums), expected, rtol=1e-10)


@pytest.mark.parametrize("layout", [LAYOUTS["random"], LAYOUTS["one group"]], ids=["random", "one group"])
@pytest.mark.parametrize("part", ["total", "signal", "noise"])
def test_count_correlation_equals_its_definition_over_pairs(layout, part):
    spikes, labels = correlated_spikes()
    counts = spikes.sum(0)
    means = np.stack([counts[labels == c].mean(0) for c in range(C)])
    values = {"total": counts, "signal": means, "noise": counts - means[labels]}[part]
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(values, rowvar=False)
    r[2] = r[:, 2] = np.nan  # the silent neuron
    groups = range(layout.num_groups)
    expected = [[np.nanmean([r[i, j] for i, j in pairs(layout, g, h)]) for h in groups] for g in groups]
    actual = getattr(count_correlation(sums_of(spikes, labels, layout)), part)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_independent_neurons_are_none_of_this_whatever_their_rate(rate):
    draw, labels = np.random.default_rng(0), np.arange(300) % C
    sums, others = (
        sums_of((draw.uniform(size=(20, 300, layout.size)) < rate).astype(float), labels, layout)
        for layout in (GroupLayout(60, 3), GroupLayout(12, 2))
    )
    # three groups' mean over 190 pairs × 5700 independent products: standard error 1e-3
    assert temporal_synchrony(sums).abs().max() < 0.004
    matrices = count_correlation(sums)
    assert max(matrices.total.abs().max(), matrices.noise.abs().max()) < 0.02
    # ten frequencies: a mean of ten lengths, each with a standard deviation of half its mean
    torch.testing.assert_close(coherence(sums, others), chance_coherence(sums, others), rtol=0.35, atol=0)


@pytest.mark.parametrize(
    ("change", "defined"),
    [
        (lambda spikes, labels: (0 * spikes, labels), set()),
        (lambda spikes, labels: (0 * spikes + 1, labels), set()),
        (lambda spikes, labels: (spikes[:1], labels), {"total", "signal", "noise"}),
        (lambda spikes, labels: (spikes[:, :1], labels[:1]), set()),
        (lambda spikes, labels: (spikes[:, :C], np.arange(C)), {"total", "signal"}),
    ],
    ids=["silent", "always firing", "one step", "one sample", "one sample a class"],
)
def test_what_is_not_defined_is_nan(change, defined):
    sums = sums_of(*change(*correlated_spikes()), LAYOUTS["index"])
    assert temporal_synchrony(sums).isnan().all()
    assert coherence(sums, sums).isnan().all()
    matrices = count_correlation(sums)._asdict()
    assert {name for name, matrix in matrices.items() if not matrix.isnan().all()} == defined
    assert ((firing_rates(sums) >= 0) & (firing_rates(sums) <= 1)).all()


def test_a_group_of_one_neuron_has_no_pair_and_neurons_that_answer_every_class_alike_no_signal_correlation():
    spikes, labels = correlated_spikes()
    sums = sums_of(spikes[..., :5], labels, GroupLayout(5, 4))  # groups of 2, 1, 1, 1
    for found in (temporal_synchrony(sums), count_correlation(sums).total.diagonal()):
        assert found.isnan().tolist() == [False, True, True, True]
    spikes = np.zeros((T, 3 * 10, 2))
    spikes[0, ::10] = 1  # one spike in ten samples of each class: the mean of three times 0.1 is not 0.1 in binary
    matrices = count_correlation(sums_of(spikes, np.repeat(np.arange(3), 10), GroupLayout(2, 1)))
    assert matrices.signal.isnan().all()
    assert matrices.noise.item() == pytest.approx(1)


@pytest.mark.parametrize("case", MASK_CASES.values(), ids=MASK_CASES)
def test_wiring_equals_its_definition_on_the_dense_mask(case):
    mask = case.mask()
    values = packed_randn(mask, 0)
    dense, weight = mask.to_dense().double(), mask.unpack(values).abs().double()
    out_group, in_group = mask.rows.layout.group_of, mask.cols.layout.group_of
    groups = range(case.groups)
    density = [[dense[out_group == g][:, in_group == h].mean() for h in groups] for g in groups]
    torch.testing.assert_close(group_density(mask), torch.tensor(density, dtype=torch.float64))
    shares = [1 - dense[out_group == g][:, in_group == g].sum() / dense[out_group == g].sum() for g in groups]
    torch.testing.assert_close(cross_group_share(mask), torch.stack(shares))
    for strength, actual in ((dense, input_group_entropy(mask)), (weight, input_group_entropy(mask, values))):
        of_neurons = []
        for row in strength:
            d = np.array([row[in_group == h].mean() for h in groups])
            p = d[d > 0] / d.sum()
            of_neurons.append(-(p * np.log(p)).sum() / np.log(case.groups) if case.groups > 1 else math.nan)
        expected = [np.mean(np.array(of_neurons)[out_group == g]) for g in groups]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)  # |w| is summed in float32


def test_entropy_runs_from_one_source_to_all_alike():
    layout, inputs = GroupLayout(16, 4), GroupLayout(21, 4)  # inputs in groups of 6, 5, 5, 5
    separate = BlockMask.sample(layout, inputs, p_inter=0.0, block_size=2)
    assert input_group_entropy(separate).tolist() == cross_group_share(separate).tolist() == [0.0] * 4
    full = BlockMask.full(layout, inputs, block_size=2)
    torch.testing.assert_close(input_group_entropy(full), torch.ones(4, dtype=torch.float64))
    assert group_density(full).eq(1).all()
    for out_groups, in_groups in ((2, 8), (8, 2)):  # the more numerous ones have several of their own
        layouts = GroupLayout(16, out_groups), GroupLayout(16, in_groups)
        assert cross_group_share(BlockMask.sample(*layouts, p_inter=0.0, block_size=2)).tolist() == [0.0] * out_groups
        assert cross_group_share(BlockMask.full(*layouts)).tolist() == [0.5] * out_groups
    one_unit = BlockMask(GroupLayout(4, 2), GroupLayout(4, 2), torch.tensor([0]), torch.tensor([0]), 2)
    assert input_group_entropy(one_unit)[0] == 0
    for found in (input_group_entropy(one_unit), cross_group_share(one_unit)):
        assert found.isnan().tolist() == [False, True], "neurons without inputs have none"


def batches_of(net, samples=60, seed=0):
    x, labels = torch.rand(samples, 49, generator=seeded(seed)), torch.arange(samples) % 10
    for part in (slice(25), slice(25, samples)):
        inputs = net.encode(x[part], seeded(seed))
        yield inputs, net.simulate(inputs), labels[part]


@pytest.mark.parametrize(("model", "enc"), [("random", "current"), ("mixer", "rate")])
def test_a_network_is_analysed_layer_by_layer(model, enc):
    net = G2GNet(49, 64, 10, model, 0.3, 4, T=12, enc=enc, enc_scale=3.0, generator=seeded(0))
    batches = list(batches_of(net))
    analysis = analyze_network(net, batches, 10)
    assert (analysis.samples, analysis.steps) == (60, 12)
    spikes = [torch.cat([activity.spikes[number].dense() for _, activity, _ in batches], 1) for number in range(3)]
    labels = torch.arange(60) % 10
    for layer, of_layer, (connection, _) in zip(analysis.layers, spikes, net.layers(), strict=True):
        sums = SpikeSums.of(of_layer, labels, 10, connection.mask.rows.layout)
        torch.testing.assert_close(layer.synchrony, temporal_synchrony(sums), equal_nan=True)
        assert layer.firing_rate == pytest.approx(of_layer.mean().item())
        assert torch.equal(layer.density, group_density(connection.mask))
        assert layer.coherence.diagonal().isnan().all()
    # inputs are grouped as the input side of the connection says, also where that is not how they were made
    first, second = analysis.layers[:2]
    sides = net.fc2.mask.rows.layout, net.fc2.mask.cols.layout
    post, pre = (SpikeSums.of(each, labels, 10, side) for each, side in zip(spikes[1::-1], sides, strict=True))
    torch.testing.assert_close(second.pathway_coherence, coherence(post, pre), equal_nan=True)
    assert (first.pathway_coherence is None) == (enc == "current")
    assert math.isnan(first.coherence_by_pathway) == (enc == "current")
    other = ~torch.eye(8, dtype=torch.bool)
    by_pathway = np.corrcoef(second.pathway_coherence[other], second.density[other])
    by_share = np.corrcoef(second.coherence.nanmean(1), second.cross_group_share)
    found = second.coherence_by_pathway, second.coherence_by_share
    assert found == pytest.approx((by_pathway[0, 1], by_share[0, 1]))
    everything = torch.cat([each.mean((0, 1)) for each in spikes])
    assert analysis.firing_rate == pytest.approx(everything.mean().item())
    assert analysis.accuracy == pytest.approx((spikes[2].sum(0).argmax(1) == labels).float().mean().item())
    assert json.loads(json.dumps(analysis.as_dict(), allow_nan=False)) == analysis.as_dict()
    in_chunks = [(inputs, net.simulate(inputs, chunk=5), labels) for inputs, _, labels in batches]
    assert analyze_network(net, in_chunks, 10).as_dict() == analysis.as_dict()


def test_a_network_of_two_classes_is_analysed_by_the_groups_that_each_of_them_hears_and_a_dense_one_by_none():
    net = G2GNet(49, 64, 2, "index", 0.3, 4, T=12, enc="rate", enc_scale=3.0, threshold=0.1, generator=seeded(0))
    analysis = analyze_network(net, ((x, activity, labels % 2) for x, activity, labels in batches_of(net)), 2)
    readout = analysis.layers[2]
    assert readout.density.shape == readout.pathway_coherence.shape == (2, 8)
    other = np.repeat([[False, True], [True, False]], 4, axis=1)
    expected = np.corrcoef(readout.pathway_coherence.numpy()[other], readout.density.numpy()[other])[0, 1]
    assert readout.coherence_by_pathway == pytest.approx(expected)
    assert json.loads(json.dumps(analysis.as_dict(), allow_nan=False)) == analysis.as_dict()
    net = G2GNet(49, 64, 10, "dense", T=12, enc_scale=3.0, generator=seeded(0))
    layer = analyze_network(net, batches_of(net), 10).layers[1]
    assert layer.synchrony.isfinite().all()
    assert layer.correlation.noise.isfinite().all()
    shown = layer.as_dict()
    assert shown["cross_group_coherence"] == shown["input_entropy"] == shown["weight_entropy"] == [None]
    assert shown["coherence_by_share"] is shown["coherence_by_pathway"] is None
    assert shown["cross_group_share"] == [0.0]
