"""Races: each contender runs in a process of its own, and they are timed in turn.

Separate processes give each contender its own peak memory, and a process that waits on its pipe takes no processor
time. Turns are interleaved in rounds of rotating order, so other load on the machine affects all alike. Only contenders
with right results are timed.
"""

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from . import cli
from .machine import PeakMemory, load_lazy_parts, timed

RacerT = TypeVar("RacerT")
ResultT = TypeVar("ResultT")


def nothing() -> None:
    """Does nothing."""


class Turn(NamedTuple):
    """What is timed, what the parent checks, and what is done before each turn, outside its time."""

    step: Callable[[], Any]
    results: Callable[[], Any] = nothing
    before: Callable[[], Any] = nothing


#: The child's side of a race, a generator: it yields its device (None: the CPU) when imports and data are there, whose
#: memory does not count, and then its :class:`Turn`.
Session = Iterator[Any]


@dataclass
class Racer:
    """A participant of a race, and what is known about it."""

    label: str
    session: Callable[..., Session]  # of ``arguments``, in a process of its own
    arguments: tuple[Any, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)  # other fields of its record
    #: what is wrong about the results of the session; it may write them into ``run``
    check: Callable[[dict[str, Any], Any], str] = lambda run, results: ""
    #: or why it has no time: "skipped" (cannot run here), "refused" (raised an error), "wrong" (its results are)
    status: str = "timed"
    reason: str = ""  # in words
    seconds: list[float] = field(default_factory=list)  # one per repeat
    cpu_seconds: list[float] = field(default_factory=list)  # of all threads of its process, waiting in a loop included
    first_seconds: float | None = None  # of the first turn, which may compile, plan and allocate
    base_bytes: int = 0  # of the process with its imports and the data
    peak_bytes: int | None = None  # above that, during the later turns

    def summary(self) -> dict[str, Any]:
        """Its run in a record; it has times only if its results were right."""
        run = {**self.run, "status": self.status, "reason": self.reason}
        if self.status == "timed":
            p20, median, p80 = np.percentile(self.seconds, (20, 50, 80)).tolist()
            run |= {"median": median, "p20": p20, "p80": p80, "repeats": len(self.seconds)}
            run |= {"cpu_median": float(np.median(self.cpu_seconds))}
            run |= {"first_seconds": self.first_seconds, "peak_bytes": self.peak_bytes}
        return run


class WorkerError(RuntimeError):
    """A worker could not fulfil a request."""


class Worker:
    """The parent's end of a process that answers requests, which are methods of :class:`_Child`."""

    def __init__(self, session: Callable[..., Session], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, session, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, request: str) -> Any:
        try:
            self._connection.send(request)
            succeeded, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise WorkerError(f"its process died (exit code {self._process.exitcode})") from None
        if not succeeded:
            raise WorkerError(answer)
        return answer

    def close(self) -> None:
        self._connection.close()  # upon which it ends by itself
        self._process.join(5)
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, session: Callable[..., Session], *arguments: Any) -> None:
    """The child's main loop: answers requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    child = _Child(session(*arguments))
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            try:
                answer = True, getattr(child, request)()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                answer = False, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            connection.send(answer)


class _Child:
    def __init__(self, session: Session) -> None:
        self.session = session  # what it loaded lives as long as this

    def build(self) -> None:
        self.device = next(self.session) or torch.device("cpu")
        load_lazy_parts(self.device)
        self.memory = PeakMemory(self.device)
        self.turn: Turn = next(self.session)

    def restart(self) -> None:
        self.memory.restart()

    def memory_used(self) -> tuple[int, int]:
        return self.memory.before, self.memory.above()

    def results(self) -> Any:
        return self.turn.results()

    def time(self) -> tuple[float, float]:
        """Seconds for one turn, and processor time."""
        self.turn.before()
        before = time.process_time()
        taken = timed(self.turn.step, self.device)
        return taken, time.process_time() - before


def race(
    racers: Sequence[Racer], repeats: int, warm_up: int = 2, between_rounds: Callable[[], None] = nothing
) -> Sequence[Racer]:
    """Checks all racers that are not skipped, one after the other, then times them in turn, under a progress bar.

    Each has ``warm_up`` untimed turns, the last of which counts memory, and ``repeats`` timed ones. Before each round,
    while no racer computes, ``between_rounds`` is called. The racers are returned with their times.
    """
    with contextlib.ExitStack() as stack:
        running: list[tuple[Racer, Worker]] = []
        here = [racer for racer in racers if racer.status != "skipped"]
        bar = stack.enter_context(cli.bar(len(here) * (1 + repeats)))
        for racer in here:
            bar.set_description(f"checking {racer.label}", refresh=False)
            bar.update()
            worker = Worker(racer.session, *racer.arguments)
            stack.callback(worker.close)
            if _admit(racer, worker, warm_up):
                running.append((racer, worker))
            else:
                worker.close()
        for _, place, (racer, worker) in turns(running, repeats):
            if place == 0:
                between_rounds()
            bar.set_description(racer.label, refresh=False)
            bar.update()
            if racer.status == "timed":
                with _noting_failure(racer):
                    taken, processor = worker.ask("time")
                    racer.seconds.append(taken)
                    racer.cpu_seconds.append(processor)
    return racers


def turns(racers: Sequence[RacerT], rounds: int) -> Iterator[tuple[int, int, RacerT]]:
    """Every racer once per round, each time begun by the next racer: the round, the place in it, and the racer."""
    for number in range(rounds):
        first = number % len(racers) if racers else 0
        for place, racer in enumerate((*racers[first:], *racers[:first])):
            yield number, place, racer


def in_turn(
    works: Mapping[str, Callable[[], ResultT]], rounds: int, warm_up: int = 1, done: Callable[[], Any] = nothing
) -> dict[str, list[ResultT]]:
    """The results of works of this process in ``rounds`` turns after ``warm_up``; ``done`` is called after each."""
    given: dict[str, list[ResultT]] = {name: [] for name in works}
    for number, _, name in turns(list(works), warm_up + rounds):
        result = works[name]()
        if number >= warm_up:
            given[name].append(result)
        done()
    return given


def _admit(racer: Racer, worker: Worker, warm_up: int) -> bool:
    """Builds and warms up the racer, counts its memory and checks its results."""
    with _noting_failure(racer):
        worker.ask("build")
        for turn in range(warm_up):
            if turn == warm_up - 1:
                worker.ask("restart")
            taken, _ = worker.ask("time")
            racer.first_seconds = racer.first_seconds or taken
        racer.base_bytes, racer.peak_bytes = worker.ask("memory_used")
        racer.reason = racer.check(racer.run, worker.ask("results"))
        if racer.reason:
            racer.status = "wrong"
    return racer.status == "timed"


@contextlib.contextmanager
def _noting_failure(racer: Racer) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        racer.status, racer.reason, racer.seconds = "refused", str(error), []
