"""A second of a brain: ``python -m benchmarks.brain --second``, part of :mod:`benchmarks.brain`.

The fly-brain model (Shiu et al. 2024) on a drawn network of its size: steps of 0.1 ms, 700 neurons excited at 150 Hz
straight on the membrane, a delay of 18 steps. Brian2 runs the same network and inputs in float64, we in float32; the
table has the spikes of each. Gradients are those of the mean rate by the weights, under a triangle from θ/2 to 3θ/2 or
under the arctangent, and reach ``TRUNCATE`` steps back. NEST runs the nearest network of its own (:func:`in_nest`).

The last rows are training steps of the network of :mod:`benchmarks.brain`, ``--T`` steps and ``--batch_size`` samples,
with other delays and surrogates.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from g2gnet import CubaLIF, Projection, SpikingNetwork
from g2gnet.base.tables import markdown

from .harness import Racer, Session, Turn, race
from .report import seconds

#: neurons that are excited, trials of a batch, and steps over which a gradient passes
EXCITED, TRIALS, TRUNCATE = 700, 30, 100
#: steps of a second, for each one of ``--T``
STEPS = 100
TAU, TAU_SYN, THETA, DELAY, REFRACTORY, SYNAPSE, CUE = 20.0, 5.0, 7.0, 18, 22, 0.275, 68.75


class Brain(NamedTuple):
    """A network: source, target and weight of each connection, in mV."""

    neurons: int
    pre: np.ndarray
    post: np.ndarray
    weight: np.ndarray


def drawn(neurons: int, weights: int) -> Brain:
    """Lognormal numbers of sources and of targets, three neurons of ten inhibit, and synapses are counted."""
    draw = np.random.default_rng(7)
    ends = []
    for _ in range(2):
        share = np.cumsum(draw.lognormal(0, 1.2, neurons))
        ends.append(np.searchsorted(share, draw.random(weights) * share[-1]).astype(np.int64))
    key = np.unique(ends[0] * neurons + ends[1])
    pre, post = key // neurons, key % neurons
    sign = np.where(draw.random(neurons) < 0.3, -1, 1)[pre]
    return Brain(neurons, pre, post, (SYNAPSE * sign * draw.geometric(1 / 3.5, len(pre))).astype(np.float32))


def excitation(steps: int, trials: int, excited: int) -> torch.Tensor:
    """Spikes at 150 Hz, [T, B, excited]; the first trial is the same for any number of them."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([(torch.rand(steps, excited, generator=draw) < 0.015).float() for _ in range(trials)], 1)


def network(brain: Brain, excited: int, surrogate: str = "triangle") -> SpikingNetwork:
    each, size = np.arange(excited), brain.neurons
    own = Projection.from_edges("brain", "brain", brain.pre, brain.post, brain.weight, DELAY, sizes=(size, size))
    cue = Projection.from_edges("input", "brain", each, each, CUE, 0, sizes=(excited, size), onto="membrane")
    period = torch.full((size,), float(REFRACTORY))
    period[:excited] = 0
    options: dict[str, Any] = {"reset_current": True, "surrogate": surrogate, "alpha": 2 / THETA}
    neurons = CubaLIF(size, tau=TAU, tau_syn=TAU_SYN, dt=0.1, threshold=THETA, refractory=period / 10, **options)
    net = SpikingNetwork({"brain": neurons}, [*cue, *own], "brain").requires_grad_(False)
    net.get_parameter("brain_to_brain.values").requires_grad_()
    return net


#: runs once, and gives how many spikes there were; by the number of steps
Run = Callable[[], int]


