"""What tools that count say of a sparse network, and optimizers that cannot train packed weights."""

import pytest
import torch
import torchinfo
from torch.utils.flop_counter import FlopCounterMode

from g2gnet import G2GNet


def net_of(**options):
    return G2GNet(784, 256, 10, block_size=16, T=10, generator=torch.Generator().manual_seed(0), **options)


def test_the_flop_counter_counts_the_weights_that_exist():
    net, x = net_of(), torch.rand(32, 784)
    with FlopCounterMode(display=False) as counter:
        net(x)
    first, *rest = (2 * 32 * int(layer.mask.to_dense().sum()) for layer, _ in net.layers())
    assert counter.get_total_flops() == first + 10 * sum(rest)


def test_torchinfo_shows_the_parameters_that_exist():
    net = net_of()
    summary = torchinfo.summary(net, (32, 784), verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in net.parameters())
    # its products follow from parameters named weight and bias, of which there are only biases; the page says so
    assert summary.total_mult_adds < 1e6


def test_muon_refuses_packed_weights_by_their_size():
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon(net_of().parameters())
