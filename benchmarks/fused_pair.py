"""A layer's fused kernel compared with the pair of kernels: ``python -m benchmarks.fused_pair``.

Forward and backward of one hidden layer over all T, for the batch sizes and units for which ``fused_pays`` decides. On
a GPU each is replayed as a CUDA graph, which excludes the host's time. Without one, ``TRITON_INTERPRET=1`` and small
sizes show that the program runs; the times mean nothing then.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from g2g_kernels import BlockMask, GroupLayout, Neurons, SpikingLayer
from g2g_kernels.numbers import COUNT
from g2g_kernels.ops.g2g_stack.call import StackCall
from g2g_kernels.triton import runtime
from g2gnet.base.tables import in_columns
from g2gnet.programs.flags import Parser
from g2gnet.training.captured_step import CapturedStep

from . import cli
from .machine import describe, timed
from .predictions import FUSED_BATCHES, FUSED_UNITS, fused_label
from .registry import PRECISIONS
from .report import seconds
from .roofline import DTYPES

#: firing rate of the inputs
RATE = 0.05
COUNTS = {"hidden_dim": (2048, "neurons"), "T": (50, "time steps"), "repeats": (20, "timed turns")}


def build_parser() -> Parser:
    quick = {"batch_sizes": "64,256", "block_sizes": "64", "repeats": 5}
    parser = cli.build_parser("fused_pair", __doc__, "up to eight minutes on a GPU", quick)
    text = "cuda, cuda:N or, in Triton's interpreter, cpu (default: cuda)"
    parser.add_argument("--device", default="cuda", help=text)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the product (default: bf16)")
    for name, values, text in (
        ("batch_sizes", FUSED_BATCHES, "batch sizes"),
        ("block_sizes", FUSED_UNITS, "sides of units"),
    ):
        default = ",".join(map(str, values))
        parser.add_argument(f"--{name}", default=default, metavar="N,N,...", help=f"{text} (default: {default})")
    cli.add_counts(parser, COUNTS)
    return parser


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


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both ways at every size, prints the table and returns the record.

    Raises:
        ValueError: for a device that Triton cannot use, or sizes out of range.
    """
    reason = runtime.unavailable()
    device = torch.device(arguments.device)
    if reason is None and device.type != ("cpu" if runtime.interpreted() else "cuda"):
        reason = "TRITON_INTERPRET=1 works with --device cpu only, which needs it"
    if reason is not None:
        raise ValueError(f"device={arguments.device!r}: {reason}")
    batches, units = (cli.numbers(text) for text in (arguments.batch_sizes, arguments.block_sizes))
    cli.checked(arguments, *COUNTS)
    for size in (*batches, *units):
        COUNT.check("sizes", size)
    from g2g_kernels.ops.g2g_stack import triton as stack

    found: list[dict[str, Any]] = []
    with cli.bar(len(units) * len(batches), unit=" layers") as bar:
        for block_size, batch in itertools.product(units, batches):
            bar.update()
            layer = Layer(device, arguments.precision, arguments.T, batch, arguments.hidden_dim, block_size)
            counts = []
            for fused in (False, True):
                with stack.choose(fused):
                    counts.append(layer.step().clone())
                    work = replayed(layer.step, device)
                    taken = [timed(work, device) for _ in range(arguments.repeats)]
                found.append(
                    {
                        "what": fused_label(batch, block_size, fused),
                        "median": statistics.median(taken),
                        # a membrane at the threshold may spike in one way and not in the other
                        "counts_that_differ": float((counts[0] != counts[-1]).float().mean()),
                    }
                )
    rows = [(one["what"], seconds(one["median"]), f"{one['counts_that_differ']:.1e}") for one in found]
    print(in_columns(("", "median", "counts that differ"), rows))
    return {
        "benchmark": "fused_pair",
        "precision": arguments.precision,
        "T": arguments.T,
        "hidden_dim": arguments.hidden_dim,
        "machine": describe(device),
        "runs": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
