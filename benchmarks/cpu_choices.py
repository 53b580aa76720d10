"""Whether the CPU kernels choose the fastest way to multiply: ``python -m benchmarks.cpu_choices``.

Spikes are multiplied by events, by sums of subsets, with vectors over the batch or by matrix tiles, and the gradient
of the inputs by events, by tiles or, if they are the spikes of a layer below, where that layer needs it
(csrc/PERFORMANCE.md). Each point is one layer of N → N neurons, T steps of B samples; where gradients pass from a
layer to one below, two of them. Forward pass, gradient of the weights, and that with the gradient of the inputs are
timed by themselves, each way forced in turn and then as the kernels choose: processor time, the least of all turns,
which other programs disturb least. Ways sum in different orders, so the last bits identify the chosen one.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from g2g_kernels import BlockMask, Connection, GroupLayout, Neurons, Population, g2g_stack
from g2g_kernels.cpu import library
from g2g_kernels.ops.g2g_stack import cpu as stack

from . import cli
from .harness import in_turn
from .report import by_column

NEVER = math.inf
#: what forces each way to multiply spikes: the costs of events, of vectors over the batch and of sums of subsets
COSTS = ("EVENT_COST", "BATCH_COST", "SUBSET_COST")
WAYS = {
    "events": (0.0, NEVER, NEVER), "tiles": (NEVER, NEVER, NEVER), "batch": (0.0, 0.0, NEVER), "sums": (0.0, NEVER, 0.0)
}  # fmt: skip
#: what forces each way to the gradient of the inputs: the share of events up to which they pay, and the cost where the
#: layer below needs it
DOWN = {"tiles": (0.0, NEVER), "events": (NEVER, NEVER), "needed": (0.0, 0.0)}
#: a chosen way may be so much slower than the fastest
ALLOWED = 1.03


class Pass(NamedTuple):
    """How many layers, the sharpness of their surrogate, and whether each neuron has its own β, which bars events."""

    layers: int = 1
    alpha: float = 2.0
    per_neuron: bool = False


#: between two layers, a gradient is needed by 36, 19 and 5 % of the neurons and steps at α 1, 2 and 8
PASSES = {
    "forward": Pass(),
    "weights": Pass(),
    "inputs, α 2": Pass(),
    "inputs, α 8": Pass(alpha=8.0),
    "inputs of two layers, α 1": Pass(2, 1.0),
    "inputs of two layers, α 2": Pass(2),
    "inputs of two layers, α 8": Pass(2, 8.0),
    "inputs of two layers, α 1, β per neuron": Pass(2, 1.0, per_neuron=True),
}


class Point(NamedTuple):
    unit: int
    density: float
    rate: float
    T: int
    B: int


def grid() -> Iterator[Point]:
    """Units × densities × rates, and other T and B."""
    densities = rates = (0.02, 0.05, 0.1, 0.25)
    for unit, density, rate in itertools.product((1, 16, 64), densities, rates):
        yield Point(unit, density, rate, 10, 128)
    for unit, density, (steps, batch) in itertools.product((1, 16, 32), (0.05, 0.25), ((10, 16), (50, 32), (1, 256))):
        yield Point(unit, density, 0.1, steps, batch)


@contextmanager
def forced(way: str, down: bool) -> Iterator[None]:
    """The way to multiply spikes, or ``down`` to the gradient of the inputs."""
    changes: list[tuple[Any, str, Any]]
    if down:
        limit, needed = DOWN[way]
        changes = [(stack, "GRADIENT_EVENT_LIMIT", {False: limit, True: limit}), (library, "NEEDED_COST", needed)]
    else:
        changes = [(library, *each) for each in zip(COSTS, WAYS[way], strict=True)]
    with ExitStack() as changed:
        for change in changes:
            changed.enter_context(mock.patch.object(*change))
        yield


#: what gives a tensor whose last bits depend on the way
Run = Callable[[], torch.Tensor]


class Layers:
    """The layers of one point, and their passes."""

    def __init__(self, point: Point, size: int, of: Pass) -> None:
        draw = torch.Generator().manual_seed(0)
        layout = GroupLayout(size, 8)
        beta = torch.full((size if of.per_neuron else 1,), 0.9)
        neurons = Neurons("lif", (beta, torch.tensor(1.0)), "subtract", "triangle", of.alpha)
        # the spread of the currents is that of the threshold, so that some membranes are near it and some spike
        spread = (size * point.density * point.rate) ** -0.5
        self.layers = []
        for number in range(of.layers):
            options = {"p_intra": point.density, "p_inter": point.density, "block_size": point.unit}
            mask = BlockMask.sample(layout, layout, **options, generator=draw)  # type: ignore[arg-type]
            values = mask.pack(spread * torch.randn(size, size, generator=draw)).requires_grad_()
            self.layers.append(Population(neurons, (Connection("linear", values, mask, number - 1),)))
        self.x = (torch.rand(point.T, point.B, size, generator=draw) < point.rate).float()

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        result = g2g_stack(self.x, self.layers, backend="cpu")
        assert result.states is not None
        return result.states[0][0]

    def backward(self, inputs: bool) -> Run:
        """The gradient of the weights, and that of the inputs, too."""
        counts = g2g_stack(self.x.requires_grad_(inputs), self.layers, backend="cpu").counts
        wanted = [*(layer.connections[0].values for layer in reversed(self.layers)), *([self.x] if inputs else [])]
        grad = torch.randn(counts.shape, generator=torch.Generator().manual_seed(1))
        return lambda: torch.autograd.grad(counts, wanted, grad, retain_graph=True)[-1]


def measure(point: Point, size: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Processor milliseconds of each pass, by way."""
    for name, of in PASSES.items():
        down, layers = "inputs" in name, Layers(point, size, of)
        run = layers.forward if name == "forward" else layers.backward(inputs=down and of.layers == 1)

        def taken(way: str, down: bool = down, run: Run = run) -> float:
            with forced(way, down):
                begin = time.process_time()
                run()
                return 1e3 * (time.process_time() - begin)

        results: dict[str, torch.Tensor] = {}  # which also makes the plan and maps memory
        for way in DOWN if down else WAYS:
            with forced(way, down):
                result = run()
            # a way that does not serve these units is another one
            if not any(torch.equal(result, other) for other in results.values()):
                results[way] = result
        expected = run()
        chosen = next((way for way, result in results.items() if torch.equal(result, expected)), None)
        times = in_turn({way: functools.partial(taken, way) for way in results}, repeats, warm_up=0)
        least = {way: min(of_way) for way, of_way in times.items()}
        over = least[chosen] / min(least.values()) if chosen else None
        yield {**point._asdict(), "pass": name, "ms": least, "chosen": chosen, "over": over}


