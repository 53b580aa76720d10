"""The rules by which kernels are chosen, beside the model of predicted times, and what they say of kinds of cards."""

import functools
import types

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")
from benchmarks import costs
from benchmarks.launches import Operation, layer_step, product_step
from benchmarks.roofline import network
from g2g_kernels import Neurons, SpikingLayer
from g2g_kernels.ops.g2g_linear import tiles
from g2g_kernels.ops.g2g_linear.triton import units_of
from g2g_kernels.ops.g2g_stack import triton as stack
from g2g_kernels.triton import runtime
from g2g_kernels.triton.products import precision_of

META = torch.device("meta")
#: rules are simple: where both ways take about as long, they may take the other one
SLACK = 1.35
LAYERS = {"units of 64": (64, 0.15), "units of 64, 60 %": (64, 0.6), "units of 16": (16, 0.15), "full": (64, 1.0)}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@functools.cache
def hidden(layer: str):
    """The second layer of a network with 2048 neurons."""
    block_size, p_inter = LAYERS[layer]
    return network(block_size=block_size, p_inter=p_inter).to("meta")


def units_and_layer(layer: str):
    net = hidden(layer)
    spiking = SpikingLayer(net.fc2.values, net.fc2.mask, net.fc2.bias, net.lif2.population)
    return units_of(net.fc2.mask.tensors(), net.fc2.values), spiking


def microseconds(operations: list[Operation], card: str) -> float:
    return 1e6 * sum(costs.seconds(operation.work, costs.CARDS[card]) for operation in operations)


@every_dtype
@pytest.mark.parametrize(("layer", "name"), [*((layer, "fc2") for layer in LAYERS), ("units of 64", "fc3")])
def test_the_dense_product_is_taken_where_it_is_predicted_to_be_faster(layer, name, dtype):
    """Each product by itself: forward, input gradient, weight gradient."""
    connection = getattr(hidden(layer), name)
    units = units_of(connection.mask.tensors(), connection.values)
    for card in costs.CARDS:
        for samples in (400, 12_800):
            x = torch.empty(samples, 2048, dtype=dtype, device="meta")
            with runtime.assumed(costs.CARDS[card].architecture):
                precision = precision_of(dtype, META)
                for way, outer in (("forward", units.rows), ("to x", units.cols), ("to weights", units.rows)):
                    wanted = (way == "to x", way == "to weights", False)
                    times = {}
                    for dense in (False, True):
                        with tiles.choose(dense):
                            recorded = product_step(connection, samples, dtype, wanted)
                        phase = "forward" if way == "forward" else "backward"
                        times[dense] = microseconds([each for each in recorded if each.phase == phase], card)
                    chosen = units.dense_pays(x, outer, dtype, precision)
                    assert times[chosen] <= SLACK * min(times.values()), (card, samples, way, times)


@every_layer
def test_layers_are_fused_where_that_is_predicted_to_be_faster(layer):
    units, spiking = units_and_layer(layer)
    for card in costs.CARDS:
        with runtime.assumed(costs.CARDS[card].architecture):
            for batch in (128, 256, 512, 1024):
                given = units, spiking.population, batch, torch.uint8, torch.bfloat16
                with stack.choose(True):
                    can = stack.fused_pays(*given)
                if not can:
                    continue
                fused = layer_step(spiking, 50, batch, torch.bfloat16, True)
                pair = layer_step(spiking, 50, batch, torch.bfloat16, False)
                # the weight gradient is that of the pair's way, so only what the layers do not have in common counts
                times = {True: alone(fused, card), False: alone(pair, card)}
                chosen = stack.fused_pays(*given)
                assert times[chosen] <= SLACK * min(times.values()), (card, batch, times)


def alone(operations: list[Operation], card: str) -> float:
    """Without the weight gradient, by units or dense."""
    backward = [each for each in operations if each.phase == "backward"]
    neurons = next(i for i, each in enumerate(backward) if each.name.endswith("backward_kernel"))
    forward = [each for each in operations if each.phase == "forward"]
    return microseconds([*forward, backward[neurons]], card)


def test_what_is_never_fused():
    """Margins say nothing of other states than the membrane; floats and 32 bits have no kernel."""
    units, _ = units_and_layer("units of 64")
    assert stack.fused_pays(units, Neurons("lif", ()), 256, torch.uint8, torch.bfloat16)
    spikes, bf16, fp32 = torch.uint8, torch.bfloat16, torch.float32
    with stack.choose(True):
        for model, x, products in (("synaptic", spikes, bf16), ("lif", bf16, bf16), ("lif", spikes, fp32)):
            assert not stack.fused_pays(units, Neurons(model, ()), 256, x, products)


def test_a_card_for_graphics_is_no_small_h100(monkeypatch):
    """Its tensor cores multiply bfloat16 two to four times as fast as its ordinary cores float32: parts take six or
    three times as many, and L2 gives small tiles what they need."""
    units, _ = units_and_layer("units of 16")
    x = torch.empty(12_800, 2048, dtype=torch.uint8, device="meta")
    found = {}
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"):
        major, minor = divmod(int(architecture[3:]), 10)
        of = types.SimpleNamespace(major=major, minor=minor, multi_processor_count=7, shared_memory_per_block_optin=9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, of=of: of)
        card = runtime._card_of.__wrapped__(0)
        assert card == runtime.Card(architecture, 7, 9)
        monkeypatch.setattr(runtime, "card_of", lambda device, card=card: card)
        dense = units.dense_pays(x, units.rows, torch.bfloat16, "ieee")
        found[architecture] = precision_of(torch.float32, META), dense
    graphics = ("ieee", False)
    assert found == {
        "sm_80": ("parts", False), "sm_86": graphics, "sm_89": graphics, "sm_90": ("parts", True), "sm_120": graphics,
    }  # fmt: skip


# --- the model ----------------------------------------------------------------------------------------------------


def test_waiting_by_hand():
    assert costs.waiting(0, 4, 108) == 1  # PyTorch's own kernels
    assert costs.waiting(128, 8, 108) == pytest.approx(2 / (128 / 108))  # 1.19 waves: 59 % of an A100
    assert costs.waiting(132, 8, 132) == 1
    assert costs.waiting(66, 8, 132) == 2  # half of the multiprocessors
    assert costs.waiting(132, 4, 132) == 2  # half of the warps that hide latency
    assert costs.waiting(264, 4, 132) == 1


def test_weights_stay_on_chip_where_they_fit():
    """Nine units of 64 and two steps of their spikes take 144 KB: on an H100, not where factors are registers, too."""
    units, _ = units_and_layer("units of 64")
    of_spikes = torch.uint8, torch.bfloat16
    assert stack.units_on_chip(units, *of_spikes) == 9
    assert stack.units_on_chip(units, torch.uint8, torch.float32) == 0
    assert stack.units_on_chip(units, torch.bfloat16, torch.bfloat16) == 0
    for architecture in ("sm_80", "sm_89", "gfx942"):
        with runtime.assumed(architecture):
            assert stack.units_on_chip(units, *of_spikes) == 0
    assert stack.units_on_chip(units_and_layer("full")[0], *of_spikes) == 0
