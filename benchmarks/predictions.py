"""Predicted times on GPUs, written down before anything had run on one.

    python -m benchmarks.predictions --written 2026-11-25 --json benchmarks/results/predictions.json

What a kernel takes (:mod:`benchmarks.launches` lists them) is modelled by :mod:`benchmarks.costs`. Kernels run one
after another, unless the host launches them more slowly. The shares of a card's rates are guesses; the record lists
them with the predictions.

What is predicted is what the stages of :mod:`benchmarks.first_run` measure, which compares its times with the record.
Do not write the record again once something has run on a GPU: it would no longer show what was expected.
"""

import functools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels import Neurons, SpikingLayer
from g2g_kernels.triton import products, runtime
from g2gnet.programs.flags import Parser, add_json_flag
from g2gnet.programs.main import run_program

from . import cli, costs, fused_pair, kernel_times, records, report, throughput
from .first_run import RECORD, stages
from .launches import Operation, correlations, forward_pass, layer_step, neurons_step, product_step, training_step
from .machine import describe
from .registry import choose
from .roofline import CARDS, DTYPES, INPUT_DIM, adam, network, seconds
from .workload import Workload

#: what :mod:`benchmarks.host_time` has measured of the default network's bfloat16 step on backend ``triton``
HOST = {
    run["part"]: run
    for run in records.read(RECORD.with_name("host-time-2-core-zen4.jsonl"))["runs"]
    if (run["backend"], run["precision"]) == ("triton", "bf16")
}


#: the guesses: of the model of kernels, and of the host in seconds; what is measured says so
ASSUMED = costs.ASSUMED | {
    "host, to launch a Triton kernel, s": 25e-6,
    "host, a PyTorch operation, s": 5e-6,
    "host, a part of a step beside those, s": 150e-6,
    "host, Triton's launcher up to the driver, measured, s": HOST["launcher"]["least"] / HOST["launcher"]["launches"],
    "host, a training step without it, measured, s": HOST["step"]["least"],
    "host, a forward pass without it, measured, s": HOST["forward"]["least"],
    "replaying a CUDA graph, s": 15e-6,
}

_NEURONS = "TILE 1024, then 256; SEGMENT 5; twice the warps"
#: what to try next if a time is off by more than 1.5, by what determines it
NEXT = {
    "product_kernel": "BLOCK_M 256 with 8 warps (a fifth less from L2); num_stages 4, then 2; 64 rows where the last "
    "tile of samples is nearly empty",
    "fused_forward_kernel": "num_stages 4, then 2; BLOCK_M 32, for twice the programs; the pair, where that is faster",
    "weight_gradient_kernel": "BLOCK_S 128 with num_stages 2; 256 columns (GROUP 4); _PROGRAMS 264, then 1056",
    "neurons_forward_kernel": _NEURONS,
    "neurons_backward_kernel": _NEURONS,
    "PyTorch's products": "none: cuBLAS chooses; for units below 16, tiles of 16 × 16 instead of the dense product",
    "PyTorch's other operations": "fewer of them: sums over parts and samples inside the kernels that make them",
    "the host": "a CUDA graph; else fewer PyTorch operations between launches",
}


# --- one kernel ---------------------------------------------------------------------------------------------------


def decider(operation: Operation) -> str:
    """The key of :data:`NEXT` for a kernel."""
    if operation.launch is not None:
        return operation.name if operation.name in NEXT else "PyTorch's other operations"
    return "PyTorch's products" if operation.flop else "PyTorch's other operations"


