"""Times g2g against the libraries that people use: ``python -m benchmarks.throughput``.

A training step (forward, cross-entropy, backward, fused Adam), its forward pass, or one of its parts alone; same sizes,
same weights, same images for all; results are compared with a float64 reference before anything is timed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from g2gnet.programs.flags import Parser

from . import cli, report
from .floor import floor_seconds, work
from .harness import Job, Outcome, measure
from .machine import Limits, describe
from .registry import KERNELS, Entry, choose
from .workload import Prepared, load


def build_parser() -> Parser:
    parser = Parser(
        prog="g2g-bench" if Path(sys.argv[0]).stem == "g2g-bench" else f"python -m {__package__}.throughput",
        description=__doc__,
        epilog="\n".join(["kernels:", *(f"  {name:13} {kernel.about}" for name, kernel in KERNELS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", default="step", choices=tuple(KERNELS), help="what to time (default: step)")
    cli.add_flags(parser, repeats=10)
    return parser


def throughput(arguments: argparse.Namespace) -> cli.Report:
    device, repeats = cli.device_from(arguments), cli.repeats_from(arguments)
    kernel = KERNELS[arguments.kernel]
    entries = choose(arguments.kernel, arguments.contenders, arguments.backend, arguments.precision)
    if arguments.quick and not arguments.contenders:
        entries = [leave_out(entry) if entry.compiles else entry for entry in entries]
    workload = cli.workload_from(arguments, **kernel.workload)
    machine = describe(device)
    print(cli.headline(machine))
    path, prepared = cli.prepare_with_bar(workload, arguments.data_dir)
    print(f"{kernel.about}: {about(prepared)}", flush=True)

    paths = {
        entry.label: cli.prepare_with_bar(entry.own(workload), arguments.data_dir)[0]
        for entry in entries
        if entry.own(workload) != workload and entry.unavailable is None
    }
    jobs = [Job(entry, paths.get(entry.label, path), arguments.kernel, str(device)) for entry in entries]
    limits = Limits(device)
    total = len(jobs) + repeats * sum(entry.unavailable is None for entry in entries)
    with tqdm(total=total, leave=False, disable=None) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

        outcomes = measure(jobs, repeats, progress=progress, between_rounds=limits.measure)

    done, rates = work(prepared, arguments.kernel), limits.rates()
    record: dict[str, Any] = {
        "benchmark": "throughput",
        "kernel": arguments.kernel,
        "baseline": kernel.baseline,
        "machine": machine,
        "limits": rates,
        "workload": {
            **prepared.workload.as_dict(),
            "density": prepared.density(),
            "test_accuracy": prepared.test_accuracy,
            "note": prepared.note,
            **done,
        },
        "floor_seconds": floor_seconds(done, rates),
        "contenders": [report.summary(outcome) | own_floor(outcome, path, rates) for outcome in outcomes],
    }
    print(report.throughput_table(record))
    print(
        f"This machine multiplies at {rates['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s and copies at "
        f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s: the floor of this is {report.seconds(record['floor_seconds'])}."
    )
    cli.warn_if_busy(machine, rates)
    return cli.Report(record, csv_rows(record), status=int(any(outcome.status == "wrong" for outcome in outcomes)))


def own_floor(outcome: Outcome, path: Path, rates: dict[str, float]) -> dict[str, float]:
    """``floor_seconds`` of a contender whose workload is not that at ``path``, which the others have."""
    if outcome.status != "timed" or outcome.job.path == path:
        return {}
    return {"floor_seconds": floor_seconds(work(load(outcome.job.path), outcome.job.kernel), rates)}


def leave_out(entry: Entry) -> Entry:
    """The entry with the reason why ``--quick`` skips it."""
    reason = entry.unavailable or "--quick skips what compiles for a minute; name it in --contenders to include it"
    return dataclasses.replace(entry, unavailable=reason)


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per contender."""
    rows = []
    for row in record["contenders"]:
        derived: dict[str, Any] = {"gflop_per_s": "", "of_floor": ""}
        if row["status"] == "timed":
            derived["gflop_per_s"] = record["workload"]["flop"] / row["median"] / 1e9
            derived["of_floor"] = report.of_floor(record, row)
        rows.append({"kernel": record["kernel"], **report.flat(row), **derived})
    return rows


def about(prepared: Prepared) -> str:
    """The workload in one line."""
    w = prepared.workload
    return (
        f"{w.model}{', recurrent' * w.recurrent}, batch {w.batch_size}, {w.T} steps, {w.hidden_dim:,} neurons per "
        f"layer, {w.block_size} × {w.block_size} blocks, {prepared.density():.1%} of the weights; {w.dataset}, after "
        f"{w.train_steps} training steps (test accuracy {prepared.test_accuracy:.2f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), throughput, argv)


if __name__ == "__main__":
    sys.exit(main())
