"""Cross-validation: its folds, what it trains, prints and writes, and how it goes on."""

import contextlib
import dataclasses
import io
import json
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from training_runs import assert_equal, flags_of

import crossval
from g2gnet.data import load_dataset
from g2gnet.programs import analyze
from g2gnet.training import Machine, SettingsError, Trainer, TrainSettings, read_run, run_training
from g2gnet.training.cross_validation import FoldSettings, stratified_folds

NETWORK = {"dataset": "fashionmnist-mini", "model": "mixer", "hidden_dim": 64, "block_size": 8, "T": 5, "enc_scale": 3}
FLAGS = [*flags_of(NETWORK), *shlex.split("--limit_train 150 --limit_test 60 --epochs 2 --k_folds 3")]
STEM = "fashionmnist-mini_mixer_p0.15_T5_current"


def load(directory, fold):
    return torch.load(directory / f"{STEM}_fold{fold}of3.pth", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert crossval.main([*FLAGS, "--checkpoint_dir", str(folder)]) == 0
    return folder, printed.getvalue().splitlines()


@pytest.mark.parametrize("k_folds", [2, 5])
def test_folds_are_shuffled_disjoint_and_have_equal_shares_of_each_class(k_folds):
    labels = torch.randint(4, (103,), generator=torch.Generator().manual_seed(0))
    folds = stratified_folds(labels, k_folds, seed=1)
    assert len(folds) == k_folds
    assert torch.cat([val for _, val in folds]).sort().values.tolist() == list(range(103))
    for train, val in folds:
        assert torch.cat([train, val]).sort().values.tolist() == list(range(103))
        for members, whole in zip(labels[val].bincount(minlength=4), labels.bincount(), strict=True):
            assert abs(members - whole / k_folds) < 1
        assert val.tolist() != list(range(int(val[0]), int(val[0]) + len(val)))
    assert_equal(folds, stratified_folds(labels, k_folds, seed=1))
    assert not torch.equal(folds[0][1], stratified_folds(labels, k_folds, seed=2**33)[0][1])
    few = torch.tensor([0] * 9 + [2] * 3)
    with pytest.raises(SettingsError, match=r"k_folds=4 .*: class 2 has only 3 of the 12 training images; give fewer"):
        stratified_folds(few, 4, seed=0)
    assert len(stratified_folds(few, 3, seed=0)) == 3


def test_each_fold_is_a_training_run_without_its_part(whole, tmp_path):
    data = load_dataset("fashionmnist-mini").limited(150, 60)
    for fold, (train, val) in enumerate(stratified_folds(data.train_labels, 3, 42), 1):
        # the same with what train.py has: its test images are the held-back part here, but for one fold
        part = dataclasses.replace(data, train_images=data.train_images[train], train_labels=data.train_labels[train])
        if fold != 2:
            part = dataclasses.replace(part, test_images=data.train_images[val], test_labels=data.train_labels[val])
        settings = TrainSettings(**NETWORK, epochs=2, seed=42 + fold - 1)
        record = run_training(settings, lambda part=part: part, tmp_path / str(fold), Machine(torch.device("cpu")))
        checkpoint = load(whole[0], fold)
        last, expected = checkpoint["history"][-1], tmp_path / str(fold) / f"{settings.stem}.pth"
        assert last["test_acc" if fold == 2 else "val_acc"] == record["test_acc"]
        assert_equal(checkpoint["model"], torch.load(expected, weights_only=True)["model"])


def test_the_results_are_printed_and_written(whole, tmp_path, capsys):
    folder, lines = whole
    assert "k_folds=3" in lines[0]
    assert "fold=" not in lines[0].replace("k_folds=", "")
    histories = [load(folder, fold)["history"] for fold in (1, 2, 3)]
    results = json.loads((folder / f"{STEM}_3folds.json").read_text())
    starts = [
        f"Fold {fold}/3, seed {41 + fold} | Epoch {epoch:02d} | train_acc=" for fold in (1, 2, 3) for epoch in (1, 2)
    ]
    assert all(line.startswith(start) for line, start in zip(lines[1:7], starts, strict=True))
    expected = ["| fold | seed | train_acc | val_acc | test_acc |", "| --- | --- | --- | --- | --- |"]
    columns = {name: [history[-1][name] for history in histories] for name in ("train_acc", "val_acc", "test_acc")}
    for fold in range(3):
        cells = " | ".join(f"{values[fold]:.4f}" for values in columns.values())
        expected.append(f"| {fold + 1} | {42 + fold} | {cells} |")
    for name, function in (("mean", statistics.mean), ("std", statistics.stdev)):
        expected.append(f"| {name} |  | {' | '.join(f'{function(values):.4f}' for values in columns.values())} |")
        assert results[name] == {accuracy: function(values) for accuracy, values in columns.items()}
    assert lines[7:] == [*expected, f"wrote {folder / f'{STEM}_3folds.json'}"]
    assert [fold["test_acc"] for fold in results["folds"]] == columns["test_acc"]
    given = {**NETWORK, "limit_train": 150, "limit_test": 60, "epochs": 2, "k_folds": 3}
    assert results["settings"] == {**FoldSettings().flag_values(), **given}
    # a finished cross-validation is not trained again, and shows the same table; with --json it tells its files
    assert crossval.main([*FLAGS, "--checkpoint_dir", str(folder), "--json"]) == 0
    document, again = capsys.readouterr()
    assert again.count("is finished") == 3
    assert "Epoch" not in again
    assert again.splitlines()[-8:] == lines[-8:]
    told = json.loads(document)
    assert told.items() >= results.items()
    assert told["files"]["results"] == f"{folder}/{STEM}_3folds.json"
    for fold, (files, history) in enumerate(zip(told["files"]["folds"], histories, strict=True), 1):
        assert files["checkpoint"] == f"{folder}/{STEM}_fold{fold}of3.pth"
        assert json.loads(Path(files["history"]).read_text().splitlines()[-1]) == history[-1]
    # a fold is a run, too
    run = read_run(files["checkpoint"])
    assert (run.settings.fold, run.settings.k_folds) == (3, 3)
    assert analyze.main([files["checkpoint"], "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["accuracy"] == run.history[-1]["test_acc"]
    second = FoldSettings(seed=7).of_fold(2)
    assert (second.seed, second.stem) == (8, f"{TrainSettings(seed=7).stem}_fold2of5")


def test_an_interrupted_cross_validation_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    def lines_of(place, status=0):
        variant = ["--sparsity_mode", "dynamic", "--dst_interval", "2", "--enc", "rate"]
        assert crossval.main([*FLAGS, *variant, "--checkpoint_dir", str(tmp_path / place)]) == status
        return capsys.readouterr().out.splitlines()

    def stop_in_fold_two(self, on_step=None, train_epoch=Trainer.train_epoch):
        if self.settings.fold == 2 and self.epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(self, on_step)

    whole = lines_of("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", stop_in_fold_two)
        lines_of("parts", 130)
    assert len(list((tmp_path / "parts").glob("*.DONE"))) == 1
    parts = lines_of("parts")
    assert "is finished" in parts[1]
    assert "resuming" in parts[2]
    assert whole[-8:-1] == parts[-8:-1]
    for path in (tmp_path / "whole").glob("*.pth"):
        assert_equal(*(torch.load(tmp_path / name / path.name, weights_only=True) for name in ("whole", "parts")))
