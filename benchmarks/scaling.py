"""How the time and the memory of a step grow: ``python -m benchmarks.scaling --quantity p_inter``.

One network is trained for each value of the quantity, all contenders take turns, and a straight line is fitted to the
medians by least squares: seconds against multiplications and additions of the active weights. If the line fits and
begins near zero, the cost of a sparse network is proportional to its active weights.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from g2g_kernels import available_backends
from g2gnet.base.tables import in_columns
from g2gnet.programs.flags import Parser

from . import cli, report
from .floor import work
from .harness import Job, Outcome, measure
from .machine import Limits, describe
from .registry import COMPACT, Entry, choose
from .workload import Prepared


class Quantity(NamedTuple):
    """What can grow.

    Attributes:
        field: the workload's.
        values: its default values.
        x_is: the label of x.
        x: of a prepared workload; None: the value itself.
        changes: of the workload, whatever the value.
        changes_at: those that depend on the value.
        beside_dense: whether the memory of the dense network's parameters stands beside: it is computed, since the
            largest cannot be run.
    """

    field: str
    values: tuple[Any, ...]
    x_is: str
    x: Callable[[Prepared], float] | None = None
    changes: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    changes_at: Callable[[Any], dict[str, Any]] = lambda value: {}
    beside_dense: bool = False

    def of(self, entry: Entry, value: Any) -> dict[str, Any]:
        """The changes of a contender's workload; α only concerns those with another surrogate."""
        concerned = self.field != "alpha" or "alpha" in entry.workload
        return {**entry.workload, **({self.field: value, **self.changes_at(value)} if concerned else {})}


#: neurons in a group of a wide layer
WIDE_GROUP = 256


def _wide(neurons: int) -> dict[str, Any]:
    """Groups of one size, with as many weights between them as inside, so that a neuron has as many in any layer."""
    groups = neurons // WIDE_GROUP
    return {"num_groups": groups, "p_inter": 1 / max(1, groups - 1)}


