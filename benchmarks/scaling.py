"""How the time of a step grows: ``python -m benchmarks.scaling --quantity p_inter``.

One network is trained for each value of the quantity, everyone takes every step in turn, and a straight line is fitted
to the medians by least squares: against the density of all weights (for ``p_inter``), T, or the batch size B.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import cli, report
from benchmarks.harness import Job, Outcome, measure
from benchmarks.machine import Limits, describe
from benchmarks.registry import choose
from g2g_kernels import available_backends

#: for each quantity the workload's field and the values it takes by default
QUANTITIES: dict[str, tuple[str, list[Any]]] = {
    "p_inter": ("p_inter", [0.0, 0.05, 0.15, 0.3, 0.6, 1.0]),
    "T": ("T", [10, 20, 30, 40, 50]),
    "B": ("batch_size", [32, 64, 128, 192, 256]),
}


class Line(NamedTuple):
    """seconds = slope·x + intercept, and the share of the variance that this explains."""

    slope: float
    intercept: float
    r_squared: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line through at least two different points."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    spread = np.asarray(y) - np.mean(y)
    unexplained = float(rest @ rest / (spread @ spread)) if np.any(spread) else 0.0
    return Line(float(slope), float(intercept), 1.0 - unexplained)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument(
        "--quantity", default="p_inter", choices=tuple(QUANTITIES), help="what grows (default: p_inter)"
    )
    parser.add_argument("--values", metavar="X,Y,...", help="its values (default: as in the design)")
    parser.add_argument("--kernel", default="step", choices=("step", "forward"), help="what to time (default: step)")
    parser.add_argument(
        "--contenders", metavar="A,B,...", help="who takes part, by the names of benchmarks.throughput (default: g2g)"
    )
    cli.add_flags(parser, repeats=7)
    return parser


def scaling(arguments: argparse.Namespace) -> int:
    device = cli.device_from(arguments)
    entries = choose(arguments.kernel, arguments.contenders or ",".join(f"g2g-{name}" for name in available_backends()))
    name, values = QUANTITIES[arguments.quantity]
    if arguments.values:
        values = list(cli.numbers(arguments.values, float if name == "p_inter" else int))
    if len(set(values)) < 2:
        raise ValueError(f"values={arguments.values!r}: a line needs at least two different values")
    workloads = [cli.workload_from(arguments, **{name: value}) for value in values]
    machine = describe(device)
    print(cli.headline(machine))
    prepared = [cli.prepare_with_bar(workload, arguments.data_dir) for workload in workloads]
    x = [one.density() if name == "p_inter" else getattr(one.workload, name) for _, one in prepared]

    jobs = [Job(entry, path, arguments.kernel, str(device)) for entry in entries for path, _ in prepared]
    limits = Limits(device)
    with tqdm(total=len(jobs) * (1 + arguments.repeats), leave=False, disable=None) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

        outcomes = measure(jobs, arguments.repeats, progress=progress, between_rounds=limits.measure)

    groups = {entry.label: outcomes[number * len(x) : (number + 1) * len(x)] for number, entry in enumerate(entries)}
    record: dict[str, Any] = {
        "benchmark": "scaling",
        "kernel": arguments.kernel,
        "quantity": arguments.quantity,
        "x_is": "density of all weights" if name == "p_inter" else name,
        "machine": machine,
        "limits": limits.rates(),
        "workloads": [
            {**one.workload.as_dict(), "x": place, "note": one.note}
            for (_, one), place in zip(prepared, x, strict=True)
        ],
        "contenders": [curve(label, x, group) for label, group in groups.items()],
    }
    print(table(record))
    cli.warn_if_busy(machine, limits.rates())
    if arguments.json:
        report.write_json(arguments.json, record)
    return 1 if any(outcome.status == "wrong" for outcome in outcomes) else 0


def curve(label: str, x: Sequence[float], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One contender's part of the record: every point, and the line through those that have a time."""
    points = [{"x": place, **report.summary(outcome)} for place, outcome in zip(x, outcomes, strict=True)]
    timed = [point for point in points if point["status"] == "timed"]
    found = [point["x"] for point in timed]
    line = fit(found, [point["median"] for point in timed])._asdict() if len(set(found)) > 1 else None
    return {"contender": label, "points": points, "line": line}


def table(record: dict[str, Any]) -> str:
    """A row a contender: the medians, then the line."""
    workloads = record["workloads"]
    header = (record["x_is"], *(f"{place['x']:.3g}" for place in workloads), "slope", "intercept", "of largest", "R²")
    rows, notes = [], []
    for one in record["contenders"]:
        medians = [point.get("median") for point in one["points"]]
        notes += [
            f"{one['contender']} at {point['x']:.3g}: {point['status']}: {point['reason']}"
            for point in one["points"]
            if point["status"] != "timed"
        ]
        line = one["line"]
        fitted = ["–"] * 4
        if line:
            largest = max(median for median in medians if median)
            fitted = [
                report.seconds(line["slope"]),
                report.seconds(line["intercept"]),
                f"{line['intercept'] / largest:.0%}",
                f"{line['r_squared']:.4f}",
            ]
        rows.append((one["contender"], *(report.seconds(m) if m else "–" for m in medians), *fitted))
    return "\n".join([report.grid(header, rows), *notes])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), scaling, argv)


if __name__ == "__main__":
    sys.exit(main())
