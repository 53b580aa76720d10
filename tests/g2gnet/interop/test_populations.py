"""Graphs of populations with delays in NIR: they run as NIR's nodes say, and come back from a file as they were."""

import contextlib
import io

import nir
import numpy as np
import pytest
import snntorch
import torch
from helpers import seeded
from snntorch.import_nir import import_from_nir

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, G2GLinear, G2GNet, Projection, SpikingNetwork, SpikingStack, Synaptic
from g2gnet.interop import from_nir, to_nir

STEPS, INPUTS = 16, 18
SAMPLES = torch.rand(STEPS, 3, INPUTS, generator=seeded(1)) * 3
#: no float32 changes it on the way through a time constant: 1 − (1 − 0.75) is 0.75
LEAK = {"beta": 0.75, "threshold": 0.5, "reset": "zero"}
DT, IN, LATER = 1e-4, nir.Input(input_type={"input": np.array([8])}), nir.Delay(np.ones(8))


def joined(into, out, seed, block_size=2, bias=True):
    mask = BlockMask.sample(GroupLayout(out, 4), GroupLayout(into, 4), 1.0, 0.4, block_size, seeded(seed))
    return G2GLinear(mask, bias=bias, generator=seeded(seed))


def graph_of(*projections, **populations):
    """The network of these projections, the last of the populations its output."""
    return SpikingNetwork(populations, projections, [*populations][-1], STEPS)


def feedback():
    """Two areas and their feedback, a skip from the input to the output, and two projections of one pair."""
    return graph_of(
        Projection("input", "v1", joined(INPUTS, 24, 1), delay=torch.randint(4, (INPUTS,), generator=seeded(5))),
        Projection("v1", "lm", joined(24, 20, 2), delay=2),
        Projection("lm", "v1", joined(20, 24, 3, bias=False), delay=3),
        Projection("lm", "output", joined(20, 7, 4)),
        Projection("lm", "output", joined(20, 7, 5), delay=4),
        Projection("input", "output", joined(INPUTS, 7, 6), delay=1),
        **{"lm": LIF(**LEAK), "v1": LIF(24, **LEAK), "output": LIF(**LEAK)},
    )


def loops():
    """A population with three self-projections, of delays 1, 1 for each neuron, and 1 to 5, the last two saved."""
    many = torch.randint(1, 6, (20,), generator=seeded(5))
    projections = {
        "into": Projection("input", "a", joined(INPUTS, 20, 1, 16)),
        "one": Projection("a", "a", joined(20, 20, 2, 16), delay=1),
        "ones": Projection("a", "a", joined(20, 20, 3, bias=False), delay=torch.ones(20, dtype=torch.int64)),
        "many": Projection("a", "a", joined(20, 20, 4, bias=False), delay=many, max_delay=9),
        "out": Projection("a", "b", joined(20, 8, 5)),
    }
    return SpikingNetwork({"a": LIF(**LEAK), "b": LIF(**LEAK)}, projections, "b", STEPS)


def learned():
    """A ring of three with learned delays, of which one rounds to even and one is below the least of a cycle."""
    starts = torch.linspace(-1, 6.5, 16).clamp(0, 6)
    return graph_of(
        Projection("input", "a", joined(INPUTS, 12, 1), delay=1.5, learn_delay=True, max_delay=6),
        Projection("a", "b", joined(12, 16, 2)),
        Projection("b", "c", joined(16, 14, 3), delay=starts, learn_delay=True, max_delay=6, delay_width=3),
        Projection("c", "a", joined(14, 12, 4, bias=False), delay=2),
        **{name: LIF(**LEAK) for name in "abc"},
    )


def of_the_command(**options):
    options = {"block_size": 2, "T": STEPS, "recurrent": [2], "feedback": True, "delay": 4, **LEAK, **options}
    return G2GNet(INPUTS, [20, 12, 16], 7, "mixer", generator=seeded(0), **options)


def chain_ends():
    """What ``SpikingStack`` would be, with names."""
    loop = Projection("a", "a", joined(12, 12, 2, bias=False), delay=1)
    return Projection("input", "a", joined(INPUTS, 12, 1)), loop, Projection("a", "b", joined(12, 7, 3))


def chain(*more):
    return graph_of(*chain_ends(), *more, a=LIF(**LEAK), b=LIF(**LEAK))


