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
    device, repeats, precision = cli.device_from(arguments), arguments.repeats, arguments.precision or "bf16"
    _, prepared = cli.prepare_with_bar(cli.workload_from(arguments), arguments.data_dir)
    on_gpu, kinds = device.type == "cuda", torch.autograd.DeviceType
    backend = arguments.backend or ("triton" if on_gpu else "torch")
    contender = Network(prepared, device, precision, backend=backend)
    for _ in range(3):
        contender.step()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        for _ in range(repeats):
            contender.step()
        synchronize(device)
    spent: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if event.device_type == (kinds.CUDA if on_gpu else kinds.CPU) and not getattr(
            event, "is_user_annotation", False
        ):
            # kernels have no children; a PyTorch operation on the CPU has, and their time is not its own
            spent[event.name].append(1e-6 * (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total))
    runs: list[dict[str, Any]] = [
        {"what": name, "median": sum(times) / repeats, "calls": len(times) / repeats} for name, times in spent.items()
    ]
    runs.sort(key=lambda run: -run["median"])
    return {"precision": precision, "backend": backend, "workload": prepared.workload.as_dict(), "runs": runs}


def table(record: dict[str, Any]) -> str:
    """The kernels that take a hundredth of the step or more."""
    kernels = record["runs"]
    least = SMALL * sum(kernel["median"] for kernel in kernels)
    rows = [(k["what"][:60], seconds(k["median"]), f"{k['calls']:g}") for k in kernels if k["median"] >= least]
    return in_columns(("per step", "time", "calls"), rows)


PROGRAM = cli.Program(
    "kernel_times", __doc__, "a minute", measure, table, {"repeats": (10, "profiled steps")}, cli.QUICK, cli.add_flags
)
main, build_parser = PROGRAM.main, PROGRAM.build_parser

if __name__ == "__main__":
    sys.exit(main())
