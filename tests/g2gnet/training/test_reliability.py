"""Nothing is lost: signals, kills, damaged files, full disks, two runs at once."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import processes
import pytest
import torch
from helpers import ROOT
from training_runs import SMALL, VARIANTS, assert_equal, flags_of, load, run, small_trainer

import g2gnet
from g2gnet.base.tensor_files import TensorFileError, read_tensors, write_tensors
from g2gnet.data import load_dataset
from g2gnet.neurons import LIF, Synaptic
from g2gnet.training import CheckpointError, Interrupted, Machine, Trainer, TrainingError, TrainSettings, read_run
from g2gnet.training.checkpoints import RunFiles
from g2gnet.training.checks import CALM, DRIFTING, LOWER, WAKE, LayerWatch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks are those of POSIX")


def signalled(step, number=signal.SIGTERM, train_step=Trainer._train_step):
    """A training step in which the signal comes when the step has that number."""

    def train_step_signalled(self, index):
        if self.step == step:
            os.kill(os.getpid(), number)
        return train_step(self, index)

    return train_step_signalled


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def stop_at(directory, step, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", signalled(step - 1))
        said = f"after step {step}, with {(step - 1) // 4} of 3 epochs done; saved in .*: run the same command again"
        with pytest.raises(Interrupted, match=said):
            run(directory, **options)
    return RunFiles(directory, TrainSettings(**{**SMALL, **options}).stem)


def test_a_network_from_inside_an_epoch_is_named_by_its_step(tmp_path, monkeypatch, caplog):
    files = stop_at(tmp_path, 6, monkeypatch)
    saved = read_run(files.checkpoint)
    assert (saved.epoch, saved.step, saved.interrupted, len(saved.history)) == (1, 6, True, 1)
    caplog.clear()
    net = g2gnet.load(files.checkpoint)
    assert_equal(dict(net.state_dict()), dict(load(files)["model"]))
    g2gnet.load(files.previous)  # of the end of the first epoch
    (message,) = caplog.messages
    said = "was saved inside epoch 2 of 3, after step 6 of the run: no accuracy in its history is that of this"
    assert message.startswith(f"{files.checkpoint} {said}")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name in ("dynamic", "images", "all schedules") else pytest.mark.ci)
        for name in VARIANTS
        if name != "static"
    ],
)
def test_a_signal_inside_an_epoch_loses_no_step(tmp_path, monkeypatch, capsys, variant):
    """4 steps an epoch, 3 epochs; a run is stopped in a middle, or also in the first and the last step of an epoch."""
    whole = run(tmp_path / "whole", **VARIANTS[variant])
    for step in (1, 6, 12) if variant == "dynamic" else (6,):
        files = stop_at(tmp_path / "parts", step, monkeypatch, **VARIANTS[variant])
        assert load(files)["step"] == step
        assert not files.marker.exists()
    parts = run(tmp_path / "parts", **VARIANTS[variant])
    assert f"after epoch {(step - 1) // 4}, step {step}" in capsys.readouterr().out
    assert_equal(load(whole), load(parts))
    assert [json.loads(line) for line in parts.history.read_text().splitlines()] == load(parts)["history"]
    assert parts.analysis.read_text() == whole.analysis.read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


OLDER = {
    "average": {"recurrent": True, "average": 3},
    "rows": {"sequence": "rows", "T": 28, "neuron": "adlif", "sparsity_mode": "dynamic", "dst_interval": 2},
    "fixed delays": {"delay": 2, "average": 3, "limit_train": 280, "validation": 0.25},
    "learned delays": {"delay": 2, "learn_delay": True},
}


@pytest.mark.ci
@pytest.mark.parametrize("options", OLDER.values(), ids=OLDER)
def test_a_run_of_an_older_version_resumes_to_the_same_bits(tmp_path, monkeypatch, options):
    """Its states had no delay for all neurons and whole numbers as integers, and it kept nothing of its samples."""
    whole = run(tmp_path / "whole", **options)
    files = stop_at(tmp_path / "parts", 6, monkeypatch, **options)
    for path in filter(os.path.exists, (files.checkpoint, files.previous, files.best)):
        now, before = g2gnet.load(path), read_tensors(path)
        assert now.trained_on == ((28, 28), before.pop("samples")["kind"])
        for state in (before[name] for name in {"model", "trained"} & before.keys()):
            for name in [name for name in state if name.endswith("_delay") or name == "input_order"]:
                each = state.pop(name)
                if each.dim():
                    state[name] = each if "learn_delay" in options else each.long()
        write_tensors(path, before)
        then = g2gnet.load(path)
        assert_equal(dict(then.state_dict()), dict(now.state_dict()))
        assert then.trained_on is None
    assert_equal(load(whole), load(run(tmp_path / "parts", **options)))
    assert not files.best.exists() or g2gnet.load(files.best).trained_on


def test_a_signal_between_epochs_or_after_the_last_loses_nothing(whole, tmp_path, monkeypatch):
    for epoch in (1, 3):

        def evaluate_signalled(self, part, epoch=epoch, evaluate=Trainer.evaluate):
            if self.epoch == epoch:
                os.kill(os.getpid(), signal.SIGINT)
            return evaluate(self, part)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "evaluate", evaluate_signalled)
            with pytest.raises(Interrupted, match=f"stopped by SIGINT after step {4 * epoch}, with {epoch} of 3"):
                run(tmp_path / "parts")
    assert_equal(load(whole), load(run(tmp_path / "parts")))


def test_signals_that_are_ignored_stay_ignored(whole, tmp_path, monkeypatch):
    """As ``nohup`` and a shell's ``&`` leave them to their children."""
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.signal(number, signal.SIG_IGN)
        try:
            monkeypatch.setattr(Trainer, "_train_step", signalled(5, number))
            assert_equal(load(whole), load(run(tmp_path / number.name)))
            assert signal.getsignal(number) is signal.SIG_IGN
        finally:
            signal.signal(number, handler)