NETWORKS = {
    "chain": chain, "feedback": feedback, "loops": loops, "learned": learned, "flags": of_the_command,
    "neurons": lambda: of_the_command(per_neuron=True, learn_delay=True),
}  # fmt: skip


def spikes_of(net, samples=SAMPLES):
    trains = [train.dense() for train in net.simulate(samples).spikes]
    assert all(0 < train.sum() < train.numel() for train in trains)
    return trains


def with_other_weights(net):
    """Stronger ones, for spikes in each population."""
    with torch.no_grad():
        for connection in net.connections().values():
            connection.values.mul_(2)
    return net


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_graph_comes_back_from_a_file_with_its_names_states_and_spikes(make, tmp_path):
    net = with_other_weights(make())
    nir.write(tmp_path / "net.nir", to_nir(net, dt=1e-3))
    back = from_nir(nir.read(tmp_path / "net.nir"), dt=1e-3, T=STEPS)
    assert back.populations == net.populations
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in net.named_parameters()]
    state = back.state_dict()
    assert list(state) == [name for name in net.state_dict() if name in state]
    for name, tensor in state.items():
        expected = net.state_dict()[name]
        if name.endswith("delay"):  # learned ones are written as they act
            expected = net.delays(name.removesuffix("_delay")).to(expected.dtype)
            tensor = tensor.expand(expected.shape)
        assert torch.equal(tensor, expected), name
    assert all(torch.equal(back.delays(name), net.delays(name)) for name in net.connections())
    assert back.projections() == net.projections()
    assert all(map(torch.equal, spikes_of(back), spikes_of(net)))
    assert all(map(torch.equal, spikes_of(back.double(), SAMPLES.double()), spikes_of(net.double(), SAMPLES.double())))


def run_by_hand(graph, dt, samples):
    """The trains of a graph's neurons, node by node as NIR defines them: what leads to a node adds up, y(t) = x(t − τ).
    A loop of one population that has no Delay takes one step."""
    nodes, edges = dict(graph.nodes), list(graph.edges)
    for name, node in graph.nodes.items():
        if isinstance(node, nir.NIRGraph):  # of neurons and their loop
            nodes[name], nodes[f"{name}.loop"] = node.nodes["lif"], node.nodes["w_rec"]
            edges += [(name, f"{name}.loop"), (f"{name}.loop", name)]
    into = {name: [one for one, other in edges if other == name] for name in nodes}
    neurons = {name: node for name, node in nodes.items() if isinstance(node, nir.LIF | nir.IF)}
    v, trains = dict.fromkeys(neurons, 0.0), {name: [] for name in neurons}

    def output(name, t, asked_by=None):
        """Of a node at step t, for neurons that it leads to without a Delay."""
        node = nodes[name]
        if name in neurons:
            t -= name == asked_by
            return trains[name][t] if t >= 0 else np.zeros((samples.shape[1], node.r.size))
        if isinstance(node, nir.Input):
            return samples[t] if t >= 0 else np.zeros_like(samples[0])
        (source,) = into[name]
        if isinstance(node, nir.Delay):
            steps = np.round(node.delay / dt).astype(int).tolist()
            return np.stack([output(source, t - d)[:, neuron] for neuron, d in enumerate(steps)], 1)
        return output(source, t, asked_by) @ node.weight.T.astype(float) + getattr(node, "bias", 0.0)

    for t in range(len(samples)):
        for name, node in neurons.items():  # in the order in which the network runs them
            current = sum(output(source, t, name) for source in into[name])
            leaks = isinstance(node, nir.LIF)
            change = (node.v_leak - v[name] + node.r * current) / node.tau if leaks else node.r * current
            v[name] = v[name] + dt * change
            fired = v[name] > node.v_threshold
            v[name] = np.where(fired, node.v_reset, v[name])
            trains[name].append(fired.astype(float))
    return [torch.from_numpy(np.stack(train)) for train in trains.values()]


def recurrent(**options):
    """A stack, of which a population and its loop are one node."""
    options = {"recurrent": True, "per_neuron": True, "block_size": 2, "T": STEPS, **LEAK, **options}
    return G2GNet(INPUTS, 20, 7, "mixer", generator=seeded(0), **options)


STACKS = {"recurrent": recurrent, "no leak": lambda: recurrent(recurrent=False, beta=1.0, threshold=0.9)}


