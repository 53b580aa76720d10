"""Held-out training images: which they are, what they decide, and that the test images are used once, at the end."""

import json
import signal
from unittest.mock import Mock

import pytest
import torch
from training_runs import SMALL, assert_equal, load, run, small_trainer

from g2gnet.base.seeding import stream
from g2gnet.data import as_samples, load_dataset
from g2gnet.training import CheckpointError, Interrupted, SettingsError, Trainer, read_run
from g2gnet.training.checkpoints import RunFiles
from g2gnet.training.held_out import best_of, held_out

QUARTER = {"validation": 0.25}


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.999])
def test_of_each_class_its_share_is_held_out_and_never_none_or_all(share):
    counts = [2, 3, 40, 0, 101]
    labels = torch.arange(5).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    index = held_out(labels, share, seed=1)
    assert index.tolist() == sorted(set(index.tolist()))
    expected = [min(max(1, round(share * count)), count - 1) if count else 0 for count in counts]
    assert labels[index].bincount(minlength=5).tolist() == expected
    assert torch.equal(index, held_out(labels, share, seed=1))
    assert not torch.equal(held_out(labels, 0.5, seed=1), held_out(labels, 0.5, seed=2))
    with pytest.raises(SettingsError, match=rf"validation={share} cannot hold out and keep an image of class 1, which"):
        held_out(torch.tensor([0, 0, 1, 2, 2]), share, seed=0)


def test_what_is_held_out_trains_nothing_and_standardizes_nothing():
    data = load_dataset(SMALL["dataset"]).limited(200, 100)
    trainer = small_trainer(**QUARTER, standardize=True, seed=5)
    index = held_out(data.train_labels, 0.25, seed=0)  # whatever the seed of the run
    assert torch.equal(trainer.held_out, index)
    assert trainer.fingerprint == data.fingerprint, "the data are those of a run that holds none out"
    rest = [number for number in range(200) if number not in index.tolist()]
    for found, expected in (
        (trainer.data.val_images, data.train_images[index]),
        (trainer.data.train_images, data.train_images[rest]),
        (trainer.data.train_labels, data.train_labels[rest]),
    ):
        assert torch.equal(found, expected)
    samples = as_samples(data.train_images[rest]).double()
    assert trainer.net.input_mean.item() == pytest.approx(samples.mean().item(), rel=1e-6)
    seen, encode = [], trainer.net.encode
    trainer.net.encode = lambda x, *rest: seen.append(x) or encode(x, *rest)
    trainer.train_epoch()
    order = torch.randperm(len(rest), generator=stream(5, "order", 1))
    assert torch.equal(torch.cat(seen), as_samples(data.train_images[torch.cat([torch.tensor(rest)[order], index])]))


def scripted(monkeypatch, accuracies):
    """Has the epochs reach these accuracies on held-out images; returns a list of the parts that are tested."""
    parts, evaluate = [], Trainer._evaluate

    def scripted_evaluate(self, net, epoch, part):
        parts.append(part)
        result = evaluate(self, net, epoch, part)
        return result._replace(accuracy=accuracies[epoch - 1]) if part == "val" else result

    monkeypatch.setattr(Trainer, "_evaluate", scripted_evaluate)
    return parts


def accuracy_of(checkpoint):
    saved, data = read_run(checkpoint), load_dataset(SMALL["dataset"]).limited(None, 100)
    with torch.no_grad():
        found = saved.network().eval()(as_samples(data.test_images)).argmax(1)
    return (found == data.test_labels).double().mean().item()


