"""A training step of a whole brain's recurrent network: ``python -m benchmarks.brain``.

One population of leaky neurons, joined to itself by as many single weights as a fly's brain has: 138,639 neurons and
15.1 million connections (Dorkenwald et al. 2024), here with lognormal numbers of targets, which are drawn uniformly; or
those of a file (``--edges``). Each contender has a process of its own with the same graph, weights and inputs; they
take turns. A step is forward and backward through all time steps, exact under the arctangent surrogate.

Before that, each is compared with a dense network in float64, of 2,000 neurons: equal spikes, and gradients. The peers
are a PyTorch loop over CSR products with a backward pass written by hand, the strongest form that a user would write;
the same with PyTorch's own autograd, which forms the gradient of all N² weights; and JAX, by sums over the edges.
"""

import argparse
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, G2GLinear, Projection, SpikingNetwork
from g2gnet.base.tables import markdown
from g2gnet.programs.flags import Parser

from . import cli, second
from .contender import ATan
from .harness import Racer, Session, Turn, race
from .report import by_column, ratio, seconds

BETA, THRESHOLD = 0.9, 1.0
#: the network that is compared with a dense one, and how far gradients may be off, relative to the largest
CHECKED, CLOSE = 2000, 1e-4
#: columns of a file of edges: ours, and those of FlyWire's connections
COLUMNS = (("pre", "post", "weight"), ("pre_root_id", "post_root_id", "syn_count"))
#: weights of the networks of ``--growth``, and their share of all pairs of neurons
GROWTH, SHARE = (100_000, 1_000_000, 10_000_000, 30_000_000, 100_000_000), 0.001
#: transmitters that inhibit in a fly (Shiu et al. 2024)
INHIBITORY = ("GABA", "GLUT")


class Graph(NamedTuple):
    """A recurrent network: the source, the target and the weight of each connection, by target, then by source."""

    neurons: int
    pre: np.ndarray
    post: np.ndarray
    weight: np.ndarray


