"""A run's history, what it tells TensorBoard and other loggers, and the examples of docs/other-libraries.md."""

import csv
import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from code_blocks import run_blocks
from helpers import ROOT, packed_randn, seeded
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from g2g_kernels import BlockMask, GroupLayout
from g2gnet.data import load_dataset
from g2gnet.inspect import group_density
from g2gnet.training import Machine, TrainSettings, run_training
from g2gnet.training.checkpoints import RunFiles
from g2gnet.training.tensorboard import TensorBoardLog

SMALL = {"dataset": "fashionmnist-mini", "model": "mixer", "hidden_dim": 32, "block_size": 4, "T": 4}
SMALL |= {"limit_train": 60, "limit_test": 20, "batch_size": 30}


def run(directory, on_epoch, **options):
    settings, machine = TrainSettings(**{**SMALL, **options}), Machine(torch.device("cpu"))
    return run_training(settings, lambda: load_dataset(settings.dataset), directory, machine, on_epoch=on_epoch)


def events_of(directory):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    return events.Reload()


def test_group_weights_are_the_mean_of_the_dense_matrix_between_groups():
    layouts = GroupLayout(13, 4, "random", seeded(0)), GroupLayout(22, 4, "interleaved")
    mask = BlockMask.sample(*layouts, block_size=2, generator=seeded(0))
    values = packed_randn(mask, 1)
    dense, (rows, cols) = mask.unpack(values).abs().double(), (layout.group_of for layout in layouts)
    expected = torch.stack([torch.stack([dense[rows == g][:, cols == h].mean() for h in range(4)]) for g in range(4)])
    torch.testing.assert_close(group_density(mask, values), expected)


def test_a_history_replaces_what_was_there_and_a_value_that_a_record_lacks_is_empty(tmp_path):
    files = RunFiles(tmp_path, "run")
    first, second = {"epoch": 1, "units": {"fc1": 3}}, {"epoch": 2, "units": {"fc1": 4}, "new": 0.5}
    files.write_history([])
    assert files.table.read_text() == files.history.read_text() == ""
    files.history.write_text('{"epoch": 1, "un')  # as a crash may leave it
    files.write_history([first, second])
    assert [json.loads(line) for line in files.history.read_text().splitlines()] == [first, second]
    assert files.table.read_text() == "epoch,units/fc1,new\n1,3,\n2,4,0.5\n"


def test_the_history_is_kept_as_lines_of_json_and_as_csv_and_given_to_callbacks_after_the_checkpoint(tmp_path):
    seen = []

    def callback(record, trainer):
        checkpoint = torch.load(tmp_path / f"{trainer.settings.stem}.pth", weights_only=True)
        assert checkpoint["history"][-1] == record
        seen.append((record["epoch"], trainer.epoch))

    result = run(tmp_path, [callback, callback], epochs=2, sparsity_mode="dynamic", dst_interval=2)
    assert seen == [(1, 1), (1, 1), (2, 2), (2, 2)]
    (lines,), (table,) = tmp_path.glob("*.jsonl"), tmp_path.glob("*.csv")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert result == records[-1]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for record, row in zip(records, rows, strict=True):
        assert float(row["firing_rate/lif2"]) == record["firing_rate"]["lif2"]
        assert int(row["units_pruned"]) == record["units_pruned"] > 0
        assert len(row) == sum(len(value) if isinstance(value, dict) else 1 for value in record.values())


def test_tensorboard_shows_the_record_the_weights_and_the_groups(tmp_path):
    seen, log = [], TensorBoardLog(tmp_path / "log")
    run(tmp_path / "checkpoints", [log, lambda *record_and_trainer: seen.append(record_and_trainer)], epochs=2)
    records, (*_, trainer) = zip(*seen, strict=True)
    events = events_of(tmp_path / "log" / trainer.settings.stem)
    for name in ("train_loss", "test_acc", "samples_per_s"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(record["epoch"], pytest.approx(record[name])) for record in records]
    assert events.Scalars("firing_rate/lif2")[-1].value == pytest.approx(records[-1]["firing_rate"]["lif2"])
    assert events.Scalars("beta/lif1")[-1].value == pytest.approx(trainer.net.lif1.beta.item())
    mask, values = trainer.net.fc2.mask, trainer.net.fc2.values
    histogram = events.Histograms("weights/fc2")[-1].histogram_value
    assert histogram.num == mask.num_weights
    assert histogram.sum == pytest.approx(values.sum().item(), rel=1e-3)
    image = events.Images("weight between groups/fc2")[-1]
    assert (image.height, image.width) == (128, 128)  # 8 × 8 groups, 16 pixels each
    picture = Image.open(io.BytesIO(image.encoded_image_string)).convert("L")
    pixels, heat = torch.from_numpy(np.array(picture))[8::16, 8::16], group_density(mask, values)
    assert (pixels / 255 - heat / heat.max()).abs().max() < 0.005  # 8 bits


def test_a_resumed_run_goes_on_in_its_curves(tmp_path):
    def stop(record, trainer):
        if record["epoch"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(tmp_path / "checkpoints", [TensorBoardLog(tmp_path / "log"), stop], epochs=3)
    run(tmp_path / "checkpoints", [TensorBoardLog(tmp_path / "log")], epochs=3)
    (directory,) = (tmp_path / "log").iterdir()
    assert [event.step for event in events_of(directory).Scalars("test_acc")] == [1, 2, 3]


def test_log_dir_writes_and_what_stands_in_its_way_is_named(tmp_path, monkeypatch, capsys):
    flags = [f"--{name}={value}" for name, value in {**SMALL, "epochs": 1}.items()]
    flags += ["--checkpoint_dir", str(tmp_path / "checkpoints"), "--log_dir"]
    assert train.main([*flags, str(tmp_path / "log")]) == 0
    (directory,) = (tmp_path / "log").iterdir()
    assert events_of(directory).Scalars("test_acc")
    (tmp_path / "file").touch()
    assert train.main([*flags, str(tmp_path / "file")]) == 2
    assert "Not a directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert train.main([*flags, str(tmp_path / "log")]) == 2
    assert "pip install 'g2gnet[tensorboard]' installs it" in capsys.readouterr().err


class Listener(types.ModuleType):
    """Stands for ``wandb`` and ``mlflow``, which the examples only call."""

    heard = ()

    def init(self, project):
        assert project == "g2g"
        return self

    def log(self, values, step):
        self.heard += ((step, values["test_acc"]),)

    log_metrics = log


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    small = ", ".join(f"{name}={value!r}" for name, value in {**SMALL, "epochs": 2}.items())
    listeners = {name: Listener(name) for name in ("wandb", "mlflow")}
    for name, listener in listeners.items():
        monkeypatch.setitem(sys.modules, name, listener)
    monkeypatch.chdir(tmp_path)
    smaller = {'dataset="fashionmnist-mini", model="mixer", epochs=5': small}
    names = run_blocks(ROOT / "docs" / "other-libraries.md", smaller)
    assert [[step for step, _ in listener.heard] for listener in listeners.values()] == [[1, 2], [1, 2]]
    torch.testing.assert_close(names["again"].state_dict(), names["net"].state_dict(), rtol=0, atol=0)
