"""The time of a training step, kernel by kernel, by PyTorch's profiler: ``python -m benchmarks.kernel_times``.

On a GPU these are the kernels on the device. On a CPU, for trying the program, they are PyTorch's own operations.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from g2gnet.base.tables import in_columns
from g2gnet.programs.flags import Parser

from . import cli
from .machine import describe, synchronize
from .ours import Network
from .report import seconds

#: kernels below this share of the total are omitted from the table
SMALL = 0.01


def build_parser() -> Parser:
    parser = cli.build_parser("kernel_times", __doc__, "a minute", cli.QUICK)
    cli.add_flags(parser, repeats=10)
    return parser


def kernel_times(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profiles the steps, prints the table and returns the record."""
    cli.checked(arguments, "repeats")
    device, repeats, workload = cli.device_from(arguments), arguments.repeats, cli.workload_from(arguments)
    _, prepared = cli.prepare_with_bar(workload, arguments.data_dir)
    backend = arguments.backend or ("triton" if device.type == "cuda" else "torch")
    precision = arguments.precision or "bf16"
    contender = Network(prepared, device, precision, backend)
    for _ in range(3):
        contender.step()
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            contender.step()
        synchronize(device)
    spent: dict[str, list[float]] = defaultdict(list)
    on_device = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    for event in profiler.events() or []:
        if event.device_type == on_device and not getattr(event, "is_user_annotation", False):
            # kernels have no children; a PyTorch operation on the CPU has, and their time is not its own
            microseconds = event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
            spent[event.name].append(1e-6 * microseconds)
    kernels: list[dict[str, Any]] = [
        {"what": name, "median": sum(times) / repeats, "calls": len(times) / repeats} for name, times in spent.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["median"])
    whole = sum(kernel["median"] for kernel in kernels)
    shown = [kernel for kernel in kernels if kernel["median"] >= SMALL * whole]
    rows = [(k["what"][:60], seconds(k["median"]), f"{k['calls']:g}") for k in shown]
    print(in_columns(("per step", "time", "calls"), rows))
    return {
        "benchmark": "kernel_times",
        "precision": precision,
        "backend": backend,
        "workload": prepared.workload.as_dict(),
        "machine": describe(device),
        "runs": kernels,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), kernel_times, argv)


if __name__ == "__main__":
    sys.exit(main())