def synthetic(neurons: int, weights: int, seed: int = 0) -> Graph:
    """A graph whose neurons have lognormal numbers of targets."""
    draw = np.random.default_rng(seed)
    degree = draw.lognormal(0.0, 1.0, neurons)
    degree = np.clip(degree / degree.sum() * weights, 1, neurons).astype(np.int64)
    pre = np.repeat(np.arange(neurons), degree)
    key = np.unique(draw.integers(0, neurons, len(pre)) * neurons + pre)
    weight = draw.uniform(-0.01, 0.01, len(key)).astype(np.float32)
    return Graph(neurons, key % neurons, key // neurons, weight)


def from_file(path: str) -> Graph:
    """The graph of a CSV file, also a packed one: columns pre, post and weight; or FlyWire's connections, whose weights
    are its synapses, negative where the transmitter inhibits, scaled so that a neuron's largest input is 0.01."""
    import pandas

    try:
        table = pandas.read_csv(path)
    except (OSError, ValueError) as error:  # of pandas, too, and of bytes that are no text
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    names = next((names for names in COLUMNS if set(names) <= set(table.columns)), None)
    if names is None:
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}; give {', or '.join(map(str, COLUMNS))}")
    pre, post, weight = names
    if not len(table) or table[[*names]].isna().any(axis=None):
        raise ValueError(f"{path} has no connections, or some whose {pre}, {post} or {weight} is missing")
    ids, numbers = np.unique(np.concatenate([table[pre], table[post]]), return_inverse=True)
    size = table[weight].to_numpy(np.float64)
    if "nt_type" in table:
        size = np.where(table["nt_type"].isin(INHIBITORY), -size, size)
    key, place = np.unique(numbers[len(table) :] * len(ids) + numbers[: len(table)], return_inverse=True)
    summed = np.bincount(place, size)
    return Graph(len(ids), key % len(ids), key // len(ids), (0.01 * summed / np.abs(summed).max()).astype(np.float32))


def graph_of(arguments: argparse.Namespace) -> Graph:
    return from_file(arguments.edges) if arguments.edges else synthetic(arguments.neurons, arguments.weights)


#: spike counts [B, N], and the gradients of the weights and of the input
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Step = Callable[[], Found]


def ours(graph: Graph, drive: torch.Tensor, steps: int, delay: int = 1, surrogate: str = "atan") -> Step:
    layout, each = GroupLayout(graph.neurons, 1), torch.arange(graph.neurons)
    mask = BlockMask(layout, layout, torch.from_numpy(graph.post), torch.from_numpy(graph.pre), block_size=1)
    recurrent = G2GLinear(mask, bias=False)
    inputs = G2GLinear(BlockMask(layout, layout, each, each, block_size=1), bias=False)
    with torch.no_grad():
        recurrent.values.copy_(torch.from_numpy(graph.weight)[:, None, None])
        inputs.values.fill_(1.0)
    inputs.requires_grad_(False)
    neurons = LIF(beta=BETA, threshold=THRESHOLD, learn_beta=False, learn_threshold=False, surrogate=surrogate)
    projections = [Projection("input", "brain", inputs), Projection("brain", "brain", recurrent, delay=delay)]
    net, x = SpikingNetwork({"brain": neurons}, projections, "brain", steps), drive.requires_grad_()

    def step() -> Found:
        x.grad = recurrent.values.grad = None
        counts = net(x)
        (1e-3 * counts).sum().backward()
        assert x.grad is not None
        assert recurrent.values.grad is not None
        return counts.detach(), recurrent.values.grad.flatten(), x.grad

    return step


def _csr(graph: Graph, rows: np.ndarray, cols: np.ndarray, weights: torch.Tensor) -> torch.Tensor:
    """A CSR matrix of entries that are sorted by row."""
    pointer = np.concatenate([[0], np.bincount(rows, minlength=graph.neurons).cumsum()])
    index = torch.from_numpy(pointer.astype(np.int32)), torch.from_numpy(cols.astype(np.int32))
    with warnings.catch_warnings():  # that such matrices are new
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(*index, weights, (graph.neurons, graph.neurons), check_invariants=False)


def by_hand(graph: Graph, drive: torch.Tensor, steps: int) -> Step:
    back = np.lexsort((graph.post, graph.pre))  # by source
    weight = torch.from_numpy(graph.weight)
    forward = _csr(graph, graph.post, graph.pre, weight)
    backward = _csr(graph, graph.pre[back], graph.post[back], weight[back])
    zeros = _csr(graph, graph.post, graph.pre, torch.zeros_like(weight))
    current = drive.T.contiguous()  # [N, B]

    @torch.no_grad()
    def step() -> Found:
        membrane, spikes = torch.zeros_like(current), torch.zeros_like(current)
        membranes, all_spikes = [], []
        for t in range(steps):
            membrane = BETA * membrane + (current + forward @ spikes if t else current) - spikes * THRESHOLD
            spikes = (membrane > THRESHOLD).float()
            membranes.append(membrane)
            all_spikes.append(spikes)
        grad_current, grad = torch.zeros_like(current), torch.zeros_like(current)
        to_current: list[torch.Tensor] = []
        for membrane in reversed(membranes):
            upstream = 1e-3 + (backward @ to_current[-1] if to_current else 0.0)
            grad = upstream / (1 + (torch.pi * (membrane - THRESHOLD)).square()) + BETA * grad
            grad_current += grad
            to_current.append(grad)
        later, sent = torch.cat(to_current[-2::-1], 1), torch.cat(all_spikes[:-1], 1)  # of steps 1 … T − 1, 0 … T − 2
        of_weights = torch.sparse.sampled_addmm(zeros, later, sent.T.contiguous()).values()
        return torch.stack(all_spikes).sum(0).T, of_weights, grad_current.T

    return step


def _autograd(matrix: torch.Tensor, weights: torch.Tensor, x: torch.Tensor, steps: int) -> Any:
    """Counts [B, N] and gradients by autograd; ``matrix`` multiplies spikes, and its gradient is of ``weights``."""
    current, membrane = x.T, torch.zeros_like(x.T)
    spikes = counts = torch.zeros_like(x.T)
    for t in range(steps):
        reset = (membrane > THRESHOLD).to(x.dtype) * THRESHOLD
        membrane = BETA * membrane + (current + matrix @ spikes if t else current) - reset
        spikes = ATan.apply(membrane - THRESHOLD)
        counts = counts + spikes
    (1e-3 * counts).sum().backward()
    return counts.detach().T, weights.grad, x.grad


def autograd(graph: Graph, drive: torch.Tensor, steps: int) -> Step:
    def step() -> Found:
        matrix = _csr(graph, graph.post, graph.pre, torch.from_numpy(graph.weight)).requires_grad_()
        counts, weights, x = _autograd(matrix, matrix, drive.detach().requires_grad_(), steps)
        return counts, weights.values() if weights.layout == torch.sparse_csr else weights[graph.post, graph.pre], x

    return step


def jax_edges(graph: Graph, drive: torch.Tensor, steps: int) -> Step:
    import jax
    from jax import numpy as jnp

    from .peers.jax_scan import spike

    pre, post = jnp.asarray(graph.pre, jnp.int32), jnp.asarray(graph.post, jnp.int32)
    current, weights = jnp.asarray(drive.detach().numpy().T), jnp.asarray(graph.weight)

    def loss(weights: Any, current: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            membrane, spikes = carry
            arrived = jax.ops.segment_sum(weights[:, None] * spikes[pre], post, graph.neurons, indices_are_sorted=True)
            reset = jax.lax.stop_gradient((membrane > THRESHOLD).astype(membrane.dtype)) * THRESHOLD
            membrane = BETA * membrane + current + arrived - reset
            spikes = spike(membrane - THRESHOLD)
            return (membrane, spikes), spikes

        zeros = jnp.zeros_like(current)
        _, spikes = jax.lax.scan(jax.checkpoint(one), (zeros, zeros), None, length=steps)
        return 1e-3 * spikes.sum(), spikes.sum(0)

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def step() -> Found:
        (_, counts), grads = jax.block_until_ready(both(weights, current))
        counts, of_weights, of_current = (torch.from_numpy(np.array(each)) for each in (counts, *grads))
        return counts.T, of_weights, of_current.T

    return step


#: by name: what makes their step, and what they are in words
CONTENDERS: dict[str, Callable[[Graph, torch.Tensor, int], Step]] = {
    "g2g-cpu": ours, "csr-by-hand": by_hand, "csr-autograd": autograd, "jax-edges": jax_edges
}  # fmt: skip
TEXTS = {
    "g2g-cpu": "g2g: weights in lists",
    "csr-by-hand": "PyTorch loop over CSR products, backward by hand",
    "csr-autograd": "PyTorch loop over CSR products, autograd",
    "jax-edges": "JAX, jit and scan, sums over edges",
}


def drive_of(graph: Graph, batch: int, gain: float) -> torch.Tensor:
    """Currents [B, N] up to ``gain`` of either sign."""
    return gain * (2 * torch.rand(batch, graph.neurons, generator=torch.Generator().manual_seed(1)) - 1)


def farthest(name: str) -> float:
    """How far a contender's gradients are from those of a dense network in float64, relative to their largest; ∞ if
    spikes differ."""
    graph = synthetic(CHECKED, 40 * CHECKED)
    graph, drive = graph._replace(weight=graph.weight * 10), drive_of(graph, 3, 0.3)
    found = CONTENDERS[name](graph, drive.clone(), 20)()
    dense = torch.zeros(CHECKED, CHECKED, dtype=torch.float64)
    dense[graph.post, graph.pre] = torch.from_numpy(graph.weight).double()
    dense.requires_grad_()
    counts, weights, x = _autograd(dense, dense, drive.double().requires_grad_(), 20)
    if not torch.equal(found[0].double(), counts):
        return float("inf")
    expected = weights[graph.post, graph.pre], x
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found[1:], expected, strict=True))