def work_of(operation: Operation) -> costs.Work:
    """What a kernel does, by its launch; a kernel without products reads nothing but memory."""
    if operation.launch is None:
        kind, _ = operation.factors if operation.flop else ("bf16", 1)
        return costs.Work(operation.flop, kind, operation.bytes, operation.bytes)
    a, programs = operation.launch.arguments, math.prod(operation.launch.grid)
    warps = a.get("num_warps", 4)
    if not operation.flop:
        return costs.Work(bytes=operation.bytes, l2_bytes=operation.bytes, programs=programs, warps=warps)
    if operation.name == "weight_gradient_kernel":
        block = costs.Block(a["BLOCK_R"], a["GROUP"] * a["BLOCK_C"], a["samples"])
        pairs = operation.launch.grid[2] * costs.groups_of(a["num_units"], a["num_rows"], a["GROUP"])
        left, right = a["grad_y"].itemsize, a["x"].itemsize
    else:
        samples, steps = a["samples" if "samples" in a else "batch"], a.get("steps", 1)
        block = costs.Block(a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"])
        on_chip = a.get("ON_CHIP", 0)
        units = a["num_n"] * on_chip if on_chip else len(a["values"])
        pairs = units * -(-a["N"] // block.n) * -(-a["K"] // block.k) * steps * -(-samples // block.m)
        parts = products.PARTS if a["PRECISION"] == "parts" else 1
        left, right = a["x" if "x" in a else "grad_after"].itemsize, 0 if on_chip else a["values"].itemsize * parts
    kind, times = operation.factors
    flop, l2_bytes = times * block.flop(pairs), block.l2_bytes(pairs, left, right)
    return costs.Work(flop, kind, operation.bytes, l2_bytes, programs, warps)


def on_host(operations: Sequence[Operation], work: str) -> float:
    """Seconds that the host needs to launch them; for a ``"training step"`` or a ``"forward pass"`` as measured."""
    launches = sum(operation.launch is not None for operation in operations)
    if work != "part":
        launching = launches * ASSUMED["host, Triton's launcher up to the driver, measured, s"]
        return launching + ASSUMED[f"host, a {work} without it, measured, s"]
    return (
        launches * ASSUMED["host, to launch a Triton kernel, s"]
        + (len(operations) - launches) * ASSUMED["host, a PyTorch operation, s"]
        + ASSUMED["host, a part of a step beside those, s"]
    )


# --- what is measured ---------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """One thing that a stage of :mod:`benchmarks.first_run` measures.

    Attributes:
        stage, what: as the page names it.
        operations: what it launches.
        precision: of its products.
        work: ``"training step"``, whose loss and optimizer the host launches too, ``"forward pass"`` or ``"part"``.
        graph: whether it is replayed as a CUDA graph.
    """

    stage: str
    what: str
    operations: Sequence[Operation]
    precision: str
    work: str = "training step"
    graph: bool = False

    def row(self, card: str) -> dict[str, Any]:
        """Its floor and its prediction on a card, and what determines the latter."""
        floor = sum(seconds(operation, CARDS[card]) for operation in self.operations)
        times: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            times[decider(operation)] += costs.seconds(work_of(operation), CARDS[card])
        total, decides = sum(times.values()), max(times, key=lambda name: times[name])
        host = on_host(self.operations, self.work)
        if self.graph:
            total += ASSUMED["replaying a CUDA graph, s"]
        elif host > total:
            total, decides = host, "the host"
        return {
            "stage": self.stage,
            "what": self.what,
            "floor": float(f"{floor:.3g}"),
            "predicted": float(f"{total:.3g}"),
            "decides": decides,
        }


#: what the host does of a turn, by the kernel of :mod:`benchmarks.throughput`; of others it launches a part of a step
HOSTS = {"step": "training step", "forward": "forward pass"}


def operations_of(kernel: str, workload: Workload, dtype: torch.dtype) -> list[Operation]:
    """What one turn of a kernel launches."""
    net, batch, samples = network(**workload.as_dict()), workload.batch_size, workload.T * workload.batch_size
    match kernel:
        case "step":
            return [*training_step(net, batch, INPUT_DIM, dtype), adam(net)]
        case "forward":
            return forward_pass(net, batch, INPUT_DIM, dtype)
        case "linear" | "linear-dense":
            return product_step(net.fc2, samples, dtype)
        case "dst":
            return correlations(net, batch, INPUT_DIM)
    parameters = [torch.empty(1, device="meta") for _ in {"lif": "βθ", "synaptic": "γβθ"}[kernel]]
    return neurons_step(Neurons(kernel, tuple(parameters)), workload.T, batch, workload.hidden_dim)


def of_throughput(stage: str, flags: Sequence[str]) -> Iterator[Work]:
    """Each of our contenders with each workload."""
    arguments = throughput.build_parser().parse_args(flags)
    kernel, recorded = arguments.kernel, functools.cache(operations_of)
    for value, workload in throughput.workloads_of(arguments).items():
        for entry in choose(kernel, arguments.contenders):
            if entry.backend == "triton":
                what = entry.label if value is None else f"{entry.label}, {arguments.quantity} {value}"
                operations = recorded(kernel, workload, DTYPES[entry.precision])
                graph = entry.target.endswith(":Captured")
                yield Work(stage, what, operations, entry.precision, HOSTS.get(kernel, "part"), graph)


def of_fused_pair(stage: str, flags: Sequence[str]) -> Iterator[Work]:
    """One layer of each size in both ways."""
    arguments = fused_pair.build_parser().parse_args(flags)
    precision = arguments.precision
    for block_size, batch in fused_pair.sizes(arguments):
        net = network(block_size=block_size, hidden_dim=arguments.hidden_dim).to("meta")
        layer = SpikingLayer(net.fc2.values, net.fc2.mask, net.fc2.bias, net.lif2.population)
        for fused in (False, True):
            operations = layer_step(layer, arguments.T, batch, DTYPES[precision], fused, spikes=True)
            yield Work(stage, fused_pair.label(batch, block_size, fused), operations, precision, "part", graph=True)


def of_kernel_times(stage: str, flags: Sequence[str]) -> Iterator[Work]:
    """The kernels of a training step in bfloat16, each by its name."""
    workload = cli.workload_from(kernel_times.build_parser().parse_args(flags))
    by_kernel: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations_of("step", workload, torch.bfloat16):
        if operation.launch is not None:
            by_kernel[operation.name].append(operation)
    for name, operations in by_kernel.items():
        yield Work(stage, name, operations, "bf16", "part", graph=True)


def everything() -> Iterator[Work]:
    """All that has a prediction, stage by stage, by the flags of each."""
    of_program = {"throughput": of_throughput, "fused_pair": of_fused_pair, "kernel_times": of_kernel_times}
    for stage in stages("cuda"):
        program, *flags = stage.command
        if predicted := of_program.get(program.rpartition(".")[2]):
            yield from predicted(stage.name, flags)


def record(written: str) -> dict[str, Any]:
    """The predictions for every card, written down on the day ``written``; prints those for an H100."""
    cards = {}
    for card in CARDS:
        with runtime.assumed(CARDS[card].architecture):  # which decides how a step is computed
            cards[card] = [each.row(card) for each in everything()]
    for row in cards["h100"]:
        print(f"{row['stage']}, {row['what']}: {report.seconds(row['predicted'])}, {row['decides']}")
    return {
        "benchmark": "predictions",
        "written": written,
        "machine": describe(torch.device("cpu")),  # on which the model was computed
        "assumed": ASSUMED,
        "next": NEXT,
        "cards": cards,
    }


def build_parser() -> Parser:
    parser = Parser(prog=f"python -m {__package__}.predictions", description=__doc__.split("\n\n")[0])
    parser.add_argument("--written", required=True, metavar="DATE", help="the day on which they were written down")
    add_json_flag(parser, "the predictions for all cards")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), lambda arguments: record(arguments.written), argv, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
