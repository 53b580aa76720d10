"""The files of a run: checkpoint, history and marker. Written so that a crash leaves the old or the new one whole."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from g2gnet.files import replace_file

#: version of the checkpoint's structure
FORMAT = 1


class CheckpointError(RuntimeError):
    """A run's files cannot be used or written; the message says why, and what to do. The files are left alone."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :meth:`RunFiles.save_checkpoint` wrote, on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: if it is missing, damaged or not one of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # what a damaged file makes torch.load raise is an open list
        summary = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read ({summary}).") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("settings"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of this version of g2g.")
    return state


class RunFiles:
    """``<directory>/<stem>`` with the endings .pth (checkpoint), .jsonl (history), .analysis.json and .DONE (marker).

    Raises:
        CheckpointError: if the directory cannot be made or written to.
    """

    def __init__(self, directory: Path | str, stem: str) -> None:
        self.directory = Path(directory)
        self.checkpoint = self.directory / f"{stem}.pth"
        self.history = self.directory / f"{stem}.jsonl"
        self.analysis = self.directory / f"{stem}.analysis.json"
        self.marker = self.directory / f"{stem}.DONE"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise CheckpointError(
                f"cannot write to the checkpoint directory {self.directory} ({error.strerror}); "
                "give another one by --checkpoint_dir"
            ) from error

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint by ``state`` (tensors, numbers, strings and containers of them).

        Raises:
            CheckpointError: if it cannot be written (a full disk, say); the previous checkpoint is still there.
        """
        try:
            replace_file(self.checkpoint, lambda file: torch.save({"format": FORMAT, **state}, file))
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            raise CheckpointError(
                f"cannot write {self.checkpoint} ({error}); the last one that was written is untouched. "
                "Make room, then run the same command to go on from it"
            ) from error

    def load_checkpoint(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The checkpoint on the CPU, or None if there is none.

        Raises:
            CheckpointError: if it is damaged, not one of ours, or made with other settings.
        """
        if not self.checkpoint.exists():
            return None
        way_out = f"It was left alone; move it away, or give another --checkpoint_dir than {self.directory}"
        try:
            state = read_checkpoint(self.checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {way_out}.") from error
        self._check_settings(self.checkpoint, state["settings"], settings)
        return state

    def mark_done(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Writes the marker of a finished run."""
        text = json.dumps({"settings": settings, "result": result}, indent=2) + "\n"
        replace_file(self.marker, lambda file: file.write(text.encode()))

    def write_analysis(self, analysis: dict[str, Any]) -> None:
        """Writes the analysis of the trained network.

        Raises:
            CheckpointError: if it cannot be written.
        """
        text = json.dumps(analysis) + "\n"
        try:
            replace_file(self.analysis, lambda file: file.write(text.encode()))
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.analysis} ({error.strerror}); every epoch is kept. Make room and run this again"
            ) from error

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
        files = (self.checkpoint, self.history, self.analysis, self.marker)
        return ", ".join(str(path) for path in files if path.exists())

    def write_history(self, records: list[dict[str, Any]]) -> None:
        """Makes the history hold just these records, one line of JSON each."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        if not self.history.exists() or self.history.read_text() != text:
            replace_file(self.history, lambda file: file.write(text.encode()))

    def append_history(self, record: dict[str, Any]) -> None:
        """Adds one line of JSON."""
        with self.history.open("a") as file:
            file.write(json.dumps(record) + "\n")
