"""Programs on sequences: data of one's own, and images that unfold over time, from flags to reports."""

import glob
import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import OWN_LABELS, write_heidelberg, write_own

import crossval
import train
from g2gnet import load
from g2gnet.data import as_samples, load_dataset, npz
from g2gnet.programs import analyze
from g2gnet.programs.report import program as report
from g2gnet.programs.sweep import program as sweep
from g2gnet.sequences import input_order
from g2gnet.training import Trainer, read_run

SMALL = ["--hidden_dim", "16", "--batch_size", "20", "--block_size", "4", "--epochs", "1", "--model", "mixer"]


def trained(program, folder, *flags):
    arguments = [*SMALL, *flags, "--checkpoint_dir", folder, "--json", folder / "out.json"]
    assert program.main([str(argument) for argument in arguments]) == 0
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize(
    ("shape", "dtype", "flags", "sequence", "steps", "inputs"),
    [
        ((6, 5), np.float32, "", "own", 6, 5),
        ((6, 5), np.uint8, "--standardize", "own", 6, 5),
        ((6, 2, 3, 4), np.uint8, "", "own", 6, 24),
        ((6, 2, 3, 4), np.float32, "--augment flip --erase 0.5", "own", 6, 24),  # frames that are changed stay frames
        ((6, 5), np.float32, "--T 3 --sequence none", "none", 3, 30),
        ((6, 5), np.float32, "--T 3 --sequence none --augment flip --erase 0.5", "none", 3, 30),
        ((2, 6, 5), np.float32, "--sequence rows --sequence_step 2", "rows", 3, 20),
    ],
)
def test_shape_and_flags_say_what_samples_are(tmp_path, shape, dtype, flags, sequence, steps, inputs):
    data = write_own(tmp_path / "mine.npz", *shape, dtype=dtype)
    document = trained(train, tmp_path, "--dataset", data, *flags.split())
    settings, checkpoint = document["settings"], document["files"]["checkpoint"]
    assert (settings["T"], settings["sequence"]) == (steps, sequence)
    net = load(checkpoint)
    assert (net.T, net.fc1.in_features) == (steps, inputs)
    assert net.trained_on == (shape, "uint8" if dtype == np.uint8 else "floats")
    with np.load(data) as file:
        found = net.predict(file["test_images"], batch_size=7)
    assert float((found.classes == torch.from_numpy(OWN_LABELS[40:])).double().mean()) == document["result"]["test_acc"]
    samples = as_samples(load_dataset(settings["dataset"]).test_images)
    assert torch.equal(net(samples), found.logits)
    if sequence == "own" and not net.standardize:
        assert "_own_mixer_p0.15_T6_current" in checkpoint
        assert torch.equal(net.encode(samples), samples.view(20, 6, inputs).transpose(0, 1))
        layers = json.loads(Path(document["files"]["analysis"]).read_text())["layers"]
        assert layers["lif1"]["pathway_coherence"] is None  # its inputs are no spikes
        assert layers["lif2"]["pathway_coherence"] is not None