def _second(arguments: argparse.Namespace) -> tuple[Brain, int, int]:
    """The network, the number of steps, and that of neurons that are excited."""
    with np.load(arguments.drawn) as parts:
        brain = Brain(arguments.neurons, *[parts[name] for name in Brain._fields[1:]])
    return brain, STEPS * arguments.T, min(EXCITED, brain.neurons // 10)


def forward(arguments: argparse.Namespace, trials: int = 1) -> Run:
    brain, steps, excited = _second(arguments)
    net, x = network(brain, excited), excitation(steps, trials, excited)

    @torch.no_grad()
    def run() -> int:
        return len(net.simulate(x).spikes[0].events())

    return run


def gradients(arguments: argparse.Namespace, surrogate: str = "triangle") -> Run:
    brain, steps, excited = _second(arguments)
    net, x = network(brain, excited, surrogate), excitation(steps, 1, excited)
    chunk = None if surrogate == "triangle" else TRUNCATE  # by events no states are kept
    (learned,) = [each for each in net.parameters() if each.requires_grad]

    def run() -> int:
        learned.grad = None
        activity = net.simulate(x, chunk=chunk, truncate=TRUNCATE)
        activity.rates[0].mean().backward()
        assert learned.grad is not None
        assert learned.grad.any()
        return int(activity.counts.sum())

    return run


def training(arguments: argparse.Namespace, delay: int, surrogate: str) -> Run:
    from .brain import drive_of, ours, synthetic

    graph = synthetic(arguments.neurons, arguments.weights)
    step = ours(graph, drive_of(graph, arguments.batch_size, arguments.gain), arguments.T, delay, surrogate)
    return lambda: int(step()[0].sum())


def in_brian2(arguments: argparse.Namespace) -> Run:
    import brian2
    from brian2 import ms, mV

    brain, steps, excited = _second(arguments)
    brian2.defaultclock.dt = 0.1 * ms
    cells = brian2.NeuronGroup(
        brain.neurons,
        f"""dv/dt = (g - v) / ({TAU} * ms) : volt (unless refractory)
        dg/dt = -g / ({TAU_SYN} * ms) : volt (unless refractory)
        period : second""",
        method="linear", threshold=f"v > {THETA} * mV", reset="v = 0 * mV; g = 0 * mV", refractory="period",
    )  # fmt: skip
    period = np.full(brain.neurons, REFRACTORY / 10)
    period[:excited] = 0
    cells.period = period * ms
    joined = brian2.Synapses(cells, cells, "weight : volt", on_pre="g += weight", delay=DELAY / 10 * ms)
    joined.connect(i=brain.pre, j=brain.post)
    joined.weight = brain.weight * mV
    step, _, source = excitation(steps, 1, excited).nonzero().numpy().T
    cue = brian2.SpikeGeneratorGroup(excited, source, step * 0.1 * ms)
    driven = brian2.Synapses(cue, cells, on_pre=f"v += {CUE} * mV")
    driven.connect(j="i")
    monitor = brian2.SpikeMonitor(cells, record=False)
    whole = brian2.Network(cells, joined, cue, driven, monitor)
    whole.store()

    def run() -> int:
        whole.restore()
        whole.run(steps * 0.1 * ms)
        return int(monitor.num_spikes)

    return run


def in_nest(arguments: argparse.Namespace) -> Run:
    """In float64; ``iaf_psc_exp`` neurons keep their current at a spike and take no input onto the membrane. Excited
    neurons are parrots therefore, which repeat their inputs, and nothing else."""
    import nest

    brain, steps, excited = _second(arguments)
    nest.ResetKernel()
    nest.resolution = 0.1
    parrots = nest.Create("parrot_neuron", excited)
    alike = {"C_m": TAU, "tau_m": TAU, "tau_syn_ex": TAU_SYN, "tau_syn_in": TAU_SYN, "t_ref": REFRACTORY / 10}
    rest = {"E_L": 0.0, "V_m": 0.0, "V_reset": 0.0, "V_th": THETA}
    cells = nest.Create("iaf_psc_exp", brain.neurons - excited, alike | rest)
    own = brain.post >= excited
    weights = {"weight": brain.weight[own].astype(float), "delay": np.full(int(own.sum()), DELAY / 10)}
    nest.Connect(brain.pre[own] + 1, brain.post[own] + 1, "one_to_one", weights)
    given = excitation(steps, 1, excited)[:, 0]
    times = [{"spike_times": (0.1 * (each.nonzero()[:, 0] + 1)).tolist()} for each in given.T]
    cue = nest.Create("spike_generator", excited, times)
    nest.Connect(cue, parrots, "one_to_one", {"delay": 0.1})
    recorder = nest.Create("spike_recorder")
    nest.Connect(parrots + cells, recorder)

    def run() -> int:
        cue.origin = nest.biological_time
        cells.V_m = 0.0  # what is on its way or decays stays from the last run
        recorder.n_events = 0
        nest.Simulate(steps / 10)
        return int(recorder.n_events)

    return run


#: by name: what makes their run, with how many threads, the steps for each one of ``--T``, and what they are in words
CONTENDERS: dict[str, tuple[Callable[..., Run], int, int, str]] = {
    "forward": (forward, 1, STEPS, "g2g, one trial"),
    "trials": (partial(forward, trials=TRIALS), 2, STEPS, f"g2g, {TRIALS} trials"),
    "gradients": (gradients, 1, STEPS, f"g2g, one trial forward and backward, triangle, truncate={TRUNCATE}"),
    "atan": (partial(gradients, surrogate="atan"), 2, STEPS, f"g2g, the same, arctangent, chunk={TRUNCATE}"),
    "brian2": (in_brian2, 1, STEPS, "Brian2, one trial"),
    "nest": (in_nest, 1, STEPS, "NEST, one trial"),
    **{
        f"training-{delay}-{surrogate}": (
            partial(training, delay=delay, surrogate=surrogate), 2, 1, f"g2g, training, delay {delay}, {surrogate}",
        )
        for delay, surrogate in ((1, "atan"), (1, "triangle"), (18, "atan"))
    },
}  # fmt: skip


def session(name: str, arguments: argparse.Namespace) -> Session:
    make, threads, steps, _ = CONTENDERS[name]
    torch.set_num_threads(threads)
    run, found = make(arguments), [0]
    yield None  # the network does not count as memory; lists that a first call makes of it do

    def step() -> None:
        found[0] = run()

    yield Turn(step, lambda: {"steps": steps * arguments.T, "spikes": found[0]})


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all contenders in turn."""

    def check(run: dict[str, Any], results: dict[str, Any]) -> str:
        run.update(results)
        return "" if run["spikes"] else "no neuron has spiked"

    runs = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "brain.npz"  # drawn once: that takes longer than what is timed
        np.savez(file, **drawn(arguments.neurons, arguments.weights)._asdict())
        given = argparse.Namespace(**vars(arguments), drawn=file)
        for name, (_, threads, *_) in CONTENDERS.items():  # one after the other, since each fills the memory
            (racer,) = race([Racer(name, session, (name, given), {"name": name, "threads": threads}, check)],
                            arguments.repeats, 1)  # fmt: skip
            outcome = {"status": racer.status, "reason": racer.reason, "peak_bytes": racer.peak_bytes}
            runs.append(racer.run | outcome | {"seconds": [round(t, 4) for t in racer.seconds]})
    return {"benchmark": "brain_second", "runs": runs}


def table(record: dict[str, Any]) -> str:
    rows = []
    for run in record["runs"]:
        cells = [f"fails: {run['reason']}", *[""] * 4]
        if run["seconds"]:
            took = statistics.median(run["seconds"])
            cells = [
                seconds(took),
                f"{1e6 * took / run['steps']:.3g} µs",
                f"{run['spikes']:,}",
                f"{run['peak_bytes'] / 1e6:.0f} MB",
            ]
        rows.append([CONTENDERS[run["name"]][3], str(run["threads"]), *cells[:4]])
    return markdown(["", "threads", "time", "a step", "spikes", "memory beyond the network"], rows)
