"""Populations and projections with delays, against a float64 loop over steps that keeps every spike."""

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Iterable

import numpy as np
import pandas
import pytest
import torch
from covering import every_pair
from helpers import compiles_whole, rms, seeded
from networks import Reference, three_layers
from torch.func import vmap
from torch.utils import _pytree

from g2g_kernels import BlockMask, GroupLayout, available_backends
from g2g_kernels.ops.g2g_stack import ways
from g2gnet import (
    LIF,
    AdLIF,
    CubaLIF,
    DSTScheduler,
    G2GLinear,
    G2GNet,
    Projection,
    SpikingNetwork,
    SpikingStack,
    Synaptic,
)  # fmt: skip
from g2gnet.dst.rules import unit_correlation
from g2gnet.interop import from_snntorch, to_snntorch

T, B, D = 11, 3, 10
SIZES = {"input": D, "a": 9, "b": 13, "c": 6, "d": 14, "e": 8, "l": 12, "s": 9, "t": 10, "out": 5}
BACKENDS = [name for name in ("torch", "cpu") if name in available_backends()]
COLUMNS = "pre", "post", "weight", "delay", "sizes"


def joined(source: str, target: str, draw: torch.Generator, unit: int = 1, bias: bool = True) -> G2GLinear:
    out, into = (GroupLayout(SIZES[name], 3, "random", draw) for name in (target, source))
    connection = G2GLinear(BlockMask.sample(out, into, 1, 0.6, unit, draw), bias=bias, generator=draw)
    connection.values.data *= 2.5
    return connection


#: by name: (source, target, delay) of each projection; (low, high): drawn for each neuron; "learned": a parameter
GRAPHS = {
    "chain": [("input", "a", 0), ("a", "b", 0), ("b", "out", 0)],
    "chain with delays": [("input", "a", 2), ("a", "b", (0, 4)), ("b", "out", 3)],
    "skips": [("input", "a", 0), ("a", "b", 0), ("a", "out", 1), ("input", "b", (0, 3)), ("b", "out", 0)],
    "self-loops": [("input", "a", 0), ("a", "a", 1), ("a", "a", 3), ("a", "b", 0), ("b", "b", (2, 5)), ("b", "out", 0)],
    "feedback": [("input", "a", 0), ("a", "b", 1), ("b", "a", 2), ("b", "out", 0)],
    "fast feedback": [("input", "a", 0), ("a", "b", 0), ("b", "a", 1), ("b", "out", 0)],
    "ring": [("input", "a", 0), ("a", "b", 1), ("b", "c", 2), ("c", "a", 1), ("c", "out", 0)],
    "from the output": [("input", "a", 0), ("a", "out", 0), ("out", "a", 2)],
    "twice the same": [("input", "a", 0), ("a", "out", 0), ("a", "out", 2)],
    "learned": [("input", "a", "learned"), ("a", "b", "learned"), ("b", "out", 0)],
    "learned self-loop": [("input", "a", 0), ("a", "a", "learned"), ("a", "out", 0)],
    "learned on a cycle": [("input", "a", 0), ("a", "b", "learned"), ("b", "a", "learned"), ("b", "out", 1)],
    "current-based": [("input", "d", 0), ("d", "e", 1), ("e", "d", 1), ("e", "e", 2), ("e", "out", 0)],
    "current-based chain": [("input", "d", 0), ("d", "d", 1), ("d", "e", (0, 1)), ("e", "out", 0)],
    "no delay on a cycle": [
        ("input", "d", 0),
        ("d", "d", 0),
        ("d", "c", 0),
        ("c", "d", 0),
        ("d", "e", 0),
        ("e", "d", 2),
        ("e", "out", 0),
    ],
    "no delay but one": [("input", "d", 1), ("d", "e", 0), ("e", "e", (0, 3)), ("e", "d", 0), ("e", "out", 0)],
    "refractory": [
        ("input", "l", 0),
        ("l", "l", 1),
        ("l", "s", 0),
        ("s", "s", (1, 3)),
        ("s", "t", 2),
        ("t", "l", 1),
        ("t", "out", 0),
    ],
    "refractory chain": [("input", "l", 0), ("l", "l", 1), ("l", "t", (0, 2)), ("t", "t", 1), ("t", "out", 0)],
    "onto membranes": [
        ("input", "d", 0, "membrane"),
        ("d", "e", 1),
        ("e", "d", 1, "membrane"),
        ("e", "d", 2),
        ("d", "c", 0),
        ("input", "c", 2, "membrane"),
        ("c", "out", 0, "membrane"),
    ],
}


#: of layers in a chain, as a stack
STACKS = {"stack": False, "recurrent stack": True}
#: those whose states hold what delays need, and chains
CONTINUED = ["chain", "chain with delays", "skips", "self-loops", "ring", "learned on a cycle", *STACKS]
CONTINUED += [
    "current-based",
    "current-based chain",
    "no delay on a cycle",
    "no delay but one",
    "onto membranes",
    "refractory",
    "refractory chain",
]


def network(name: str, backend: str | None = None, unit: int = 1, seed: int = 0, **options) -> SpikingNetwork:
    if name in STACKS:
        return three_layers(backend, T, D, recurrent=STACKS[name])
    draw, projections = seeded(seed), []
    if name == "onto membranes" and backend == "cpu":
        backend = None  # no kernel adds to a membrane
    for source, target, delay, *onto in GRAPHS[name]:
        learned = dict.fromkeys(["onto"][: len(onto)], "membrane")
        if isinstance(delay, tuple):
            learned["max_delay"] = delay[1]
            delay = torch.randint(delay[0], delay[1] + 1, (SIZES[source],), generator=draw)
        elif delay == "learned":
            delay = torch.rand(SIZES[source], generator=draw) * 7 - 1
            delay, learned = delay.clamp(0, 5), learned | {"learn_delay": True, "max_delay": 5}
        connection = joined(source, target, draw, unit, bias=source != target)
        connection.backend = backend
        projections.append(Projection(source, target, connection, delay, **learned))
    kinds = {"a": LIF(SIZES["a"], threshold=0.4), "b": AdLIF(threshold=0.5), "c": Synaptic(), "out": LIF(threshold=0.6)}
    cuba = {"syn_decay": 0.5, "beta": 0.6, "threshold": 0.3, "refractory": 3}
    kinds |= {"d": CubaLIF(**cuba), "e": CubaLIF(SIZES["e"], **cuba, reset="subtract", reset_current=True)}
    kinds |= {"l": LIF(threshold=0.4, refractory=3), "s": Synaptic(threshold=0.5, refractory=2, reset="zero")}
    kinds |= {"t": AdLIF(SIZES["t"], threshold=0.4, refractory=np.arange(SIZES["t"]) % 5)}
    populations = {each: kinds[each] for each in kinds if any(p.target == each for p in projections)}
    return SpikingNetwork(populations, projections, "out", T, backend=backend, **options)


