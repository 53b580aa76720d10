"""Runs contenders side by side, each in a process of its own, and times them in turn.

Separate processes give each contender its own peak memory, and a process that waits on its pipe takes no processor
time. Turns are interleaved, round by round and in a rotating order, so other load on the machine affects all alike. No
contender is timed before the judge has accepted its results.
"""

import contextlib
import importlib
import multiprocessing
import operator
import signal
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from . import cli
from .contender import Contender
from .correctness import Judge
from .machine import PeakMemory, load_lazy_parts, timed
from .registry import KERNELS, Entry
from .workload import Prepared, load

RacerT = TypeVar("RacerT")
ResultT = TypeVar("ResultT")


@dataclass
class Racer:
    """What takes part in a race: a session in a process of its own, and what is known of it.

    Attributes:
        label: its name.
        session: makes the child's :class:`Session` of ``arguments``.
        check: what is wrong about the results of the session, or "".
        run: what else a record says of it.
        status: ``"timed"``, or why there is no time: ``"skipped"`` (cannot run here), ``"refused"`` (says it cannot
            do this), ``"wrong"`` (its results are).
        reason: the same in words, or "".
        seconds: one per repeat.
        cpu_seconds: the same in processor time of all threads of its process, waiting in a loop included.
        first_seconds: of the first turn, which may compile, plan and allocate.
        peak_bytes: during the later turns, above the process with its imports and the data.
    """

    label: str
    session: Callable[..., "Session"]
    arguments: tuple[Any, ...] = ()
    check: Callable[[Any], str] = lambda results: ""
    run: dict[str, Any] = field(default_factory=dict)
    status: str = "timed"
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    peak_bytes: int | None = None

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
    """The parent's end of a process that answers requests: calls of methods of ``session(*arguments)`` or its parts."""

    def __init__(self, session: Callable[..., Any], *arguments: Any) -> None:
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


def _serve(connection: Connection, make: Callable[..., Any], *about: Any) -> None:
    """The child's main loop: answers requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    session = make(*about)
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = operator.attrgetter(connection.recv())
            try:
                answer = True, request(session)()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                answer = False, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            connection.send(answer)


class Session(ABC):
    """The child's side of a race: a training step, or another kernel."""

    device = torch.device("cpu")
    memory: PeakMemory  # begins in :meth:`build`, after imports and data

    @abstractmethod
    def build(self) -> None:
        """Prepares the step."""

    @abstractmethod
    def step(self) -> Any:
        """What is timed."""

    @abstractmethod
    def results(self) -> Any:
        """What the parent checks."""

    def time(self) -> tuple[float, float]:
        """Seconds for one turn, and processor time."""
        before = time.process_time()
        taken = timed(self.step, self.device)
        return taken, time.process_time() - before


@dataclass(frozen=True)
class Job:
    """A contender to run on a prepared workload."""

    entry: Entry
    path: Path
    kernel: str = "step"
    device: str = "cpu"


class _ContenderSession(Session):
    prepared: Prepared
    contender: Contender

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)

    def build(self) -> None:
        module, _, name = self.job.entry.target.partition(":")
        kind: type[Contender] = getattr(importlib.import_module(module), name)
        self.prepared = prepared = load(self.job.path)  # kept: freeing it would make memory use seem smaller
        kind.preload(prepared, self.job.entry.precision, self.job.entry.options.get("inputs", ""))
        load_lazy_parts(self.device)
        self.memory = PeakMemory(self.device)
        self.contender = kind(prepared, self.device, self.job.entry.precision, **self.job.entry.options)

    def step(self) -> None:
        getattr(self.contender, KERNELS[self.job.kernel].method)()

    def time(self) -> tuple[float, float]:
        self.contender.before_turn()
        return super().time()

    def results(self) -> dict[str, Any]:
        forward_only = self.job.kernel == "forward"
        results = self.contender.forward_results() if forward_only else self.contender.results()
        # numpy goes through the pipe as it is; tensors would go through shared memory that dies with this process
        return {
            "results": {name: _to_numpy(tensor) for name, tensor in results.items()},
            "firing_rates": self.contender.firing_rates(results),
            "differs": self.contender.differs,
            "how": (self.contender.reset, self.job.entry.precision, self.contender.masked, self.contender.omits),
        }


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """On the host, and wider where numpy has no such type."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def measure(
    jobs: Sequence[Job],
    repeats: int = 10,
    warm_up: int = 2,
    between_rounds: Callable[[], None] = lambda: None,
) -> list[Racer]:
    """Checks and times contenders; those whose entry is unavailable come back as skipped (see :func:`race`)."""
    judges: dict[tuple[Path, str], Judge] = {}

    def racer(job: Job) -> Racer:
        entry = job.entry
        run: dict[str, Any] = {"contender": entry.label, "precision": entry.precision, "differs": ""}
        run |= {"firing_rates": None, "closest": None}

        def check(answer: dict[str, Any]) -> str:
            key = job.path, job.kernel
            if key not in judges:
                judges[key] = Judge(load(job.path), job.kernel)
            results = {name: torch.as_tensor(array) for name, array in answer["results"].items()}
            verdict = judges[key].verdict(results, *answer["how"])
            run.update(firing_rates=answer["firing_rates"], differs=answer["differs"], closest=verdict.closest())
            return verdict.objection

        status = "skipped" if entry.unavailable else "timed"
        return Racer(entry.label, _ContenderSession, (job,), check, run, status, entry.unavailable or "")

    def rest() -> None:
        judges.clear()
        between_rounds()

    racers = [racer(job) for job in jobs]
    race(racers, repeats, warm_up, rest)
    return racers


def race(
    racers: Sequence[Racer],
    repeats: int,
    warm_up: int = 2,
    between_rounds: Callable[[], None] = lambda: None,
) -> None:
    """Checks all racers that are not skipped, one after the other, then times them in turn, under a progress bar.

    Args:
        racers: who takes part; they keep the times.
        repeats: timed turns each.
        warm_up: untimed turns before them; memory is that of the last of these.
        between_rounds: called before each round, when no racer computes.
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


def turns(racers: Sequence[RacerT], rounds: int) -> Iterator[tuple[int, int, RacerT]]:
    """Every racer once per round, each round begun by the next one; numbered by the round and within it."""
    for number in range(rounds):
        first = number % len(racers) if racers else 0
        for place, racer in enumerate((*racers[first:], *racers[:first])):
            yield number, place, racer


def in_turn(
    works: Mapping[str, Callable[[], ResultT]], rounds: int, warm_up: int = 1, done: Callable[[], Any] = lambda: None
) -> dict[str, list[ResultT]]:
    """What works of this process give in ``rounds`` turns, after ``warm_up`` others; ``done`` is called after each."""
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
                worker.ask("memory.restart")
            taken, _ = worker.ask("time")
            racer.first_seconds = racer.first_seconds or taken
        racer.peak_bytes = worker.ask("memory.above")
        racer.reason = racer.check(worker.ask("results"))
        if racer.reason:
            racer.status = "wrong"
    return racer.status == "timed"


@contextlib.contextmanager
def _noting_failure(racer: Racer) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        racer.status, racer.reason, racer.seconds = "refused", str(error), []
