"""What reads a checkpoint: ``g2gnet.load``, and ``g2g-analyze``, which says what the finished run said."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from small_data import publish_resnet, write_cifar, write_own, write_resnet
from tiny_checkpoints import VARIANTS, replaced, rewrite, train_tiny
from training_runs import assert_equal

import g2gnet
import train
from g2gnet.base.seeding import stream
from g2gnet.base.tensor_files import read_tensors
from g2gnet.data import as_samples, load_dataset, npz
from g2gnet.inspect import analyze_network, layers_table
from g2gnet.programs import analyze
from g2gnet.training import CheckpointError, read_run
from g2gnet.training.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("mixer"), "--model mixer --standardize --neuron synaptic")


def test_a_loaded_network_classifies_as_the_run_did(checkpoint):
    net, data = g2gnet.load(checkpoint), load_dataset("fashionmnist-mini").limited(None, 100)
    assert not net.training
    with torch.no_grad():
        found = net(as_samples(data.test_images)).argmax(1)
    accuracy = (found == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(read_run(checkpoint).history[-1]["test_acc"])
    # whatever the defaults of PyTorch are
    with torch.device("meta"):
        on_meta = g2gnet.load(checkpoint)
    torch.set_default_dtype(torch.float64)
    try:
        in_float64 = g2gnet.load(checkpoint)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (on_meta, in_float64):
        assert_equal(dict(other.state_dict()), dict(net.state_dict()))


def test_what_cannot_be_loaded_is_refused(checkpoint, tmp_path):
    for options, message in (
        ({"device": "gpu"}, "device='gpu' is unknown; give auto, cpu"),  # before the file is read
        ({"backend": "fast"}, "backend='fast' is not a backend; choose one of auto"),
        ({}, r"nowhere.pth cannot be read \(No such file or directory\)"),
    ):
        with pytest.raises(ValueError if options else CheckpointError, match=message):
            g2gnet.load(tmp_path / "nowhere.pth", **options)
    content = replaced(read_tensors(checkpoint), "model/input_deviation", torch.zeros(()))
    with pytest.raises(CheckpointError, match=r"input_deviation is not above 0"):
        g2gnet.load(rewrite(checkpoint, tmp_path / "c.pth", **content))


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_the_analysis_of_a_checkpoint_is_that_of_the_finished_run(tmp_path, capsys, flags):
    checkpoint = train_tiny(tmp_path, flags)
    of_run = capsys.readouterr().out
    after_training = json.loads(checkpoint.with_suffix(".analysis.json").read_text())
    assert analyze.main([str(checkpoint), "--json", str(tmp_path / "again.json")]) == 0
    printed = capsys.readouterr().out
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name: again[name] for name in after_training} == after_training
    run = read_run(checkpoint)
    assert again["settings"] == run.settings.as_dict()
    assert (again["epoch"], again["step"], again["interrupted"], again["samples"]) == (2, 8, False, 100)
    # the accuracy on all test images, which the last epoch's record has too
    assert again["accuracy"] == run.history[-1]["test_acc"]
    assert f"accuracy {again['accuracy']:.4f}" in of_run
    (row,) = [line.split() for line in of_run.splitlines() if line.startswith("lif2")]
    found = again["layers"]["lif2"]
    operations = f"{round(found['accumulates'] + found['multiplies']):,}"
    rate, silent = f"{found['firing_rate']:#.3g}", f"{100 * found['silent']:.1f}"
    assert row == ["lif2", str(found["neurons"]), rate, silent, "%", operations]
    assert "neurons  spikes per neuron and step  neurons that never fired  synaptic operations per image\n" in of_run
    assert all(f"{name} group" in printed for name in again["layers"])
    assert ("quantities between groups" in printed) == ("dense" in flags)


def test_fewer_samples_and_an_interrupted_run_are_analysed(checkpoint, tmp_path, capsys):
    inside = rewrite(checkpoint, tmp_path / "c.pth", epoch=0, history=[], step=3, progress={})
    assert analyze.main([str(inside), "--samples", "30", "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "mixer on fashionmnist-mini, inside epoch 1 of 2, after step 3 of the run\n" in printed
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["epoch"], written["step"], written["interrupted"]) == (0, 3, True)
    net, data = read_run(inside).network(), load_dataset("fashionmnist-mini")
    inputs = net.encode(as_samples(data.test_images[:30]), stream(42, "encode_test", 2, 0))
    expected = analyze_network(net, [(inputs, net.simulate(inputs), data.test_labels[:30])], 10)
    assert {name: written[name] for name in expected.as_dict()} == expected.as_dict()
    assert str(layers_table(expected)) in printed


def test_a_saved_run_has_the_network_before_and_after(tmp_path):
    flags = "--model index --recurrent --sparsity_mode dynamic --dst_interval 3 --dst_fraction 0.3"
    run = read_run(train_tiny(tmp_path, flags))
    before, after = run.initial_network(), run.network()
    there, then = after.fc2.mask.to_dense(), before.fc2.mask.to_dense()
    assert not torch.equal(then, there)
    first, last = run.history
    # in units of one size, the share of the weights that are still there is that of the units
    assert last["initial_units_kept"]["fc2"] == pytest.approx((then & there).sum().item() / then.sum().item())
    assert first["initial_units_kept"] == first["units_kept"]
    assert last["units_kept"]["fc2"] < 1
    masks = {name: connection.mask.to_dense() for name, connection in after.connections().items()}
    assert "rec2" in masks
    assert_equal({name: mask.to_dense() for name, mask in run.masks().items()}, masks)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("settings/model", "<script>", "model='<script>' is unknown"),
        ("settings/tempo", 1, "the setting tempo is unknown; a later version of g2g may"),
        ("settings/T", 5.5, "T=5.5 must be a whole number"),
        ("history", [{"epoch": 1}], "lacks train_loss"),
        ("history/0/test_acc", "<b>", "test_acc=.<b>. is not a number of at least 0"),
        ("tested", [0.9], "tested is a list"),
        ("tested", {"test_acc": 0.9}, "tested lacks best"),
        ("tested", {"test_acc": "<b>", "best": {"epoch": 1, "val_acc": 1, "test_acc": 1}}, "test_acc"),
        ("settings/validation", 0.25, "val_acc"),
        ("epoch", -1, "epoch=-1 is not a whole number of at least 0"),
        ("step", -1, "step=-1 is not a whole number"),
        ("model/fc1.bias", torch.zeros(3), "fc1.bias"),
    ],
)
def test_numbers_of_a_checkpoint_are_checked_before_they_are_used(checkpoint, tmp_path, name, value, message):
    state = read_checkpoint(checkpoint)
    if name == "history/0/test_acc":
        name, value = "history", [{**state["history"][0], "test_acc": value}]
    with pytest.raises(CheckpointError, match=message):
        read_run(rewrite(checkpoint, tmp_path / "c.pth", **replaced(state, name, value)))


def test_the_directory_of_data_of_ones_own_is_asked_for(tmp_path, capsys, caplog, monkeypatch):
    checkpoint = train_tiny(tmp_path, f"--dataset {write_own(tmp_path / 'mine.npz', 20)}")
    assert "samples, [D] = [20]," in caplog.text
    monkeypatch.setattr(npz, "_paths", {})  # as in another process
    assert analyze.main([str(checkpoint)]) == 1
    assert "data/mine.npz cannot be read" in (error := capsys.readouterr().err)
    assert "; give the directory that has it as --data_dir" in error
    assert analyze.main([str(checkpoint), "--data_dir", str(tmp_path)]) == 0


def test_a_run_on_features_needs_the_weights_that_it_had(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cifar(monkeypatch, tmp_path / "data", "cifar10", train=50, test=20)
    publish_resnet(monkeypatch, tmp_path / "hub", "cifar10")
    write_resnet(tmp_path / "own.pt", "cifar10", seed=1)
    flags = "--dataset cifar10 --use_resnet --model index --hidden_dim 16 --T 3 --epochs 1 --resnet_weights own.pt"
    assert train.main(shlex.split(flags)) == 0
    (checkpoint,) = Path("checkpoints").glob("*.pth")
    assert analyze.main([str(checkpoint)]) == 2
    assert "give the file with the run's weights by --resnet_weights" in capsys.readouterr().err
    assert analyze.main([str(checkpoint), "--resnet_weights", "own.pt", "--json", "a.json"]) == 0
    after_training = json.loads(checkpoint.with_suffix(".analysis.json").read_text())
    assert json.loads(Path("a.json").read_text()).items() >= after_training.items()
