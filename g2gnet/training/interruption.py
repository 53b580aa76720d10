"""Ctrl-C and other requests to stop during training: the step is finished and saved before the program ends. What
systems do differently with signals is decided here."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

#: seconds in which the same signal again is the same request: a terminal or a process manager sends it to every process
#: of a job, and torchrun, one of them, passes it on
GRACE = 3.0
#: what asks a program to stop; on Windows a process can send another one no SIGTERM, but Ctrl-Break
STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(Exception):  # noqa: N818  (nothing is wrong)
    """The ``signal`` with this number ended a run early; the message says what was saved and how to resume."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def raised(number: signal.Signals, message: str) -> contextlib.AbstractContextManager[None]:
    """While entered, the signal raises :class:`Interrupted` with this message, as Ctrl-C raises KeyboardInterrupt."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(message, number)

    return handled(number, interrupt)


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """While entered, the signal has this handler, in the main thread alone and unless the signal is ignored."""
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def leave_stopping_to_parent() -> None:
    """Called first in a process that trains for another one, which :func:`stop_children` stops. Ctrl-C reaches all
    processes of a terminal: these ignore it, but on Windows, where it is all that can reach them and outside training
    ends them without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL if sys.platform == "win32" else signal.SIG_IGN)


def stop_children(children: Iterable[BaseProcess], error: BaseException) -> None:
    """Asks processes to stop after ``error`` here; on Windows Ctrl-C has done so, and after other errors they end at
    once."""
    if sys.platform == "win32" and isinstance(error, KeyboardInterrupt):
        return
    for process in children:
        process.terminate()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """While entered, the first signal of :data:`STOP` goes into the list; the next one ends the process at once, unless
    it is the same signal within :data:`GRACE` seconds. As with :func:`handled`, does nothing outside the main thread
    and for signals that are ignored, as by ``nohup`` or a shell's ``&``."""
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        if received:
            return
        received.append(signal.Signals(number))
        # not by print, which the signal may have interrupted
        with contextlib.suppress(OSError):
            text = f"\n{received[0].name}: finishing and saving this step; after {GRACE:.0f} seconds a second signal"
            os.write(2, f"{text} ends at once\n".encode())

    with contextlib.ExitStack() as held:
        if threading.current_thread() is threading.main_thread():
            reader, writer = map(held.enter_context, socket.socketpair())
            writer.setblocking(False)
            held.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
            threading.Thread(target=_end_at_next, args=(reader,), daemon=True).start()
            for number in STOP:
                held.enter_context(handled(number, note))
        yield received


def _end_at_next(reader: socket.socket) -> None:
    """Ends the process at the second signal from ``reader``, even if the main thread waits inside PyTorch."""
    first: tuple[int, float] | None = None
    with contextlib.suppress(OSError):
        for number in iter(lambda: reader.recv(1), b""):
            now = time.monotonic()
            if number[0] not in STOP:
                continue
            if first is None:
                first = number[0], now
            elif number[0] != first[0] or now - first[1] > GRACE:
                os._exit(128 + number[0])
