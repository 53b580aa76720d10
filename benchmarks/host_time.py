"""The time of the host in a training step, by part, where kernels cost nothing: ``python -m benchmarks.host_time``.

CPU time of one thread, at sizes that leave little but Python and dispatch. ``tiny`` has 32-64-64-16 neurons, T = 5 and
B = 4; ``plain loop`` is the same network with dense layers, a loop over time in plain PyTorch. ``default`` has the
layers and options of the default network, and launches its kernels, at 112-256-256-10 neurons, T = B = 2 and units of
16. Backend ``triton`` records its launches instead of running them, so it needs no GPU; the time of Triton's own
launcher is not included. Cases take turns. Compare the least times, since other programs share the machine.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.triton import runtime
from g2gnet import LIF, G2GLinear, G2GNet, SpikingNetwork, SpikingStack
from g2gnet.base.tables import markdown

from . import cli
from .contender import ATan, autocast
from .harness import in_turn
from .report import seconds

PARTS = ("forward", "loss", "backward", "optimizer")
#: steps of a case in its turn
TURN = 10


class Case(NamedTuple):
    """What is timed: a network, who runs it, and the precision of products."""

    network: str
    backend: str
    precision: str = "fp32"


CASES = (
    Case("tiny", "plain loop"), Case("tiny", "cpu"), Case("default", "cpu"), Case("default", "triton"),
    Case("default", "triton", "bf16"),
)  # fmt: skip


class PlainLoop(nn.Module):
    """The layers of a stack as dense ones, in a plain loop over time."""

    def __init__(self, stack: SpikingNetwork) -> None:
        super().__init__()
        self.T = stack.T
        self.linears = nn.ModuleList(connection.to_linear() for connection, _ in stack.layers())
        self.neurons = nn.ModuleList(neurons for _, neurons in stack.layers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [B, D] held for T steps → spike counts [B, C]."""
        membranes, counts = [torch.zeros(())] * len(self.linears), torch.zeros(())
        for _ in range(self.T):
            spikes = x
            for number, (linear, neurons) in enumerate(zip(self.linears, self.neurons, strict=True)):
                assert isinstance(neurons, LIF)
                reset = (membranes[number] > neurons.threshold).detach() * neurons.threshold
                membranes[number] = neurons.beta * membranes[number] + linear(spikes) - reset
                spikes = ATan.apply(membranes[number] - neurons.threshold)
            counts = counts + spikes
        return counts


def tiny(backend: str) -> SpikingStack:
    """32-64-64-16 neurons in groups, units of 8, T = 5."""
    draw = torch.Generator().manual_seed(42)
    layouts = [GroupLayout(size) for size in (32, 64, 64, 16)]
    masks = [BlockMask.sample(out, into, block_size=8, generator=draw) for into, out in itertools.pairwise(layouts)]
    return SpikingStack([(G2GLinear(mask, generator=draw), LIF()) for mask in masks], 5, backend)


def default(backend: str) -> G2GNet:
    """The default network at sizes that cost nothing; every layer has the form that it has there."""
    draw = torch.Generator().manual_seed(42)
    return G2GNet(112, 256, 10, block_size=16, T=2, backend=backend, generator=draw)


class Contender:
    """A training step of one case, and the seconds of each of its parts."""

    def __init__(self, case: Case) -> None:
        self.case, draw = case, torch.Generator().manual_seed(0)
        build, batch = (tiny, 4) if case.network == "tiny" else (default, 2)
        stack = build("cpu" if case.backend == "plain loop" else case.backend)
        (first, _), *_, (last, _) = stack.layers()
        self.x = torch.rand(batch, first.in_features, generator=draw)
        self.labels = torch.randint(last.out_features, (batch,), generator=draw)
        self.net = PlainLoop(stack) if case.backend == "plain loop" else stack
        self.optimizer = torch.optim.Adam(self.net.parameters(), fused=True)
        self.launches: list[runtime.Launch] = []  # of the last step, on Triton

    def step(self) -> dict[str, float]:
        """Trains for one step."""
        marks = [time.process_time()]
        with autocast(self.x.device, self.case.precision):
            counts = self.net(self.x)
        marks.append(time.process_time())
        loss = F.cross_entropy(counts.float(), self.labels)
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.process_time())
        parts = {part: end - start for part, (start, end) in zip(PARTS, itertools.pairwise(marks), strict=True)}
        return {**parts, "forward to backward": marks[3] - marks[0], "step": marks[-1] - marks[0]}

    def turn(self, steps: int | None = None) -> list[dict[str, float]]:
        """Trains for some steps."""
        taken = []
        with contextlib.ExitStack() as stack:
            self.launches = stack.enter_context(free_launches()) if self.case.backend == "triton" else []
            for _ in range(steps or TURN):
                self.launches.clear()
                taken.append(self.step())
        return taken


@contextlib.contextmanager
def free_launches() -> Iterator[list[runtime.Launch]]:
    """Inside, backend ``triton`` takes tensors on the CPU, and its launches are recorded instead of run."""
    from g2g_kernels.ops.g2g_stack import triton as stack

    pays = stack.fused_pays

    def pays_in_the_default_network(units: Any, *rest: Any) -> bool:
        pays(units, *rest)  # takes its time, but for layers as small as these it decides otherwise
        return units.rows.num_units >= 16 and rest[-1] != torch.float32

    patched = mock.patch.object(stack, "fused_pays", pays_in_the_default_network)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), patched, runtime.recorded() as launches:
        yield launches


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all cases in turn."""
    contenders = {str(case): Contender(case) for case in CASES}
    with cli.bar((arguments.warm_up + arguments.turns) * len(CASES)) as bar:
        works = {name: contender.turn for name, contender in contenders.items()}
        turns = in_turn(works, arguments.turns, arguments.warm_up, bar.update)
    runs = []
    for name, contender in contenders.items():
        steps = list(itertools.chain(*turns[name]))
        runs += [_row(contender.case, part, [step[part] for step in steps]) for part in steps[0]]
    return {"turns": arguments.turns, "turn": TURN, "runs": runs}


def _row(case: Case, part: str, taken: Sequence[float]) -> dict[str, Any]:
    return {**case._asdict(), "part": part, "least": min(taken), "median": statistics.median(taken)}


def table(record: dict[str, Any]) -> str:
    """Least and median time of each part of each case."""
    cases: dict[str, dict[str, str]] = {}
    for row in record["runs"]:
        times = cases.setdefault(", ".join(row[field] for field in Case._fields), {})
        times[row["part"]] = f"{seconds(row['least'])} ({seconds(row['median'])})"
    parts = list(dict.fromkeys(row["part"] for row in record["runs"]))
    rows = [[name, *(times.get(part, "–") for part in parts)] for name, times in cases.items()]
    return markdown(["least (median)", *parts], rows)


PROGRAM = cli.Program(
    "host_time", __doc__, "half a minute on a core", measure, table,
    {"turns": (50, f"timed turns of {TURN} steps"), "warm_up": (5, "turns before them")},
    {"turns": 10},
    threads=1,
)  # fmt: skip
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
