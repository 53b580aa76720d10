"""The ways that kernels are chosen by are those whose predicted times are the least: one model for both."""

import functools

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")
from benchmarks.launches import Operation, layer_step, product_step
from benchmarks.predictions import network, work_of
from g2g_kernels import Neurons, SpikingLayer
from g2g_kernels.ops.g2g_linear import tiles
from g2g_kernels.ops.g2g_linear.triton import units_of
from g2g_kernels.ops.g2g_stack import triton as stack
from g2g_kernels.triton import costs
from g2g_kernels.triton.products import precision_of

META = torch.device("meta")
#: the choice knows the arithmetic and the large tensors; what it leaves out (sums over parts, rates, biases) is less
SLACK = 1.1
LAYERS = {"units of 64": (64, 0.15), "units of 64, 60 %": (64, 0.6), "units of 16": (16, 0.15), "full": (64, 1.0)}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@functools.cache
def hidden(layer: str):
    """The second layer of a network with 2048 neurons."""
    block_size, p_inter = LAYERS[layer]
    return network(block_size=block_size, p_inter=p_inter).to("meta")


def microseconds(operations: list[Operation], card: str) -> float:
    return 1e6 * sum(costs.seconds(work_of(operation), costs.CARDS[card]) for operation in operations)


@every_dtype
@every_layer
def test_the_dense_product_is_taken_where_it_is_predicted_to_be_faster(layer, dtype):
    """Each product by itself: forward, input gradient, weight gradient."""
    connection = hidden(layer).fc2
    shape = units_of(connection.mask.tensors(), connection.values).shape
    for samples in (400, 12_800):
        x = torch.empty(samples, 2048, dtype=dtype, device="meta")
        operations = {}
        for dense in (False, True):
            with tiles.choose(dense):
                recorded = product_step(connection, samples, dtype, (True, False, False))
                operations[dense, "forward"] = [each for each in recorded if each.phase == "forward"]
                operations[dense, "to x"] = [each for each in recorded if each.phase == "backward"]
                recorded = product_step(connection, samples, dtype, (False, True, False))
                operations[dense, "to weights"] = [each for each in recorded if each.phase == "backward"]
        for card in costs.CARDS:
            for way in ("forward", "to x", "to weights"):
                times = {dense: microseconds(operations[dense, way], card) for dense in (False, True)}
                with costs.assumed(card):
                    y = connection.values.dtype if way == "to weights" else dtype
                    chosen = tiles.dense_pays(shape, way, x, y, dtype, precision_of(dtype, META))
                assert times[chosen] <= SLACK * min(times.values()), (card, samples, way, times)
                call = tiles.Call(way, shape, samples, dtype, y, dtype, precision_of(dtype, META), costs.CARDS[card])
                # of few samples, weights that are converted or put in place count too, which the choice leaves out
                for dense, time in times.items() if samples > 400 else ():
                    assert 1e6 * tiles.seconds(call, dense) == pytest.approx(time, rel=SLACK - 1), (card, way, dense)


@every_dtype
@every_layer
def test_layers_are_fused_where_that_is_predicted_to_be_faster(layer, dtype):
    net = hidden(layer)
    spiking = SpikingLayer(net.fc2.values, net.fc2.mask, net.fc2.bias, net.lif2.population)
    units = units_of(net.fc2.mask.tensors(), net.fc2.values)
    for batch in (32, 256, 1024):
        fused = layer_step(spiking, 50, batch, dtype, True, spikes=True)
        pairs = []
        for dense in (False, True):
            with tiles.choose(dense):
                pairs.append(layer_step(spiking, 50, batch, dtype, False, spikes=True))
        for card in costs.CARDS:
            rest = 50, batch, torch.uint8, dtype, META
            with costs.assumed(card):
                chosen = stack.fused_pays(units, net.lif2.population, *rest)
            # the weight gradient is that of the pair's way, so only what the layers do not have in common counts
            times = {True: alone(fused, card), False: min(alone(pair, card) for pair in pairs)}
            assert times[chosen] <= SLACK * min(times.values()), (card, batch, times)


def alone(operations: list[Operation], card: str) -> float:
    """Without the weight gradient, by units or dense."""
    backward = [each for each in operations if each.phase == "backward"]
    neurons = next(i for i, each in enumerate(backward) if each.name.endswith("backward_kernel"))
    forward = [each for each in operations if each.phase == "forward"]
    return microseconds([*forward, backward[neurons]], card)


def test_models_with_more_than_a_membrane_are_never_fused():
    """Margins say nothing of their other states."""
    connection = hidden("units of 64").fc2
    units = units_of(connection.mask.tensors(), connection.values)
    rest = 50, 256, torch.uint8, torch.bfloat16, META
    assert stack.fused_pays(units, Neurons("lif", ()), *rest)
    assert not stack.fused_pays(units, Neurons("synaptic", ()), *rest)


# --- the model ----------------------------------------------------------------------------------------------------


def test_factors_by_hand():
    """Spikes are one part, other numbers three, of which six of nine products count."""
    assert costs.factors(torch.float32, "parts", True) == ("bf16", 3)
    assert costs.factors(torch.float32, "parts", False) == ("bf16", 6)
    assert costs.factors(torch.float32, "tf32", False) == ("tf32", 1)
    assert costs.factors(torch.float32, "ieee", False) == ("fp32", 1)
    assert costs.factors(torch.bfloat16, "ieee", True) == ("bf16", 1)


def test_waiting_by_hand():
    assert costs.waiting(0, 4, 108) == 1  # PyTorch's own kernels
    assert costs.waiting(128, 8, 108) == pytest.approx(2 / (128 / 108))  # 1.19 waves: 59 % of an A100
    assert costs.waiting(132, 8, 132) == 1
    assert costs.waiting(66, 8, 132) == 2  # half of the multiprocessors
    assert costs.waiting(132, 4, 132) == 2  # half of the warps that hide latency
    assert costs.waiting(264, 4, 132) == 1


def test_a_card_that_is_not_known_has_an_h100_s_multiprocessors():
    assert costs.named("NVIDIA A100-SXM4-80GB", 108, 0) is costs.CARDS["a100"]
    other, h100 = costs.named("NVIDIA L4", 66, 99 << 10), costs.CARDS["h100"]
    assert (other.multiprocessors, other.shared_bytes) == (66, 99 << 10)
    assert other.bytes_per_s == h100.bytes_per_s / 2
    assert other.flop_per_s["bf16"] == h100.flop_per_s["bf16"] / 2


def test_weights_stay_on_chip_where_they_fit():
    """Nine units of 64 and two steps of their spikes take 144 KB: on an A100 and an H100, not on a card with 99."""
    connection = hidden("units of 64").fc2
    units = units_of(connection.mask.tensors(), connection.values)
    assert stack.units_on_chip(units, torch.uint8, torch.bfloat16, META) == 9
    assert stack.units_on_chip(units, torch.uint8, torch.float32, META) == 0
    assert stack.units_on_chip(units, torch.bfloat16, torch.bfloat16, META) == 0
    small = costs.named("another", 66, 99 << 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "card_of", lambda device: small)
        assert stack.units_on_chip(units, torch.uint8, torch.bfloat16, META) == 0
    dense = hidden("full").fc2
    assert stack.units_on_chip(units_of(dense.mask.tensors(), dense.values), torch.uint8, torch.bfloat16, META) == 0