@pytest.mark.parametrize(
    "where", [pytest.param("waves", marks=pytest.mark.ci), pytest.param("data", marks=pytest.mark.long)]
)
def test_the_commands_that_programs_print_find_data_of_ones_own(tmp_path, monkeypatch, capsys, where):
    """Beside the program, and in a folder of its own; with held-out images they draw the best network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("g2gnet.programs.report.content.picture", lambda figure, caption: caption)
    Path(where).mkdir()
    data = write_own(Path(where, "my waves.npz"), 6, 5)
    monkeypatch.setattr(Trainer, "_evaluate", falling(Trainer._evaluate))
    monkeypatch.setattr("g2gnet.programs.sweep.engine.processes", lambda *_: ThreadPoolExecutor(1))
    flags = [*SMALL, "--dataset", str(data), "--epochs", "3", "--validation", "0.25"]
    assert train.main([*flags, "--json", "out.json"]) == 0
    assert sweep.main([*flags, "--seed", "1", "2"]) == 0
    printed = re.findall("(?:W|w)ith pictures: g2g-report (.*)", capsys.readouterr().out)
    assert len(printed) == 2
    document = json.loads(Path("out.json").read_text())
    npz._paths.clear()  # as in a process of their own
    for command in printed:
        assert ("--data_dir waves" in command) == (where == "waves")
        words = [word for given in shlex.split(command) for word in sorted(glob.glob(given)) or [given]]
        assert [word for word in words if word.endswith(".pth")] == [
            word for word in words if word.endswith(".best.pth")
        ]
        assert report.main(words) == 0
    best = shlex.split(printed[0])
    assert report.main(best) == 0
    assert analyze.main([*best, "--json", "again.json"]) == 0
    again = json.loads(Path("again.json").read_text())
    assert again["epoch"] == document["result"]["best"]["epoch"] == 1
    saved = json.loads(Path(document["files"]["analysis"]).read_text())
    assert {name: again[name] for name in saved} == saved
    assert f"{100 * document['result']['best']['test_acc']:.2f} % test" in Path("report.html").read_text()


def falling(evaluate):
    """The first epoch is the best on held-out images."""

    def scripted(self, net, epoch, part):
        result = evaluate(self, net, epoch, part)
        return result._replace(accuracy=0.9 - epoch / 10) if part == "val" else result

    return scripted


def test_the_checkpoint_has_the_order_of_permuted_pixels(tmp_path, monkeypatch):
    flags = ["--dataset", "fashionmnist-mini", "--limit_train", "60", "--limit_test", "40", "--enc", "rate"]
    flags += ["--sequence", "permuted", "--sequence_step", "98", "--sequence_seed", "5", "--chunk", "3"]
    checkpoint = trained(train, tmp_path, *flags)["files"]["checkpoint"]
    run, order = read_run(checkpoint), input_order("permuted", (28, 28), 98, 5)
    other = trained(train, tmp_path, *flags, "--seed", "7", "--name", "other")["files"]["checkpoint"]
    assert all(torch.equal(each.network().input_order.long(), order) for each in (run, read_run(other)))  # of any seed
    assert analyze.main([checkpoint, "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["accuracy"] == run.history[-1]["test_acc"]
    assert again["layers"]["lif1"]["pathway_coherence"] is not None  # its inputs are spikes
    monkeypatch.setattr("g2gnet.programs.report.content.picture", lambda figure, caption: caption)
    assert report.main([checkpoint, "--output", str(tmp_path / "report.html")]) == 0
    assert "fashionmnist-mini as sequences (permuted)" in (tmp_path / "report.html").read_text()


def test_recordings_are_trained_on_and_inspected_as_the_checkpoint_says(tmp_path, monkeypatch, capsys):
    pytest.importorskip("h5py")
    told = write_heidelberg(tmp_path / "data", "shd")
    times = np.concatenate([seconds for lists, *_ in told.values() for seconds in lists])
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "shd", "--bins", "70", "--dt", "20", "--T", "30", "--unit_shift", "4", "--enc_scale", "0.5"]
    document = trained(train, tmp_path, *flags)
    settings, checkpoint = document["settings"], document["files"]["checkpoint"]
    assert [settings[name] for name in ("bins", "dt", "T", "sequence")] == [70, 20, 30, "own"]
    late = f"{(times >= 0.6).mean():.2%} of the events come after 30 × 20 ms and are left out"
    assert late in capsys.readouterr().out
    net, data = load(checkpoint), load_dataset("shd", bins=70, dt=20, steps=30)
    assert (net.T, net.fc1.in_features) == (30, 70)
    samples = as_samples(data.test_images)
    assert torch.equal(net.encode(samples), 0.5 * data.test_images.transpose(0, 1))
    assert analyze.main([checkpoint, "--json", "again.json"]) == 0
    found = (net(samples).argmax(1) == data.test_labels).double().mean().item()
    assert found == json.loads(Path("again.json").read_text())["accuracy"] == document["result"]["test_acc"]
    assert trained(train, tmp_path, *flags)["result"] == document["result"]  # it is finished
    assert train.main([*SMALL, *flags[:2], "--dt", "10", "--T", "30", "--checkpoint_dir", str(tmp_path)]) == 1
    assert "dt: 20.0 there, 10.0 now" in capsys.readouterr().err
    Path("data/shd_train.h5").unlink()
    assert analyze.main([checkpoint]) == 1
    assert "shd is not in data: neither data nor data/SHD has shd_train.h5" in capsys.readouterr().err


def test_recordings_with_a_part_for_validation_and_folds_of_them(tmp_path):
    pytest.importorskip("h5py")
    write_heidelberg(tmp_path, "ssc", classes=4, train=40, test=20)
    flags = ["--dataset", "ssc", "--T", "10", "--data_dir", tmp_path]
    assert 0 <= trained(train, tmp_path, *flags)["result"]["val_acc"] <= 1
    assert len(trained(crossval, tmp_path, *flags, "--k_folds", "2")["folds"]) == 2