def session(name: str, arguments: argparse.Namespace, threads: int) -> Session:
    """A contender's step."""
    torch.set_num_threads(threads)
    yield None  # the graph counts as its memory
    off, graph = farthest(name), graph_of(arguments)
    run = CONTENDERS[name](graph, drive_of(graph, arguments.batch_size, arguments.gain), arguments.T)
    given: list[torch.Tensor] = []

    def step() -> None:
        given[:] = run()[:1]

    def results() -> dict[str, Any]:
        return {"off": off, "weights": len(graph.weight), "rate": float(given[0].mean()) / arguments.T}

    yield Turn(step, results)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all contenders in turn; with ``--growth`` our step with more and more weights."""
    if arguments.second:
        return second.measure(arguments)
    if arguments.growth:
        runs = []
        for weights in GROWTH:
            neurons = round((weights / SHARE) ** 0.5)
            size = argparse.Namespace(**{**vars(arguments), "weights": weights, "neurons": neurons})
            runs += [{"neurons": neurons, **run} for run in timed_runs(size, ["g2g-cpu"])]
        return {"benchmark": "brain_growth", "runs": runs}
    # PyTorch's own backward pass takes the most of a minute a step, at the size of --quick, too
    names = arguments.contenders or [name for name in CONTENDERS if not (arguments.quick and name == "csr-autograd")]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise ValueError(f"contenders={unknown[0]!r} is unknown; choose of {', '.join(CONTENDERS)}")
    if arguments.edges:
        graph_of(arguments)  # an error is said before anything starts
    return {"gain": arguments.gain, "edges": arguments.edges, "runs": timed_runs(arguments, names)}


def timed_runs(arguments: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of these contenders; each is built while no other one computes, since it fills the memory."""

    def check(run: dict[str, Any], results: dict[str, Any]) -> str:
        run.update(results)
        return "" if run["off"] <= CLOSE else f"gradients are off by {run['off']:.1e}"

    given = arguments, torch.get_num_threads()
    racers = race([Racer(name, session, (name, *given), {"name": name}, check) for name in names], arguments.repeats, 1)
    for each in racers:
        asked = re.search(r"allocate (\d+) bytes", each.reason)
        reason = f"asks for {int(asked[1]) / 1e9:.0f} GB of memory" if asked else each.reason
        each.run |= {"status": each.status, "reason": reason, "seconds": [round(t, 4) for t in each.seconds]}
        if each.peak_bytes is not None:
            each.run |= {"base": each.base_bytes, "peak": each.base_bytes + each.peak_bytes}
    return [each.run for each in racers]


