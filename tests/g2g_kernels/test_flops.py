"""What PyTorch's FLOP counter says of sparse layers: two for each weight that exists and each sample that it meets."""

import pytest
import torch
from helpers import chained, seeded
from networks import small_net
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from g2g_kernels import BlockMask, GroupLayout, available_backends, g2g_linear, g2g_stack
from g2g_kernels import register_flop_formulas as register
from g2gnet import G2GLinear, sparsify

if "cpu" not in available_backends():
    pytest.skip("backend torch multiplies dense weights, and PyTorch counts that", allow_module_level=True)

STEPS, BATCH = 6, 5
register()


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def weights(layer):
    return int(layer.mask.to_dense().sum())


def test_a_layer_counts_its_weights_forward_and_in_both_gradients():
    mask = BlockMask.sample(GroupLayout(45, 4), GroupLayout(70, 4), block_size=8, generator=seeded(0))
    assert mask.num_units * mask.unit_shape[0] * mask.unit_shape[1] > mask.to_dense().sum(), "units are padded"
    layer, x = G2GLinear(mask), torch.randn(3, BATCH, 70, requires_grad=True)
    product = 2 * 3 * BATCH * weights(layer)
    assert counted(lambda: layer(x)) == product
    assert counted(lambda: layer(x).sum().backward()) == 3 * product
    assert counted(lambda: layer(x.detach()).sum().backward()) == 2 * product
    layer.requires_grad_(False)
    assert counted(lambda: layer(x).sum().backward()) == 2 * product


def in_one_call(net):
    """The network without its modules, which are called where something counts each of them, as the counter does."""
    of = enumerate(net.layers())
    layers = [chained(k, each.values, each.mask, each.bias, neurons.population) for k, (each, neurons) in of]
    return lambda x: g2g_stack(x, layers, STEPS if x.dim() == 2 else None).counts


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("of", [in_one_call, lambda net: net], ids=["in one call", "layer by layer"])
def test_a_network_counts_the_product_of_a_held_input_once(of, held):
    net = small_net(T=STEPS)
    run = of(net)
    x = torch.rand(BATCH, 30) if held else torch.rand(STEPS, BATCH, 30)
    first, *rest = (2 * BATCH * STEPS * weights(layer) for layer, _ in net.layers())
    first //= STEPS if held else 1
    assert counted(lambda: run(x)) == first + sum(rest)
    assert counted(lambda: run(x).sum().backward()) == 2 * first + 3 * sum(rest)
    x.requires_grad_()
    assert counted(lambda: run(x).sum().backward()) == 3 * first + 3 * sum(rest)
    # the counter tells the layers of a network apart
    with FlopCounterMode(display=False) as counter:
        net(torch.rand(STEPS, BATCH, 30))
    for number, (layer, _) in enumerate(net.layers(), 1):
        assert sum(counter.get_flop_counts()[f"G2GNet.fc{number}"].values()) == 2 * BATCH * STEPS * weights(layer)


def test_a_model_made_sparse_counts_its_density_of_what_it_did():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))
    x = torch.rand(BATCH, 64)
    dense = counted(lambda: model(x))
    sparsify(model, 0.5, block_size=4)
    assert counted(lambda: model(x)) == dense * (1 / 8 + 7 / 8 * 0.5)


def test_tensors_without_data_are_counted_with_the_padding():
    mask = BlockMask.full(GroupLayout(15, 1), GroupLayout(16, 1), 8)
    values = torch.rand(mask.num_units, 8, 8)
    with FakeTensorMode() as mode:
        mask, values = mask._apply(mode.from_tensor), mode.from_tensor(values)
        assert counted(lambda: g2g_linear(torch.rand(BATCH, 16), values, mask)) == 2 * BATCH * 16 * 16


def test_counters_include_the_operators_once_that_is_asked_for(monkeypatch):
    """In this file it is; ``test_imports.py`` tests that no import does."""
    others = {name: formula for name, formula in flop_counter.flop_registry.items() if not str(name).startswith("g2g.")}
    monkeypatch.setattr(flop_counter, "flop_registry", others)
    layer, found = G2GLinear(BlockMask.full(GroupLayout(16), GroupLayout(8))), []
    for _ in range(3):
        found.append(counted(lambda: layer(torch.rand(BATCH, 8))))
        register()
    assert found == [0, 2 * BATCH * 16 * 8, 2 * BATCH * 16 * 8]