def loss_of(spikes: Iterable[torch.Tensor]) -> torch.Tensor:
    """Of when each neuron fires."""
    draw = seeded(9)
    return sum((each * torch.randn(each.shape, generator=draw, dtype=torch.float64).to(each)).sum() for each in spikes)


def silence(how: str, sizes: dict[str, int]) -> tuple[dict, dict[str, torch.Tensor]]:
    """Some neurons of each population as ``silenced`` takes them, and as bool [B, N]."""
    draw = seeded(11)
    masks = {
        each: torch.rand(B if how == "of samples" else 1, size, generator=draw) < 0.2 for each, size in sizes.items()
    }
    forms = {
        "numbers": lambda mask: mask[0].nonzero()[:, 0].tolist(),
        "mask": lambda mask: pandas.Series(mask[0].numpy()),
    }
    given = {each: forms.get(how, lambda mask: mask)(mask) for each, mask in masks.items()}
    return given, {each: mask.expand(B, -1) for each, mask in masks.items()}


@every_pair(
    name=GRAPHS, backend=BACKENDS, held=(False, True), dropout=(0.0, 0.25),
    silenced=(None, "numbers", "mask", "of samples"), width=(1, 2, 5, 10),
)  # fmt: skip
def test_spikes_and_gradients_are_those_of_the_definition(backend, name, held, dropout, silenced, width):
    """Dropped neurons are silent, and the others send more. Silenced ones are silent in any mode, and
    the others send what they would."""
    net = network(name, backend, unit={"skips": 4, "feedback": 16}.get(name, 1), dropout=dropout)
    net.train(silenced != "mask")
    if "learned" in name:
        net.delay_width = width
    dropout = dropout if net.training else 0.0
    x = torch.rand((B, D) if held else (T, B, D), generator=seeded(4)) * 2
    x64 = (x.expand(T, B, D) if held else x).double().requires_grad_()
    reference, dropped = Reference(net), net.drop(B, seeded(3)) if dropout else None
    silent = dict(zip(net.populations, dropped or (), strict=False))
    given, masks = silence(silenced, net._size_of()) if silenced else (None, {})
    silent |= {each: mask | silent.get(each, mask) for each, mask in masks.items()}
    expected = reference.run(x64, silent, 1 / (1 - dropout))
    activity = net.simulate(x.requires_grad_(), dropped=dropped, spikes=True, silenced=given)
    for each, mask in silent.items():
        assert not mask.any() or not expected[each][:, mask].any()
    ours = {each: train.dense() for each, train in activity.spikes.items()}
    assert sum(each.sum() for each in ours.values()) > (30 if silenced else 50)
    for each in net.populations:
        assert torch.equal(ours[each].double(), expected[each]), each
    assert torch.equal(activity.counts.double(), expected["out"].sum(0))
    loss_of(ours.values()).backward()
    gradients = reference.gradients(loss_of(expected.values()), expected, x64)
    assert set(gradients) == {each for each, _ in net.named_parameters()}
    for each, parameter in net.named_parameters():
        error = rms(parameter.grad.double() - gradients[each])
        # one number for all neurons is a sum of a thousand terms of both signs
        assert error <= (2e-4 if parameter.numel() == 1 else 2e-5) * rms(gradients[each]) + 1e-7, each


@pytest.mark.parametrize(
    ("option", "given", "match"),
    [
        ("silenced", {"x": [0]}, "silenced names 'x', which is none of the populations a, b, c, out"),
        ("silenced", {"b": [3, 13]}, r"silenced\['b'\] names neuron 13; b has 13 neurons, numbered from 0"),
        ("silenced", {"b": torch.zeros(9, dtype=torch.bool)}, r"is bool \[9\]; give .* bool \[13\] or \[3, 13\]"),
        ("silenced", {"a": [0.5]}, r"silenced\['a'\] is float64 \[1\]; give numbers of neurons"),
        ("silenced", {"a": ["AVAL"]}, r"silenced\['a'\] is <U4 \[1\]; give numbers of neurons"),
        ("membranes", {"a": [-1]}, r"membranes\['a'\] names neuron -1"),
        ("membranes", {"a": torch.zeros(B, 9, dtype=torch.bool)}, r"is bool \[3, 9\]; give .* or bool \[9\]"),
    ],
)  # fmt: skip
def test_neurons_that_a_network_does_not_have_are_refused_by_name(option, given, match):
    with pytest.raises(ValueError, match=match):
        network("ring").simulate(torch.rand(B, D), **{option: given})
    with pytest.raises(TypeError, match="silenced is a list; give a dict of neurons by the name of their population"):
        network("ring").simulate(torch.rand(B, D), silenced=[3])


def tensors_of(state) -> list[torch.Tensor]:
    return [tensor for each in state for tensor in ((each,) if isinstance(each, torch.Tensor) else each)]


def run_in_parts(net: SpikingNetwork, x: torch.Tensor, borders: tuple[int, ...]):
    """Spikes [T, B, N] of each population, the last state and the additions, of runs that continue one another."""
    state, parts, additions = None, [], 0
    for first, last in itertools.pairwise(borders):
        net.T = last - first  # for which held inputs are
        activity = net.simulate(x[first:last] if x.dim() == 3 else x, state, spikes=True)
        state = activity.state
        parts.append([train.dense() for train in activity.spikes])
        additions += np.array([each.accumulates for each in activity.synaptic_operations()])
    net.T = T
    return [torch.cat(of_parts) for of_parts in zip(*parts, strict=True)], state, additions


@pytest.mark.parametrize(("name", "backend"), [*zip(CONTINUED, itertools.cycle(BACKENDS), strict=False)])
def test_parts_and_single_steps_that_continue_one_another_are_the_whole(name, backend):
    net = network(name, backend)
    # parts shorter and longer than the delays
    over_time = (torch.rand(T, B, D, generator=seeded(4)) * 2).requires_grad_()
    for x in (over_time, over_time[0].detach().requires_grad_()):
        whole, parts = run_in_parts(net, x, (0, T)), run_in_parts(net, x, (0, 1, 7, T))
        gradients = []
        for spikes, state, _ in (whole, parts):
            loss = loss_of(spikes) + sum(tensor.square().sum() for tensor in tensors_of(state))
            gradients.append(torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True))
        state, outputs = None, []
        for now in x if x.dim() == 3 else x.expand(T, B, D):
            output, state = net.step(now, state)
            outputs.append(output)
        assert torch.equal(torch.stack(outputs), whole[0][-1])
        for others in (parts[1], state):
            for ours, theirs in zip(tensors_of(others), tensors_of(whole[1]), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, parts[0], whole[0]))
        assert (parts[2] == whole[2]).all()
        for (each, _), ours, theirs in zip([("x", x), *net.named_parameters()], *reversed(gradients), strict=True):
            assert rms(ours - theirs) <= 2e-5 * rms(theirs) + 1e-7, each


