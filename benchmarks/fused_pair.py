"""A layer's fused kernel compared with the pair of kernels: ``python -m benchmarks.fused_pair``.

Forward and backward of one hidden layer over all T, for the batch sizes and units for which ``fused_pays`` decides. On
a GPU each is replayed as a CUDA graph, which excludes the host's time. Without one, ``TRITON_INTERPRET=1`` and small
sizes show that the program runs; the times mean nothing then.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from g2g_kernels import BlockMask, GroupLayout, Neurons, SpikingLayer
from g2g_kernels.ops.g2g_stack.call import StackCall
from g2g_kernels.triton import runtime
from g2gnet.base.tables import in_columns
from g2gnet.programs.flags import Parser
from g2gnet.training.captured_step import CapturedStep

from . import cli
from .machine import timed
from .registry import PRECISIONS
from .report import seconds
from .roofline import DTYPES

#: firing rate of the inputs
RATE = 0.05


def add_flags(parser: Parser) -> None:
    text = "cuda, cuda:N or, in Triton's interpreter, cpu (default: cuda)"
    parser.add_argument("--device", default="cuda", help=text)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the product (default: bf16)")
    text = "batch sizes (default: %(default)s)"
    parser.add_argument("--batch_sizes", default="64,128,256,512,1024", metavar="N,N,...", help=text)
    text = "sides of units (default: %(default)s)"
    parser.add_argument("--block_sizes", default="16,32,64", metavar="N,N,...", help=text)


def sizes(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """The side of units and the batch size of each layer that is compared."""
    return itertools.product(cli.counts(arguments, "block_sizes"), cli.counts(arguments, "batch_sizes"))


def label(batch: int, block_size: int, fused: bool) -> str:
    """The name of a layer of that size, run in that way."""
    return f"B {batch}, units of {block_size}, {'fused' if fused else 'pair'}"


class Layer:
    """One layer and a batch of spikes for it, as the bytes that a layer before it gives, on ``device``."""

    def __init__(
        self, device: torch.device, precision: str, steps: int, batch: int, size: int, block_size: int
    ) -> None:
        draw = torch.Generator().manual_seed(42)
        layout = GroupLayout(size)
        mask = BlockMask.sample(layout, layout, block_size=block_size, generator=draw)
        weight = torch.randn(size, size, generator=draw) / (RATE * mask.density * size) ** 0.5
        spikes = torch.rand(steps, batch, size, generator=draw) < RATE
        self.dtype = DTYPES[precision]
        self.x = spikes.to(device, torch.uint8)
        self.values = mask.pack(weight).to(device).requires_grad_()
        self.bias = torch.zeros(size, device=device, requires_grad=True)
        self.parameters = [torch.tensor([value], device=device, requires_grad=True) for value in (0.9, 1.0)]
        self.gradient = torch.randn(batch, size, generator=draw).to(device)
        self.layer = SpikingLayer(self.values, mask.to(device), self.bias, Neurons("lif", tuple(self.parameters)))

    def step(self) -> torch.Tensor:
        """Spike counts [B, N]; the gradients are in the leaves."""
        from g2g_kernels.ops.g2g_stack import triton as stack

        for leaf in (self.values, self.bias, *self.parameters):
            leaf.grad = None
        counts, *_ = stack.FORWARD(StackCall.of(self.x, [self.layer], None, self.dtype))
        counts.backward(self.gradient)
        return counts.detach()


def replayed(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``work`` as a CUDA graph; itself on other devices."""
    if device.type != "cuda":
        return work
    captured, nothing = CapturedStep(lambda *_: work(), device, (), required=True), torch.empty(0, device=device)

    def replay() -> None:
        captured(nothing, nothing, None)

    for _ in range(CapturedStep.WARM_UP + 1):
        replay()
    return replay


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both ways at every size.

    Raises:
        ValueError: for a device that Triton cannot use, or sizes out of range.
    """
    reason, device = runtime.unavailable(), cli.device_from(arguments)
    if reason is None and device.type != ("cpu" if runtime.interpreted() else "cuda"):
        reason = "TRITON_INTERPRET=1 works with --device cpu only, which needs it"
    if reason is not None:
        raise ValueError(f"device={arguments.device!r}: {reason}")
    from g2g_kernels.ops.g2g_stack import triton as stack

    found: list[dict[str, Any]] = []
    for block_size, batch in cli.bar(list(sizes(arguments)), unit=" layers"):
        layer = Layer(device, arguments.precision, arguments.T, batch, arguments.hidden_dim, block_size)
        counts = []
        for fused in (False, True):
            with stack.choose(fused):
                counts.append(layer.step().clone())
                work = replayed(layer.step, device)
                taken = [timed(work, device) for _ in range(arguments.repeats)]
            # a membrane at the threshold may spike in one way and not in the other
            differ = float((counts[0] != counts[-1]).float().mean())
            what = label(batch, block_size, fused)
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
