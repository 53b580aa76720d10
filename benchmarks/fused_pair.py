"""A layer's fused kernel compared with the pair of kernels: ``python -m benchmarks.fused_pair``.

Forward and backward of one hidden layer over all T, for the batch sizes and units for which ``fused_pays`` decides. On
a GPU each is replayed as a CUDA graph, which excludes the host's time. Without one, ``TRITON_INTERPRET=1`` and small
sizes show that the program runs; the times mean nothing then.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from g2g_kernels import SpikingLayer
from g2g_kernels.ops.g2g_stack.call import StackCall
from g2g_kernels.triton import runtime
from g2gnet.base.tables import in_columns
from g2gnet.programs.flags import Parser
from g2gnet.training.captured_step import CapturedStep

from . import cli
from .contender import FORMATS
from .machine import timed
from .registry import PRECISIONS
from .report import seconds
from .roofline import network

#: firing rate of the inputs
RATE = 0.05


def add_flags(parser: Parser) -> None:
    text = "cuda, cuda:N or, in Triton's interpreter, cpu (default: cuda)"
    parser.add_argument("--device", default="cuda", help=text)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the product (default: bf16)")
    for name, text, default in (
        ("batch_sizes", "batch sizes", "64,128,256,512,1024"),
        ("block_sizes", "sides of units", "16,32,64"),
    ):
        parser.add_argument(f"--{name}", default=default, metavar="N,N,...", help=f"{text} (default: {default})")


def step_of(arguments: argparse.Namespace, batch: int, block_size: int, device: torch.device) -> Callable[[], Any]:
    """Forward and backward of a layer, on spikes as the bytes that a layer before it gives: the spike counts [B, N]."""
    from g2g_kernels.ops.g2g_stack import triton as stack

    net = network(block_size=block_size, hidden_dim=arguments.hidden_dim).to(device)
    net.fc2.values.data *= (3 / RATE) ** 0.5  # so that currents vary by as much as the threshold is high
    layer = SpikingLayer(net.fc2.values, net.fc2.mask, net.fc2.bias, net.lif2.population)
    draw = torch.Generator().manual_seed(42)
    spikes = torch.rand(arguments.T, batch, arguments.hidden_dim, generator=draw) < RATE
    x, gradient = spikes.to(device, torch.uint8), torch.randn(spikes.shape[1:], generator=draw).to(device)

    def step() -> torch.Tensor:
        net.zero_grad(set_to_none=True)
        counts, *_ = stack.FORWARD(StackCall.of(x, [layer], None, FORMATS[arguments.precision]))
        counts.backward(gradient)
        return counts.detach()

    return step


def replayed(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``work`` as a CUDA graph; itself on other devices."""
    if device.type != "cuda":
        return work
    captured, nothing = CapturedStep(lambda *_: work(), device, (), required=True), torch.empty(0, device=device)
    for _ in range(CapturedStep.WARM_UP + 1):
        captured(nothing, nothing, None)
    return lambda: captured(nothing, nothing, None)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both ways at every size; raises ValueError for a device that Triton cannot use, or sizes out of range."""
    reason, device = runtime.unavailable(), cli.device_from(arguments)
    if reason is None and device.type != ("cpu" if runtime.interpreted() else "cuda"):
        reason = "TRITON_INTERPRET=1 works with --device cpu only, which needs it"
    if reason is not None:
        raise ValueError(f"device={arguments.device!r}: {reason}")
    from g2g_kernels.ops.g2g_stack import triton as stack

    found: list[dict[str, Any]] = []
    sizes = itertools.product(cli.counts(arguments, "block_sizes"), cli.counts(arguments, "batch_sizes"))
    for block_size, batch in cli.bar(list(sizes), unit=" layers"):
        step, counts = step_of(arguments, batch, block_size, device), []
        for fused in (False, True):
            with stack.choose(fused):
                counts.append(step().clone())
                work = replayed(step, device)
                taken = [timed(work, device) for _ in range(arguments.repeats)]
            # a membrane at the threshold may spike in one way and not in the other
            differ = float((counts[0] != counts[-1]).float().mean())
            what = f"B {batch}, units of {block_size}, {'fused' if fused else 'pair'}"
            found.append({"what": what, "median": statistics.median(taken), "counts_that_differ": differ})
    return {"precision": arguments.precision, "runs": found}


def table(record: dict[str, Any]) -> str:
    """The time of each way at each size, and how many counts differ from those of the pair."""
    rows = [(one["what"], seconds(one["median"]), f"{one['counts_that_differ']:.1e}") for one in record["runs"]]
    return in_columns(("", "median", "counts that differ"), rows)


PROGRAM = cli.Program(
    "fused_pair", __doc__, "up to eight minutes on a GPU", measure, table,
    {"hidden_dim": (2048, "neurons"), "T": (50, "time steps"), "repeats": (20, "timed turns")},
    {"batch_sizes": "64,256", "block_sizes": "64", "repeats": 5},
    add_flags,
)  # fmt: skip
main, build_parser = PROGRAM.main, PROGRAM.build_parser

if __name__ == "__main__":
    sys.exit(main())
