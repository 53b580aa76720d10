"""The conductance of a layer of a G2GNet, by captum, whose methods take samples first where g2g has time first."""

import torch
from captum.attr import LayerConductance
from torch import nn

from g2gnet import G2GNet


class SampleFirst(nn.Module):
    def __init__(self, neurons):
        super().__init__()
        self.neurons, self.spikes = neurons, nn.Identity()

    def forward(self, current):
        return self.spikes(self.neurons(current).transpose(0, 1)).transpose(0, 1)


net = G2GNet(784, 256, 10, model="mixer", block_size=16, T=10)
net.lif2 = SampleFirst(net.lif2)
conductance = LayerConductance(net, net.lif2.spikes)
print(conductance.attribute(torch.rand(8, 784), target=3, n_steps=8).shape)