@every_pair(name=("current-based", "current-based chain", "no delay on a cycle", "onto membranes"), held=(False, True))
def test_called_modules_give_what_one_call_gives(name, held):
    net = network(name)
    x, results = torch.rand((B, D) if held else (T, B, D), generator=seeded(4)) * 2, []
    for way in ("operators in turn", "modules in turn"):
        assert net.explain(x).way.name == way or "cpu" not in BACKENDS
        activity = net.simulate(x, spikes=True)
        loss_of([each.dense() for each in activity.spikes]).backward()
        results.append([each.dense() for each in activity.spikes])
        results.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad()
        for connection in net.connections().values():
            connection.register_forward_hook(lambda *arguments: None)
    assert all(map(torch.equal, results[0], results[2]))
    assert all(each.any() for each in results[0])
    for ours, theirs in zip(results[3], results[1], strict=True):
        assert rms(ours - theirs) <= 2e-5 * rms(theirs) + 1e-7


@pytest.mark.ci
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels were not built")
@compiles_whole
def test_spikes_that_a_state_carries_into_a_chain_have_the_gradient_of_plain_pytorch_and_none_when_compiled():
    x, gradients = torch.rand(T, B, D, generator=seeded(4)) * 2, []
    for backend in ("torch", "cpu"):
        net = network("chain with delays", backend)
        assert net.explain(x).way.name == {"torch": "reference", "cpu": "cpu chain"}[backend]
        first = net.simulate(x[:9])
        rest = net.simulate(x[9:], first.state)
        # of the carried spikes alone: what comes after them, and what they are
        loss = rest.counts.square().sum() + loss_of(rest.state[net.depth :]) + loss_of(first.state[net.depth :])
        gradients.append(torch.autograd.grad(loss, [*net.parameters()], allow_unused=True))
    for (name, _), theirs, ours in zip(net.named_parameters(), *gradients, strict=True):
        assert (ours is None) == (theirs is None), name
        assert theirs is None or rms(ours - theirs) <= 2e-5 * rms(theirs) + 1e-7, name
    run = torch.compile(lambda x: net.simulate(x).state, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="no gradient through spikes that delays carry"):  # Dynamo's, or ours
        run(x)
    with torch.no_grad():
        torch.testing.assert_close(run(x), net.simulate(x).state)


@every_pair(name=CONTINUED, backend=BACKENDS, chunk=(1, 4, 50), held=(False, True))
def test_chunks_change_no_spike_and_no_gradient(backend, name, chunk, held):
    net = network(name, backend)
    x = (torch.rand((B, D) if held else (T, B, D), generator=seeded(4)) * 2).requires_grad_()
    runs, gradients = [], []
    for size in (None, chunk):
        runs.append(net.simulate(x, chunk=size))
        summed = [*runs[-1].rates, *tensors_of(runs[-1].state)]
        loss = runs[-1].counts.square().sum() + sum(each.square().sum() for each in summed)
        gradients.append(torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True))
    whole, chunked = runs
    for ours, theirs in zip(chunked.spikes, whole.spikes, strict=True):
        assert torch.equal(ours.dense(), theirs.dense())
    assert torch.equal(chunked.counts, whole.counts)
    torch.testing.assert_close((chunked.state, chunked.rates), (whole.state, whole.rates))
    assert chunked.synaptic_operations() == whole.synaptic_operations()
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert theirs is None or rms(ours - theirs) <= 2e-5 * rms(theirs) + 1e-7


@every_pair(name=("chain with delays", "ring"), backend=BACKENDS, membranes=(False, True))
def test_what_began_under_autocast_goes_on_without_and_again_under_it(backend, name, membranes):
    net = network(name, backend)
    x = torch.rand(T, B, D, generator=seeded(4)) * 2
    with torch.autocast("cpu", torch.bfloat16):
        state = net.simulate(x, membranes=membranes).state
    wide = tuple([tensor.float() if isinstance(tensor, torch.Tensor) else tensor for tensor in state])
    assert torch.equal(net.simulate(x, state).counts, net.simulate(x, wide).counts)
    assert torch.equal(net.step(x[0], state)[0], net.step(x[0], wide)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.simulate(x, state).counts, net.simulate(x, wide).counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_membranes_and_readouts(backend):
    net = network("feedback", backend, readout="mean")
    x = torch.rand(B, D, generator=seeded(4))
    activity = net.simulate(x, membranes=True)
    assert torch.allclose(activity.readout, activity.membranes["out"].mean(0))
    assert not activity.spikes["out"].dense().any()
    assert torch.equal(activity.spikes["a"].dense(), (activity.membranes["a"] > net.a.threshold).float())
    late = Projection("input", "out", joined("input", "out", seeded(0), bias=False), 2)  # nothing arrives at first
    net, state, outputs = SpikingNetwork({"out": LIF()}, [late], "out", T, readout="last", backend=backend), None, []
    for _ in range(T):
        output, state = net.step(x, state)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs), net.simulate(x, membranes=True).membranes["out"])
    assert outputs[0].shape == (B, 5)


def of_kind(kind: str) -> tuple[SpikingNetwork, tuple[str, ...]]:
    """A network of each class, and the names of its populations."""
    if kind == "stack":
        layers = [(joined("input", "a", seeded(0)), LIF()), (joined("a", "out", seeded(1)), LIF())]
        return SpikingStack(layers, T), ("lif1", "lif2")
    if kind == "settings":
        return G2GNet(D, [8, 6], 5, block_size=2, T=T, feedback=True, generator=seeded(0)), ("lif1", "lif2", "lif3")
    return network("ring"), ("a", "b", "c", "out")


