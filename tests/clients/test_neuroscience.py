"""The pages for neuroscientists with what they need: Brian2, and the worm's connectome.

``PYTHONPATH=.:tests python tests/clients/test_neuroscience.py`` records Brian2's spikes for tests without it.
"""

import re

import matplotlib
import numpy as np
import pandas
import pytest
import torch
from code_blocks import ROOT, run_blocks

from examples import fly_trials
from g2g_kernels.cpu import library
from g2gnet import CubaLIF, Projection, SpikingNetwork

RECORDED = ROOT / "tests" / "brian2_spikes.npz"


def with_brian2():
    """The names that docs/brian2.md defines, its code for Brian2 included."""
    names = {}
    for code in re.findall(r"^```py(?:thon)?\n(.*?)^```", (ROOT / "docs" / "brian2.md").read_text(), re.S | re.M):
        exec(code, names)
    return names


def test_brian2_and_g2g_have_the_same_spikes():
    names = with_brian2()
    with np.load(RECORDED) as recorded:
        for reset in ("subtract", "zero"):
            theirs = names["in_brian2"](reset)
            np.testing.assert_array_equal(theirs, recorded[reset])
            np.testing.assert_array_equal(theirs, names["in_g2g"](reset))
        theirs = names["current_based_in_brian2"]()
        np.testing.assert_array_equal(theirs, recorded["current_based"])
        np.testing.assert_array_equal(theirs, names["current_based_in_g2g"]())


@pytest.mark.parametrize("seed", [0, 1])
def test_networks_by_events_have_the_spikes_of_brian2(seed, monkeypatch):
    """Random networks with delays, inhibition, inputs onto the membrane and a refractory period, in float64."""
    import brian2
    from brian2 import ms, mV

    draw, size, inputs, steps = np.random.default_rng(seed), 300, 20, 2000
    pairs = np.unique(draw.integers(0, size * size, 9000))
    pre, post = pairs // size, pairs % size
    sign = np.where(draw.random(size) < 0.3, -1, 1)[pre]
    weights = 0.55 * sign * draw.geometric(0.3, len(pre))
    given = draw.random((steps, inputs)) < 0.015
    period = np.where(np.arange(size) < inputs, 0, 2.2)

    brian2.start_scope()
    brian2.prefs.codegen.target = "numpy"
    brian2.defaultclock.dt = 0.1 * ms
    cells = brian2.NeuronGroup(
        size,
        """dv/dt = (g - v) / (20 * ms) : volt (unless refractory)
        dg/dt = -g / (5 * ms) : volt (unless refractory)
        period : second""",
        method="linear", threshold="v > 7 * mV", reset="v = 0 * mV; g = 0 * mV", refractory="period",
    )  # fmt: skip
    cells.period = period * ms
    joined = brian2.Synapses(cells, cells, "weight : volt", on_pre="g += weight", delay=1.8 * ms)
    joined.connect(i=pre, j=post)
    joined.weight = weights * mV
    step, source = given.nonzero()
    cue = brian2.SpikeGeneratorGroup(inputs, source, step * 0.1 * ms)
    driven = brian2.Synapses(cue, cells, on_pre="v += 68.75 * mV")
    driven.connect(j="i")
    monitor = brian2.SpikeMonitor(cells)
    brian2.Network(cells, joined, cue, driven, monitor).run(steps * 0.1 * ms)
    theirs = np.stack([np.rint(monitor.t / (0.1 * ms)).astype(int), monitor.i], 1)
    theirs = theirs[np.lexsort((theirs[:, 1], theirs[:, 0]))]

    monkeypatch.setattr(library, "LIST_COST", 0.0)
    own = Projection.from_edges("cells", "cells", pre, post, weights, 18, sizes=(size, size))
    each = np.arange(inputs)
    cue = Projection.from_edges("input", "cells", each, each, 68.75, 0, sizes=(inputs, size), onto="membrane")
    period = torch.from_numpy(np.rint(period / 0.1))
    neurons = CubaLIF(size, threshold=7.0, refractory=period, reset_current=True)
    net = SpikingNetwork({"cells": neurons}, [*cue, *own], "cells").double()
    x = torch.from_numpy(given.astype(float))[:, None]
    with torch.no_grad():
        neurons.beta.fill_(np.exp(-0.1 / 20))
        neurons.syn_decay.fill_(np.exp(-0.1 / 5))
        net.cells_to_cells.values.copy_(torch.from_numpy(weights)[np.lexsort((pre, post))][:, None, None])
        for engine in ("all", "reached", ""):
            monkeypatch.setenv("G2G_CPU_NEURONS", engine)
            assert net.explain(x).way.name == "cpu events"
            np.testing.assert_array_equal(net.simulate(x).spikes["cells"].events()[:, [0, 2]], theirs)
    assert len(set(theirs[:, 1])) > inputs