def test_the_best_epoch_is_kept_patience_ends_the_run_and_the_end_is_tested(tmp_path, monkeypatch, capsys):
    parts = scripted(monkeypatch, [0.5, 0.7, 0.7, 0.6, 0.9])
    options = {**QUARTER, "patience": 2, "epochs": 5, "sparsity_mode": "dynamic", "dst_interval": 2}
    files = run(tmp_path, **options)
    assert parts == ["val"] * 4 + ["test"] * 2
    records = [json.loads(line) for line in files.history.read_text().splitlines()]
    assert [record["val_acc"] for record in records] == [0.5, 0.7, 0.7, 0.6]
    assert all("test_acc" not in record for record in records)
    assert best_of(records)["epoch"] == 2  # the first of equal ones
    last, best = read_run(files.checkpoint), read_run(files.best)
    assert (last.epoch, best.epoch, best.step) == (4, 2, 2 * 3)
    assert best.history == records[:2]
    tested = {"epoch": 2, "val_acc": 0.7, "test_acc": accuracy_of(files.best)}
    assert last.tested == {"test_acc": accuracy_of(files.checkpoint), "best": tested}
    assert last.tested["test_acc"] != tested["test_acc"]
    assert json.loads(files.marker.read_text())["result"] == last.result == {**records[-1], **last.tested}
    assert best.tested == {"test_acc": tested["test_acc"], "best": tested}
    assert json.loads(files.analysis.read_text())["accuracy"] == pytest.approx(tested["test_acc"])
    printed = capsys.readouterr().out
    assert "ended after epoch 4: no later epoch was better than epoch 2 (val_acc=0.7000)\n" in printed
    said = f"test_acc={last.tested['test_acc']:.4f}; best epoch 2: val_acc=0.7000, test_acc={tested['test_acc']:.4f}"
    assert f"Test | {said}\n" in printed
    run(tmp_path, **options)  # it is finished, though there could be more epochs
    assert f"is finished: {said}. To run it again, delete {files.checkpoint}, {files.best}" in capsys.readouterr().out
    assert len(parts) == 6


def test_of_a_network_that_is_pruned_only_epochs_with_the_fewest_units_can_be_the_best(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.8, 0.5, 0.6])
    pruned = {"sparsity_mode": "dynamic", "dst_interval": 2, "dst_stop": 0.75, "final_density": 0.2}
    files = run(tmp_path, **QUARTER, **pruned, model="dense", epochs=4, patience=1)
    assert read_run(files.checkpoint).epoch == read_run(files.best).epoch == 4


@pytest.mark.ci
def test_stopped_before_or_after_either_file_of_the_best_epoch_the_run_ends_the_same(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.5, 0.5])
    options = {**QUARTER, "patience": 2, "sparsity_mode": "dynamic", "dst_interval": 2, "lr_schedule": "cosine"}
    whole = run(tmp_path / "whole", **options)
    assert read_run(whole.best).epoch == 1

    def signalled(self, index, step=Trainer._train_step):
        result = step(self, index)
        if self.step == 4:  # the first of epoch 2
            signal.raise_signal(signal.SIGTERM)
        return result

    killed = Mock(side_effect=KeyboardInterrupt)
    stops = [(RunFiles, "save_best", killed), (RunFiles, "save_checkpoint", killed), (Trainer, "test", killed)]
    for owner, name, stop in [*stops, (Trainer, "_train_step", signalled)]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                run(tmp_path / name, **options)
        parts = run(tmp_path / name, **options)
        assert_equal(load(parts), load(whole))
        assert_equal(*(torch.load(files.best, weights_only=True) for files in (parts, whole)))


def test_a_best_network_that_is_gone_or_another_ones_is_named(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.7, 0.6] * 5)
    files = run(tmp_path, **QUARTER)
    first = files.best.read_bytes()
    for content, message in ((b"", "cannot be read"), (files.checkpoint.read_bytes(), "is not that of epoch 2")):
        files.marker.unlink(missing_ok=True)
        files.best.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{files.best} {message}.* Restore that file, or delete"):
            run(tmp_path, **QUARTER)
    other = run(tmp_path / "other", **QUARTER, validation_seed=1)
    files.best.write_bytes(other.best.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{files.best} belongs to a run with different settings") as error:
        run(tmp_path, **QUARTER)
    assert str(error.value).count("delete") == 1, "one remedy"
    files.best.write_bytes(first)
    run(tmp_path, **QUARTER)
    assert files.marker.exists()


def test_a_run_goes_on_with_the_same_images_only(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **QUARTER)
    with pytest.raises(CheckpointError, match=r"validation: 0\.25 there, 0\.3 now"):
        run(tmp_path, validation=0.3)
    with monkeypatch.context() as patch:
        patch.setattr("g2gnet.training.epochs.held_out", lambda labels, share, seed: held_out(labels, share, seed + 1))
        with pytest.raises(CheckpointError, match="it holds out other training images than those of its"):
            run(tmp_path, **QUARTER)
    files = run(tmp_path, **QUARTER)
    assert load(files)["tested"]["test_acc"] == accuracy_of(files.checkpoint)
