"""Reads regular files only, writes files so that a crash leaves the old or the new one complete, and locks them. What
systems do differently with files is decided here."""

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from g2gnet.base.messages import reason, warn

#: errors of file systems without locks (mostly network file systems)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
#: seconds for which Windows is asked again to replace or remove a file that another program has open
PATIENCE = 5.0


def open_file(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError if it cannot be opened or is another kind of file: a FIFO would
    wait for a writer, a device may not end."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_file(path: Path | str) -> bytes:
    """The content of a regular file. Raises OSError as :func:`open_file` does."""
    with open_file(path) as file:
        return file.read()


def expanded(names: Iterable[str]) -> list[Path]:
    """The files of names, which on Windows may be patterns (``*.pth``): its shells leave them to programs."""
    return [Path(file) for name in names for file in (sys.platform == "win32" and sorted(glob.glob(name))) or [name]]


def check_own(path: Path) -> None:
    """Raises OSError if anything but a regular file is at ``path``, the place of a program's own file: the target of a
    link may belong to somebody else, a FIFO would wait for a reader."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise OSError(errno.EINVAL, f"it is {what}", str(path))


def open_own(path: Path | str, flags: int) -> int:
    """Opens a program's own file, as the ``opener`` of ``open``. Raises OSError as :func:`check_own` does."""
    check_own(Path(path))
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def make_directory(path: Path) -> None:
    """Makes a directory and its parents. Raises OSError, NotADirectoryError where something else has its name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def same_file(one: Path, other: Path) -> bool:
    """Whether two names are of one file, which need not exist: they may differ by ``..``, links, or letters' case."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def is_special(path: Path) -> bool:
    """Whether ``path`` is a FIFO, a device or a socket: these are written to, not replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_writable(path: Path) -> None:
    """Raises OSError if :func:`replace_file` could not write ``path``, before there is anything to write."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if is_special(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    _, trial = _temporary(path)  # the longer of its two names
    trial.touch(exist_ok=False)
    remove_file(trial)  # a run that begins at this moment may have removed it with other leftovers


def replace_file(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Writes a file beside ``path``, flushes it to disk and renames it, so that ``path`` is complete at any instant.
    Replaces the target of a symbolic link; writes to FIFOs and devices. The old file also gets the name ``keep``."""
    if is_special(path):
        with path.open("wb") as file:
            write(file)
        return
    path = Path(os.path.realpath(path))
    first, second = _temporary(path)
    try:
        with first.open("xb") as file:
            write(file)
            file.flush()
            _flush(file.fileno())
        if keep is not None:
            try:
                os.link(path, second)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, second)
            _persistently(lambda: os.replace(second, keep))  # a link alone cannot replace a file
        _persistently(lambda: os.replace(first, path))
    except BaseException:
        for leftover in (first, second):
            with contextlib.suppress(OSError):
                remove_file(leftover)
        raise
    if os.name == "posix":  # the rename is only safe once the directory is on the disk
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            _flush(directory)
        finally:
            os.close(directory)


def remove_file(path: Path) -> None:
    """Removes a file, if it exists. Raises OSError if it cannot be removed."""
    _persistently(lambda: path.unlink(missing_ok=True))


def _persistently(change: Callable[[], Any]) -> None:
    """Calls ``change``, on Windows again and again for :data:`PATIENCE` seconds: a virus scanner or a reader of results
    may have the file open, which elsewhere does not matter."""
    end = time.monotonic() + PATIENCE
    while sys.platform == "win32" and time.monotonic() < end:
        with contextlib.suppress(PermissionError):
            return change()
        time.sleep(0.01)
    change()


def _flush(descriptor: int) -> None:
    """Writes what the system holds of an open file to the disk; for macOS, ``fsync`` is done once the drive has it in
    its memory."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # another system, or a file system without it
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined,unused-ignore]
        return
    os.fsync(descriptor)


def _temporary(path: Path) -> tuple[Path, Path]:
    """Two new names beside the file at ``path``, links followed: for its replacement and for its second name."""
    target = Path(os.path.realpath(path))
    first = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    return first, Path(f"{first}.keep")


def leftovers(path: Path) -> list[Path]:
    """The files that a killed :func:`replace_file` left beside ``path``."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*"))


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """While entered, no other process can enter it for the lock file ``path``. The lock ends with its process, the file
    stays. Warns if the file system has no locks. Raises ``filelock.Timeout`` if another process has entered it and
    ``wait`` is false, another OSError if the file cannot be opened, or is a symbolic link or no regular file."""
    check_own(path)
    lock = filelock.FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter from filelock 3, for ENOSYS
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        warn(f"warning: {path} cannot be locked ({reason(error)}): make sure that no other process does the same")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """While entered, the user's other processes on this machine wait to enter it for the same ``path``. Warns if the
    user's cache, where the locks are, cannot be written to."""
    # not beside path: the lock's file stays, and that directory may be read-only
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "g2g", "locks")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    with contextlib.ExitStack() as held:
        try:
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            held.enter_context(locked(cache / f"{name[:16]}.lock", wait=True))
        except OSError as error:
            warn(f"warning: no lock in {cache} ({reason(error)}): make sure that no other process makes {path}")
        yield