@pytest.mark.parametrize("kind", ["stack", "settings", "graph"])
def test_every_network_gives_its_activity_by_number_and_by_name(kind):
    net, names = of_kind(kind)
    seen = []
    net.register_activity_hook(lambda x, activity, state: seen.append(activity.rates.keys()))
    activity = net.simulate(torch.rand(B, D, generator=seeded(4)) * 2, membranes=True)
    assert seen == [names]
    for values in (activity.spikes, activity.rates, activity.membranes, activity.synaptic_operations()):
        assert isinstance(values, tuple)
        assert len(values) == len(names) == net.depth
        assert values.keys() == names == tuple(dict(values))
        for number, (name, value) in enumerate(values.items()):
            assert value is values[name] is values[number] is values[number - net.depth]
        assert [*map(id, values)] == [id(values[name]) for name in names]
        assert [*map(id, values[1:])] == [id(values[name]) for name in names[1:]]
        with pytest.raises(KeyError, match=f"no population is called 'x'; there are {', '.join(names)}"):
            _ = values["x"]
    for twin in (pickle.loads(pickle.dumps(activity.spikes)), copy.deepcopy(activity.spikes)):
        assert twin.keys() == names
        assert torch.equal(twin["lif1" if kind != "graph" else "a"].dense(), activity.spikes[0].dense())
    leaves, spec = _pytree.tree_flatten(activity.membranes)
    assert all(map(torch.equal, leaves, activity.membranes))
    assert _pytree.tree_unflatten(leaves, spec).keys() == names
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec


@pytest.mark.ci
@pytest.mark.skipif(torch.__version__ < "2.8", reason="older versions compile no subclass of tuple: no names there")
def test_activity_by_name_passes_transforms_compilers_and_exports():
    net, names = of_kind("stack")
    x = torch.rand(4, D, generator=seeded(4)) * 2
    expected = net.simulate(x).rates
    of_samples = vmap(lambda sample: net.simulate(sample[None]).rates)(x)
    torch.testing.assert_close(of_samples["lif1"].mean(0), expected["lif1"])

    class Rates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> tuple:
            return self.net.simulate(x).rates

    class Sum(torch.nn.Module):
        def forward(self, rates: tuple) -> torch.Tensor:
            return rates["lif1"].sum() + rates[-1].sum()

    summed = torch.export.export(Sum(), (expected,)).module()(expected)
    assert summed == sum(each.sum() for each in expected)
    exported = torch.export.export(Rates(), (x,)).module()
    compiled = torch.compile(lambda x: net.simulate(x).rates, backend="eager", fullgraph=True)
    for run in (exported, compiled):
        assert run(x).keys() == names
        assert all(map(torch.equal, run(x), expected))


@every_pair(name=("skips", "self-loops", "ring", "chain with delays", "learned"), backend=BACKENDS, held=(False, True))
def test_synaptic_operations_count_what_arrives(backend, name, held):
    net = network(name, backend)
    x = (torch.rand((B, D) if held else (T, B, D), generator=seeded(4)) < 0.5).float()
    reference = Reference(net)
    reference.run((x.expand(T, B, D) if held else x).double())
    operations = net.simulate(x).synaptic_operations()
    for number, name in enumerate(net.populations):
        expected = 0
        for each in net.projections():
            if each.target == number:
                fan_out = (net.connections()[each.name].dense_weight() != 0).sum(0)
                once = held and each.source < 0 and not each.most
                steps = range(1 if once else T)
                expected += sum(int(((reference.arrived[each.name, t] != 0) * fan_out).sum()) for t in steps)
        assert sum(operations[name][:2]) == expected, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_network_has_the_delays_of_the_other_and_those_out_of_bounds_are_refused(backend):
    ours, theirs = network("chain with delays", backend, seed=1), network("chain with delays", backend)
    state, x = theirs.state_dict(), torch.rand(B, D, generator=seeded(4)) * 2
    before = {name: tensor for name, tensor in state.items() if name not in ("input_to_a_delay", "b_to_out_delay")}
    integers = state | {"a_to_b_delay": state["a_to_b_delay"].long()}
    for saved, assign in ((state, False), (before, False), (integers, True)):
        ours.load_state_dict(saved, assign=assign)  # also as it was saved before, integers and none for all neurons
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.delays("a_to_b"), theirs.delays("a_to_b"))
    expected = theirs(x)
    for wrong in (-1, 5, torch.nan):  # written into the buffer
        ours.a_to_b_delay[2] = wrong
        with pytest.raises(ValueError, match=r"a_to_b_delay was written to, and is .*; .* has room for 0 to 4"):
            ours(x)
    with torch.no_grad():
        for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            mine.copy_(other)
    assert torch.equal(ours(x), expected)
    assert torch.equal(torch.func.functional_call(network("chain with delays", backend, seed=1), state, (x,)), expected)
    assert torch.equal(ours.bfloat16().float().delays("a_to_b"), theirs.delays("a_to_b"))


def test_learned_delays_stay_float32_in_a_network_of_bfloat16():
    net = G2GNet(D, 16, 5, T=T, block_size=4, delay=400, learn_delay=True, generator=seeded(0), backend="torch")
    with torch.no_grad():
        net.fc3_delay.fill_(301.0)
        net.fc2_delay.fill_(1.0)
    net(torch.rand(B, D)).sum().backward()
    net.bfloat16()
    assert (net.fc2.values.dtype, net.fc2_delay.dtype) == (torch.bfloat16, torch.float32)
    assert net.fc2.values.grad.dtype == torch.bfloat16
    assert net.delays("fc3").tolist() == [301] * 16
    net.predict(torch.rand(B, D))
    net(torch.rand(B, D).bfloat16()).sum().backward()
    assert net.fc2_delay.grad.dtype == torch.float32
    net.fc3_delay.grad.fill_(1.0)
    torch.optim.SGD([net.fc3_delay], lr=0.1).step()
    assert net.fc3_delay.tolist() == pytest.approx([300.9] * 16)


def ring(delay, back=2, **options) -> SpikingNetwork:
    """Two populations that reach one another; the delays of the first way are given."""
    joins = [("input", "a", 0), ("a", "b", delay), ("b", "a", back), ("b", "out", 0)]
    parts = [Projection(s, t, joined(s, t, seeded(0)), d, **(options if d is delay else {})) for s, t, d in joins]
    return SpikingNetwork({"a": LIF(), "b": LIF(), "out": LIF()}, parts, "out", T)


