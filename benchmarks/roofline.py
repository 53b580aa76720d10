"""The least time of a training step on a named GPU, kernel by kernel: ``python -m benchmarks.roofline``.

A model, not a measurement. For each kernel of the Triton backend (as :mod:`benchmarks.launches` lists them):
the floating-point operations of its matrix products over the weights that exist, the bytes of every tensor that it
reads or writes, each once, and the longer of their two times at the card's rates. Kernels do not overlap. Not counted:
repeated reads after a cache miss, arithmetic outside of matrix products, gaps between launches, the loss.
"""

import argparse
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from g2g_kernels.triton import runtime
from g2gnet import G2GNet
from g2gnet.base.tables import markdown
from g2gnet.programs.flags import FlagError, Parser
from g2gnet.programs.main import run_program

from . import cli
from .contender import FORMATS
from .costs import CARDS, Card
from .launches import Operation, training_step
from .workload import Workload

INPUT_DIM, NUM_CLASSES = 784, 10  # Fashion-MNIST

#: operations below this share of the whole are shown in one line
SMALL = 0.01

#: names of the neurons' tensors over time, by a kernel's argument; spikes are recognised by their dtype
KINDS = {
    "current": "currents",
    "margins": "margins θ − U",
    "checkpoints": "membranes",
    "grad_spikes": "∂L/∂S",
    "grad_current": "∂L/∂I",
    "grad_y": "∂L/∂I",
}
PRODUCTS = {"forward": {"y": "currents"}, "backward": {"x": "∂L/∂I", "y": "∂L/∂S"}}


def kinds(operation: Operation) -> dict[str, int]:
    """The bytes of an operation by kind."""
    names = KINDS | (PRODUCTS[operation.phase] if operation.name == "product_kernel" else {})
    moved: Counter[str] = Counter()
    for name, tensor in operation.tensors.items():
        kind = "spikes" if tensor.dtype == torch.uint8 else names.get(name, "weights and sums")
        moved[kind] += tensor.numel() * tensor.itemsize
    return dict(moved)


def seconds(operation: Operation, card: Card) -> float:
    """The floor of one operation."""
    memory = operation.bytes / card.bytes_per_s
    if not operation.flop:
        return memory
    kind, times = operation.factors
    return max(times * operation.flop / card.flop_per_s[kind], memory)


def adam(net: G2GNet) -> Operation:
    """The fused optimizer: reads float32 weights, gradients and two moments, writes all but the gradients."""
    weights = sum(parameter.numel() for parameter in net.parameters())
    passes = ("weights", "gradients", "moments", "squares", "new weights", "new moments", "new squares")
    return Operation("optimizer", "fused Adam", {name: torch.empty(weights, device="meta") for name in passes}, 0)


def table(operations: Sequence[Operation], card: Card) -> str:
    """The floor of every operation and of all together, as Markdown."""
    total = sum(seconds(operation, card) for operation in operations)

    def row(phase: str, name: str, chosen: Sequence[Operation], bound: str = "", moved: str = "") -> list[str]:
        flop, megabytes = sum(each.flop for each in chosen) / 1e9, sum(each.bytes for each in chosen) / 1e6
        floor = sum(seconds(each, card) for each in chosen) * 1e6
        return [phase, name, f"{flop:.1f}", f"{megabytes:.1f}", f"{floor:.1f}", bound, moved]

    rows, small = [], []
    for each in operations:
        floor = seconds(each, card)
        if floor < SMALL * total:
            small.append(each)
            continue
        bound = "memory" if floor == each.bytes / card.bytes_per_s else "arithmetic"
        parts = [f"{size / 1e6:.1f} {kind}" for kind, size in kinds(each).items() if size > 0.01 * each.bytes]
        rows.append(row(each.phase, each.name, [each], bound, ", ".join(parts)))
    rows += [row("", f"{len(small)} smaller ones", small), row("", f"**all {len(operations)}**", operations)]
    header = ["pass", "kernel", "GFLOP", "MB", "floor, µs", "bound by", "of which, MB"]
    return markdown(header, rows, right=header[2:5])


def network(**changes: Any) -> G2GNet:
    """The network of the workload with such changes, with initial weights."""
    draw = torch.Generator().manual_seed(42)
    return G2GNet.from_settings(Workload(**changes).settings(), INPUT_DIM, NUM_CLASSES, generator=draw)


def build_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    cli.add_sizes(parser)
    parser.add_argument("--precision", choices=tuple(FORMATS), default="bf16", help="of products (default: bf16)")
    parser.add_argument("--card", choices=tuple(CARDS), default="h100", help="card whose rates to use (default: h100)")
    return parser


def roofline(arguments: argparse.Namespace) -> str:
    """The whole report, as Markdown; raises FlagError without Triton."""
    if importlib.util.find_spec("triton") is None:
        raise FlagError("the model needs the Triton kernels: pip install triton")
    workload, card = cli.workload_from(arguments), CARDS[arguments.card]
    net = network(**workload.as_dict())
    masks = [connection.mask for connection, _ in net.layers()]
    weights = sum(mask.num_weights for mask in masks)
    density = weights / sum(math.prod(mask.shape) for mask in masks)
    with runtime.assuming(architecture=card.architecture):
        operations = training_step(net, workload.batch_size, INPUT_DIM, FORMATS[arguments.precision])
    operations.append(adam(net))
    total = sum(seconds(operation, card) for operation in operations)
    return f"""\
# Floor of a training step: {total * 1e3:.3f} ms

A model, not a measurement: these kernels have not been run on a GPU. `python -m benchmarks.roofline` prints it.

{workload.model}, batch {workload.batch_size}, {workload.T} steps, {workload.hidden_dim:,} neurons per layer, \
p_inter {workload.p_inter}, {workload.block_size} × {workload.block_size} blocks, {arguments.precision}: \
{weights:,} weights, {density:.1%} of the dense network's.
{card.source}: {card.flop_per_s[arguments.precision] / 1e12:.0f} TFLOP/s, {card.bytes_per_s / 1e12:.1f} TB/s.

{table(operations, card)}

A kernel's floor is the longer of its arithmetic and its memory traffic; every tensor counts once per kernel. Kernels
are listed in the order of their launches, layers 1 to 3 forward and 3 to 1 backward. Gaps between them and the loss are
not counted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), lambda arguments: print(roofline(arguments), end=""), argv)


if __name__ == "__main__":
    sys.exit(main())
