"""How the memory and the time of a training step grow with T, whole and in chunks: ``python -m benchmarks.chunks``.

A chunk of time steps is computed twice, in the forward and in the backward pass, so that memory grows with T only by
spikes, as bits, and the states between chunks. Inputs vary from step to step. Each step has a process of its own, which
gives its peak memory; those of one T take turns, and have to give the same spike counts and gradients.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.base.tables import markdown
from g2gnet.programs.flags import Parser

from . import cli
from .harness import Racer, Session, Turn, race
from .machine import Limits
from .report import ratio, seconds

#: T of the step whose chunks are compared
USUAL = 1000
#: the largest relative difference of gradients that the order of sums explains
ALLOWED = 1e-4
#: neurons of the network's ends
ENDS = {"input_dim": 100, "num_classes": 20}


def session(size: Mapping[str, int], steps: int, chunk: int | None) -> Session:
    """A training step of ``steps`` time steps, whole or in chunks."""
    generator, batch = torch.Generator().manual_seed(0), size["batch_size"]
    inputs = torch.rand(steps, batch, size["input_dim"], generator=generator)
    labels = torch.randint(size["num_classes"], (batch,), generator=generator)
    yield None
    sizes = size["input_dim"], size["hidden_dim"], size["num_classes"]
    net = G2GNet(*sizes, "index", T=steps, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, fused=True)

    def gradients() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        counts = net.simulate(inputs, chunk=chunk).counts
        F.cross_entropy(counts, labels).backward()
        return counts.detach()

    def step() -> None:
        gradients()
        optimizer.step()

    def results() -> dict[str, np.ndarray]:
        """Spike counts and gradients."""
        found = {"counts": gradients()} | {name: parameter.grad for name, parameter in net.named_parameters()}
        return {name: each.numpy() for name, each in found.items() if each is not None}

    yield Turn(step, results)


def plan(arguments: argparse.Namespace) -> dict[int, list[int | None]]:
    """The chunks of each T (None: the whole); raises ValueError for a number out of range."""
    lengths, compared = cli.counts(arguments, "T"), sorted({*cli.counts(arguments, "chunks"), arguments.chunk})
    planned = {steps: [None, *(compared if steps == USUAL else [arguments.chunk])] for steps in lengths}
    return {**planned, **({arguments.long: [arguments.chunk]} if arguments.long else {})}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times the whole and the chunks of each T in turn."""
    planned, limits = plan(arguments), Limits(torch.device("cpu"))
    size = {"batch_size": arguments.batch_size, "hidden_dim": arguments.hidden_dim, **ENDS}
    runs: list[dict[str, Any]] = []
    for steps, compared in planned.items():
        whole, *_ = racers = points(size, steps, compared)
        for each in race(racers, arguments.repeats):
            run = each.summary()
            if whole.run["chunk"] is None and whole.status == each.status == "timed":
                run["times"] = ratio(each.seconds, whole.seconds)
                run["cpu_times"] = ratio(each.cpu_seconds, whole.cpu_seconds)
            runs.append(run)
        limits.measure()
    return {"limits": limits.rates(), "sizes": size, "runs": runs}


def points(size: Mapping[str, int], steps: int, compared: Sequence[int | None]) -> list[Racer]:
    """The racers with this number of steps; chunks must give the results of the whole."""
    expected: dict[str, np.ndarray] = {}

    def check(run: dict[str, Any], results: dict[str, np.ndarray]) -> str:
        if run["chunk"] is None:
            expected.update(results)
        differs = run["differs"] = difference(results, expected) if expected and run["chunk"] else None
        return f"differs by {differs:.1e}" if differs is not None and differs > ALLOWED else ""

    labels = {chunk: f"{steps} steps, {'whole' if chunk is None else f'chunks of {chunk}'}" for chunk in compared}
    return [Racer(labels[n], session, (size, steps, n), {"T": steps, "chunk": n}, check) for n in compared]


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
    whole = {run["T"]: run for run in record["runs"] if run["chunk"] is None}
    rows = []
    for run in record["runs"]:
        row = [f"{run['T']:,}", "–" if run["chunk"] is None else str(run["chunk"])]
        if run["status"] != "timed":
            rows.append([*row, run["status"], "", "", "", ""])
            continue
        peak = time = processor = ""
        if run["chunk"] is not None and "times" in run:
            peak = f"{100 * run['peak_bytes'] / whole[run['T']]['peak_bytes']:.0f} %"
            time, processor = f"{run['times']:.2f} ×", f"{run['cpu_times']:.2f} ×"
        rows.append([*row, f"{run['peak_bytes'] / 1e6:,.0f} MB", peak, seconds(run["median"]), time, processor])
    return markdown(["T", "chunk", "peak memory", "of the whole's", "step", "of the whole's", "processor time"], rows)


def add_flags(parser: Parser) -> None:
    for name, text, default in (
        ("T", "time steps, whole and in chunks", "250,500,1000,2000"),
        ("chunks", f"steps of a chunk that are compared at T = {USUAL}", "25,50,100,200"),
    ):
        parser.add_argument(f"--{name}", default=default, metavar="N,N,...", help=f"{text} (default: {default})")
    text = "time steps that are computed in chunks only; 0: none (default: 10000)"
    parser.add_argument("--long", type=int, default=10_000, metavar="N", help=text)


PROGRAM = cli.Program(
    "chunks", __doc__, "about six minutes on two cores", measure, table,
    {
        "chunk": (50, "steps of a chunk at other T"),
        "repeats": (5, "timed turns"),
        "hidden_dim": (1024, "neurons in each of the two hidden layers"),
        "batch_size": (64, "sequences in a step"),
    },
    {"T": "250,1000", "chunks": "50,100", "long": 0, "hidden_dim": 256, "repeats": 2},
    add_flags,
)  # fmt: skip
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