LEARNED, NINE = {"learn_delay": True, "max_delay": 4}, np.full(9, 1)
#: what is saved, into what it is loaded, and the delays then, or what refuses them
LOADS = {
    "learned into fixed, half to even": (ring(1.7, **LEARNED), ring(1, max_delay=4), 2),
    "half of it": (ring(2.5, **LEARNED), ring(NINE, max_delay=4), 2),
    "learned into fixed, no room": (ring(2.6, **LEARNED), ring(NINE, max_delay=2), "2.6; .* has room for 0 to 2"),
    "a bound of learned ones": (ring(0.4, **LEARNED), ring(1, max_delay=4), "learned ones act as net.delays('a_to_b')"),
    "fixed into learned": (ring(3, max_delay=9), ring(0, **LEARNED), 3),
    "fixed into learned, no room": (ring(8), ring(0, **LEARNED), "is 8; this network has room for 0 to 4"),
    "one for all into another": (ring(3), ring(1), "a_to_b_delay is 3; this network's is 1"),
    "one for all into each": (ring(3), ring(4 * NINE), 3),
    "each into one for all": (ring(3 * NINE), ring(3), 3),
    "others into one for all": (ring(np.arange(9)), ring(3), "a_to_b_delay is from 0 to 8; this network's is 3"),
    "a cycle without delay": (ring(0), ring(NINE, 0), "a → b → a is a cycle without delay"),
    "more neurons": (torch.zeros(10), ring(NINE), r"a_to_b_delay has shape \[10\]; give \[9\]"),
    "rounded": (torch.full((9,), 300.0).bfloat16(), ring(NINE, max_delay=500), "that torch.bfloat16 has rounded"),
}  # fmt: skip


@pytest.mark.parametrize(("saved", "into", "then"), LOADS.values(), ids=LOADS)
def test_delays_are_loaded_as_they_act_or_refused_by_name(saved, into, then):
    state = into.state_dict()
    key, before = "a_to_b_delay", into.delays("a_to_b")
    state[key] = saved if isinstance(saved, torch.Tensor) else saved.state_dict()[key]
    if isinstance(then, int):
        into.load_state_dict(state)
        assert into.delays("a_to_b").tolist() == [then] * 9
        assert isinstance(saved, torch.Tensor) or torch.equal(saved.delays("a_to_b"), into.delays("a_to_b"))
        return
    with pytest.raises(RuntimeError, match=then.replace("(", r"\(").replace(")", r"\)")) as error:
        into.load_state_dict(state)
    assert "Missing" not in str(error.value)
    assert torch.equal(into.delays("a_to_b"), before)


class AverageOfEverything(torch.optim.swa_utils.AveragedModel):
    """As timm's ModelEmaV2, of every tensor of the state."""

    def update_parameters(self, model):
        for average, now in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(0.999 * average + 0.001 * now)


@pytest.mark.parametrize("kind", ["buffers", "state"])
def test_averages_of_all_buffers_keep_fixed_delays_and_the_order_of_inputs(kind):
    net = G2GNet(64, 16, 5, block_size=4, T=20, sequence="rows", delay=90, recurrent=True, generator=seeded(0))
    net.input_order.copy_(torch.randperm(20 * 64, generator=seeded(1)).view(20, 64))
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    average = {
        "buffers": torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=ema, use_buffers=True),
        "state": AverageOfEverything(net),
    }[kind]
    for _ in range(60):
        average.update_parameters(net)
    x = torch.rand(3, 20 * 64, generator=seeded(2)) * 3
    assert all(torch.equal(average.module.delays(name), net.delays(name)) for name in net.connections())
    assert torch.equal(average.module.encode(x), net.encode(x))
    net.load_state_dict(average.module.state_dict())
    net.input_order[0] = 5
    with pytest.raises(ValueError, match="input_order was written to, and does not have each value of a sample once"):
        net(x)


def test_a_state_of_other_delays_or_samples_is_refused_by_name():
    net, x = ring(4), torch.rand(T, B, D, generator=seeded(4))
    state = net.simulate(x).state
    for other in (ring(3).simulate(x).state, (*state[:3], state[3][1:], *state[4:]), net.simulate(x[:, :2]).state):
        for call in (lambda given: net.simulate(x, given), lambda given: net.step(x[0], given)):
            with pytest.raises(
                ValueError, match=r"of what a sent, but delays of this network read \[4, 3, 9\], its last 4"
            ):
                call(other)
    net.simulate(x, (*state[:3], None, *state[4:]))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_learned_delays_run_without_gradients_under_transforms_and_are_refused_with_them():
    net, x = network("learned"), torch.rand(B, D, generator=seeded(4)) * 2
    calls = {
        "vmap": lambda: torch.vmap(lambda x: net(x[None])[0])(x),
        "grad": lambda: torch.func.grad(lambda x: net(x).sum())(x),
        "trace": lambda: torch.jit.trace(net, (x,), check_trace=False)(x),
    }
    for call in calls.values():
        with pytest.raises(NotImplementedError, match=r"learned delays have no gradient in torch.func"):
            call()
    with torch.no_grad():
        assert torch.equal(calls["vmap"](), net(x))
        assert torch.equal(calls["trace"](), net(x))
    for name in ("input_to_a", "a_to_b"):
        net.get_parameter(f"{name}_delay").requires_grad_(False)
    x.requires_grad_()
    torch.testing.assert_close(calls["grad"](), torch.autograd.grad(net(x).sum(), x)[0], rtol=1e-3, atol=1e-4)


def test_the_graph_has_delays():
    net = network("twice the same")
    graph = net.to_networkx()
    assert graph.is_multigraph()
    assert sorted({data.get("delay", 0) for *_, data in graph.edges(data=True)}) == [0, 2]
    assert "2 steps later" in net._repr_html_()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ([("input", "a", 0), ("a", "b", 0), ("b", "a", 0), ("b", "out", 0)], "a → b → a is a cycle without delay"),
        ([("input", "a", 0), ("a", "a", 0), ("a", "out", 0)], "a → a is a cycle without delay"),
        ([("input", "a", 0), ("b", "out", 0)], r"'b' is not one of"),
        ([("input", "a", 0), ("a", "input", 1), ("a", "out", 0)], "'input' is not one of"),
        ([("input", "a", 0), ("a", "out", -1)], "must be from 0 to 65535 steps; these are -1"),
        ([("a", "out", 0), ("out", "a", 1)], "no projections lead from the input to 'a'"),
    ],
)
def test_what_is_no_network_is_refused_by_name(graph, message, monkeypatch):
    monkeypatch.setitem(GRAPHS, "wrong", graph)
    with pytest.raises(ValueError, match=message):
        network("wrong")


