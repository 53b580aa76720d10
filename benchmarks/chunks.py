"""How the memory and the time of a training step grow with T, whole and in chunks: ``python -m benchmarks.chunks``.

A chunk of time steps is computed twice, in the forward and in the backward pass, so that memory grows with T only by
spikes, as bits, and the states between chunks. Inputs vary from step to step. Each step has a process of its own, which
gives its peak memory; those of one T take turns, and have to give the same spike counts and gradients.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from g2g_kernels.numbers import COUNT
from g2gnet import G2GNet
from g2gnet.base.tables import markdown
from g2gnet.programs.flags import Parser

from . import cli
from .harness import Worker, WorkerError, turns
from .machine import Limits, PeakMemory, describe, load_lazy_parts, timed
from .report import seconds

#: T of the step whose chunks are compared, and the chunk of other steps
USUAL, CHUNK = 1000, 50
COUNTS = {
    "chunk": (CHUNK, "steps of a chunk at other T"),
    "repeats": (5, "timed turns"),
    "hidden_dim": (1024, "neurons in each of the two hidden layers"),
    "batch_size": (64, "sequences in a step"),
}
#: the largest relative difference of gradients that the order of sums explains
ALLOWED = 1e-4


class Size(NamedTuple):
    """The network, index with default density, and its batch."""

    batch_size: int
    hidden_dim: int
    input_dim: int = 100
    num_classes: int = 20


class Session:
    """A training step, in its own process."""

    def __init__(self, size: Size, steps: int, chunk: int | None) -> None:
        self.size, self.steps, self.chunk = size, steps, chunk

    def build(self) -> None:
        size, generator = self.size, torch.Generator().manual_seed(0)
        self.inputs = torch.rand(self.steps, size.batch_size, size.input_dim, generator=generator)
        self.labels = torch.randint(size.num_classes, (size.batch_size,), generator=generator)
        load_lazy_parts(torch.device("cpu"))
        self.memory = PeakMemory(torch.device("cpu"))
        self.net = G2GNet(size.input_dim, size.hidden_dim, size.num_classes, "index", T=self.steps, generator=generator)
        self.optimizer = torch.optim.Adam(self.net.parameters(), fused=True)

    def results(self) -> dict[str, np.ndarray]:
        """Spike counts and gradients before the first update."""
        counts = self._gradients()
        gradients = {name: parameter.grad for name, parameter in self.net.named_parameters()}
        return {"counts": counts.numpy(), **{name: of.numpy() for name, of in gradients.items() if of is not None}}

    def time(self) -> tuple[float, float]:
        """Seconds for one step, and processor time of all threads."""
        before = time.process_time()
        taken = timed(self._step, torch.device("cpu"))
        return taken, time.process_time() - before

    def _gradients(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.net.simulate(self.inputs, chunk=self.chunk).counts
        F.cross_entropy(counts, self.labels).backward()
        return counts.detach()

    def _step(self) -> None:
        self._gradients()
        self.optimizer.step()


def build_parser() -> Parser:
    quick = {"T": "250,1000", "chunks": "50,100", "long": 0, "hidden_dim": 256, "repeats": 2}
    parser = cli.build_parser("chunks", __doc__, "about six minutes on two cores", quick)
    text = "time steps, whole and in chunks (default: %(default)s)"
    parser.add_argument("--T", default="250,500,1000,2000", metavar="N,N,...", help=text)
    text = f"steps of a chunk that are compared at T = {USUAL} (default: %(default)s)"
    parser.add_argument("--chunks", default="25,50,100,200", metavar="N,N,...", help=text)
    text = "time steps that are computed in chunks only; 0: none (default: %(default)s)"
    parser.add_argument("--long", type=int, default=10_000, metavar="N", help=text)
    cli.add_counts(parser, COUNTS)
    return parser


def plan(arguments: argparse.Namespace) -> dict[int, list[int | None]]:
    """The chunks of each T; None: the whole.

    Raises:
        ValueError: for a number out of range.
    """
    lengths, chunks = (cli.numbers(getattr(arguments, name)) for name in ("T", "chunks"))
    cli.checked(arguments, *COUNTS)
    for name, numbers in (("T", lengths), ("chunks", chunks)):
        for number in numbers:
            COUNT.check(name, number)
    compared = sorted({*chunks, arguments.chunk})
    planned = {steps: [None, *(compared if steps == USUAL else [arguments.chunk])] for steps in lengths}
    return {**planned, **({arguments.long: [arguments.chunk]} if arguments.long else {})}


def chunks(arguments: argparse.Namespace) -> dict[str, Any]:
    planned = plan(arguments)
    size = Size(batch_size=arguments.batch_size, hidden_dim=arguments.hidden_dim)
    machine, limits = describe(torch.device("cpu")), Limits(torch.device("cpu"))
    print(cli.headline(machine))
    points: list[dict[str, Any]] = []
    with cli.bar(sum(map(len, planned.values())) * (1 + arguments.repeats)) as bar:
        for steps, compared in planned.items():
            points += measure(size, steps, compared, arguments.repeats, bar)
            limits.measure()
    about = {"benchmark": "chunks", "machine": machine, "limits": limits.rates(), "sizes": size._asdict()}
    record = {**about, "runs": points}
    print(table(record))
    cli.warn_if_busy(machine, limits.rates())
    return record


def measure(size: Size, steps: int, compared: Sequence[int | None], repeats: int, bar: tqdm) -> list[dict[str, Any]]:
    """The point of each chunk at one T, from processes that take turns."""
    points: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        racers, expected = [], None
        taken: dict[int | None, list[tuple[float, float]]] = {chunk: [] for chunk in (None, *compared)}
        for chunk in compared:
            bar.set_description(f"{steps} steps, {'whole' if chunk is None else f'chunks of {chunk}'}", refresh=False)
            bar.update()
            point: dict[str, Any] = {"T": steps, "chunk": chunk, "status": "timed"}
            points.append(point)
            worker = Worker(Session, size, steps, chunk)
            stack.callback(worker.close)
            try:
                worker.ask("build")
                results = worker.ask("results")
                worker.ask("time")
                worker.ask("memory.restart")
                worker.ask("time")
                point["peak_bytes"] = worker.ask("memory.above")
            except WorkerError as error:  # without memory, say
                point |= {"status": "refused", "reason": str(error)}
                continue
            point["differs"] = None if expected is None else difference(results, expected)
            expected = results if chunk is None else expected
            if point["differs"] is not None and point["differs"] > ALLOWED:
                point["status"] = "wrong"
                continue
            racers.append((worker, point))
        for _, _, (worker, point) in turns(racers, repeats):
            taken[point["chunk"]].append(worker.ask("time"))
            bar.update()
    for _, point in racers:
        point["median"] = statistics.median(seconds for seconds, _ in taken[point["chunk"]])
        pairs = list(zip(taken[point["chunk"]], taken[None], strict=True)) if taken[None] else []
        for number, ratio in enumerate(("times", "cpu_times") if pairs else ()):
            point[ratio] = statistics.median(ours[number] / whole[number] for ours, whole in pairs)
    return points


def difference(results: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative difference of a gradient, in the Euclidean norm; infinite unless all counts are equal."""
    if not np.array_equal(results["counts"], expected["counts"]):
        return float("inf")
    errors = (
        np.linalg.norm(results[name] - one) / max(np.linalg.norm(one), np.finfo(np.float32).tiny)
        for name, one in expected.items()
        if name != "counts"
    )
    return float(max(errors))


def table(record: dict[str, Any]) -> str:
    """One row per T and chunk: peak memory and time, and what they are of those without chunks."""
    whole = {point["T"]: point for point in record["runs"] if point["chunk"] is None}
    rows = []
    for point in record["runs"]:
        row = [f"{point['T']:,}", "–" if point["chunk"] is None else str(point["chunk"])]
        if point["status"] != "timed":
            rows.append([*row, point["status"], "", "", "", ""])
            continue
        beside = whole.get(point["T"], {})
        time = peak = processor = ""
        if point["chunk"] is not None and "median" in beside:
            peak, time = f"{100 * point['peak_bytes'] / beside['peak_bytes']:.0f} %", f"{point['times']:.2f} ×"
            processor = f"{point['cpu_times']:.2f} ×"
        rows.append([*row, f"{point['peak_bytes'] / 1e6:,.0f} MB", peak, seconds(point["median"]), time, processor])
    return markdown(["T", "chunk", "peak memory", "of the whole's", "step", "of the whole's", "processor time"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), chunks, argv)


if __name__ == "__main__":
    sys.exit(main())
