"""Populations that may reach one another, in one call of the CPU kernels, and chains with delays, against float64:
outputs and every gradient."""

import random

import pytest
import torch
from covering import every_pair
from helpers import changed, lif_layer, packed_randn, seeded

from g2g_kernels import BlockMask, GroupLayout, Neurons, Population, explain, g2g_stack
from g2g_kernels.cpu.workspace import workspace
from g2g_kernels.ops.g2g_stack import Connection, graph
from g2g_kernels.ops.g2g_stack.delays import Delay
from g2g_kernels.ops.g2g_stack.schedule import components_of
from g2g_kernels.ops.neurons.models import MODELS
from g2g_kernels.ops.record import arguments, opened

T, INPUTS = 12, 20
SIZES = {"a": 70, "b": 24, "out": 9}
#: (source, target, delay) of each connection; a pair: drawn for each neuron; "learned": within the numbers behind it
GRAPHS = {
    "fast feedback": [("x", "a", 0), ("a", "b", 0), ("b", "a", 1), ("b", "out", 0)],
    "ring": [("x", "a", 0), ("a", "a", 1), ("a", "b", (1, 3)), ("b", "a", 2), ("a", "out", (0, 20)), ("b", "out", 1)],
    "skips": [("x", "a", 2), ("x", "b", (0, 3)), ("a", "b", 0), ("a", "b", 4), ("a", "out", 0), ("b", "out", (0, 5))],
    "learned": [
        ("x", "a", 0),
        ("a", "b", ("learned", 0, 4)),
        ("b", "a", ("learned", 1, 4)),
        ("a", "out", ("learned", 0, 4)),
    ],
    "nothing but feedback": [("x", "a", 0), ("a", "out", 0), ("out", "b", 3), ("b", "out", 1)],
    "chain": [("x", "a", 0), ("a", "b", ("learned", 0, 1)), ("b", "out", ("learned", 0, 30))],
    "recurrent chain": [("a", "a", 1), ("x", "a", 0), ("a", "b", ("learned", 0, 5)), ("b", "out", (0, 3))],
}


class Case:
    """The tensors of a graph, and its layers of them."""

    def __init__(self, name, kinds, block_size, model: str, dropped: bool, started: bool, samples=5, width=1) -> None:
        draw, self.leaves = seeded(3), {}
        self.connections, self.is_chain = GRAPHS[name], "chain" in name
        self.model, self.dropped, self.started = model, dropped, started
        layouts = {"x": GroupLayout(INPUTS, 2)}
        for (population, size), kind in zip(SIZES.items(), kinds, strict=True):
            layouts[population] = GroupLayout(size, 3, kind=kind, generator=draw)
            for number, parameter in enumerate(MODELS[model].parameters):
                drawn = torch.rand(size if number % 2 else 1, generator=draw) / 4
                drawn += 0.7 if parameter in MODELS[model].decays else 0.3
                self.leaves[f"{population}.{parameter}"] = drawn * 5 if parameter == "refractory" else drawn
            if started:
                states = len(MODELS[model].states)
                self.leaves[f"{population}.state"] = torch.randn(states, samples, size, generator=draw) / 2
                if model.startswith("refractory"):  # whole steps
                    self.leaves[f"{population}.state"][0] = torch.randint(0, 3, (samples, size), generator=draw)
        self.masks, self.delays = [], []
        for number, (source, target, delay) in enumerate(self.connections):
            # other groups than those of the source's own connections, as in a layer of a Mixer network
            cols = GroupLayout(layouts[source].size, 2, "interleaved") if number % 3 == 2 else layouts[source]
            mask = BlockMask.sample(layouts[target], cols, p_inter=0.4, block_size=block_size, generator=draw)
            self.masks.append(mask)
            self.leaves[f"values{number}"] = packed_randn(mask, number) * 0.5
            self.leaves[f"bias{number}"] = torch.rand(mask.shape[0], generator=draw) / 10
            size = mask.shape[1]
            if isinstance(delay, int):
                self.delays.append(Delay(delay, delay) if delay else None)
            elif delay[0] == "learned":
                _, least, most = delay
                self.leaves[f"learned{number}"] = torch.rand(size, generator=draw) * (most + 2) - 1
                self.delays.append(Delay(least, most, width=width))
            else:
                low, high = delay
                self.delays.append(Delay(low, high, torch.randint(low, high + 1, (size,), generator=draw)))
        reach = 40
        self.leaves["x"] = torch.rand(T, samples, INPUTS, generator=draw) * 2
        if started and any(source == "x" and delay for source, _, delay in self.connections):
            self.leaves["before"] = torch.rand(reach, samples, INPUTS, generator=draw)
        self.silent = {name: torch.rand(samples, size, generator=draw) < 0.2 for name, size in SIZES.items()}
        for name, size in SIZES.items() if started else ():
            sent = (torch.rand(reach, samples, size, generator=draw) < 0.3).float()
            if self.is_chain:  # whose recurrent connection reads the state
                sent[-1] = self.leaves[f"{name}.state"][-1] > self.leaves[f"{name}.threshold"]
            self.leaves[f"{name}.sent"] = sent * ~self.silent[name] if dropped else sent

    def layers(self, leaves: dict[str, torch.Tensor], **options: str) -> list[Population]:
        names = list(SIZES)
        place = {"x": -1} | {name: number for number, name in enumerate(names)}
        layers = []
        for name in names:
            reaching = []
            for number, (source, target, _) in enumerate(self.connections):
                if target != name:
                    continue
                delay, learned = self.delays[number], leaves.get(f"learned{number}")
                if learned is not None:
                    steps = learned.detach().clamp(delay.least, delay.most).round().long()
                    delay = delay._replace(steps=steps, learned=learned)
                bias = leaves[f"bias{number}"] if number % 2 else None
                values, mask = leaves[f"values{number}"], self.masks[number]
                reaching.append(Connection("linear", values, mask, place[source], delay, bias))
            own = tuple([leaves[f"{name}.{parameter}"] for parameter in MODELS[self.model].parameters])
            dropped = self.silent[name] if self.dropped and name != "out" else None
            kept = {"state": leaves.get(f"{name}.state"), "sent": leaves.get(f"{name}.sent")}
            layers.append(Population(Neurons(self.model, own, **options), tuple(reaching), dropped, **kept))
        return layers


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setattr(workspace, "poison", True)


