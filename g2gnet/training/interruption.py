"""Ctrl-C and SIGTERM during training: the step is finished and saved before the program ends."""

import contextlib
import os
import signal
import threading
from typing import Any


class Interrupted(Exception):  # noqa: N818  (nothing is wrong)
    """A signal ended a run early; the message says what was saved and how to resume.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is stored in ``received``; the next ends the process at once.

    Only the main thread gets signals: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # not print: the signal may have interrupted one
        with contextlib.suppress(OSError):
            os.write(
                2, f"\n{self.received.name}: finishing and saving this step; a second signal ends at once\n".encode()
            )
