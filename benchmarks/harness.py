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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from .contender import Contender
from .correctness import Judge, Verdict
from .machine import PeakMemory, load_lazy_parts, timed
from .registry import KERNELS, Entry
from .workload import Prepared, load

RacerT = TypeVar("RacerT")


@dataclass(frozen=True)
class Job:
    """A contender to run on a prepared workload."""

    entry: Entry
    path: Path
    kernel: str = "step"
    device: str = "cpu"


@dataclass
class Outcome:
    """The outcome of a job.

    Attributes:
        status: ``"timed"``, or why there is no time: ``"skipped"`` (cannot run here), ``"refused"`` (says it cannot
            do this), ``"wrong"`` (its results are).
        reason: the same in words, or "".
        seconds: one per repeat.
        cpu_seconds: the same in processor time of all threads of its process, waiting in a loop included.
        first_seconds: of the first turn, which may compile, plan and allocate.
        peak_bytes: during the later turns, above the process with its imports and the data.
        differs: how its computation differs from the others', in words.
    """

    job: Job
    status: str = "timed"
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    peak_bytes: int | None = None
    firing_rates: list[float] | None = None
    differs: str = ""
    verdict: Verdict | None = None


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


class _Session:
    """The child's side of each request."""

    prepared: Prepared
    contender: Contender
    memory: PeakMemory

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device(job.device)

    def build(self) -> None:
        module, _, name = self.job.entry.target.partition(":")
        kind: type[Contender] = getattr(importlib.import_module(module), name)
        self.prepared = prepared = load(self.job.path)  # kept: freeing it would make memory use seem smaller
        kind.preload(prepared, self.job.entry.precision, **self.job.entry.options)
        load_lazy_parts(self.device)
        self.memory = PeakMemory(self.device)
        self.contender = kind(prepared, self.device, self.job.entry.precision, **self.job.entry.options)

    def time(self) -> tuple[float, float]:
        """Seconds for one turn, and processor time."""
        work = getattr(self.contender, KERNELS[self.job.kernel].method)
        self.contender.before_turn()
        before = time.process_time()
        taken = timed(work, self.device)
        return taken, time.process_time() - before

    def results(self) -> dict[str, Any]:
        forward_only = self.job.kernel == "forward"
        results = self.contender.forward_results() if forward_only else self.contender.results()
        # numpy goes through the pipe as it is; tensors would go through shared memory that dies with this process
        return {
            "results": {name: _to_numpy(tensor) for name, tensor in results.items()},
            "firing_rates": self.contender.firing_rates(results),
            "reset": self.contender.reset,
            "masked": self.contender.masked,
            "omits": self.contender.omits,
            "differs": self.contender.differs,
        }


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """On the host, and wider where numpy has no such type."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def measure(
    jobs: Sequence[Job],
    repeats: int = 10,
    warm_up: int = 2,
    progress: Callable[[str], None] = lambda text: None,
    between_rounds: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Checks and times the jobs.

    Args:
        jobs: what to run; jobs whose entry is unavailable come back as skipped.
        repeats: timed turns each.
        warm_up: untimed turns before them, at least two; memory is that of the turns after the first.
        progress: called with the current action, once per job for its check and once per job and round.
        between_rounds: called after each round, when no contender computes.
    """
    outcomes = [Outcome(job) for job in jobs]
    judges: dict[tuple[Path, str], Judge] = {}
    with contextlib.ExitStack() as stack:
        racers: list[tuple[Worker, Outcome]] = []
        for outcome in outcomes:
            progress(f"checking {outcome.job.entry.label}")
            if outcome.job.entry.unavailable:
                outcome.status, outcome.reason = "skipped", outcome.job.entry.unavailable
                continue
            key = outcome.job.path, outcome.job.kernel
            if key not in judges:
                judges[key] = Judge(load(outcome.job.path), outcome.job.kernel)
            worker = Worker(_Session, outcome.job)
            stack.callback(worker.close)
            if _admit(worker, outcome, judges[key], warm_up):
                racers.append((worker, outcome))
            else:
                worker.close()
        judges.clear()
        for _, place, (worker, outcome) in turns(racers, repeats):
            if place == 0:
                between_rounds()
            progress(outcome.job.entry.label)
            if outcome.status == "timed":
                with _noting_failure(outcome):
                    taken, processor = worker.ask("time")
                    outcome.seconds.append(taken)
                    outcome.cpu_seconds.append(processor)
    return outcomes


def turns(racers: Sequence[RacerT], rounds: int) -> Iterator[tuple[int, int, RacerT]]:
    """Every racer once per round, each round begun by the next one; numbered by the round and within it."""
    for number in range(rounds):
        first = number % len(racers) if racers else 0
        for place, racer in enumerate((*racers[first:], *racers[:first])):
            yield number, place, racer


def _admit(worker: Worker, outcome: Outcome, judge: Judge, warm_up: int) -> bool:
    """Builds and warms up the contender, counts its memory and has its results judged."""
    with _noting_failure(outcome):
        worker.ask("build")
        outcome.first_seconds, _ = worker.ask("time")
        worker.ask("memory.restart")
        for _ in range(max(1, warm_up - 1)):
            worker.ask("time")
        outcome.peak_bytes = worker.ask("memory.above")
        answer = worker.ask("results")
        outcome.firing_rates, outcome.differs = answer["firing_rates"], answer["differs"]
        outcome.verdict = judge.verdict(
            {name: torch.as_tensor(array) for name, array in answer["results"].items()},
            answer["reset"],
            outcome.job.entry.precision,
            answer["masked"],
            answer["omits"],
        )
        if outcome.verdict.objection:
            outcome.status, outcome.reason = "wrong", outcome.verdict.objection
    return outcome.status == "timed"


@contextlib.contextmanager
def _noting_failure(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        outcome.status, outcome.reason, outcome.seconds = "refused", str(error), []