def test_the_page_on_connectomes_trains_the_worm():
    matplotlib.use("Agg")
    assert run_blocks(ROOT / "docs" / "connectome.md")["after"] > 0.95


def test_trials_of_the_fly_have_the_spikes_of_a_float64_loop(tmp_path, monkeypatch, capsys):
    """The files have the columns and types of the published ones."""
    monkeypatch.chdir(tmp_path)
    draw, count = np.random.default_rng(0), 150
    ids = 720575940596125868 + draw.choice(10**9, count, replace=False)
    pandas.DataFrame({"Completed": True}, ids).to_csv("Completeness_783.csv")
    pre, post = draw.integers(0, count, (2, 3000))
    synapses, sign = draw.integers(5, 40, 3000), np.where(draw.random(count) < 0.3, -1, 1)[pre]
    ends = {"Presynaptic_ID": ids[pre], "Postsynaptic_ID": ids[post]}
    ends |= {"Presynaptic_Index": pre, "Postsynaptic_Index": post}
    strength = {"Connectivity": synapses, "Excitatory": sign, "Excitatory x Connectivity": synapses * sign}
    pandas.DataFrame(ends | strength).to_parquet("Connectivity_783.parquet", compression="brotli")
    excited, silent, steps = [3, 7, 11, 20], [5], 400

    torch.manual_seed(0)
    files, chosen = ["Completeness_783.csv", "Connectivity_783.parquet"], ["--excite", *map(str, ids[excited])]
    fly_trials.main([*files, *chosen, "--silence", str(ids[5]), "--trials", "2", "--seconds", "0.04"])
    found = pandas.read_parquet("spikes.parquet")

    torch.manual_seed(0)
    x = (torch.rand(steps, 2, 4) < 0.015).numpy()
    v, g, until = np.zeros((2, count)), np.zeros((2, count)), np.zeros((2, count))
    weights, sent = np.zeros((count, count)), np.zeros((steps, 2, count))
    np.add.at(weights, (post, pre), 0.275 * synapses * sign)
    leak, decay = np.exp(-0.1 / 20), np.exp(-0.1 / 5)
    gain = (leak - decay) * np.log(leak) / (np.log(decay) - np.log(leak))
    period = np.where(np.isin(np.arange(count), excited), 0, 22)
    for t in range(steps):
        ready = until <= t
        v, g = np.where(ready, leak * v + gain * g, v), np.where(ready, decay * g, g)
        fires = ready & (v > 7)
        takes = ready & ~fires
        g = np.where(takes, g + (sent[t - 18] @ weights.T if t >= 18 else 0), g)
        v[:, excited] += takes[:, excited] * x[t] * 250 * 0.275
        v, g, until = np.where(fires, 0, v), np.where(fires, 0, g), np.where(fires, t + np.maximum(period, 1), until)
        sent[t] = fires
        sent[t][:, silent], v[:, silent], g[:, silent] = 0, 0, 0
    step, trial, neuron = sent.nonzero()
    assert len(step) > 50
    assert len({*neuron} - {*excited}) > 5
    np.testing.assert_array_equal(found.trial, trial)
    np.testing.assert_array_equal(found.flywire_id, ids[neuron])
    np.testing.assert_allclose(found.t, step * 1e-4)
    for wrong, why in (
        (["nothing.csv", files[1], *chosen], "nothing.csv is no file"),
        ([*files[::-1], *chosen], "no network of Connectivity_783.parquet and Completeness_783.csv: "),
        ([*files, *chosen, "--silence", "7"], "Completeness_783.csv has no neuron 7"),
        ([*files, *chosen, "--out", "nowhere/spikes.parquet"], "--out a file in an existing folder"),
    ):
        with pytest.raises(SystemExit):
            fly_trials.main(wrong)
        assert why in capsys.readouterr().err.splitlines()[-1]


if __name__ == "__main__":
    names = with_brian2()
    spikes = {reset: names["in_brian2"](reset) for reset in ("subtract", "zero")}
    spikes["current_based"] = names["current_based_in_brian2"]()
    np.savez_compressed(RECORDED, **{name: each.astype(np.uint16) for name, each in spikes.items()})
