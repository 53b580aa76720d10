"""The time of a training step, kernel by kernel, by PyTorch's profiler: ``python -m benchmarks.kernel_times``.

On a GPU these are the kernels on the device. On a CPU, for trying the program, they are PyTorch's own operations.
"""

import argparse
import sys
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from g2gnet.base.tables import in_columns

from . import cli
from .machine import synchronize
from .ours import Network
from .report import seconds

#: kernels below this share of the total are omitted from the table
SMALL = 0.01


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profiles the steps."""
    device, repeats = cli.device_from(arguments), arguments.repeats
    _, prepared = cli.prepare_with_bar(cli.workload_from(arguments), arguments.data_dir)
    backend = arguments.backend or ("triton" if device.type == "cuda" else "torch")
    precision = arguments.precision or "bf16"
    contender = Network(prepared, device, precision, backend=backend)
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
    about = {"precision": precision, "backend": backend, "workload": prepared.workload.as_dict()}
    return {**about, "runs": kernels}


def table(record: dict[str, Any]) -> str:
    """The kernels that take a hundredth of the step or more."""
    kernels = record["runs"]
    least = SMALL * sum(kernel["median"] for kernel in kernels)
    rows = [(k["what"][:60], seconds(k["median"]), f"{k['calls']:g}") for k in kernels if k["median"] >= least]
    return in_columns(("per step", "time", "calls"), rows)


COUNTS = {"repeats": (10, "profiled steps")}
PROGRAM = cli.Program("kernel_times", __doc__, "a minute", measure, table, COUNTS, cli.QUICK, cli.add_flags)
main, build_parser = PROGRAM.main, PROGRAM.build_parser

if __name__ == "__main__":
    sys.exit(main())