@pytest.mark.parametrize("make", [*NETWORKS.values(), *STACKS.values()], ids=[*NETWORKS, *STACKS])
def test_the_graph_written_is_the_differential_equation_with_its_delays(make):
    net, dt = with_other_weights(make()).double(), 2.5e-4
    by_hand = run_by_hand(to_nir(net, dt), dt, SAMPLES.double().numpy())
    torch.testing.assert_close(by_hand, spikes_of(net, SAMPLES.double()), rtol=0, atol=0)


@pytest.mark.skipif(snntorch.__version__.startswith("0."), reason="snnTorch before 1.0 reads no recurrent neurons")
def test_snntorchs_importer_runs_skips_and_loops_with_the_same_spikes():
    """It has no delays, and leaves a bias in a loop out of the first step."""
    net = with_other_weights(chain(Projection("input", "b", joined(INPUTS, 7, 4))))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it scales the threshold
        theirs = import_from_nir(to_nir(net))
    state, trains = None, []
    with torch.no_grad():
        for x_t in SAMPLES:
            spikes, state = theirs(x_t, state)
            trains.append(spikes)
    assert torch.equal(torch.stack(trains), spikes_of(net)[-1])
    with pytest.raises(ValueError, match="Delay"):
        import_from_nir(to_nir(feedback()))


def test_synaptic_neurons_and_neurons_without_leak_may_be_in_one_graph(tmp_path, caplog):
    net = graph_of(
        Projection("input", "a", joined(INPUTS, 12, 1)),
        Projection("a", "b", joined(12, 9, 2), delay=2),
        Projection("b", "a", joined(9, 12, 3), delay=1),
        a=Synaptic(syn_decay=0.5, **LEAK),
        b=LIF(learn_beta=False, **{**LEAK, "beta": 1.0}),
    )
    nir.write(tmp_path / "net.nir", to_nir(net))
    back = from_nir(nir.read(tmp_path / "net.nir"), T=STEPS)
    assert "a: after a spike NIR's CubaLIF charges from zero" in caplog.text
    assert all(map(torch.equal, spikes_of(back), spikes_of(net)))


def lif(size):
    return nir.LIF(tau=np.full(size, 4e-4), r=np.full(size, 4.0), v_leak=np.zeros(size), v_threshold=np.full(size, 0.5))


def linear(out, into, bias=None):
    weight = torch.randn(out, into, generator=seeded(out)).numpy()
    return nir.Linear(weight) if bias is None else nir.Affine(weight, bias)


def two_areas(edges=(), remove=(), **nodes):
    """input → w1 → a → w2 → b → output, with more nodes and edges and without some."""
    ends = nir.Input(input_type={"input": np.array([INPUTS])}), nir.Output(output_type={"output": np.array([6])})
    every = {"in": ends[0], "out": ends[1], "a": lif(8), "b": lif(6), "w1": linear(8, INPUTS), "w2": linear(6, 8)}
    joins = [("in", "w1"), ("w1", "a"), ("a", "w2"), ("w2", "b"), ("b", "out")]
    kept = [edge for edge in joins if edge not in remove]
    return nir.NIRGraph(nodes={**every, **nodes}, edges=[*kept, *edges], type_check=False)


def delayed_by(delay):
    """The areas, their second connection delayed."""
    return two_areas([("a", "d"), ("d", "w2")], [("a", "w2")], d=nir.Delay(np.asarray(delay)))


def test_the_forms_of_a_delay_are_one():
    expected = from_nir(delayed_by(np.full(8, 3 * DT)), T=STEPS)
    assert type(expected) is SpikingNetwork
    assert expected.delays("w2").tolist() == [3] * 8
    projections = [(each.name, each.most, each.per_neuron) for each in expected.projections()]
    assert projections == [("w1", 0, False), ("w2", 3, False)]
    by_both = {"d": nir.Delay(np.full(8, 3 * DT)), "w3": linear(5, 8), "c": lif(5)}
    for graph in (
        delayed_by(3 * DT),  # a number
        delayed_by(np.full(8, 3 * DT, np.float32)),
        delayed_by(np.full((2, 4), 3 * DT)),
        two_areas([("a", "d"), ("d", "w2"), ("d", "w3"), ("w3", "c")], [("a", "w2")], **by_both),  # shared
    ):
        net = from_nir(graph, T=STEPS)
        assert torch.equal(spikes_of(net)[net.populations.index("b")], spikes_of(expected)[1])
    assert type(from_nir(delayed_by(np.zeros(8)), T=STEPS)) is SpikingStack  # a delay of 0 is none
    each = from_nir(delayed_by(np.arange(8) * DT), T=STEPS)
    assert each.w2_delay.tolist() == each.delays("w2").tolist() == list(range(8))


