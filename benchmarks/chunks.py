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
from .harness import Worker, WorkerError
from .machine import Limits, PeakMemory, describe, load_lazy_parts, timed
from .report import seconds

#: T of the step whose chunks are compared, and the chunk of other steps
USUAL, CHUNK = 1000, 50
LISTS = {
    "T": ("250,500,1000,2000", "time steps, whole and in chunks"),
    "chunks": ("25,50,100,200", f"steps of a chunk that are compared at T = {USUAL}"),
}
NUMBERS = {
    "chunk": (CHUNK, "steps of a chunk at other T"),
    "long": (10_000, "time steps that are computed in chunks only; 0: none"),
    "repeats": (5, "timed turns"),
}
#: the largest relative difference of gradients that the order of sums explains
ALLOWED = 1e-4


class Size(NamedTuple):
    """The network, index with default density, and its batch."""

    batch_size: int = 64
    input_dim: int = 100
    hidden_dim: int = 1024
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

    def forget_peak(self) -> None:
        self.memory.restart()

    def peak(self) -> int:
        return self.memory.above()

    def firing_rates(self) -> list[float]:
        """Of each layer: spikes per neuron and step, 0 to 1."""
        with torch.no_grad():
            activity = self.net.simulate(self.inputs, chunk=self.chunk or CHUNK)
        return [rates.mean().item() for rates in activity.rates]

    def _gradients(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.net.simulate(self.inputs, chunk=self.chunk).counts
        F.cross_entropy(counts, self.labels).backward()
        return counts.detach()

    def _step(self) -> None:
        self._gradients()
        self.optimizer.step()


def build_parser() -> Parser:
    parser = Parser(
        prog=f"python -m {__package__}.chunks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, (default, text) in LISTS.items():
        parser.add_argument(f"--{name}", default=default, metavar="N,N,...", help=f"{text} (default: {default})")
    sizes = {
        "hidden_dim": (Size().hidden_dim, "neurons in each of the two hidden layers"),
        "batch_size": (Size().batch_size, "sequences in a step"),
    }
    for name, (number, text) in {**NUMBERS, **sizes}.items():
        parser.add_argument(f"--{name}", type=int, default=number, metavar="N", help=f"{text} (default: {number})")
    cli.add_report_flags(parser)
    return parser


def plan(arguments: argparse.Namespace) -> dict[int, list[int | None]]:
    """The chunks of each T; None: the whole.

    Raises:
        ValueError: for a number out of range.
    """
    lengths, chunks = (cli.numbers(getattr(arguments, name), int) for name in ("T", "chunks"))
    for name in ("chunk", "hidden_dim", "batch_size", "repeats"):
        COUNT.check(name, getattr(arguments, name))
    for name, numbers in (("T", lengths), ("chunks", chunks)):
        for number in numbers:
            COUNT.check(name, number)
    compared = sorted({*chunks, arguments.chunk})
    planned = {steps: [None, *(compared if steps == USUAL else [arguments.chunk])] for steps in lengths}
    return {**planned, **({arguments.long: [arguments.chunk]} if arguments.long else {})}


def chunks(arguments: argparse.Namespace) -> cli.Report:
    planned = plan(arguments)
    size = Size(batch_size=arguments.batch_size, hidden_dim=arguments.hidden_dim)
    machine, limits = describe(torch.device("cpu")), Limits(torch.device("cpu"))
    print(cli.headline(machine))
    turns = sum(map(len, planned.values())) * (1 + arguments.repeats)
    points: list[dict[str, Any]] = []
    with tqdm(total=turns, leave=False, disable=None) as bar:
        for steps, compared in planned.items():
            points += measure(size, steps, compared, arguments.repeats, bar)
            limits.measure()
    record = {
        "benchmark": "chunks",
        "machine": machine,
        "limits": limits.rates(),
        "sizes": size._asdict(),
        "points": points,
    }
    print(table(record))
    cli.warn_if_busy(machine, limits.rates())
    wrong = any(point["status"] == "wrong" for point in points)
    rows = [
        {name: point.get(name, "") for name in ("T", "chunk", "status", "median", "peak_bytes")} for point in points
    ]
    return cli.Report(record, rows, status=int(wrong))


def measure(size: Size, steps: int, compared: Sequence[int | None], repeats: int, bar: tqdm) -> list[dict[str, Any]]:
    """The point of each chunk at one T, from processes that take turns."""
    points: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        racers, expected = [], None
        for chunk in compared:
            bar.set_description(f"{steps} steps, {'whole' if chunk is None else f'chunks of {chunk}'}")
            bar.update()
            point: dict[str, Any] = {"T": steps, "chunk": chunk, "status": "timed"}
            points.append(point)
            worker = Worker(Session, size, steps, chunk)
            stack.callback(worker.close)
            try:
                worker.ask("build")
                results = worker.ask("results")
                point["first_seconds"], _ = worker.ask("time")
                worker.ask("forget_peak")
                worker.ask("time")
                point["peak_bytes"] = worker.ask("peak")
                point["firing_rates"] = worker.ask("firing_rates")
            except WorkerError as error:  # without memory, say
                point |= {"status": "refused", "reason": str(error)}
                continue
            point["differs"] = None if expected is None else difference(results, expected)
            expected = results if chunk is None else expected
            if point["differs"] is not None and point["differs"] > ALLOWED:
                point["status"] = "wrong"
                continue
            racers.append((worker, point))
        for turn in range(repeats):
            first = turn % len(racers) if racers else 0
            for worker, point in (*racers[first:], *racers[:first]):
                for quantity, taken in zip(("seconds", "cpu_seconds"), worker.ask("time"), strict=True):
                    point.setdefault(quantity, []).append(taken)
                bar.update()
    for _, point in racers:
        point["median"] = statistics.median(point["seconds"])
        if racers[0][1]["chunk"] is None:
            for ratio, quantity in (("times", "seconds"), ("cpu_times", "cpu_seconds")):
                pairs = zip(point[quantity], racers[0][1][quantity], strict=True)
                point[ratio] = statistics.median(a / b for a, b in pairs)
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


def usual_chunk(record: dict[str, Any]) -> int:
    """The chunk of the longest step."""
    longest = max(record["points"], key=lambda point: (point["T"], point["chunk"] is not None))
    return longest["chunk"]


def table(record: dict[str, Any]) -> str:
    """One row per T and chunk: peak memory and time, and what they are of those without chunks."""
    whole = {point["T"]: point for point in record["points"] if point["chunk"] is None}
    rows = []
    for point in record["points"]:
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