def test_arguments_that_cannot_be_are_refused_by_name():
    connection = joined("a", "b", seeded(0))
    for options, message in (
        ({"delay": torch.zeros(4, dtype=torch.int64)}, r"have shape \[4\]; give one number, or one for each of the 9"),
        ({"delay": 1.5}, "the delays of a → b are 1.5; give whole numbers of steps"),
        ({"delay": "3"}, "the delays of a → b are '3'; give whole numbers of steps"),
        ({"delay": True}, "the delays of a → b are True"),
        ({"delay": [1, None]}, r"the delays of a → b are \[1, None\]"),
        ({"delay": np.full(9, 70000, np.uint32)}, "from 0 to 65535 steps; these are from 70000 to 70000"),
        ({"delay": 1.5, "learn_delay": True}, "give max_delay"),
        ({"delay": 9, "learn_delay": True, "max_delay": 8}, "from 0 to 8 steps; these are 9"),
        ({"delay_width": 2}, "delay_width=2 of a → b is of gradients of learned delays; give learn_delay=True"),
        ({"delay": 1, **LEARNED, "delay_width": 0}, "delay_width of a → b=0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Projection("a", "b", connection, **options)
    no_name = "cannot name a module"
    taken = [(name, f"'{name}' is already an") for name in ("step", "readout", "dropout", "steps", "T", "depth")]
    for name, message in (*taken, ("a.b", no_name), ("", no_name), ("_projections", no_name)):
        with pytest.raises(ValueError, match=message):
            SpikingNetwork({name: LIF()}, [Projection("input", name, connection)], name)
    into, loop = Projection("input", "b", connection), joined("b", "b", seeded(0))
    with pytest.raises(ValueError, match="'b_delay' is the name of the delays of b"):
        SpikingNetwork(
            {"b_delay": LIF()},
            {"c": Projection("input", "b_delay", connection), "b": Projection("b_delay", "b_delay", loop)},
            "b_delay",
        )
    with pytest.raises(TypeError, match="populations is a list; give a dict of the neurons by name"):
        SpikingNetwork([LIF()], [into], "b")
    with pytest.raises(ValueError, match="'typo' is not one of the connections input_to_b"):
        SpikingNetwork({"b": LIF()}, [into], "b").delays("typo")
    with pytest.raises(TypeError, match="tuple is not a Projection"):
        SpikingNetwork({"b": LIF()}, [("input", "b", connection)], "b")
    with pytest.raises(ValueError, match=r"chunk=4 does not know the spikes after a chunk, .*; leave it out"):
        network("learned").simulate(torch.rand(T, B, D), chunk=4)
    net = network("learned on a cycle")
    net.simulate(torch.rand(T, B, D), chunk=4)
    net.delay_width = 2
    with pytest.raises(ValueError, match=r"chunk=4 .* the gradient of width 2 of a learned delay of 1 reads; leave"):
        net.simulate(torch.rand(T, B, D), chunk=4)
    with pytest.raises(ValueError, match="delay_width=3 would change nothing: no delays of this network are learned"):
        network("skips").delay_width = 3
    late = Projection("input", "b", connection, 2, max_delay=5)
    kinds = [
        torch.full((9,), 2, dtype=getattr(torch, f"{kind}")) for kind in ("int8", "uint8", "int16", "uint16", "int32")
    ]
    for delay in (2, np.int64(2), np.full(9, 2), [2] * 9, *kinds):
        delays = dataclasses.replace(late, delay=delay)
        net = SpikingNetwork({"b": LIF()}, [delays], "b", T=3)
        assert net.delays("input_to_b").tolist() == [2] * 9
        assert net(torch.rand(2, 9)).shape == (2, 13)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("name", "connection"), [("chain with delays", "a_to_b"), ("recurrent stack", "rec1")])
def test_correlations_are_of_spikes_as_they_arrive(name, connection, given):
    """Those that the network records, and those of an activity that its layers are given."""
    net = network(name).train()
    x = torch.rand(T, B, D, generator=seeded(4)) * 2
    received, layer = Reference(net), net.get_submodule(connection)
    target = next(each.target for each in net.projections() if each.name == connection)
    spikes = [*received.run(x.double()).values()][target].float()
    arrived = torch.stack([received.arrived[connection, t] for t in range(T)]).float()
    scores = unit_correlation(arrived, spikes, layer.mask)
    present = layer.mask.present().clone()
    best = scores.masked_fill(present, -2).flatten().topk(int(0.25 * present.sum())).values  # of which many are 0
    optimizer, layers = torch.optim.SGD(net.parameters(), 0.0), [*net.connections().values()]
    rules = {"interval": 1, "fraction": 0.25, "prune": "set", "grow": "hebb"}
    dst = DSTScheduler(layers if given else net, optimizer, **rules, network=net if given else None)
    activity = net.simulate(x)
    activity.counts.sum().backward()
    dst.step(*((x, activity) if given else ()))
    assert best[0] > 0
    assert torch.equal(scores[layer.mask.present() & ~present].sort(descending=True).values, best)
    if given:
        with pytest.raises(
            ValueError, match=r"of layers of \[.*\] neurons, .* DSTScheduler\(layers, optimizer, network="
        ):
            DSTScheduler(layers[::-1], optimizer, interval=1).step(x, activity)


def test_a_net_of_settings_has_layers_feedback_and_delays():
    net = G2GNet(
        D, [16, 12, 8], 5, "mixer", block_size=4, T=T, num_groups=4, recurrent=[2], feedback=True, delay=3,
        threshold=0.4, generator=seeded(0), backend="torch",
    )  # fmt: skip
    assert list(net.connections()) == ["fc1", "fb1", "fc2", "rec2", "fb2", "fc3", "fc4"]
    for name in net.connections():
        delays = net.delays(name)
        assert int(name[:2] != "fc") <= delays.min()
        assert delays.max() <= 3
    x = torch.rand(B, D, generator=seeded(4)) * 3
    expected = Reference(net).run(x.expand(T, B, D).double())
    activity = net.simulate(x)
    for number, name in enumerate(net.populations):
        assert torch.equal(activity.spikes[number].dense().double(), expected[name])
    assert activity.rates[1].sum() > 0
    assert list(G2GNet(D, [16], 5, block_size=4).connections()) == ["fc1", "fc2"]
    plain, same = (G2GNet(D, size, 5, block_size=4, generator=seeded(0)) for size in (16, [16, 16]))
    assert torch.equal(plain.fc2.values, same.fc2.values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: G2GNet(D, 16, 5, delay=3), "has no form for fc1, with delays up to 3 steps"),
        (
            lambda: G2GNet(D, 16, 5, feedback=True),
            "for fb1, with delays up to 1 steps from population 2 to population 1",
        ),
        (lambda: network("chain with delays"), r"has no form for \w+, with delays up to \d steps"),
        (lambda: torch.nn.Linear(2, 2), "takes a SpikingStack, a G2GNet or a SpikingNetwork, not a Linear"),
    ],
)
def test_what_snntorch_cannot_express_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"to_snntorch .*{message}"):
        to_snntorch(make())


