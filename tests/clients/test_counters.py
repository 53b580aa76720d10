"""What tools that count say of a sparse network, and optimizers that cannot train packed weights."""

import pandas
import ptflops
import pytest
import thop
import torch
import torchinfo
from torch import nn

from g2g_kernels import BlockMask, GroupLayout
from g2gnet import G2GLinear, G2GNet


def test_torchinfo_shows_the_parameters_that_exist():
    net = G2GNet(784, 256, 10, block_size=16, T=10)
    summary = torchinfo.summary(net, (32, 784), verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in net.parameters())
    # its products follow from parameters named weight and bias, of which there are only biases; the page says so
    assert summary.total_mult_adds < 1e6


def test_ptflops_and_thop_count_the_weights_that_exist_with_the_functions_of_the_page():
    mask = BlockMask.sample(GroupLayout(64), GroupLayout(80), block_size=8)
    model, weights = nn.Sequential(G2GLinear(mask), nn.Linear(64, 10)), int(mask.to_dense().sum())

    def for_ptflops(layer, inputs, output):
        layer.__flops__ += output[..., 0].numel() * layer.mask.num_weights

    def for_thop(layer, inputs, output):
        layer.total_ops += output[..., 0].numel() * layer.mask.num_weights

    def by_ptflops(hooks):
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
        return ptflops.get_model_complexity_info(model, (80,), custom_modules_hooks=hooks, **options)[0]

    def by_thop(operations):
        return thop.profile(model, (torch.rand(3, 80),), custom_ops=operations, verbose=False)[0]

    assert by_ptflops({G2GLinear: for_ptflops}) - by_ptflops({}) == weights
    assert by_thop({G2GLinear: for_thop}) - by_thop({}) == 3 * weights


def test_the_edges_are_a_data_frame():
    layer = G2GLinear(BlockMask.sample(GroupLayout(64), GroupLayout(80), block_size=8))
    frame = layer.mask.edges(layer.values).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame) == ["source", "target", "source_group", "target_group", "weight"]
    assert list(layer.mask.edges().to_frame()) == ["source", "target", "source_group", "target_group"]
    assert frame.groupby("target").size().tolist() == layer.mask.fan_in().tolist()


def test_muon_refuses_packed_weights_by_their_size():
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon(G2GNet(784, 256, 10).parameters())