PROGRAM = """
import sys, time
import train
from g2gnet.training import Trainer, interruption
seconds, interruption.GRACE = float(sys.argv.pop()), float(sys.argv.pop())
train_step = Trainer._train_step
def slow_step(self, index):
    if self.step == 5:
        print("in the step", flush=True)
        time.sleep(seconds)
    return train_step(self, index)
Trainer._train_step = slow_step
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.ci
@pytest.mark.parametrize(
    ("signals", "grace", "at_once"),
    [
        # what torchrun and a process manager send between them
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGTERM], 60, False),
        ([signal.SIGINT, signal.SIGINT], 0, True),
        ([signal.SIGTERM, signal.SIGINT], 60, True),
    ],
)
def test_the_program_stops_after_the_step_or_at_once(tmp_path, signals, grace, at_once):
    program, printed, errors = (tmp_path / name for name in ("program.py", "printed", "printed.err"))
    program.write_text(PROGRAM)
    seconds = "3600" if at_once else "0.5"  # a second signal must not wait for the step, which would take an hour
    flags = [*flags_of(SMALL), "--checkpoint_dir", tmp_path, grace, seconds]
    process = processes.start(program, *flags, output=printed)
    processes.wait_for("in the step\n", process, tmp_path / "printed.out")
    os.kill(process.pid, signals[0])
    processes.wait_for("a second signal ends at once", process, errors)
    for number in signals[1:]:
        os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + signals[-1]
    assert read_tensors(next(tmp_path.glob("*current.pth")))["step"] == (4 if at_once else 6)
    assert ("after step 6, with 1 of 3 epochs done" in errors.read_text()) == (not at_once)
    assert "Traceback" not in (tmp_path / "printed.out").read_text() + errors.read_text()


@pytest.mark.long
def test_killed_at_random_instants_runs_end_with_the_same_weights():
    """50 SIGKILLs: in steps, in updates of the units, in writes of the checkpoint and of the marker."""
    command = [sys.executable, "-m", "tests.kill_and_resume", "50"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("50 kills: ")
    assert "every run ended with the same weights" in done.stdout
    for place in ("step", "units update", "checkpoint write", "marker write"):
        assert re.search(rf"[1-9]\d* in a {place}", done.stdout), done.stdout


@pytest.mark.ci
def test_every_truncation_and_a_flipped_bit_in_every_byte_is_noticed(tmp_path):
    path, content = tmp_path / "file.pth", {"weights": torch.arange(3.0), "epoch": 1}
    write_tensors(path, content)
    assert_equal(read_tensors(path), content)
    assert_equal(torch.load(path, weights_only=True), content)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 9)] + [whole + b"\0"]
    for place, byte in enumerate(whole):
        damaged.append(whole[:place] + bytes([byte ^ 1 << place % 8]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(TensorFileError):
            read_tensors(path)


def test_the_checkpoint_before_a_damaged_one_is_used(whole, tmp_path, monkeypatch, capsys):
    files = stop_at(tmp_path / "parts", 10, monkeypatch)
    assert (load(files)["step"], read_tensors(files.previous)["step"]) == (10, 8)
    files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:9999])
    files = stop_at(tmp_path / "parts", 9, monkeypatch)
    output = capsys.readouterr()
    assert f"{files.checkpoint} cannot be read" in output.err
    assert "Using the previous checkpoint" in output.err
    assert f"resuming {files.previous} after epoch 2, step 8" in output.out
    # the damaged file did not take the place of the whole one
    assert (load(files)["step"], read_tensors(files.previous)["step"]) == (9, 8)
    assert_equal(load(run(tmp_path / "parts")), load(whole))
    assert not files.previous.exists()


def test_where_both_are_damaged_nothing_is_touched(tmp_path, monkeypatch):
    files = stop_at(tmp_path, 6, monkeypatch)
    for path in (files.checkpoint, files.previous):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        run(tmp_path)
    assert all(str(text) in str(error.value) for text in (files.checkpoint, files.previous, "`checkpoint_dir`"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.ci
def test_a_full_disk_is_named_and_costs_no_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: the checkpoint of the third epoch does not fit."""
    program = f"""
import resource, signal, sys, train
from g2gnet.training import Trainer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
evaluate = Trainer.evaluate
def fill_the_disk(self, part):
    if self.epoch == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return evaluate(self, part)
Trainer.evaluate = fill_the_disk
sys.exit(train.main({[*flags_of(SMALL), "--checkpoint_dir", str(tmp_path)]!r}))
"""
    (tmp_path / "program.py").write_text(program)
    done = processes.run(tmp_path / "program.py", output=tmp_path / "printed")
    assert done.statuses == [1]
    files = RunFiles(tmp_path, TrainSettings(**SMALL).stem)
    for part in (f"cannot write {files.checkpoint} (File too large)", "Free space, then run the same command again to"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert load(files)["epoch"] == 2
    assert run(tmp_path).marker.exists()


LOCKING = """
import sys, time
from g2gnet.training.checkpoints import RunFiles
with RunFiles(*sys.argv[1:]).locked():
    print("locked", flush=True)
    time.sleep(3600)
"""


@pytest.mark.ci
def test_a_second_run_of_the_same_name_is_refused_until_the_first_ends_or_dies(tmp_path):
    files, program = RunFiles(tmp_path, TrainSettings(**SMALL).stem), tmp_path / "program.py"
    with files.locked():
        with pytest.raises(CheckpointError, match=r"another run of this name is using .*mixer"):
            run(tmp_path)
        run(tmp_path, model="index")
    program.write_text(LOCKING)
    process = processes.start(program, tmp_path, files.marker.stem, output=tmp_path / "printed")
    processes.wait_for("locked\n", process, tmp_path / "printed.out")
    with pytest.raises(CheckpointError, match="another run"):
        run(tmp_path)
    process.kill()
    process.join()
    run(tmp_path)


def test_other_data_of_the_same_name_are_refused_and_another_backend_is_said(tmp_path, monkeypatch, capsys):
    files = stop_at(tmp_path, 6, monkeypatch)
    state, before, data = load(files), files.checkpoint.read_bytes(), load_dataset(SMALL["dataset"])
    other = dataclasses.replace(data, train_labels=data.train_labels.roll(1))
    with pytest.raises(CheckpointError, match=r"different data: their SHA-256 is .* there, [0-9a-f]+ now") as error:
        g2gnet.training.run_training(TrainSettings(**SMALL), lambda: other, tmp_path, Machine(torch.device("cpu")))
    assert "`data_dir`" in str(error.value)
    assert files.checkpoint.read_bytes() == before
    versions = state["versions"]
    assert set(versions) == {"g2g", "torch", "device", "backend", "instruction set"}
    write_tensors(files.checkpoint, {**state, "versions": {**versions, "instruction set": "another"}})
    capsys.readouterr()
    run(tmp_path)
    message = capsys.readouterr().err
    assert f"instruction set: another there, {versions['instruction set']} now" in message
    assert message.count("there,") == 1


def spoiled(step, spoil, train_step=Trainer._train_step):
    """A training step that is spoiled when the step has that number."""

    def train_step_spoiled(self, index):
        handle = spoil(self.net) if self.step == step else None
        result = train_step(self, index)
        if hasattr(handle, "remove"):
            handle.remove()
        return result

    return train_step_spoiled


def spoil_gradient(layer, value):
    return lambda net: getattr(net, layer).values.register_hook(lambda gradient: gradient.clone().fill_(value))


@pytest.mark.parametrize(
    ("spoil", "options", "what"),
    [
        # by the norm of all gradients, which is then not finite either, each is divided
        (spoil_gradient("fc1", torch.nan), {"clip_grad_norm": 0.1}, "the gradient of fc1.values"),
        (spoil_gradient("fc3", -torch.inf), {}, "the gradient of fc3.values"),
        # membranes of NaN never fire: the loss stays finite, the gradient does not
        (lambda net: net.fc2.values.data[0, 0, 0].fill_(torch.nan), {}, "the gradient of lif2.threshold"),
    ],
)
def test_what_is_not_finite_is_named_and_the_last_good_checkpoint_kept(tmp_path, monkeypatch, spoil, options, what):
    # a signal comes in the next step: no checkpoint is written of a spoiled network
    monkeypatch.setattr(Trainer, "_train_step", spoiled(5, spoil, signalled(6)))
    with pytest.raises(TrainingError) as error:
        run(tmp_path, **options)
    files = RunFiles(tmp_path, TrainSettings(**SMALL).stem)
    kept = f"{files.checkpoint} is the last good checkpoint; it was not changed."
    assert str(error.value) == f"in step 6 {what} became non-finite; {LOWER}. {kept}"
    assert load(files)["step"] == 4


@pytest.mark.parametrize(
    ("options", "where", "remedy"),
    [
        # before any update the learning rate cannot be the reason
        ({"enc_bias": -3e38}, "in step 1 ", "no weight has changed yet"),
        ({"threshold": 3e38}, "no checkpoint was written after step 4: ", re.escape(LOWER)),
        ({"lr": 1e30}, "in step 3 ", re.escape(LOWER)),
    ],
)
def test_numbers_that_are_not_finite_have_a_remedy(tmp_path, options, where, remedy):
    with pytest.raises(TrainingError, match=f"^{where}.*; {remedy}"):
        run(tmp_path, epochs=1, **options)


def test_a_loss_that_is_not_finite_is_named_inside_an_epoch(monkeypatch):
    monkeypatch.setattr("g2gnet.training.epochs.CHECK_INTERVAL", 3)
    trainer = small_trainer()

    def simulate_spoiled(inputs, simulate=trainer.net.simulate, **options):
        activity = simulate(inputs, **options)
        return activity._replace(counts=activity.counts * torch.nan) if trainer.step == 2 else activity

    trainer.net.simulate = simulate_spoiled
    with pytest.raises(TrainingError, match=r"in step 3 the loss and the gradient of lif3\..* became non-finite"):
        trainer.train_epoch()
    assert trainer.step == 3  # of 4
    with pytest.raises(TrainingError, match="in step 3 the loss"):
        trainer.state_dict()


def test_layers_that_do_nothing_useful_are_warned_about_once(caplog):
    watch = LayerWatch()
    neurons = {"lif1": LIF(beta=1.05), "lif2": LIF(3, beta=1.0), "lif3": LIF(), "lif4": Synaptic(neurons=3)}
    silent = {"lif1": 0.5, "lif2": 0.0, "lif3": 0.3, "lif4": 0.0}
    watch.check(1, {"lif1": 0.05, "lif2": 0.5, "lif3": 0.001, "lif4": 0.1}, silent, neurons)
    assert not caplog.messages
    neurons["lif2"].beta.data[1] = 1.25
    neurons["lif3"].beta.data.fill_(-0.5)
    neurons["lif4"].syn_decay.data[2] = 1.5
    for epoch in (2, 3):
        rates = {"lif1": 0.0, "lif2": 0.995, "lif3": 0.001, "lif4": 0.1}
        watch.check(epoch, rates, {**silent, "lif3": 0.534}, neurons)
    assert caplog.messages == [
        f"lif1 fell silent in epoch 2 (firing rate 0); {WAKE}",
        f"lif2 saturates in epoch 2 (firing rate 0.99); {CALM}",
        f"lif3 is mostly silent: 53 % of its neurons never fired in epoch 2; {WAKE}",
        f"lif2 has learned beta = 1.25 in epoch 2, outside 0 … 1: it counts as 1; {DRIFTING}",
        f"lif3 has learned beta = -0.5 in epoch 2, outside 0 … 1: it counts as 0; {DRIFTING}",
        f"lif4 has learned syn_decay = 1.5 in epoch 2, outside 0 … 1: it counts as 1; {DRIFTING}",
    ]


def test_classes_without_weights_are_warned_about_before_training(caplog):
    trainer, said = small_trainer(block_size=64, p_intra=0.2, p_inter=0.03), []
    unseen = int((trainer.net.fc3.weight.detach() == 0).all(1).sum())
    for _ in range(2):
        trainer.train_epoch(lambda *_: said.append(bool(caplog.messages)))
    assert said[0], "at the first step"
    (message,) = (message for message in caplog.messages if "classes" in message)
    without = f"fc3 has no weights for {unseen} of 10 classes, whose scores therefore do not depend on the input"
    assert message == f"{without}; lower `block_size`, or keep more weights"
    caplog.clear()
    small_trainer(block_size=4, p_intra=0.4, p_inter=0.2).train_epoch()
    assert "classes" not in caplog.text


def test_classes_that_are_tested_but_not_trained_are_warned_about(caplog):
    labels = {"train_labels": torch.arange(10) % 8, "test_labels": torch.tensor([9, 1, 2, 3, 9, 8])}
    data = dataclasses.replace(load_dataset(SMALL["dataset"]).limited(10, 6), **labels)
    small_trainer(data, limit_train=None, limit_test=6)
    said = "3 of 6 test images are of classes without a training image (8, 9), which cannot be learned"
    assert caplog.messages == [f"{said}; give some, or leave `limit_train` out"]