QUANTITIES = {
    "p_inter": Quantity("p_inter", (0.0, 0.05, 0.15, 0.3, 0.6, 1.0), "density of all weights", Prepared.density),
    "block_size": Quantity("block_size", (1, 4, 16, 32, 64), "side of a connection unit, weights"),
    "groups": Quantity("num_groups", (1, 2, 4, 8, 10), "groups on each side of a layer"),
    "T": Quantity("T", (10, 20, 30, 40, 50), "time steps T"),
    "B": Quantity("batch_size", (1, 8, 32, 128, 256), "batch size B"),
    "H": Quantity("hidden_dim", (128, 256, 512, 1024, 2048), "hidden neurons H"),
    "wide": Quantity(
        "hidden_dim",
        (1024, 4096, 16384, 65536),
        f"hidden neurons H in groups of {WIDE_GROUP}",
        changes_at=_wide,
        beside_dense=True,
    ),
    "alpha": Quantity(
        "alpha",
        (8.0, 4.0, 2.0, 1.0, 0.5, 0.25),
        "share of neurons that pass a gradient on",
        lambda prepared: prepared.event_shares[1],
        {"surrogate": COMPACT["surrogate"]},
    ),
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


def build_parser() -> Parser:
    parser = Parser(
        prog=f"python -m {__package__}.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="By default g2g on its best backend takes part, the masked snnTorch loop and the dense layers with our "
        "LIF;\nfor alpha, g2g under a triangle and under ATan; for wide layers g2g alone.\n"
        "Names are those of benchmarks.throughput.",
    )
    parser.add_argument(
        "--quantity", default="p_inter", choices=tuple(QUANTITIES), help="what grows (default: p_inter)"
    )
    values = "; ".join(f"{name} {','.join(map(str, each.values))}" for name, each in QUANTITIES.items())
    parser.add_argument("--values", metavar="X,Y,...", help=f"its values (default: {values})")
    parser.add_argument("--kernel", default="step", choices=("step", "forward"), help="what to time (default: step)")
    cli.add_flags(parser, repeats=7)
    return parser


def scaling(arguments: argparse.Namespace) -> cli.Report:
    device, repeats = cli.device_from(arguments), cli.repeats_from(arguments)
    entries = contenders(arguments)
    quantity = QUANTITIES[arguments.quantity]
    values = list(quantity.values)
    if arguments.values:
        values = list(cli.numbers(arguments.values, type(values[0])))
    if len(set(values)) < 2:
        raise ValueError(f"values={arguments.values!r}: a line needs at least two different values")
    workloads = [
        cli.workload_from(arguments, **quantity.changes, **quantity.changes_at(value), **{quantity.field: value})
        for value in values
    ]
    own = [[cli.workload_from(arguments, **quantity.of(entry, value)) for value in values] for entry in entries]
    machine = describe(device)
    print(cli.headline(machine))
    distinct = dict.fromkeys([*workloads, *itertools.chain.from_iterable(own)])
    prepared = {workload: cli.prepare_with_bar(workload, arguments.data_dir) for workload in distinct}
    places = [
        {
            **one.workload.as_dict(),
            "x": quantity.x(one) if quantity.x else getattr(one.workload, quantity.field),
            "density": one.density(),
            "note": one.note,
            **work(one, arguments.kernel),
            **({"dense_bytes": dense_bytes(one)} if quantity.beside_dense else {}),
        }
        for _, one in map(prepared.__getitem__, workloads)
    ]

    jobs = [
        Job(entry, prepared[workload][0], arguments.kernel, str(device))
        for entry, of_entry in zip(entries, own, strict=True)
        for workload in of_entry
    ]
    limits = Limits(device)
    with tqdm(total=len(jobs) * (1 + repeats), leave=False, disable=None) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

        outcomes = measure(jobs, repeats, progress=progress, between_rounds=limits.measure)

    size = len(places)
    curves = [
        curve(entry.label, places, outcomes[number * size : (number + 1) * size])
        for number, entry in enumerate(entries)
    ]
    record: dict[str, Any] = {
        "benchmark": "scaling",
        "kernel": arguments.kernel,
        "quantity": arguments.quantity,
        "x_is": quantity.x_is,
        "machine": machine,
        "limits": limits.rates(),
        "workloads": places,
        "contenders": curves,
    }
    print(table(record))
    cli.warn_if_busy(machine, limits.rates())
    return cli.Report(record, csv_rows(record), status=int(any(outcome.status == "wrong" for outcome in outcomes)))


def dense_bytes(prepared: Prepared) -> int:
    """Memory of the dense network's weights, their gradients and Adam's two moments, in float32."""
    hidden = prepared.workload.hidden_dim
    weights = hidden * (prepared.images.shape[1] + hidden + prepared.num_classes)
    return 4 * 4 * weights


def contenders(arguments: argparse.Namespace) -> list[Entry]:
    """The contenders requested by the flags; by default g2g at its best, a masked and a dense network."""
    asked = arguments.contenders, arguments.backend, arguments.precision
    if any(asked):
        return choose(arguments.kernel, *asked)
    ours = f"g2g-{available_backends()[0]}"
    if QUANTITIES[arguments.quantity].beside_dense:
        return choose(arguments.kernel, ours)
    beside = f"{ours}-triangle" if arguments.quantity == "alpha" else "snntorch-masked,dense-lif"
    return choose(arguments.kernel, f"{ours},{beside}")


def curve(label: str, places: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One contender's part of the record: every point, and the line through those with a time.

    Args:
        label: the contender.
        places: the workloads, each with its ``"x"`` and its ``"flop"``.
        outcomes: one per workload.
    """
    points = [{"x": place["x"], **report.summary(outcome)} for place, outcome in zip(places, outcomes, strict=True)]
    timed = [
        (place["flop"], point["median"])
        for place, point in zip(places, points, strict=True)
        if point["status"] == "timed"
    ]
    flop, medians = zip(*timed, strict=True) if timed else ((), ())
    # where the work hardly differs (units of another size), a line through it would say nothing
    line = fit(flop, medians)._asdict() if timed and max(flop) > 1.5 * min(flop) else None
    return {"contender": label, "points": points, "line": line}


def table(record: dict[str, Any]) -> str:
    """One row per contender: the medians and the line; then the memory; then the contenders without a time and why."""
    places = [report.plain(place["x"]) for place in record["workloads"]]
    times, memory, notes = [], [], []
    for one in record["contenders"]:
        medians = [point.get("median") for point in one["points"]]
        peaks = [point.get("peak_bytes") for point in one["points"]]
        notes += [
            f"{one['contender']} at {report.plain(point['x'])}: {point['status']}: {point['reason']}"
            for point in one["points"]
            if point["status"] != "timed"
        ]
        line, fitted = one["line"], ["–"] * 3
        if line:
            largest = max(median for median in medians if median)
            fitted = [
                report.seconds(line["intercept"]),
                f"{line['intercept'] / largest:.0%}",
                f"{line['r_squared']:.4f}",
            ]
        times.append((one["contender"], *(report.seconds(m) if m else "–" for m in medians), *fitted))
        memory.append((one["contender"], *(f"{peak / 1e6:.0f}" if peak else "–" for peak in peaks)))
    if "dense_bytes" in record["workloads"][0]:
        dense = [f"{place['dense_bytes'] / 1e6:.0f}" for place in record["workloads"]]
        memory.append(("dense weights with gradients and Adam, computed", *dense))
    return "\n".join(
        [
            f"{record['x_is']}: median time, and the line over active multiply-adds",
            in_columns(("", *places, "intercept", "of largest", "R²"), times),
            "peak memory, MB",
            in_columns(("", *places), memory),
            *notes,
        ]
    )


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per point."""
    return [
        {"quantity": record["quantity"], "x": point["x"], "flop": place["flop"], **report.flat(point)}
        for one in record["contenders"]
        for place, point in zip(record["workloads"], one["points"], strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), scaling, argv)


if __name__ == "__main__":
    sys.exit(main())
