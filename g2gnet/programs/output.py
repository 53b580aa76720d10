"""The output of programs: ``--json``, and files, which are checked before there is anything to write."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from g2gnet.base.files import check_writable, replace_file, same_file
from g2gnet.base.messages import OutputError, reason, say
from g2gnet.base.tensor_files import has_digest
from g2gnet.base.version import __version__
from g2gnet.data.npz import SUFFIX as DATA_SUFFIX
from g2gnet.training.checkpoints import RunFiles

#: stands for standard output in place of a file's name
STDOUT = "-"
#: endings of checkpoints and data, which no program replaces by its output
KEPT = (".pth", DATA_SUFFIX)


def check_output(path: Path | str, arguments: argparse.Namespace | None = None, own_files: Iterable[Path] = ()) -> None:
    """Checks a file before there is anything to write. Raises OutputError if it cannot be written, holds a checkpoint
    or data, is an input of the program by its flags, belongs to a run whose checkpoint the program reads, or is one of
    the program's ``own_files``."""
    path = Path(path)
    try:
        check_writable(path)
        lost = _what_is_lost(path, arguments, own_files)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({reason(error)}); give another file") from error
    if lost:
        raise OutputError(f"will not replace {path}: it is {lost}. Give another file after --json or --output")


def _what_is_lost(path: Path, arguments: argparse.Namespace | None, own_files: Iterable[Path]) -> str | None:
    """Why output must not replace the file at ``path``, in words; None if it may."""
    flags = {} if arguments is None else vars(arguments)
    checkpoints = [Path(name) for name in (flags.get("checkpoint"), *flags.get("checkpoints", ())) if name]
    data = str(flags.get("dataset"))
    inputs = filter(
        None, [flags.get("resnet_weights"), flags.get("start"), data if data.endswith(DATA_SUFFIX) else None]
    )
    if any(same_file(path, file) for file in [*checkpoints, *map(Path, inputs)]):
        return "a file that this program reads"
    of_runs = [file for checkpoint in checkpoints for file in RunFiles.of(checkpoint).files()]
    if any(same_file(path, file) for file in [*own_files, *of_runs]):
        return "one of the run's own files"
    target = path.resolve()
    if target.is_file() and (target.suffix.lower() in KEPT or has_digest(target)):
        return "a checkpoint or a file of data"
    return None


def check_json(arguments: argparse.Namespace, own_files: Iterable[Path] = ()) -> None:
    """Checks the target of ``--json``, if given, as :func:`check_output` does."""
    json_file = getattr(arguments, "json", None)
    if json_file not in (None, STDOUT):
        check_output(json_file, arguments, own_files)


def write_json(json_file: str, document: dict[str, Any]) -> None:
    """Writes a JSON document, with the version of g2g, to the target of ``--json``. Raises OutputError if it cannot."""
    text = json.dumps({"g2g": __version__, **document}, indent=2, ensure_ascii=json_file == STDOUT)
    if json_file == STDOUT:
        say(text)
    else:
        write_output(json_file, f"{text}\n")


def write_file(path: Path | str, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file by ``write``, completely or not at all. Raises OutputError if it cannot be written."""
    try:
        replace_file(Path(path), write)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({reason(error)}); give another file, or free some space") from error


def write_output(path: Path | str, text: str) -> None:
    """Writes ``text`` as UTF-8, with escapes for invalid characters. Raises OutputError if it cannot be written."""
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
