"""Ctrl-C and SIGTERM during training: the step is finished and saved before the program ends."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

#: Seconds in which the same signal again is the same request: a terminal or a process manager sends it to every process
#: of a job, and torchrun, which is one of them, passes it on.
GRACE = 3.0


class Interrupted(Exception):  # noqa: N818  (nothing is wrong)
    """The ``signal`` of this number ended a run early; the message says what was saved and how to resume."""

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
    """While entered, the signal has this handler. Elsewhere than in the main thread, which alone gets signals, nothing
    happens. One that is ignored stays ignored."""
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """While entered, the first SIGINT or SIGTERM comes into the list; the next one ends the process at once, unless it
    is the same within :data:`GRACE` seconds. As with :func:`handled`, only in the main thread; one that is ignored, as
    by ``nohup`` or a shell's ``&``, stays ignored."""
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        if received:
            return
        received.append(signal.Signals(number))
        # not print: the signal may have interrupted one
        with contextlib.suppress(OSError):
            text = f"\n{received[0].name}: finishing and saving this step; after {GRACE:.0f} seconds a second signal"
            os.write(2, f"{text} ends at once\n".encode())

    with contextlib.ExitStack() as held:
        if threading.current_thread() is threading.main_thread():
            reader, writer = map(held.enter_context, socket.socketpair())
            writer.setblocking(False)
            held.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
            threading.Thread(target=_end_at_next, args=(reader,), daemon=True).start()
            for number in (signal.SIGINT, signal.SIGTERM):
                held.enter_context(handled(number, note))
        yield received


def _end_at_next(reader: socket.socket) -> None:
    """Ends the process at the second of the signals whose numbers come from ``reader``, in a thread of its own: the
    main one may be inside PyTorch, waiting for a process that is gone."""
    first: tuple[int, float] | None = None
    with contextlib.suppress(OSError):
        for number in iter(lambda: reader.recv(1), b""):
            now = time.monotonic()
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if first is None:
                first = number[0], now
            elif number[0] != first[0] or now - first[1] > GRACE:
                os._exit(128 + number[0])