def test_a_chain_with_names_of_its_own_is_one_for_snntorch():
    loop = Projection("a", "a", joined("a", "a", seeded(2), bias=False), delay=1)
    ends = [
        Projection("input", "a", joined("input", "a", seeded(0))),
        Projection("a", "out", joined("a", "out", seeded(1))),
    ]
    net = SpikingNetwork({"a": LIF(threshold=0.5), "out": LIF(threshold=0.5)}, [loop, *ends], "out", T)
    x = torch.rand(T, B, D, generator=seeded(4)) * 2
    assert net(x).sum() > 0
    assert torch.equal(from_snntorch(to_snntorch(net), T=T)(x), net(x))


def test_learned_delays_follow_their_gradient():
    """The loss is least where a spike meets the step that it is wanted at: the delays that lead there are learned."""
    connection = G2GLinear(BlockMask.full(GroupLayout(6, 1), GroupLayout(6, 1), block_size=1), bias=False)
    connection.values.data = torch.eye(6).flatten()[:, None, None] * 2
    connection.values.requires_grad_(False)
    learned = Projection("input", "out", connection, torch.full((6,), 6.0), learn_delay=True, max_delay=12)
    net = SpikingNetwork({"out": LIF(beta=0.0, learn_beta=False)}, [learned], "out")
    kernel = torch.exp(-(torch.arange(-20, 21) / 4.0).square())[None, None]  # spikes near the wanted step count, too
    wanted, (x, target) = torch.tensor([3, 4, 5, 7, 8, 9]), torch.zeros(2, 18, 1, 6)
    x[1] = 1
    target[1 + wanted, 0, torch.arange(6)] = 1
    optimizer = torch.optim.Adam([net.input_to_out_delay], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        late = net.simulate(x, spikes=True).spikes["out"].dense() - target
        torch.nn.functional.conv1d(late[:, 0].T[:, None], kernel, padding=20).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.delays("input_to_out"), wanted)


