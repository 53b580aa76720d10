"""Graphs as other simulators write them, read by ours, and ours read by them: the same spikes, where a graph says all
of a neuron."""

import nir
import norse.torch as norse
import pytest
import snntorch
import torch
from snntorch.export_nir import export_to_nir
from snntorch.import_nir import import_from_nir
from torch import nn

from g2gnet import G2GNet
from g2gnet.interop import from_nir, to_nir

STEPS, BATCH = 20, 4
X = torch.rand(STEPS, BATCH, 30, generator=torch.Generator().manual_seed(0)) * 3


def linears():
    return nn.Linear(30, 40), nn.Linear(40, 10)


def assert_the_same_spikes(stack, spikes):
    ours = stack.simulate(X).spikes[-1].dense()
    assert torch.equal(ours, spikes.detach())
    assert 0 < ours.sum() < ours.numel()


@pytest.mark.parametrize("nested", [False, True])
def test_norses_integrate_and_fire_boxes(nested):
    first, second = linears()
    cells = [norse.LIFBoxCell(norse.LIFBoxParameters(v_th=torch.as_tensor(0.2))) for _ in range(2)]
    inner = norse.SequentialState(first, cells[0])
    network = norse.SequentialState(*([inner] if nested else [first, cells[0]]), second, cells[1])
    state, train = None, []
    with torch.no_grad():
        for x_t in X:
            spikes, state = network(x_t, state)
            train.append(spikes)
    # norse writes dt/τ⁻¹ for τ, so that the step that belongs to its graph is dt²
    stack = from_nir(norse.to_nir(network, X[0, :1]), dt=1e-6, T=STEPS)
    assert stack.lif1.beta.item() == pytest.approx(0.9)
    assert_the_same_spikes(stack, torch.stack(train))


def test_norses_neurons_with_a_synaptic_current_are_read_and_recurrent_cells_without_a_form_in_nir_are_named():
    network = norse.SequentialState(nn.Linear(30, 40), norse.LIFCell())
    stack = from_nir(norse.to_nir(network, X[0, :1]), dt=1e-6, T=STEPS)
    assert stack.lif1.beta.item() == pytest.approx(0.9)  # 1 − 1 ms/10 ms
    assert stack.lif1.syn_decay.item() == pytest.approx(0.8)  # 1 − 1 ms/5 ms
    network = norse.SequentialState(nn.Linear(30, 40), norse.LIFRecurrentCell(40, 40))
    with pytest.raises(ValueError, match="node 1 is empty: the tool that wrote the graph could not express it in NIR"):
        from_nir(norse.to_nir(network, X[0, :1]), dt=1e-6, T=STEPS)


@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_snntorchs_neurons(kind):
    first, second = linears()
    own = {"beta": 0.9, "threshold": 0.5} | ({"alpha": 0.7} if kind == "Synaptic" else {})
    neurons = []
    for size in (40, 10):
        per_neuron = {name: torch.full((size,), value) for name, value in own.items()}
        neurons.append(getattr(snntorch, kind)(init_hidden=True, reset_mechanism="zero", **per_neuron))
    network = nn.Sequential(first, neurons[0], second, neurons[1])
    stack = from_nir(export_to_nir(network, torch.rand(30)), T=STEPS)
    for layer in neurons:
        layer.reset_mem()
    with torch.no_grad():
        spikes = torch.stack([network(x_t) for x_t in X])
    assert_the_same_spikes(stack, spikes)


def test_sinabs_integrate_and_fire_neurons():
    """Its graphs do not say how neurons reset and how often they spike: as ours do, if they are told to."""
    layers, writer = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.nir")
    activation = pytest.importorskip("sinabs.activation")
    first, second = linears()
    options = {"reset_fn": activation.MembraneReset(), "spike_fn": activation.SingleSpike}
    neurons = [layers.IAF(spike_threshold=torch.tensor(threshold), **options) for threshold in (2.0, 0.5)]
    network = nn.Sequential(first, neurons[0], second, neurons[1])
    samples = X.transpose(0, 1).contiguous()  # [B, T, ...] there
    stack = from_nir(writer.to_nir(network, samples), dt=1.0, T=STEPS)
    for layer in neurons:
        layer.reset_states()
    with torch.no_grad():
        spikes = network(samples).transpose(0, 1)
    assert_the_same_spikes(stack, spikes)


def test_sinabs_leaky_neurons_are_read():
    layers, writer = pytest.importorskip("sinabs.layers"), pytest.importorskip("sinabs.nir")
    network = nn.Sequential(nn.Linear(30, 40), layers.LIF(tau_mem=20.0, spike_threshold=torch.tensor(0.5)))
    stack = from_nir(writer.to_nir(network, torch.rand(1, STEPS, 30)), dt=1.0, T=STEPS)
    assert stack.lif1.beta.item() == pytest.approx(0.95)  # exp(−1/20) in sinabs
    assert stack.lif1.threshold.item() == pytest.approx(0.5 * 20)
    assert torch.equal(stack.fc1.dense_weight(), network[0].weight)


@pytest.mark.parametrize("tool", ["norse", "snntorch"])
@pytest.mark.parametrize("written", [False, True])
def test_recurrent_networks_of_ours_are_run_by_others(tool, written, tmp_path):
    options = {"recurrent": True, "reset": "zero", "threshold": 0.5, "block_size": 4}
    net = G2GNet(30, 40, 10, T=STEPS, generator=torch.Generator().manual_seed(0), **options)
    graph = to_nir(net)
    if written:
        order = list(graph.nodes)
        nir.write(tmp_path / "net.nir", graph)
        graph = nir.read(tmp_path / "net.nir")  # in the order of the alphabet, which snnTorch's importer cannot read
        graph.nodes = {name: graph.nodes[name] for name in order}
    network = norse.from_nir(graph, dt=1e-4) if tool == "norse" else import_from_nir(graph)
    state, train = None, []
    with torch.no_grad():
        for x_t in X:
            spikes, state = network(x_t, state)
            train.append(spikes)
    assert_the_same_spikes(net, torch.stack(train))