def test_a_loop_has_the_delay_of_its_nodes_or_one_step():
    loop, delayed = [("b", "w"), ("w", "b")], [("b", "d"), ("d", "w"), ("w", "b")]
    one_step = from_nir(two_areas(loop, w=linear(6, 6)), T=STEPS)
    assert type(one_step) is SpikingStack
    flat, cell = nir.Flatten({"input": np.array([6])}, 0), nir.NIRGraph.from_list(lif(6))
    for same in (
        two_areas(delayed, w=linear(6, 6), d=nir.Delay(np.full(6, DT))),
        two_areas([*loop, ("b", "w")], w=linear(6, 6, np.zeros(6))),  # an edge twice
        # the loop around a graph, and with shapes that are changed on the way
        two_areas([("b", "flat"), ("flat", "w"), ("w", "b")], w=linear(6, 6), b=cell, flat=flat),
    ):
        assert torch.equal(spikes_of(from_nir(same, T=STEPS))[1], spikes_of(one_step)[1])
    for bias in (np.zeros(6), np.linspace(-1, 1, 6)):
        stack = from_nir(two_areas(loop, w=linear(6, 6, bias)), T=STEPS)
        assert stack.rec2.bias is None
        assert torch.equal(stack.fc2.bias, torch.from_numpy(bias).float()) if bias.any() else stack.fc2.bias is None
    later = from_nir(two_areas(delayed, w=linear(6, 6), d=nir.Delay(np.full(6, 2 * DT))), T=STEPS)
    assert later.delays("w").tolist() == [2] * 6
    back = [("b", "d"), ("d", "w"), ("w", "a")]
    feedback = from_nir(two_areas(back, w=linear(8, 6), d=nir.Delay(np.full(6, DT))), T=STEPS)
    assert feedback.delays("w").tolist() == [1] * 6
    assert feedback.populations == ("a", "b")