@pytest.mark.parametrize("width", [1, 2, 5, 10])
def test_the_gradient_of_a_learned_delay_is_that_of_inputs_spread_over_a_triangle(width):
    """The output is linear in its inputs, so that finite differences over the kernel's place have no other error."""
    connection = joined("input", "out", seeded(0))
    delays = torch.tensor([0, 0, 1, 2, 3, 4, 5, 7, 9, 12]).float()
    late = Projection("input", "out", connection, delays, learn_delay=True, max_delay=12, delay_width=width)
    net = SpikingNetwork({"out": LIF(beta=0.8)}, [late], "out", T, readout="mean").double()
    x, wanted = torch.rand(T, B, D, generator=seeded(4)).double(), torch.randn(B, 5, generator=seeded(5)).double()
    assert net.delay_of(net.projections()[0]).width == width
    (net(x) * wanted).sum().backward()
    half, t = (width * (width + 1)) ** 0.5, torch.arange(T).double()
    net.input_to_out_delay.data.zero_()

    def loss(delays: torch.Tensor) -> torch.Tensor:
        kernel = (1 - (t[:, None, None] - t[:, None] - delays).abs() / half).clamp(min=0) / half  # [t, s, D]
        return (net(torch.einsum("tsd,sbd->tbd", kernel, x)) * wanted).sum()

    with torch.no_grad():
        steps = torch.eye(D).double() * 1e-3
        differences = torch.stack([loss(delays + step) - loss(delays - step) for step in steps]) / 2e-3
    torch.testing.assert_close(net.input_to_out_delay.grad.double(), differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_hold_as_many_steps_more_as_gradients_of_delays_see(backend):
    """Delays of 3 to 5 steps see 3 steps ahead within a part; the state has those behind."""
    net, x = network("learned on a cycle", backend), torch.rand(T, B, D, generator=seeded(4)) * 2
    for name in ("a_to_b_delay", "b_to_a_delay"):
        getattr(net, name).data.clamp_(3, 5)
    state, gradients = net.simulate(x).state, []
    net.delay_width = 3
    with pytest.raises(ValueError, match=r"delays of this network read \[8, 3, 9\], its last 8 steps; give a state"):
        net.simulate(x, state)
    for borders in ((0, T), (0, 1, 7, T)):
        loss = loss_of(run_in_parts(net, x, borders)[0])
        gradients.append(torch.autograd.grad(loss, [*net.parameters()]))
    for (name, _), whole, parts in zip(net.named_parameters(), *gradients, strict=True):
        assert rms(parts - whole) <= 2e-5 * rms(whole) + 1e-7, name


def test_edges_become_projections_one_for_each_delay():
    draw = np.random.default_rng(0)
    pre, post, delay = (draw.integers(0, high, 200) for high in (30, 20, 3))
    weight = draw.normal(size=200)
    weight[7] = 0.0  # a weight that exists
    made = Projection.from_edges("a", "b", pre, post, weight, delay, sizes=(30, 20))
    assert [each.delay for each in made] == [0, 1, 2]
    for each in made:
        (of_delay,), dense, exists = np.nonzero(delay == each.delay), np.zeros((20, 30)), np.zeros((20, 30), bool)
        np.add.at(dense, (post[of_delay], pre[of_delay]), weight[of_delay])  # weights of a pair are added
        exists[post[of_delay], pre[of_delay]] = True
        assert np.array_equal(each.connection.mask.to_dense().numpy(), exists)
        assert np.allclose(each.connection.weight.detach().numpy(), dense, atol=1e-6)
    (same,) = Projection.from_edges("a", "b", torch.tensor(pre), post.tolist(), weight, 4, sizes=(30, 20))
    assert same.delay == 4
    pre.setflags(write=False)  # as pandas has them
    backwards = (each[::-1] for each in (pre, post.astype(np.uint16), weight))
    (of_views,) = Projection.from_edges("a", "b", *backwards, sizes=(30, 20))
    assert torch.allclose(of_views.connection.weight, same.connection.weight)
    (one,) = Projection.from_edges("a", "b", [2, 2], [1, 0], 0.5, sizes=(3, 2))
    assert one.connection.weight[:, 2].tolist() == [0.5, 0.5]
    assert Projection.from_edges("a", "b", [], [], [], sizes=(3, 3)) == []
    bfloat = torch.full((2,), 100.0, dtype=torch.bfloat16, requires_grad=True)
    halves = np.array([100, 100], np.float16)
    singles = np.array([100, 100], np.float32)
    for hundreds in (
        np.array([100, 100], np.int8),
        np.array([100, 100], ">f4"),
        bfloat,
        halves,
        singles,
    ):  # no overflow
        (made,) = Projection.from_edges("a", "b", [0, 0], [1, 1], hundreds, sizes=(3, 3))
        assert made.connection.values.flatten().tolist() == [200.0]


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        (([30], [0], [1.0]), r"pre\[0\] of the edges a → b is 30; there are 30"),
        (([0], [-1], [1.0]), r"post\[0\] of the edges a → b is -1"),
        (([0.5], [0], [1.0]), r"pre of the edges a → b is float64 .*; .astype\(int\) converts whole"),
        (([0], ["n7"], [1.0]), "post of the edges a → b is <U2 .*; pandas.factorize numbers names"),
        ((pandas.Series(["n7"]), [0], [1.0]), "pre of the edges a → b is .*; pandas.factorize"),
        (([0, 1], [0], [1.0]), "give whole numbers, one for each of 2 edges"),
        (([0], [0], [np.nan]), r"weight\[0\] of the edges a → b is nan"),
        (([0], [0], np.array([np.inf], np.float16)), r"weight\[0\] of the edges a → b is inf"),
        (([0], [0], np.array([-np.inf], np.float32)), r"weight\[0\] of the edges a → b is -inf"),
        (([0, 0], [0, 0], np.array([3e38, 3e38], np.float32)), "not finite, or that a float32 does not hold"),
        (([0, 1], [0, 1], [1.0, 1e39]), r"weight\[1\] of the edges a → b is 1e\+39"),
        (([0, 1], [0, 1], [1.0, 1.0], [0, -1]), r"delay\[1\] of the edges a → b is -1; delays are from 0 to 65535"),
        (([0], [0], [1.0], [0.5]), "delay of the edges a → b is float64"),
        (([0], [0], [1.0], [[1, 1]]), "delay of the edges a → b is int64"),
        ((0, 0, 1.0), "pre of the edges a → b is int64"),
        (([0, 0], [0, 0], [3e38, 3e38]), "not finite, or that a float32 does not hold"),
        ((np.ma.array([0, 1], mask=[0, 1]), [0, 1], [1.0, 2.0]), r"pre\[1\] of the edges a → b is missing"),
        (([0, 1], pandas.Series([1, None], dtype="Int64"), [1.0, 2.0]), r"post\[1\] of the edges a → b is missing"),
        *((([0], [0], [1.0], 0, sizes), "sizes") for sizes in (None, 3, (3,), (3, 3, 3), (3.0, 3), (0, 3))),
    ],
)
def test_edges_that_are_none_are_refused(columns, why):
    with pytest.raises(ValueError, match=why):
        Projection.from_edges("a", "b", **{"sizes": (30, 20), **dict(zip(COLUMNS, columns, strict=False))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [1 << 24, 3 * B * D, 1])
def test_sparse_inputs_give_what_dense_ones_give(monkeypatch, backend, dense):
    monkeypatch.setattr(ways, "DENSE", dense)
    net, x = network("self-loops", backend), (torch.rand(T, B, D, generator=seeded(3)) < 0.3).float()
    shown = {"a": [0, 2]}
    whole = net.simulate(x, membranes=shown)
    (wanted,) = torch.autograd.grad(whole.output.sum(), net.input_to_a.values)
    for given, options in ((x.to_sparse(), {}), (x.transpose(0, 1).to_sparse(), {"batch_first": True})):
        activity = net.simulate(given, membranes=shown, **options)
        assert torch.equal(activity.output, whole.output)
        torch.testing.assert_close(activity.membranes["a"], whole.membranes["a"])
        for name in net.populations:
            assert torch.equal(activity.spikes[name].events(), whole.spikes[name].events())
        (found,) = torch.autograd.grad(activity.output.sum(), net.input_to_a.values)
        torch.testing.assert_close(found, wanted)
    halves = [net.simulate(x[:4].to_sparse())]
    halves.append(net.simulate(x[4:].to_sparse(), halves[0].state))
    assert torch.equal(halves[0].output + halves[1].output, whole.output)
    assert net.explain(x.to_sparse()).way.name == net.explain(x).way.name


def test_sparse_inputs_that_cannot_be_run_are_refused_by_name(monkeypatch):
    net, x = network("chain"), torch.ones(T, B, D).to_sparse()
    outside = torch.sparse_coo_tensor([[0], [0], [D]], [1.0], (T, B, D), check_invariants=False)
    for given, options, why in (
        (x.to_dense()[0].to_sparse(), {}, r"x is sparse and has shape \[3, 10\]; give \[T, B, in\]"),
        (x.to_dense().to_sparse(2), {}, "each entry with three indices"),
        (x.to_dense()[:0].to_sparse(), {}, "give at least one step"),
        (outside, {}, r"indices outside its shape \[11, 3, 10\]"),
        (x.clone().requires_grad_(), {}, "sparse inputs have no gradient; give inputs.to_dense()"),
        (x, {"spikes": True}, r"sparse inputs \[11, 3, 10\] are run 1 steps at a time, which keeps no gradient of s"),
    ):
        monkeypatch.setattr(ways, "DENSE", 1)
        with pytest.raises(ValueError, match=why):
            net.simulate(given, **options)


@pytest.mark.ci
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels were not built")
@pytest.mark.parametrize(("kind", "learned"), [("index", False), ("random", True)])
def test_many_delays_whose_gradients_lie_in_the_order_of_delays(kind, learned):
    """16 samples, 61 steps and 200 neurons are more than ``kCachedLines`` of ``graph.h``."""
    draw, size, steps, batch = torch.Generator().manual_seed(0), 200, 70, 32
    layout, source = (GroupLayout(size, kind=kind, generator=draw) for _ in range(2))

    def joined(rows, cols, **options):
        mask = BlockMask.sample(rows, cols, block_size=16, generator=draw)
        return G2GLinear(mask, generator=draw, **options)

    back = joined(layout, source, bias=False)
    back.values.data *= 2
    delays = torch.randint(1, 61, (size,), generator=draw)
    projections = [
        Projection("input", "a", joined(layout, GroupLayout(30))),
        Projection("a", "a", back, delays, learn_delay=learned, max_delay=60),
        Projection("a", "out", joined(GroupLayout(5, 1), GroupLayout(size, 1))),
    ]
    net = SpikingNetwork({"a": LIF(), "out": LIF()}, projections, "out", steps, backend="cpu")
    exact = copy.deepcopy(net).double()
    exact.backend = "torch"
    x, found = torch.rand(steps, batch, 30, generator=draw) * 3, []
    for each, inputs in ((net, x), (exact, x.double())):
        inputs = inputs.clone().requires_grad_()
        activity = each.simulate(inputs)
        loss = (activity.counts - 3).square().mean() + activity.rates["a"].square().sum()
        found.append([activity.counts, *torch.autograd.grad(loss, [inputs, *each.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert theirs.norm() > 0
        assert (ours.double() - theirs).norm() <= 1e-4 * theirs.norm()
