"""NeuroBench's own numbers on a network, and ours."""

import pytest
import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import SNNTorchModel, TorchModel
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from g2gnet import LIF, G2GNet
from g2gnet.interop import to_snntorch

METRICS = [[ConnectionSparsity], [ActivationSparsity, SynapticOperations]]
B, T = 12, 6


def network():
    draw = torch.Generator().manual_seed(0)
    return G2GNet(30, 40, 10, "mixer", block_size=4, T=T, generator=draw).eval()


def by_neurobench(model, inputs):
    data = DataLoader(TensorDataset(inputs, torch.zeros(len(inputs))), batch_size=5)
    return Benchmark(model, data, [], [], METRICS).run(quiet=True)


def check(found, net, activity):
    ours = activity.synaptic_operations()
    assert found["SynapticOperations"] == {
        "Effective_ACs": sum(layer.accumulates for layer in ours) / B,
        "Effective_MACs": sum(layer.multiplies for layer in ours) / B,
        "Dense": sum(layer.dense for layer in ours) / B,
    }
    weights = [connection.mask.num_weights for connection, _ in net.layers()]
    possible = [connection.in_features * connection.out_features for connection, _ in net.layers()]
    assert found["ConnectionSparsity"] == pytest.approx(1 - sum(weights) / sum(possible), abs=1e-4)
    spikes = torch.cat([layer.dense().flatten() for layer in activity.spikes])
    assert found["ActivationSparsity"] == pytest.approx(1 - spikes.mean().item())


def test_its_harness_counts_the_operations_that_we_count():
    net, x = network(), torch.rand(B, T, 30) * 4
    theirs = to_snntorch(net)
    theirs.lif3.output = True
    for layer in theirs:
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
    check(by_neurobench(SNNTorchModel(theirs), x), net, net.simulate(x.transpose(0, 1)))


class Layers(nn.Module):
    """The layers of a network as dense ones, each called over all time steps at once."""

    def __init__(self, net):
        super().__init__()
        self.T = net.T
        for number, (connection, neurons) in enumerate(net.layers(), 1):
            self.add_module(f"fc{number}", connection.to_linear())
            self.add_module(f"lif{number}", neurons)

    def forward(self, x):
        spikes = self.lif1(self.fc1(x), self.T)
        return self.lif3(self.fc3(self.lif2(self.fc2(spikes)))).sum(0)


def test_a_held_current_is_multiplied_once():
    net, x = network(), torch.rand(B, 30) * 4
    model = TorchModel(Layers(net))
    model.add_activation_module(LIF)
    check(by_neurobench(model, x), net, net.simulate(x))
