"""Output for people: printed at once, and safe for a terminal even if it quotes a hostile file."""

import errno
import os
import shlex
import subprocess
import sys
from typing import TextIO

#: characters that move the cursor, change colours or reverse the direction of writing
_CONTROLS = [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_HARMLESS = {code: rf"\x{code:02x}" for code in _CONTROLS if chr(code) not in "\n\t"}


class OutputError(RuntimeError):
    """A program's output cannot be written."""


def printable(text: str) -> str:
    """``text`` with escapes for control characters and for bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode().translate(_HARMLESS)


def say(text: str) -> None:
    """Prints to standard output. Raises BrokenPipeError if its reader has left, OutputError if it fails otherwise."""
    try:
        print(printable(text), flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
        discard(sys.stdout)
        raise OutputError(f"cannot write to standard output ({error.strerror}); redirect it to another file") from error


def warn(text: str) -> None:
    """Prints to standard error. If that fails, the program continues without the message."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirects a stream that cannot be written, so that the interpreter's last flush raises no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def quoted(argument: object) -> str:
    """An argument as the shells of this system take it, in quotation marks where it needs some."""
    return subprocess.list2cmdline([str(argument)]) if sys.platform == "win32" else shlex.quote(str(argument))


def reason(error: BaseException) -> str:
    """The cause of an error in one line: the message of the system or of the error, or else the error's type."""
    text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    return text or type(error).__name__
