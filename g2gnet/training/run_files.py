"""The files of a run: checkpoint, history and marker. Written so that a crash leaves the old or the new one whole."""

import contextlib
import csv
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from g2gnet.files import leftovers, replace_file
from g2gnet.tensor_file import TensorFileError, read_tensors, write_tensors

#: version of the checkpoint's structure
FORMAT = 2


class CheckpointError(RuntimeError):
    """A run's files cannot be used or written; the message says why, and what to do. The files are left alone."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :meth:`RunFiles.save_checkpoint` wrote, on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: if it is missing, damaged or not one of ours.
    """
    try:
        state = read_tensors(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except TensorFileError as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("settings"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this version of g2g.")
    return state


class Checkpoint(NamedTuple):
    """A checkpoint that was read, and the file it was in."""

    path: Path
    state: dict[str, Any]


class RunFiles:
    """``<directory>/<stem>`` with the endings .pth (checkpoint), .jsonl and .csv (history), .analysis.json and .DONE
    (marker).

    Until the run is finished, .previous.pth is the checkpoint before the last one: it is used where that is damaged.

    Raises:
        CheckpointError: if the directory cannot be made or written to.
    """

    def __init__(self, directory: Path | str, stem: str) -> None:
        self.directory = Path(directory)
        self.checkpoint = self.directory / f"{stem}.pth"
        self.previous = self.directory / f"{stem}.previous.pth"
        self.history = self.directory / f"{stem}.jsonl"
        self.table = self.directory / f"{stem}.csv"
        self.analysis = self.directory / f"{stem}.analysis.json"
        self.marker = self.directory / f"{stem}.DONE"
        self._whole = False  # whether self.checkpoint is known to be, so that it may replace self.previous
        self.lock = self.directory / f".{stem}.lock"
        self._lock = FileLock(self.lock)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise CheckpointError(
                f"cannot write to the checkpoint directory {self.directory} ({error.strerror}); "
                "give another one by --checkpoint_dir"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While it is entered, no other process can enter it for these files; the lock ends with its process.

        What a killed process was writing, or had yet to delete, is cleared away.

        Raises:
            CheckpointError: if another run has entered.
        """
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise CheckpointError(
                f"another run of this name is at work on {self.checkpoint} (it holds {self.lock}); "
                f"wait for its end, or give another --checkpoint_dir than {self.directory}"
            ) from error
        try:
            for path in (self.checkpoint, self.history, self.table, self.analysis, self.marker):
                for leftover in leftovers(path):
                    leftover.unlink(missing_ok=True)
            if self.marker.exists():
                self.previous.unlink(missing_ok=True)
            yield
        finally:
            self._lock.release()

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint by ``state`` (tensors, numbers, strings and containers of them).

        Raises:
            CheckpointError: if it cannot be written (a full disk, say); the previous checkpoint is still there.
        """
        keep = self.previous if self._whole else None
        with self._writing(self.checkpoint):
            write_tensors(self.checkpoint, {"format": FORMAT, **state}, keep)
        self._whole = True

    def load_checkpoint(self, settings: dict[str, Any]) -> Checkpoint | None:
        """The checkpoint on the CPU, or where it is damaged or missing the one before it, or None if there is none.

        Raises:
            CheckpointError: if neither can be used, or if it was made with other settings.
        """
        problems = []
        for path in (self.checkpoint, self.previous):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            self._check_settings(path, state["settings"], settings)
            self._whole = path == self.checkpoint
            if problems:
                print(f"{problems[0]} Going back to the checkpoint before it.", file=sys.stderr)
            return Checkpoint(path, state)
        if problems:
            raise CheckpointError(
                f"{' '.join(problems)} Nothing was changed; move {self.names()} away to start anew, or give another "
                f"--checkpoint_dir than {self.directory}."
            )
        return None

    def mark_done(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Writes the marker of a finished run, which needs no second checkpoint any more.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._write_text(self.marker, json.dumps({"settings": settings, "result": result}, indent=2) + "\n")
        self.previous.unlink(missing_ok=True)

    def write_analysis(self, analysis: dict[str, Any]) -> None:
        """Writes the analysis of the trained network.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._write_text(self.analysis, json.dumps(analysis) + "\n")

    def load_marker(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of the finished run, or None if it is not finished.

        Raises:
            CheckpointError: if the marker is damaged or of a run with other settings.
        """
        if not self.marker.exists():
            return None
        try:
            content = json.loads(self.marker.read_text())
            made_with, result = content["settings"], dict(content["result"])
            made_with.items()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.marker} cannot be read ({error}); delete it to train again") from error
        self._check_settings(self.marker, made_with, settings)
        return result

    def _check_settings(self, path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        differing = [
            f"  {name}: {theirs.get(name, 'not set')} there, {ours.get(name, 'not set')} now"
            for name in sorted({*theirs, *ours})
            if theirs.get(name, "not set") != ours.get(name, "not set")
        ]
        if differing:
            raise CheckpointError(
                f"{path} belongs to a run with other settings:\n" + "\n".join(differing) + "\n"
                f"Give the settings that it was made with, another --checkpoint_dir than {self.directory}, "
                f"or delete {self.names()} to start anew."
            )

    def names(self) -> str:
        """The files that exist, in words."""
        return ", ".join(self.paths().values())

    def paths(self) -> dict[str, str]:
        """The files that exist, each under what it is."""
        files = ("checkpoint", "previous", "history", "table", "analysis", "marker")
        return {name: str(getattr(self, name)) for name in files if getattr(self, name).exists()}

    def last_checkpoint(self) -> str:
        """Where the last good checkpoint is, in a sentence."""
        if not self.checkpoint.exists():
            return "No checkpoint was written yet."
        return f"{self.checkpoint} is the last good checkpoint; it was left alone."

    def write_history(self, records: Sequence[dict[str, Any]]) -> None:
        """Makes the history hold just these records: a line of JSON each, and the same as a table for spreadsheets.

        Lines that are there already stay as they are, so that a program can follow the growing file.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._write_lines(self.history, "".join(json.dumps(record) + "\n" for record in records))
        self._write_lines(self.table, as_csv(records))

    def _write_lines(self, path: Path, text: str) -> None:
        """Makes ``text`` the content of the file, by adding to it if that will do."""
        with self._writing(path):
            content, there = text.encode(), path.read_bytes() if path.exists() else None
            if there is None or not content.startswith(there):
                replace_file(path, lambda file: file.write(content))
            else:
                with path.open("ab") as file:
                    file.write(content[len(there) :])

    def _write_text(self, path: Path, text: str) -> None:
        with self._writing(path):
            replace_file(path, lambda file: file.write(text.encode()))

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turns the failures of a write into CheckpointError."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path} ({error.strerror}); every epoch is kept in the last checkpoint. "
                "Make room, then run the same command to go on from it"
            ) from error
        except TensorFileError as error:
            raise CheckpointError(f"{path} was not written: {error}") from error


def numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an epoch's record, those of dictionaries inside it as ``name/key``."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """A header and a row a record; empty where a record lacks what another one has."""
    rows = [dict(numbers(record)) for record in records]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