def test_masks_are_given_by_the_names_of_nodes_and_dots_become_modules():
    inner = nir.NIRGraph.from_list(lif(8))
    graph = two_areas([("in", "w3"), ("w3", "b")], a=inner, w3=linear(6, INPUTS))
    kept = torch.rand(6, INPUTS, generator=seeded(2)) < 0.3
    net = from_nir(graph, masks={"w3": kept}, T=STEPS)
    assert net.populations == ("a_lif", "b")
    assert torch.equal(net.w3.mask.to_dense(), kept)
    with pytest.raises(ValueError, match="masks names w4, the graph w1, w2, w3"):
        from_nir(graph, masks={"w4": kept}, T=STEPS)
    with pytest.raises(ValueError, match="masks is a list; give a dict of masks by the name of their node"):
        from_nir(graph, masks=[kept], T=STEPS)
    with pytest.raises(ValueError, match=r"nodes a\.lif and another are both called 'a_lif' here; rename one"):
        from_nir(two_areas([("in", "a_lif"), ("a_lif", "b")], a=inner, a_lif=linear(6, INPUTS)), T=STEPS)
    of_stack, kept = to_nir(recurrent()), torch.rand(20, 20, generator=seeded(2)) < 0.3
    stack = from_nir(of_stack, masks={"lif1.w_rec": kept}, T=STEPS)
    assert torch.equal(stack.rec1.mask.to_dense(), kept)
    assert torch.equal(stack.rec2.mask.to_dense(), from_nir(of_stack, T=STEPS).rec2.mask.to_dense())


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (delayed_by([0, 0, 0, 2.5 * DT, 0, 0, 0, 1.5 * DT]),
         r"node d delays neuron 3 by 2.5 steps of dt=0.0001 s; delays are whole .*, or give the dt"),
        (delayed_by([0, 0, 0, -DT, 0, 0, 0, 0]), "node d: delay=-0.0001 must be"),
        (delayed_by(np.full(8, 7.0)), "the delays of a → b must be from 0 to 65535 steps; these are 70000"),
        (two_areas([("w2", "d"), ("d", "b")], [("w2", "b")], d=nir.Delay(np.ones(6))),
         "node w2 leads to d, a Delay; a linear node joins neurons .or the input., perhaps behind one Delay, to neu"),
        (two_areas([("a", "d"), ("d", "e"), ("e", "w2")], [("a", "w2")], d=LATER, e=LATER),
         "node e receives from d, a Delay; a linear node joins"),
        (two_areas([("b", "w"), ("w", "a")], w=linear(8, 6)), "a → b → a is a cycle without delay; give one of its"),
        (two_areas([("b", "d"), ("d", "w"), ("w", "b")], w=linear(6, 6), d=nir.Delay(np.zeros(6))),
         "b → b is a cycle without delay"),
        (two_areas([("b", "w"), ("w", "w1")], w=linear(INPUTS, 6)),
         "node w1 receives from in, w, where one node is needed; give each pair of populations a linear"),
        (two_areas([("w2", "a")]), "node w2 leads to b, a, where one node is needed"),
        (two_areas([("a", "w"), ("w", "v"), ("v", "b")], w=linear(5, 8), v=linear(6, 5)),
         "node w leads to v, a Linear; a linear node joins neurons"),
        (two_areas([("a", "b")]), "the edge a → b is part of no connection from neurons .or the input. by one Linear"),
        (two_areas([("a", "d"), ("d", "b")], d=nir.Delay(np.ones(8))), "the edge a → d is part of no connection"),
        (two_areas([("a", "out")]), "node out receives from b, a, where one node is needed"),
        (two_areas(w2=nir.Conv1d(1, np.ones((1, 1, 1)), 1, 0, 1, 1, np.zeros(1))),
         "node w2 is a Conv1d; a network takes Affine, Linear, Conv2d, SumPool2d, AvgPool2d, Flatten, Delay, LIF"),
        (two_areas(b=None), "node b is empty: the tool that wrote the graph could not express it"),  # norse's RLIF cell
        (two_areas(w=linear(6, 8)), "node w leads to nothing, where one node is needed"),
        (two_areas(d=nir.Delay(np.ones(8))), "node d receives nothing"),
        (two_areas(c=lif(6)), "node c receives nothing; join it to the input by a Linear or Affine node"),
        (two_areas(w2=nir.Linear(np.ones((6, 8)), metadata={"g2g_name": np.ones(3)})),
         r"'\[1\. 1\. 1\.\]' cannot name a module; give a name without dots"),
        (two_areas([("a", "w"), ("w", "b")], w=linear(6, 7)), "w has 7 inputs, but w1 has 8 outputs"),
        (two_areas([("a", "forward"), ("forward", "b")], forward=linear(6, 8)), "'forward' is already an attribute"),
        (two_areas(a=nir.NIRGraph({"x": IN, "y": IN, "lif": lif(8)}, [("x", "lif"), ("y", "lif")], type_check=False)),
         "the graph a has 2 inputs; a network takes graphs with one"),
    ],
)  # fmt: skip
def test_graphs_that_no_network_has_are_refused_by_name(graph, message):
    with pytest.raises(ValueError, match=message):
        from_nir(graph, T=STEPS)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (torch.nn.Linear(2, 2), "to_nir takes a SpikingNetwork, a SpikingStack or a G2GNet, not a Linear"),
        (graph_of(Projection("input", "v1/l4", joined(INPUTS, 8, 1)), **{"v1/l4": LIF(**LEAK)}),
         "'input_to_v1/l4' cannot be a name in NIR's files"),
        (SpikingNetwork({"a": LIF(**LEAK), "b": LIF(**LEAK)}, chain_ends(), "a", STEPS),
         "b sends to no other population, and NIR takes it for an output"),
        (graph_of(Projection("input", "a", torch.nn.Linear(INPUTS, 8)), a=LIF(**LEAK)),
         "input_to_a is a Linear; only G2GLinear, G2GConv2d, pools and the neurons of g2gnet convert"),
    ],
)  # fmt: skip
def test_networks_that_nir_cannot_carry_are_refused_by_name(net, message):
    with pytest.raises(ValueError, match=message):
        to_nir(net)
