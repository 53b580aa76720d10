"""What delays and feedback add to the time of a training step: ``python -m benchmarks.delays``.

Networks of the same sizes and weights take turns, in a rotating order; each is compared with one that has no delays, or
no feedback. The peer is a loop over time steps in PyTorch: dense weights times their mask, and spikes in a ring buffer.
Before anything is timed, the spike counts of the first samples are compared with those of plain PyTorch in float64.
"""

import argparse
import copy
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from g2g_kernels import BlockMask, GroupLayout, neurons_step
from g2gnet import LIF, G2GLinear, Projection, SpikingNetwork

from . import cli
from .harness import in_turn
from .report import by_column, ratio, seconds

#: inputs and outputs, as those of Fashion-MNIST
INPUTS, OUTPUTS = 784, 10
#: what weights between populations are multiplied with, so that each population fires in some hundredths of all steps
GAIN = 2.0
#: samples whose counts are compared, and the share of them that must be equal: rounding moves some spikes
CHECKED, LEAST_EQUAL = 8, 0.99
#: (source, target, delay) of each projection; "D": drawn for each neuron, up to --delay; "wide": learned, width 10
CHAIN: list[tuple[str, str, Any]] = [("input", "a", 0), ("a", "b", 0), ("b", "out", 0)]
LATE: list[tuple[str, str, Any]] = [("input", "a", 0), ("a", "b", "D"), ("b", "out", "D")]
LEARNED, WIDE = ([(source, target, how if late else 0) for source, target, late in LATE] for how in ("learned", "wide"))
RECURRENT, RECURRENT_LATE, RECURRENT_LEARNED = (
    [("input", "a", 0), ("a", "a", delay), ("a", "out", 0)] for delay in (1, "D", "learned")
)
HALVES = [("input", "half1", 0), ("input", "half2", 0), ("half1", "out", 0), ("half2", "out", 0)]
AMONG = [(source, target, 1) for source, target in itertools.product(("half1", "half2"), repeat=2)]
#: by name: the projections, and the network that it is compared with
NETWORKS: dict[str, tuple[list[tuple[str, str, Any]], str]] = {
    "chain": (CHAIN, "chain"),
    "chain, fixed delays": (LATE, "chain"),
    "chain, fixed delays of inputs, too": ([("input", "a", "D"), *LATE[1:]], "chain"),
    "chain, learned delays": (LEARNED, "chain, fixed delays"),
    "chain, learned delays of width 10": (WIDE, "chain, learned delays"),
    "one recurrent population": (RECURRENT, "one recurrent population"),
    "recurrent, fixed delays": (RECURRENT_LATE, "one recurrent population"),
    "recurrent, learned delays": (RECURRENT_LEARNED, "one recurrent population"),
    "two halves, all joined, delay 1": ([*HALVES, *AMONG], "one recurrent population"),
    "two populations, feedback of delay 8": ([*CHAIN, ("b", "a", 8)], "three populations in a chain"),
    "three populations in a chain": ([*CHAIN[:2], ("b", "c", 0), ("c", "out", 0)], "three populations in a chain"),
}
LOOP = "PyTorch loop, fixed delays"


