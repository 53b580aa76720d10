"""NeuroBench counts a G2GNet's activation sparsity and synaptic operations."""

import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from torch.utils.data import DataLoader, TensorDataset

from g2gnet import G2GNet
from g2gnet.interop import to_neurobench

net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10)
batches = DataLoader(TensorDataset(torch.rand(64, 10, 784), torch.randint(10, (64,))), batch_size=32)
benchmark = Benchmark(to_neurobench(net), batches, [], [], [[], [ActivationSparsity, SynapticOperations]])
print(benchmark.run(quiet=True))
