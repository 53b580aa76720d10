"""NeuroBench counts the activation sparsity and synaptic operations of a G2GNet, in snnTorch's form.

Its harness counts what hooks on PyTorch's and snnTorch's own layers see. Its batches are [B, T, D].
"""

import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import SNNTorchModel
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from g2gnet import G2GNet
from g2gnet.interop import to_snntorch

net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10)
theirs = to_snntorch(net)
theirs.lif3.output = True  # the last layer returns its spikes and its state
for layer in (theirs.fc1, theirs.fc2, theirs.fc3):
    prune.remove(layer, "weight")  # absent weights are zeros of the weight from now on
inputs = (torch.rand(64, 10, 784) < 0.2).float()
batches = DataLoader(TensorDataset(inputs, torch.randint(10, (64,))), batch_size=32)
metrics = [[ConnectionSparsity], [ActivationSparsity, SynapticOperations]]
benchmark = Benchmark(SNNTorchModel(theirs), batches, [], [], metrics)
print(benchmark.run(quiet=True))