def build(projections: list[tuple[str, str, Any]], arguments: argparse.Namespace) -> SpikingNetwork:
    """A network whose populations have --hidden_dim neurons."""
    draw, made = torch.Generator().manual_seed(0), []
    names = list(dict.fromkeys(target for _, target, _ in projections))
    sizes = {name: arguments.hidden_dim // (2 if "half" in name else 1) for name in names}
    sizes |= {"input": INPUTS, "out": OUTPUTS}
    for source, target, delay in projections:
        layouts = GroupLayout(sizes[target]), GroupLayout(sizes[source])
        mask = BlockMask.sample(*layouts, p_inter=0.15, block_size=arguments.block_size, generator=draw)
        options: dict[str, Any] = {}
        if isinstance(delay, str):
            options = {"learn_delay": delay != "D", "max_delay": arguments.delay}
            options |= {"delay_width": 10 if delay == "wide" else 1}
            delay = torch.randint(int(source == target), arguments.delay + 1, (sizes[source],), generator=draw)
        back = source != "input" and names.index(source) >= names.index(target)
        connection = G2GLinear(mask, bias=not back, generator=draw)
        if source != "input":
            spiking = [each for each in projections if each[1] == target and each[0] != "input"]
            connection.values.data *= GAIN / len(spiking) ** 0.5
        made.append(Projection(source, target, connection, delay, **options))
    return SpikingNetwork({name: LIF() for name in names}, made, "out", arguments.T)


def loop(net: SpikingNetwork, x: torch.Tensor) -> torch.Tensor:
    """Spike counts of a chain by a loop over time steps, x [B, D] held."""
    weights = [(each.dense_weight(), each.bias) for each in net.connections().values()]
    delays = [net.delays(name) for name in net.connections()]
    rings = [torch.zeros(int(late.max()) + 1, *x.shape[:-1], len(late)) for late in delays]
    states: list[Any] = [None] * net.depth
    counts: Any = 0
    for _ in range(net.T):
        sent = x
        for number, neurons in enumerate(net.neurons().values()):
            size = len(rings[number])
            rings[number] = ring = torch.cat([rings[number][1:], sent[None]]) if size > 1 else sent[None]
            rows = (size - 1 - delays[number]).expand(1, *sent.shape)
            current = torch.nn.functional.linear(ring.gather(0, rows)[0], *weights[number])
            sent, states[number] = neurons_step(current, states[number], neurons.population)
        counts = counts + sent
    return counts


def step(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Seconds of a training step; of two, since the memory that a network has left is not what the next one needs."""
    for _ in range(2):
        began = time.perf_counter()
        (run(x) - 1).square().mean().backward()
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compares all networks with plain PyTorch, then times them in turn."""
    x = torch.rand(arguments.batch_size, INPUTS, generator=torch.Generator().manual_seed(1))
    nets = {name: build(projections, arguments) for name, (projections, _) in NETWORKS.items()}
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {**nets, LOOP: lambda x: loop(nets[LOOP], x)}
    compared = {name: other for name, (_, other) in NETWORKS.items()} | {LOOP: "chain, fixed delays"}
    nets[LOOP] = nets[compared[LOOP]]
    runs = []
    for name, call in calls.items():
        with torch.no_grad():
            activity: Any = nets[name].simulate(x)
        equal = _equal(nets[name], call, x)
        about: dict[str, Any] = {"name": name, "compared_with": compared[name], "equal": equal}
        about["rates"] = [round(float(rate.mean()), 4) for rate in activity.rates]
        runs.append({**about, "status": "ok" if equal >= LEAST_EQUAL else "wrong"})
    with cli.bar((arguments.repeats + 1) * len(calls)) as bar:
        steps = {name: functools.partial(step, call, x) for name, call in calls.items()}
        times = in_turn(steps, arguments.repeats, done=bar.update)
    return {"runs": [{**run, "seconds": [round(each, 6) for each in times[run["name"]]]} for run in runs]}


@torch.no_grad()
def _equal(net: SpikingNetwork, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """The share of the first samples' counts that are those of plain PyTorch in float64. (In float32 one membrane, 1e-7
    above its threshold in step 20 of the recurrent network with delays, moves hundreds of spikes 30 steps later.)"""
    exact = copy.deepcopy(net).double()
    exact.backend = "torch"
    return float((run(x[:CHECKED]) == exact(x[:CHECKED].double())).double().mean())


def table(record: dict[str, Any]) -> str:
    """The time of a step of each network, and its ratio to the one that it is compared with."""
    times = {run["name"]: run["seconds"] for run in record["runs"]}
    others = {run["name"]: run["compared_with"] for run in record["runs"] if run["name"] != run["compared_with"]}
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda run: run["name"],
        "step": lambda run: seconds(statistics.median(run["seconds"])),
        "ratio": lambda run: (
            f"{ratio(run['seconds'], times[others[run['name']]]):.2f}" if run["name"] in others else ""
        ),
        "to": lambda run: others.get(run["name"], ""),
        "firing rates, %": lambda run: " ".join(f"{100 * rate:.1f}" for rate in run["rates"]),
    }
    return by_column(columns, record["runs"])


PROGRAM = cli.Program(
    "delays", __doc__, "about four minutes on two cores", measure, table,
    {
        "hidden_dim": (2048, "neurons in each hidden population"),
        "block_size": (64, "side of a block of weights"),
        "batch_size": (256, "samples of a step"),
        "T": (50, "time steps"),
        "delay": (20, "the largest delay"),
        "repeats": (7, "timed steps of each network"),
    },
    {"hidden_dim": 512, "batch_size": 64, "T": 20, "repeats": 2},
)  # fmt: skip
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
