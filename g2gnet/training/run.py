"""A training run from start to marker: resume, epochs with progress, checkpoints, history."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from g2gnet.base.distributed import rank
from g2gnet.base.messages import say, warn
from g2gnet.base.seeding import make_deterministic
from g2gnet.base.tensor_files import TensorFileError
from g2gnet.data import ImageData
from g2gnet.inspect import ANALYSIS_SAMPLES, NetworkAnalysis, analyze_network
from g2gnet.training.checkpoints import CheckpointError, RunFiles, compared, read_checkpoint
from g2gnet.training.checks import LOWER, TrainingError
from g2gnet.training.epochs import EpochTrainer
from g2gnet.training.evaluation import run_images
from g2gnet.training.held_out import best_of, out_of_patience
from g2gnet.training.interruption import Interrupted, stop_signals
from g2gnet.training.machine import Machine
from g2gnet.training.run_settings import RunSettings, TrainSettings
from g2gnet.training.saved_state import UNFIT, check_history
from g2gnet.training.trainer import Trainer

TrainerT = TypeVar("TrainerT", bound=EpochTrainer)
#: the most spike counts, samples × neurons, that the analysis at the end of a run keeps
ANALYSIS_COUNTS = 50_000_000
#: called after each epoch, once its checkpoint is written, with the epoch's record and the trainer
EpochCallback = Callable[[dict[str, Any], TrainerT], None]


def run_training(
    settings: TrainSettings,
    load_data: Callable[[], ImageData],
    checkpoint_dir: Path | str,
    machine: Machine,
    show_analysis: Callable[[NetworkAnalysis, int, Path], None] | None = None,
    on_epoch: Sequence[EpochCallback[Trainer]] = (),
) -> dict[str, Any]:
    """Trains a network as :func:`run_epochs` does, and loads the data only if there is something to train.

    At the end it analyses the network, with ``settings.validation`` that of the best epoch, on some test images;
    ``show_analysis`` gets the analysis, the number of all test images and the file. Raises the errors of
    :func:`run_epochs`, DataError if the data are unavailable, and SettingsError if settings do not fit the data, the
    number of processes or the memory.

    Example:
        >>> from g2gnet.data import load_dataset
        >>> settings = TrainSettings(dataset="fashionmnist-mini", hidden_dim=32, T=4, epochs=1)
        >>> data = load_dataset("fashionmnist-mini").limited(256, 100)
        >>> run_training(settings, lambda: data, "checkpoints", Machine(torch.device("cpu")))["epoch"]
        Epoch 01 | train_acc=0...
        1
    """

    def analyze(trainer: Trainer, files: RunFiles) -> None:
        net, epoch = trainer.tested, trainer.epoch
        if settings.validation is not None:
            best = read_checkpoint(files.best)
            net, epoch = trainer.network_of(best), best["epoch"]
        count = max(1, min(ANALYSIS_SAMPLES, ANALYSIS_COUNTS // sum(net.sizes)))
        batches = run_images(net, settings, epoch, trainer.data, count=count)
        analysis = analyze_network(net, batches, trainer.data.num_classes)
        files.write_analysis(analysis.as_dict())
        if show_analysis:
            show_analysis(analysis, len(trainer.data.test_labels), files.analysis)

    return run_epochs(
        settings, lambda: Trainer(settings, load_data(), machine), checkpoint_dir, machine, analyze, on_epoch
    )


def run_epochs(
    settings: RunSettings,
    make_trainer: Callable[[], TrainerT],
    checkpoint_dir: Path | str,
    machine: Machine,
    finish: Callable[[TrainerT, RunFiles], None] | None = None,
    on_epoch: Sequence[EpochCallback[TrainerT]] = (),
) -> dict[str, Any]:
    """Trains ``settings.epochs`` epochs, or resumes from the run's checkpoint, or skips a finished run.

    After each epoch it replaces the checkpoint, prints a line and adds a record to the history. At SIGINT or SIGTERM it
    finishes and saves the step; the same call resumes after that step. Returns the last record.

    With ``settings.validation`` the epochs have a ``val_acc`` in place of a ``test_acc``, the checkpoint of the best
    epoch is kept, and ``settings.patience`` may end training. The test images are used at the end: ``test_acc`` of the
    result is that of the last weights; ``best`` holds ``epoch``, ``val_acc`` and ``test_acc`` of the best epoch.

    Args:
        settings: files of a run with other settings are refused.
        make_trainer: called if there is something to train, after seeding.
        machine: the processes of its world all call this, with trainers that work together. Only the first one uses
            the run's files, prints, and calls ``finish`` and ``on_epoch``.
        finish: called after the last epoch, before the run is marked as finished.

    Raises:
        CheckpointError: if the run's files are unusable, of other settings or data, or in use by another process.
        TrainingError: if the loss or a gradient is not finite.
        DistributedError: if the states of the processes diverged.
        Interrupted: after a signal, once everything is saved.

    Example:
        >>> from g2gnet.data import load_dataset
        >>> settings = TrainSettings(dataset="fashionmnist-mini", hidden_dim=32, T=3, epochs=1)
        >>> machine, data = Machine(torch.device("cpu")), load_dataset("fashionmnist-mini").limited(256, 100)
        >>> run_epochs(settings, lambda: Trainer(settings, data, machine), "checkpoints", machine)["epoch"]
        Epoch 01 | train_acc=0...
        1
    """
    world = machine.world
    files = RunFiles(checkpoint_dir, settings.stem)
    with contextlib.ExitStack() as held:
        # only the first process uses the files and standard output
        world.first(lambda: held.enter_context(files.locked()))
        if not world.leads:
            held.enter_context(contextlib.redirect_stdout(None))
        held.enter_context(_denormals_flushed())
        world.stage = "the reading of the run's files"
        result = world.first(lambda: files.load_marker(settings))
        if result is not None:
            say(f"{settings.stem} is finished: {tests_of(result)}. To run it again, delete {files.names()}.")
            return result
        checkpoint = world.first(lambda: files.load_checkpoint(settings))
        world.stage = "the loading of the data"
        make_deterministic(settings.seed)
        run = _UnfinishedRun(settings, make_trainer(), files, machine)
        if checkpoint is not None:
            run.resume(*checkpoint)
        world.first(lambda: files.write_history(run.history))
        run.snapshot()  # not kept: it only checks that all processes start with the same network
        with stop_signals() as received:
            run.train(received, on_epoch)
            run.end(received, finish)
        return run.result


def tests_of(result: Mapping[str, Any]) -> str:
    """The accuracies of a finished run, in words."""
    text, best = f"test_acc={result['test_acc']:.4f}", result.get("best")
    if best is None:
        return text
    return f"{text}; best epoch {best['epoch']}: val_acc={best['val_acc']:.4f}, test_acc={best['test_acc']:.4f}"


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """While entered, denormal numbers are 0: Adam's moments of weights without gradient become such slow numbers."""
    before = bool(torch.full((), 2e-38) * 0.5 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class _UnfinishedRun(Generic[TrainerT]):
    """A run that has something to train: its trainer, its files, and a record of each finished epoch."""

    def __init__(self, settings: RunSettings, trainer: TrainerT, files: RunFiles, machine: Machine) -> None:
        self.settings, self.trainer, self.files, self.world = settings, trainer, files, machine.world
        self.versions, self.data = machine.versions(), trainer.fingerprint
        self.history: list[dict[str, Any]] = []
        self.tested: dict[str, Any] = {}  # the accuracies on test images of a run with held-out images, from its end
        self.world.check_same("the data", self.data)

    @property
    def result(self) -> dict[str, Any]:
        return {**self.history[-1], **self.tested}

    def resume(self, path: Path, state: dict[str, Any]) -> None:
        """Resumes after the step of a checkpoint."""
        trainer, files = self.trainer, self.files
        if (theirs := state.get("data")) != self.data:
            what = f"{path} belongs to a run on different data: their SHA-256 is {theirs} there, {self.data} now."
            remedy = f"Give their directory as `data_dir`, {files.elsewhere}, or delete {files.names()} to start over."
            raise CheckpointError(f"{what}\n{remedy}")
        try:
            trainer.load_state_dict(state)
            self.history = state["history"]
            check_history(self.history, trainer.epoch)
            # killed before it wrote the checkpoint of the best epoch
            unsaved = self._is_best() and state["progress"] is None and not state.get("tested")
            differing = compared(state["versions"], self.versions)
        except UNFIT as error:
            remedy = f"It was not changed; move it away, or give {files.elsewhere}."
            raise CheckpointError(f"{path} does not fit the network it names ({error}). {remedy}") from error
        say(f"resuming {path} after epoch {trainer.epoch}, step {trainer.step} of the run")
        if unsaved:
            self.world.first(lambda: files.save_best(state))
        if differing and self.world.leads:
            warn("warning: the last bits of the results may change:\n" + "\n".join(differing))

    def snapshot(self) -> dict[str, Any]:
        """The content of a checkpoint, on which the processes must agree."""
        state, step = self.trainer.state_dict(), self.trainer.step
        moments = [each for of in state["optimizer"]["state"].values() for each in of.values() if each is not None]
        weights = [*state["model"].values(), *state.get("trained", {}).values()]
        self.world.check_same(f"the network after step {step}", step, weights)
        self.world.check_same(f"the optimizer's state after step {step}", None, moments)
        about = {"settings": self.settings.as_dict(), "data": self.data, "versions": self.versions}
        return {**about, "history": self.history, **state}

    def train(self, received: Sequence[signal.Signals], on_epoch: Sequence[EpochCallback[TrainerT]]) -> None:
        """Trains the remaining epochs; saves everything after each, and when told to stop."""
        trainer, settings, files = self.trainer, self.settings, self.files
        while trainer.epoch < settings.epochs and not self._is_hopeless():
            try:
                record = _epoch(trainer, settings.epochs, lambda: self._told_to_stop(received))
                if record is not None:
                    self.history.append(record)
                best = record is not None and self._is_best()
                self.world.first(functools.partial(self._save, self.snapshot(), best))
            except (TrainingError, TensorFileError) as error:  # numbers are not finite
                what = str(error)
                if isinstance(error, TensorFileError):
                    what = f"no checkpoint was written after step {trainer.step}: {error}; {LOWER}"
                raise TrainingError(f"{what}. {files.last_checkpoint()}") from error
            if record is not None:
                self._report(record, on_epoch)
            # after saving: when one process ends, torchrun ends the others
            if stop := self._told_to_stop(received):
                done = f"after step {trainer.step}, with {trainer.epoch} of {settings.epochs} epochs done"
                saved = f"saved in {files.checkpoint}: run the same command again to resume from there"
                raise Interrupted(f"stopped by {stop.name} {done}; {saved}", stop)

    def end(self, received: Sequence[signal.Signals], finish: Callable[[TrainerT, RunFiles], None] | None) -> None:
        """Tests a run with held-out images, calls ``finish`` and marks the run as finished."""
        if self.settings.validation is not None:
            self._test()
        self.world.stage = "the analysis of the network"
        if finish is not None:
            self.world.first(functools.partial(finish, self.trainer, self.files))
        self.world.first(lambda: self.files.mark_done(self.settings.as_dict(), self.result))
        if stop := self._told_to_stop(received):
            raise Interrupted(f"{stop.name} came when {self.settings.stem} was almost finished", stop)

    def _is_best(self) -> bool:
        held_out = self.settings.validation is not None and self.history
        return bool(held_out) and best_of(self.history)["epoch"] == self.trainer.epoch

    def _is_hopeless(self) -> bool:
        """Whether ``patience`` ends training, which it then prints."""
        if hopeless := out_of_patience(self.history, self.settings.patience):
            best = best_of(self.history)
            than = f"epoch {best['epoch']} (val_acc={best['val_acc']:.4f})"
            say(f"{self.settings.label}ended after epoch {self.trainer.epoch}: no later epoch was better than {than}")
        return hopeless

    def _test(self) -> None:
        """Tests the last and the best network, for the only time, and saves their accuracies."""
        trainer, files = self.trainer, self.files
        self.world.stage = "the test"
        state, best = self.snapshot(), best_of(self.history)
        tested = {"epoch": best["epoch"], "val_acc": best["val_acc"], "test_acc": trainer.test(state)}
        self.tested = {"test_acc": tested["test_acc"], "best": tested}
        saved = state
        if not self._is_best():
            saved = self.world.first(lambda: files.load_best(best["epoch"], self.settings))
            try:
                tested["test_acc"] = trainer.test(saved)
            except UNFIT as error:
                raise CheckpointError(f"{files.best} does not fit the network it names ({error})") from error
        self.world.first(lambda: files.save_checkpoint({**state, "tested": self.tested}))
        of_best = {"test_acc": tested["test_acc"], "best": tested}
        self.world.first(lambda: files.save_best({**saved, "tested": of_best}))
        say(f"{self.settings.label}Test | {tests_of(self.tested)}")

    def _save(self, state: dict[str, Any], best: bool) -> None:
        self.files.save_checkpoint(state)
        if best:
            self.files.save_best(state)
        self.files.write_history(self.history)

    def _report(self, record: dict[str, Any], on_epoch: Sequence[EpochCallback[TrainerT]]) -> None:
        """Prints an epoch's results and training time, and calls ``on_epoch`` in the first process."""
        names = ("train_acc", "val_acc", "test_acc", "train_loss")
        results = " | ".join(f"{name}={record[name]:.4f}" for name in names if name in record)
        say(f"{self.settings.label}Epoch {record['epoch']:02d} | {results} | {record['seconds']:.1f} s")
        if self.world.leads:
            for callback in on_epoch:
                callback(record, self.trainer)

    def _told_to_stop(self, received: Sequence[signal.Signals]) -> signal.Signals | None:
        """The signal that any process has received, the same in all; they wait for one another here."""
        number = self.world.largest(received[0] if received else 0)
        return signal.Signals(number) if number else None


class _Stopped(Exception):  # noqa: N818  (nothing is wrong)
    """Leaves an epoch after a step."""


def _epoch(trainer: EpochTrainer, epochs: int, told_to_stop: Callable[[], Any]) -> dict[str, Any] | None:
    """Trains one epoch with a progress bar on a terminal; None if it was stopped before its end."""
    images = len(trainer.data.train_labels)
    later = (epochs - trainer.epoch - 1) * images  # in the epochs after this one
    with tqdm(
        total=images,
        desc=f"Epoch {trainer.epoch + 1:02d}/{epochs}",
        bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]",  # of 80 columns, with room for the bar
        leave=False,
        disable=rank() > 0 or not sys.stderr.isatty(),
    ) as bar:

        def after_step(seen: int, loss: torch.Tensor, accuracy: torch.Tensor) -> None:
            # only when the bar is redrawn: reading the loss waits for the device
            if bar.update(seen - bar.n):
                left = bar.format_interval((later + images - seen) * bar.format_dict["elapsed"] / seen)
                measured = f"loss {loss.item():.3f}, acc {accuracy.item():.3f}"
                bar.set_postfix_str(f"{measured}, run left {left}", refresh=False)
            if seen == images:
                bar.set_postfix_str("testing" if "test" in trainer.judges else "validating")
            if told_to_stop():
                raise _Stopped

        try:
            return trainer.train_epoch(after_step)
        except _Stopped:
            return None