def choices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the points of the grid that are asked for."""
    every = list(grid())
    kept = every[:: -(-len(every) // min(arguments.points, len(every)))]
    bar = cli.bar(kept, unit=" points")
    return {"runs": [run for point in bar for run in measure(point, arguments.size, arguments.repeats)]}


def table(record: dict[str, Any]) -> str:
    """The points whose chosen way is slower than the fastest by more than is allowed, and how many there are in all."""
    known = [point for point in record["runs"] if point["chosen"]]
    slow = [point for point in known if point["over"] > ALLOWED]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        name: lambda point, name=name: str(point[name])  # type: ignore[misc]
        for name in (*Point._fields, "pass", "chosen")
    }
    columns["ms of each way"] = lambda point: ", ".join(f"{way} {ms:.2f}" for way, ms in point["ms"].items())
    columns["over the fastest"] = lambda point: f"{point['over']:.2f}"
    said = (
        f"Of {len(record['runs'])} passes {len(slow)} take more than {ALLOWED} times the fastest way; in "
        f"{len(record['runs']) - len(known)} chunks of the batch differ in what they choose."
    )
    return f"{said}\n\n{by_column(columns, slow)}" if slow else said


PROGRAM = cli.Program(
    "cpu_choices", __doc__, "about twenty minutes on a core", choices, table,
    {
        "size": (1024, "neurons of a layer"),
        "repeats": (7, "timed turns"),
        "points": (10_000, "points of the grid that are measured, spread over it"),
    },
    {"points": 6},
    threads=1,  # others spin, which is processor time, too
)  # fmt: skip
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