def growth_table(record: dict[str, Any]) -> str:
    """Time and memory against weights and neurons, and what each of these costs by least squares."""
    done = [run for run in record["runs"] if run["seconds"]]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "neurons": lambda run: f"{run['neurons']:,}",
        "weights": lambda run: f"{run['weights']:,}",
        "step": lambda run: seconds(statistics.median(run["seconds"])),
        "peak memory": lambda run: f"{run['peak'] / 1e9:.2f} GB",
    }
    sizes = np.array([[run["weights"], run["neurons"]] for run in done], float)
    took = 1e9 * np.array([statistics.median(run["seconds"]) for run in done])
    above = np.array([run["peak"] - run["base"] for run in done])  # the process before there is a network
    words = []
    for unit, what, values in (("ns", "time", took), ("bytes", "memory", above)):
        a, b = np.linalg.lstsq(sizes / values[:, None].clip(1), np.ones(len(done)), rcond=None)[0]
        words.append(f"{what} grows by {a:.3g} {unit} per weight and {b:.3g} {unit} per neuron")
    return f"{by_column(columns, done)}\n\nBy least squares of ratios, {'; '.join(words)}."


def table(record: dict[str, Any]) -> str:
    """The time and the memory of a step of each contender."""
    if record.get("benchmark") == "brain_growth":
        return growth_table(record)
    if record.get("benchmark") == "brain_second":
        return second.table(record)
    rows, base = [], [run["seconds"] for run in record["runs"] if run["name"] == "g2g-cpu" and run["seconds"]]
    for run in record["runs"]:
        cells = [f"fails: {run.get('reason')}", *[""] * 4]
        if run["status"] in ("ok", "timed"):
            times = f"{ratio(run['seconds'], base[0]):.2f}" if base else ""
            took, memory = seconds(statistics.median(run["seconds"])), f"{run['peak'] / 1e9:.1f} GB"
            cells = [took, times, memory, f"{100 * run['rate']:.1f} %", f"{run['off']:.0e}"]
        rows.append([TEXTS[run["name"]], *cells])
    return markdown(["", "step", "over g2g", "peak memory", "firing rate", "off float64 by"], rows)


def add_flags(parser: Parser) -> None:
    text = "largest input current, held, of either sign (default: 0.27)"
    parser.add_argument("--gain", type=float, default=0.27, metavar="X", help=text)
    parser.add_argument("--edges", metavar="FILE", help="a CSV file of connections in place of drawn ones")
    text = "our step alone, with 10⁵ to 10⁸ weights, a thousandth of all pairs of neurons"
    parser.add_argument("--growth", action="store_true", help=text)
    text = "100·T steps of the fly-brain model: forward, 30 trials, with gradients; compared with Brian2 and NEST"
    parser.add_argument("--second", action="store_true", help=text)
    parser.add_argument(
        "--contenders",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="only these (default: all; with --quick without csr-autograd)",
    )


PROGRAM = cli.Program(
    "brain", __doc__, "about six minutes on two cores", measure, table,
    {
        "neurons": (138639, "neurons"),
        "weights": (15100000, "connections, about"),
        "batch_size": (8, "samples of a step"),
        "T": (100, "time steps"),
        "repeats": (3, "timed steps of each contender"),
    },
    {"neurons": 20000, "weights": 1000000, "T": 50, "repeats": 2},
    add_flags,
)  # fmt: skip
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