def compare(case: Case, held: bool, threads: int, **options: str) -> dict[str, torch.Tensor]:
    """Runs a case in both, and compares outputs and gradients; returns those of the kernels."""
    found = {}
    for backend, dtype in (("torch", torch.float64), ("cpu", torch.float32)):
        own = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in case.leaves.items()}
        for name, tensor in own.items():
            tensor.requires_grad_(not (case.is_chain and name.endswith(".sent")))  # whose kernels give it none
        layers = case.layers(own, **options)
        x, steps = (own["x"][0], T) if held else (own["x"], None)
        # a recurrent population whose states do not show its last spikes continues them in a graph
        at_once = MODELS[case.model].compared and case.started and "a.sent" in own and ("a", "a", 1) in case.connections
        way = "cpu chain" if case.is_chain and not at_once else "cpu graph"
        assert backend == "torch" or explain(x, layers, steps, backend).way.name == way
        if backend == "cpu":
            torch.set_num_threads(threads)
        activity = g2g_stack(x, layers, steps, backend=backend, before=own.get("before"))
        loss = (activity.counts * torch.linspace(-1, 1, SIZES["out"], dtype=dtype)).sum()
        for number, (rates, state) in enumerate(zip(activity.rates, activity.states, strict=True), 1):
            loss = loss + rates.sum() * number + (state * torch.linspace(0, 1, state.shape[-1], dtype=dtype)).sum()
        for sent in activity.sent:
            if sent is not None:
                loss = loss + (sent.dense() * torch.linspace(0, 1, sent.dense().shape[-1], dtype=dtype)).sum()
        loss.backward()
        found[backend] = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
        for number, spikes in enumerate(activity.spikes):
            found[backend][f"spikes of {number}"] = spikes.dense()
    assert 0.01 < found["torch"]["spikes of 0"].mean() < 0.9
    assert found["cpu"].keys() == found["torch"].keys()
    for key, expected in found["torch"].items():
        near = {"rtol": 1e-4, "atol": 2e-5 * float(expected.abs().max())}
        torch.testing.assert_close(found["cpu"][key].double(), expected.double(), **near, msg=key)
    return found["cpu"]


@every_pair(
    name=GRAPHS, kinds=(("index", "index", "index"), ("random", "interleaved", "random")), block_size=(1, 4, 5, 16, 64),
    model=tuple(MODELS), reset=("subtract", "zero", "none"), surrogate=("triangle", "atan", "fast_sigmoid"),
    dropped=(False, True), started=(False, True), held=(False, True), threads=(1, 2), width=(1, 2, 5, 10),
)  # fmt: skip
def test_graphs_of_any_kind(
    name, kinds, block_size, model, reset, surrogate, dropped, started, held, threads, width, poisoned
):
    """Units of 5 neurons: lane 48 is padding in groups of 24 and 23, which begins a vector of any width."""
    case = Case(name, kinds, block_size, model, dropped, started, width=width)
    compare(case, held, threads, reset=reset, surrogate=surrogate)


@pytest.mark.parametrize("name", ["skips", "learned", "fast feedback"])
def test_threads_with_samples_of_their_own_change_no_bit(name, poisoned):
    """130 samples are two chunks: two threads have one each, three share both. Forward, 16 of a block are a task."""
    case = Case(name, ("index",) * 3, 16, "lif", True, True, 130)
    first, *others = (compare(case, False, threads) for threads in (1, 2, 3))
    torch.testing.assert_close(others, [first] * 2, rtol=0, atol=0)


