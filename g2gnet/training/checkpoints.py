"""The files of a run: checkpoint, history and marker. A crash leaves the old or the new file complete."""

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
from g2gnet.base.files import read_file, remove_file, replace_file
from g2gnet.base.messages import reason, warn
from g2gnet.base.tensor_files import TensorFileError, check_plain, read_tensors, write_tensors
from g2gnet.training.held_out import out_of_patience
from g2gnet.training.run_settings import RunSettings
from g2gnet.training.saved_state import UNFIT, check_history, check_tested

#: version of the checkpoint's structure
FORMAT = 5
#: endings of a run's files; ``previous`` is the checkpoint before the last one, a reserve if that is damaged, and
#: ``best`` the checkpoint of the best epoch on held-out images
ENDINGS = {
    "checkpoint": ".pth", "previous": ".previous.pth", "best": ".best.pth", "history": ".jsonl", "table": ".csv",
    "analysis": ".analysis.json", "marker": ".DONE",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A run's files are unusable or not writable; the message gives the reason and a remedy. No file was changed."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; nothing in it is executed. Raises CheckpointError if it is unusable."""
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
    # JSON has no tuples
    was, now = ({name: [*v] if isinstance(v, tuple) else v for name, v in each.items()} for each in (theirs, ours))
    pairs = ((name, was.get(name, "not set"), now.get(name, "not set")) for name in sorted({*was, *now}))
    return [f"  {name}: {there} there, {here} now" for name, there, here in pairs if there != here]


class RunFiles:
    """The files ``<directory>/<stem>`` with the endings :data:`ENDINGS`, and the lock's file."""

    def __init__(self, directory: Path | str, stem: str) -> None:
        self.directory = Path(directory)
        self._all = {kind: self.directory / f"{stem}{ending}" for kind, ending in ENDINGS.items()}
        paths = self._all.values()
        self.checkpoint, self.previous, self.best, self.history, self.table, self.analysis, self.marker = paths
        self.elsewhere = f"another `checkpoint_dir` than {self.directory}"  # a remedy
        self.lock = self.directory / f".{stem}.lock"
        self._whole = False  # whether self.checkpoint is intact, so that it may replace self.previous

    @classmethod
    def of(cls, checkpoint: Path) -> "RunFiles":
        """The files of the run of this checkpoint, be it the last one, the previous one or that of the best epoch."""
        return cls(checkpoint.parent, re.sub(r"(\.previous|\.best)?\.pth$", "", checkpoint.name))

    def files(self) -> tuple[Path, ...]:
        """Every file of the run, present or not."""
        return *self._all.values(), self.lock

    def check(self) -> None:
        """Makes the directory. Raises CheckpointError if one of the files could not be written."""
        what, remedy = f"cannot write to the checkpoint directory {self.directory}", "give another `checkpoint_dir`"
        try:
            files.make_directory(self.directory)
            for check in (files.check_own, files.check_writable):
                for path in self._all.values():
                    check(path)
        except OSError as error:
            if error.errno == errno.EINVAL:  # by check_own
                what = f"{error.filename} cannot be one of the run's own files"
                remedy = f"move it away, or give {self.elsewhere}"
            elif error.errno == errno.ENAMETOOLONG:
                remedy = f"give the data a file of a shorter name than that in {self.checkpoint.name}"
            raise CheckpointError(f"{what} ({reason(error)}); {remedy}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While entered, no other process can enter it for these files; the lock ends with its process. Calls
        :meth:`check` and removes leftovers of a killed process. Raises CheckpointError if another has entered it."""
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
                    with contextlib.suppress(OSError):  # it disturbs nobody
                        leftover.unlink()
            yield

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint by ``state``, or raises CheckpointError and leaves the old one unchanged."""
        keep = self.previous if self._whole else None
        with self._writing(self.checkpoint):
            write_tensors(self.checkpoint, {"format": FORMAT, **state}, keep)
            for of_finished in (self.marker, self.analysis):  # more epochs continue a finished run
                remove_file(of_finished)
        self._whole = True

    def save_best(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint of the best epoch, or raises CheckpointError."""
        with self._writing(self.best):
            write_tensors(self.best, {"format": FORMAT, **state})

    def load_best(self, epoch: int, settings: RunSettings) -> dict[str, Any]:
        """The checkpoint of the best epoch, ``epoch``. Raises CheckpointError if it is unusable."""
        try:
            state = read_checkpoint(self.best)
            if state.get("epoch") != epoch:
                raise CheckpointError(f"{self.best} is not that of epoch {epoch}, which was the best.")
        except CheckpointError as error:
            raise CheckpointError(f"{error} Restore that file, or delete {self.names()} to train again") from error
        self._check_settings(self.best, state["settings"], settings)
        return state

    def load_checkpoint(self, settings: RunSettings) -> tuple[Path, dict[str, Any]] | None:
        """File and content of the checkpoint, on the CPU, or of the previous one if it is damaged; None if there is no
        checkpoint. Raises CheckpointError if neither is usable, or it was made with other settings."""
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
        """Deletes the previous checkpoint of a finished run and writes its marker, or raises CheckpointError."""
        with self._writing(self.previous):
            remove_file(self.previous)
        self._write_text(self.marker, json.dumps({"settings": settings, "result": result}, indent=2) + "\n")

    def write_analysis(self, analysis: dict[str, Any]) -> None:
        """Writes the analysis of the trained network, or raises CheckpointError."""
        self._write_text(self.analysis, json.dumps(analysis) + "\n")

    def load_marker(self, settings: RunSettings) -> dict[str, Any] | None:
        """The result of the finished run; None if it is not finished, or ``settings`` continue it. The result is the
        checkpoint's, which has a checksum. Raises CheckpointError if a file is damaged, or of other settings."""
        try:
            made_with = dict(json.loads(read_file(self.marker))["settings"])
            check_plain(made_with)
            self._check_settings(self.marker, made_with, settings)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            remedy = "delete it, and the run makes it again"
            raise CheckpointError(f"{self.marker} cannot be read ({reason(error)}); {remedy}") from error
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
        # a process that was killed before it deleted the marker leaves one of fewer epochs than the checkpoint
        finished &= made_with.get("epochs") == settings.epochs and bool(tested) == (settings.validation is not None)
        return {**result, **tested} if finished else None

    def _check_settings(self, path: Path, theirs: dict[str, Any], ours: RunSettings) -> None:
        """Raises CheckpointError unless a run with settings ``ours`` is the run with ``theirs``, or continues it."""
        was, now = ours.complete(theirs), ours.as_dict()
        # a setting without effect in both runs may have had another default
        for name in ours.idle(was).keys() & ours.idle(now).keys():
            was[name] = now[name]
        differing, tied = compared(was, now), ours.tied_to_epochs()
        longer = len(differing) == 1 and type(was.get("epochs")) is int and was["epochs"] < ours.epochs
        if not differing or (longer and not tied):
            return
        if longer:
            depended = f"with {' and '.join(tied)} each of its {was['epochs']} epochs depended on their number"
            differing.append(f"The run cannot go on for more epochs: {depended}.")
        named = "`name=NAME` to train another run in this directory, " if hasattr(ours, "name") else ""
        what = "\n".join([f"{path} belongs to a run with different settings:", *differing])
        remedy = f"{named}{self.elsewhere}"
        start = getattr(ours, "start", None)
        if start is None or Path(start).resolve() not in [each.resolve() for each in self._all.values()]:
            remedy += f", or delete {self.names()} to start over"
        raise CheckpointError(f"{what}\nGive the settings that it was made with, {remedy}.")

    def names(self) -> str:
        """The names of the files that exist, as text."""
        return ", ".join(self.paths().values())

    def paths(self) -> dict[str, str]:
        """The files that exist, by kind."""
        return {kind: str(path) for kind, path in self._all.items() if path.exists()}

    def last_checkpoint(self) -> str:
        """A sentence that names the last good checkpoint."""
        for path in filter(Path.exists, (self.checkpoint, self.previous)):
            return f"{path} is the last good checkpoint; it was not changed."
        return "There is no checkpoint of this run."

    def write_history(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes the history, a line of JSON for each record, and the same as CSV, or raises CheckpointError."""
        self._write_text(self.history, "".join(json.dumps(record) + "\n" for record in records))
        self._write_text(self.table, csv_of([dict(numbers(record)) for record in records]))

    def _write_text(self, path: Path, text: str) -> None:
        with self._writing(path):
            replace_file(path, lambda file: file.write(text.encode()))

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns a failed write into a CheckpointError."""
        try:
            yield
        except OSError as error:
            remedy = f"{self.last_checkpoint()} Free space, then run the same command again to resume"
            raise CheckpointError(f"cannot write {path} ({reason(error)}). {remedy}") from error


def numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an epoch's record by name; numbers of inner dictionaries have the name ``name/key``."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """These rows as CSV with a header; a value that a row lacks is empty. Without rows, the text is empty."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*rows))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
