"""The files of a run: checkpoint, history and marker. A crash leaves either the old or the new one complete."""

import contextlib
import csv
import errno
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from g2gnet.base import files
from g2gnet.base.files import read_file, replace_file
from g2gnet.base.messages import reason, warn
from g2gnet.base.tensor_files import TensorFileError, check_plain, read_tensors, write_tensors
from g2gnet.training.held_out import out_of_patience
from g2gnet.training.run_settings import RunSettings
from g2gnet.training.saved_state import UNFIT, check_history, check_tested

#: version of the checkpoint's structure
FORMAT = 5
#: the files of a run by their endings; ``previous`` is the checkpoint before the last one, used if that is damaged, and
#: ``best`` that of the best epoch by held-out images
ENDINGS = {
    "checkpoint": ".pth", "previous": ".previous.pth", "best": ".best.pth", "history": ".jsonl", "table": ".csv",
    "analysis": ".analysis.json", "marker": ".DONE",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A run's files are unusable or not writable; the message says why, and what to do. The files are not changed."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What :meth:`RunFiles.save_checkpoint` wrote, on the CPU, executing nothing. CheckpointError if unusable."""
    try:
        state = read_tensors(path)
    except (OSError, TensorFileError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).") from error
    settings = state.get("settings") if isinstance(state, dict) and state.get("format") == FORMAT else None
    if not isinstance(settings, dict) or not all(type(name) is str for name in settings):
        raise CheckpointError(f"{path} is not a checkpoint of this version of g2g.")
    return state


def compared(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """One line for each entry that differs."""
    return [
        f"  {name}: {theirs.get(name, 'not set')} there, {ours.get(name, 'not set')} now"
        for name in sorted({*theirs, *ours})
        if theirs.get(name, "not set") != ours.get(name, "not set")
    ]


class RunFiles:
    """``<directory>/<stem>`` with the endings :data:`ENDINGS`, and the file of a lock."""

    def __init__(self, directory: Path | str, stem: str) -> None:
        self.directory = Path(directory)
        self._all = {kind: self.directory / f"{stem}{ending}" for kind, ending in ENDINGS.items()}
        paths = self._all.values()
        self.checkpoint, self.previous, self.best, self.history, self.table, self.analysis, self.marker = paths
        self.elsewhere = f"another `checkpoint_dir` than {self.directory}"  # a remedy
        self.lock = self.directory / f".{stem}.lock"
        self._whole = False  # whether self.checkpoint is known to be intact, so it may replace self.previous

    @classmethod
    def of(cls, checkpoint: Path) -> "RunFiles":
        """The files of the run that has this checkpoint, the previous one or that of the best epoch."""
        return cls(checkpoint.parent, re.sub(r"(\.previous|\.best)?\.pth$", "", checkpoint.name))

    def files(self) -> tuple[Path, ...]:
        """Every file of the run, be it there or not."""
        return *self._all.values(), self.lock

    def check(self) -> None:
        """Makes the directory. Raises CheckpointError, before anything is written, if one of the files could not be."""
        what, remedy = f"cannot write to the checkpoint directory {self.directory}", "give another `checkpoint_dir`"
        try:
            files.make_directory(self.directory)
            for check in (files.check_own, files.check_writable):
                for path in self._all.values():
                    check(path)
        except OSError as error:
            if error.errno == errno.EINVAL:  # of check_own
                what = f"{error.filename} cannot be one of the run's own files"
                remedy = f"move it away, or give {self.elsewhere}"
            elif error.errno == errno.ENAMETOOLONG:
                remedy = f"give the data a file of a shorter name than that in {self.checkpoint.name}"
            raise CheckpointError(f"{what} ({reason(error)}); {remedy}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While entered, no other process can enter it for these files; the lock ends with its process. Does what
        :meth:`check` does, and removes leftovers of a killed process. Raises CheckpointError if another has entered."""
        self.check()
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(files.locked(self.lock, wait=False))
            except OSError as error:
                what = f"cannot lock {self.lock} ({reason(error)}); delete it"
                if isinstance(error, filelock.Timeout):
                    what = f"another run of this name is using {self.checkpoint} (it holds {self.lock}); wait for it"
                raise CheckpointError(f"{what}, or give {self.elsewhere}") from error
            for path in self._all.values():
                for leftover in files.leftovers(path):
                    with contextlib.suppress(OSError):  # it is in nobody's way
                        leftover.unlink()
            yield

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint by ``state``: tensors, numbers, strings, containers of them. Raises CheckpointError
        if it cannot be written; the previous checkpoint is still there."""
        keep = self.previous if self._whole else None
        with self._writing(self.checkpoint):
            write_tensors(self.checkpoint, {"format": FORMAT, **state}, keep)
            for of_finished in (self.marker, self.analysis):  # a run that was finished goes on for more epochs
                of_finished.unlink(missing_ok=True)
        self._whole = True

    def save_best(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint of the best epoch, as :meth:`save_checkpoint` does the last one."""
        with self._writing(self.best):
            write_tensors(self.best, {"format": FORMAT, **state})

    def load_best(self, epoch: int, settings: RunSettings) -> dict[str, Any]:
        """The checkpoint of the best epoch, which is this one. Raises CheckpointError if it is not usable."""
        try:
            state = read_checkpoint(self.best)
            if state.get("epoch") != epoch:
                raise CheckpointError(f"{self.best} is not that of epoch {epoch}, which was the best.")
        except CheckpointError as error:
            raise CheckpointError(f"{error} Restore that file, or delete {self.names()} to train again") from error
        self._check_settings(self.best, state["settings"], settings)
        return state

    def load_checkpoint(self, settings: RunSettings) -> tuple[Path, dict[str, Any]] | None:
        """The file and the content of the checkpoint, on the CPU, or of the previous one if that is damaged; None if
        there is none. Raises CheckpointError if neither is usable, or was made with different settings."""
        problems = []
        for path in filter(Path.exists, (self.checkpoint, self.previous)):
            try:
                state = read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            self._check_settings(path, state["settings"], settings)
            self._whole = path == self.checkpoint
            if problems:
                warn(f"{problems[0]} Using the previous checkpoint.")
            return path, state
        if problems:
            remedy = f"move {self.names()} away to start over, or give {self.elsewhere}"
            raise CheckpointError(f"{' '.join(problems)} Nothing was changed; {remedy}.")
        return None

    def mark_done(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Writes the marker of a finished run, whose second checkpoint goes; CheckpointError if that cannot be."""
        self.previous.unlink(missing_ok=True)
        self._write_text(self.marker, json.dumps({"settings": settings, "result": result}, indent=2) + "\n")

    def write_analysis(self, analysis: dict[str, Any]) -> None:
        """Writes the analysis of the trained network; raises CheckpointError if it cannot be written."""
        self._write_text(self.analysis, json.dumps(analysis) + "\n")

    def load_marker(self, settings: RunSettings) -> dict[str, Any] | None:
        """The result of the finished run; None if it is not finished, or ``settings`` have it go on. It is that of the
        checkpoint, which has a checksum. Raises CheckpointError if either file is damaged, or of other settings."""
        try:
            made_with = dict(json.loads(read_file(self.marker))["settings"])
            check_plain(made_with)
            self._check_settings(self.marker, made_with, settings)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.marker} cannot be read ({reason(error)}); delete it, and the run makes it again"
            ) from error
        try:
            state = read_checkpoint(self.checkpoint)
            history = state["history"]
            check_history(history, len(history))
            result, tested = history[-1], state.get("tested", {})
            check_tested(tested)
            finished = result["epoch"] == settings.epochs or out_of_patience(history, settings.patience)
        except UNFIT as error:
            remedy = f"restore that file, or delete {self.names()} to train it again"
            raise CheckpointError(f"{reason(error)} A result counts only with its checkpoint: {remedy}") from error
        self._check_settings(self.checkpoint, state["settings"], settings)
        # killed before it was gone, a marker is of fewer epochs than the checkpoint
        finished &= made_with.get("epochs") == settings.epochs and bool(tested) == (settings.validation is not None)
        return {**result, **tested} if finished else None

    def _check_settings(self, path: Path, theirs: dict[str, Any], ours: RunSettings) -> None:
        """Raises CheckpointError unless a run with settings ``ours`` begins as, or is, the one with ``theirs``."""
        was, now = ours.complete(theirs), ours.as_dict()
        # what has no effect in either run may have had another default
        for name in ours.idle(was).keys() & ours.idle(now).keys():
            was[name] = now[name]
        # JSON has no tuples
        was, now = ({name: [*v] if isinstance(v, tuple) else v for name, v in each.items()} for each in (was, now))
        differing, tied = compared(was, now), ours.tied_to_epochs()
        longer = len(differing) == 1 and type(was.get("epochs")) is int and was["epochs"] < ours.epochs
        if not differing or (longer and not tied):
            return
        if longer:
            depended = f"with {' and '.join(tied)} each of its {was['epochs']} epochs depended on their number"
            differing.append(f"The run cannot go on for more epochs: {depended}.")
        beside = "`name=NAME` to train another run beside it, " if hasattr(ours, "name") else ""
        what = "\n".join([f"{path} belongs to a run with different settings:", *differing])
        remedy = f"{beside}{self.elsewhere}, or delete {self.names()} to start over."
        raise CheckpointError(f"{what}\nGive the settings that it was made with, {remedy}")

    def names(self) -> str:
        """The files that exist, in words."""
        return ", ".join(self.paths().values())

    def paths(self) -> dict[str, str]:
        """The files that exist, by kind."""
        return {kind: str(path) for kind, path in self._all.items() if path.exists()}

    def last_checkpoint(self) -> str:
        """Where the last good checkpoint is, in a sentence."""
        for path in filter(Path.exists, (self.checkpoint, self.previous)):
            return f"{path} is the last good checkpoint; it was not changed."
        return "There is no checkpoint of this run."

    def write_history(self, records: Sequence[dict[str, Any]]) -> None:
        """Makes the history exactly these records, a line of JSON each, and the same as CSV. Raises CheckpointError if
        it cannot be written."""
        self._write_text(self.history, "".join(json.dumps(record) + "\n" for record in records))
        self._write_text(self.table, csv_of([dict(numbers(record)) for record in records]))

    def _write_text(self, path: Path, text: str) -> None:
        with self._writing(path):
            replace_file(path, lambda file: file.write(text.encode()))

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns the failures of a write into CheckpointError."""
        try:
            yield
        except OSError as error:
            remedy = f"{self.last_checkpoint()} Free space, then run the same command again to resume"
            raise CheckpointError(f"cannot write {path} ({reason(error)}). {remedy}") from error


def numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an epoch's record, those of dictionaries inside it as ``name/key``."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """A header and these rows; empty where a row lacks a value that another has, and without rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*rows))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
