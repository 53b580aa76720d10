"""Writing files so that a crash leaves the old or the new one whole."""

import contextlib
import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock


def replace_file(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Writes a file beside ``path``, flushes it to the disk and renames it: at any instant one of the two is whole.

    With ``keep``, the file that was at ``path`` gets that name just before.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is its owner's alone
        if keep is not None:
            os.replace(path, keep)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if os.name == "posix":  # the rename itself is only safe once the directory is on the disk
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """While it is entered, the user's other processes on this machine wait to enter it for the same ``path``."""
    # the lock's file stays, and the directory of path may be a read-only one: it lies among the temporary files
    name = hashlib.sha256(f"{getattr(os, 'getuid', int)()} {path.resolve()}".encode()).hexdigest()
    with FileLock(Path(tempfile.gettempdir(), f"g2g-{name[:16]}.lock")):
        yield


def leftovers(path: Path) -> list[Path]:
    """What :func:`replace_file` left behind for ``path`` where its process was killed."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*"))
