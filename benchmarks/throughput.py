"""Times g2g beside the libraries that people use: ``python -m benchmarks.throughput``.

A training step (forward, cross-entropy, backward, fused Adam), its forward pass alone, or LIF neurons alone; same
sizes, same weights, same images for everyone, results compared with a float64 reference before anything is timed.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from benchmarks import cli, report
from benchmarks.floor import floor_seconds, work
from benchmarks.harness import Job, measure
from benchmarks.machine import Limits, describe
from benchmarks.registry import BASELINE, KERNELS, choose
from benchmarks.workload import Prepared

ABOUT = {
    "step": "training step (forward, cross-entropy, backward, fused Adam)",
    "forward": "forward pass without gradients",
    "lif": "LIF neurons alone, forward and backward",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--kernel", default="step", choices=tuple(KERNELS), help="what to time (default: step)")
    parser.add_argument(
        "--contenders",
        metavar="A,B,...",
        help="who takes part (default: everyone in float32, our own kernels in bfloat16 too); "
        "add -bf16 to a name for bfloat16",
    )
    cli.add_flags(parser, repeats=10)
    return parser


def throughput(arguments: argparse.Namespace) -> int:
    device = cli.device_from(arguments)
    entries = choose(arguments.kernel, arguments.contenders)
    workload = cli.workload_from(arguments)
    machine = describe(device)
    print(cli.headline(machine))
    path, prepared = cli.prepare_with_bar(workload, arguments.data_dir)
    print(f"{ABOUT[arguments.kernel]}: {about(prepared)}", flush=True)

    jobs = [Job(entry, path, arguments.kernel, str(device)) for entry in entries]
    limits = Limits(device)
    total = len(jobs) + arguments.repeats * sum(entry.unavailable is None for entry in entries)
    with tqdm(total=total, leave=False, disable=None) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)
            bar.update()

        outcomes = measure(jobs, arguments.repeats, progress=progress, between_rounds=limits.measure)

    done, rates = work(prepared, arguments.kernel), limits.rates()
    record: dict[str, Any] = {
        "benchmark": "throughput",
        "kernel": arguments.kernel,
        "baseline": BASELINE[arguments.kernel],
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
        "contenders": [report.summary(outcome) for outcome in outcomes],
    }
    print(report.throughput_table(record))
    print(
        f"This machine multiplies at {rates['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s and copies at "
        f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s: the floor of this is {report.seconds(record['floor_seconds'])}."
    )
    cli.warn_if_busy(machine, rates)
    if arguments.json:
        report.write_json(arguments.json, record)
    return 1 if any(outcome.status == "wrong" for outcome in outcomes) else 0


def about(prepared: Prepared) -> str:
    """The workload in one line."""
    w = prepared.workload
    return (
        f"{w.model}, B {w.batch_size}, T {w.T}, H {w.hidden_dim}, p_inter {w.p_inter}, units of {w.block_size}: "
        f"{prepared.density():.1%} of the weights; {w.dataset}, after {w.train_steps} training steps "
        f"(test accuracy {prepared.test_accuracy:.2f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), throughput, argv)


if __name__ == "__main__":
    sys.exit(main())