def test_graphs_of_the_same_shapes_run_where_their_groups_allow():
    """A signature has no groups: the second of them has neurons in another order than the kernels take."""
    for other in (False, True):
        case = Case("skips", ("index",) * 3, 4, "lif", False, False)
        if other:
            rows = GroupLayout(SIZES["out"], 3, "random", seeded(8))
            mask = BlockMask(rows, case.masks[-1].cols.layout, case.masks[-1].unit_row, case.masks[-1].unit_col, 4)
            case.masks[-1] = mask
        layers = case.layers(case.leaves)
        assert (explain(case.leaves["x"], layers).way.name == "cpu graph") != other
        counts = {backend: g2g_stack(case.leaves["x"], layers, backend=backend).counts for backend in ("cpu", "torch")}
        assert torch.equal(counts["cpu"], counts["torch"])
        assert counts["cpu"].any()


def test_autocast_computes_what_float32_does():
    """Weights and inputs are such that no product is rounded."""
    case = Case("fast feedback", ("index",) * 3, 4, "lif", False, False)
    leaves = {name: (tensor * 8).round() / 8 for name, tensor in case.leaves.items() if name != "before"}
    found = []
    for enabled in (False, True):
        own = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            activity = g2g_stack(own["x"], case.layers(own), backend="cpu")
        activity.counts.square().sum().backward()
        found.append({name: tensor.grad for name, tensor in own.items() if tensor.grad is not None})
        found[-1]["counts"] = activity.counts.detach()
    assert torch.equal(found[1]["counts"], found[0]["counts"])
    assert found[0]["counts"].any()
    for name, expected in found[0].items():
        near = {"rtol": 0.02, "atol": 0.02 * float(expected.abs().max())}
        torch.testing.assert_close(found[1][name], expected, **near, msg=name)


@pytest.fixture
def call(monkeypatch):
    """What the forward operator is called with."""
    case, calls, forward = Case("learned", ("index",) * 3, 4, "synaptic", True, True), [], graph.FORWARD
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.leaves.items()}
    with monkeypatch.context() as patch:
        patch.setattr(graph, "FORWARD", lambda call: calls.append(call) or forward(call))
        g2g_stack(leaves["x"], case.layers(leaves), backend="cpu")
    return calls[0]


def test_delays_before_the_step_itself_are_refused(call):
    target, first = call.connections[0]
    early = first._replace(delay=Delay(-1, -1, torch.full((first.mask.shape[1],), -1)))
    own = call.populations[target]
    own = own._replace(connections=tuple(early if each is first else each for each in own.connections))
    populations = (*call.populations[:target], own, *call.populations[target + 1 :])
    with pytest.raises(ValueError, match=f"the delay to population {target} is Delay.least=-1"):
        graph.FORWARD.overload(*arguments(*opened(call._replace(populations=populations))), False)


def test_delays_that_left_their_bounds_are_refused():
    case = Case("ring", ("index",) * 3, 4, "lif", False, False)
    layers = case.layers(case.leaves)
    case.delays[2].steps[0] = 90
    with pytest.raises(ValueError, match="are from 1 to 90, and were from 1 to 3"):
        g2g_stack(case.leaves["x"], layers, backend="cpu")


@pytest.mark.parametrize("seed", range(40))
def test_a_block_reads_only_steps_that_were_sent_before_and_every_step_runs_once(seed):
    draw, total = random.Random(seed), 13
    # delays of 0 lead forward, or to a population that acts a step later on what arrives
    late = tuple(draw.sample(range(5), draw.randint(0, 2)))
    sources = [draw.choices(range(-1, 5), k=2) for _ in range(5)]
    joins = [
        [(each, draw.randint(each >= target and target not in late, 4)) for each in sources[target]]
        for target in range(5)
    ]
    sent = {-1: total} | dict.fromkeys(range(5), 0)
    for component in components_of(tuple(map(tuple, joins)), late):
        assert {*component.late} <= {*late}
        for population, first, last in component.blocks(total):
            assert first == sent[population] < last
            arrives = last - (population in component.late)
            assert all(arrives - least <= sent[source] for source, least in joins[population])
            sent[population] = last
    assert set(sent.values()) == {total}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inputs_with_a_delay_of_no_step_are_the_inputs(backend, held):
    mask = BlockMask.full(GroupLayout(9, 1), GroupLayout(20, 1), block_size=4)
    layer = lif_layer(packed_randn(mask, 1), mask, None, torch.tensor(0.9), torch.tensor(1.0))
    x = torch.rand(T, 5, 20, generator=seeded(2))
    x, steps = (x[0], T) if held else (x, None)
    counts = g2g_stack(x, [layer], steps, backend=backend).counts
    assert counts.any()
    for delay in (Delay(0, 0), Delay(0, 0, torch.zeros(20, dtype=torch.int64))):
        assert torch.equal(g2g_stack(x, [changed(layer, delay=delay)], steps, backend=backend).counts, counts)
