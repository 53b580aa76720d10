"""Libraries that hang something on the layers of a network: what they see is what the network does."""

import pytest
import torch
from captum.attr import LayerActivation, LayerConductance, LayerGradientXActivation
from neurobench.benchmarks import Benchmark
from neurobench.metrics.workload import ActivationSparsity, ActivationSparsityByLayer, SynapticOperations
from neurobench.models import SNNTorchModel, TorchModel
from snntorch import utils
from spikingjelly.activation_based import monitor
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from g2gnet import LIF, G2GLinear, G2GNet
from g2gnet.interop import to_snntorch

STEPS = 7
INPUTS = torch.rand(STEPS, 12, 30, generator=torch.Generator().manual_seed(1)) * 3
LABELS = torch.arange(12) % 10


def net_of(**options):
    generator = torch.Generator().manual_seed(0)
    return G2GNet(30, 40, 10, "mixer", block_size=4, T=STEPS, threshold=0.5, generator=generator, **options)


def benchmark(model, metrics, inputs):
    batches = DataLoader(TensorDataset(inputs, LABELS), batch_size=5)
    return Benchmark(model, batches, [], [], [[], metrics]).run(quiet=True)


@pytest.mark.parametrize("recurrent", [False, True])
def test_neurobench_counts_our_operations_of_a_network_in_snntorchs_form(recurrent):
    net = net_of(recurrent=recurrent)

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = to_snntorch(net)
            for layer in self.layers.modules():
                if isinstance(layer, nn.Linear) and prune.is_pruned(layer):
                    prune.remove(layer, "weight")

        def forward(self, x):
            return self.layers(x), None

        def reset(self):
            utils.reset(self.layers)

    found = benchmark(SNNTorchModel(Theirs()), [ActivationSparsity, SynapticOperations], INPUTS.transpose(0, 1))
    # by hand: every spike of a hidden neuron reaches the weights of its column (in the last step, no recurrent ones)
    activity = net.simulate(INPUTS)
    spikes = [train.dense() for train in activity.spikes]
    sent = [(spikes[0], net.fc2), (spikes[1], net.fc3)]
    if recurrent:
        sent += [(spikes[0][:-1], net.rec1), (spikes[1][:-1], net.rec2)]
    operations = sum((train.sum((0, 1)) * layer.mask.to_dense().sum(0)).sum().item() for train, layer in sent)
    assert found["SynapticOperations"]["Effective_ACs"] == operations / 12
    counted = activity.synaptic_operations()
    assert sum(layer.accumulates for layer in counted) == operations
    assert sum(layer.dense for layer in counted) / 12 == found["SynapticOperations"]["Dense"]
    assert found["ActivationSparsity"] == pytest.approx(1 - torch.cat(spikes, 2).mean().item())
    assert operations > 0


def test_neurobench_alone_sees_the_activity_of_a_network_that_is_no_model_of_its_own():
    net = net_of()
    model = TorchModel(net)
    model.add_activation_module(LIF)
    results = benchmark(model, [ActivationSparsity, ActivationSparsityByLayer], INPUTS[0])
    expected = [1 - rates.mean().item() for rates in net.simulate(INPUTS[0]).rates]
    assert list(results["ActivationSparsityByLayer"].values()) == pytest.approx(expected)


def test_spikingjellys_monitors_record_every_layer():
    net = net_of()
    spikes, inputs = monitor.OutputMonitor(net, LIF), monitor.InputMonitor(net, G2GLinear)
    gradients = monitor.GradOutputMonitor(net, LIF)
    net(INPUTS).square().sum().backward()
    activity = net.simulate(INPUTS)
    trains = [train.dense() for train in activity.spikes]
    assert spikes.monitored_layers == ["lif1", "lif2", "lif3"]
    assert all(map(torch.equal, spikes.records[:3], trains))
    assert all(map(torch.equal, inputs.records[:3], [INPUTS, *trains[:2]]))
    assert [gradient.shape[-1] for gradient in gradients.records] == [10, 40, 40]
    assert torch.equal(gradients.records[0], (2 * activity.counts).expand(STEPS, 12, 10))


class SampleFirst(nn.Module):
    """Neurons whose spikes pass ``spikes`` as [B, T, N], as captum's methods for layers ask for it."""

    def __init__(self, neurons):
        super().__init__()
        self.neurons, self.spikes = neurons, nn.Identity()

    def forward(self, current):
        return self.spikes(self.neurons(current).transpose(0, 1)).transpose(0, 1)


def test_captums_methods_for_layers():
    net, x = net_of(), INPUTS[0]
    train = net.simulate(x, spikes=True).spikes[1].dense()
    assert torch.equal(LayerActivation(net, net.lif2).attribute(x), train)
    product = LayerGradientXActivation(net, net.lif2).attribute(x, target=3)
    activity = net.simulate(x, spikes=True)
    train = activity.spikes[1].dense()
    (gradient,) = torch.autograd.grad(activity.counts[:, 3].sum(), train)
    torch.testing.assert_close(product, gradient * train, rtol=1e-3, atol=1e-5)
    assert product.any()
    net.lif2 = SampleFirst(net.lif2)
    conductance = LayerConductance(net, net.lif2.spikes).attribute(x, target=3, n_steps=4)
    assert conductance.shape == (12, STEPS, 40)
    alone = LayerConductance(net, net.lif2.spikes).attribute(x[2:3], target=3, n_steps=4)
    torch.testing.assert_close(conductance[2:3], alone, rtol=1e-3, atol=1e-5)


def test_fully_shard_of_every_layer_trains_like_the_plain_network():
    """In a process group of one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = net_of(), net_of()
        mesh = init_device_mesh("cpu", (1,))
        for layer in sharded.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses = {}
        for name, net in (("plain", plain), ("sharded", sharded)):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
            losses[name] = []
            for _ in range(3):
                loss = nn.functional.cross_entropy(net(INPUTS), LABELS)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
        assert losses["sharded"] == pytest.approx(losses["plain"], rel=1e-3)
        assert losses["plain"][-1] < losses["plain"][0]
    finally:
        torch.distributed.destroy_process_group()
