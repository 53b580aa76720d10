"""Models of a GPU: the roofline's arithmetic, by hand for a network of a few units, and the rules by which kernels are
chosen, beside the model of predicted times and for kinds of cards."""

import functools
import types

import pytest
import torch
from helpers import ROOT

pytest.importorskip("triton", minversion="3.3")
from benchmarks import costs, roofline
from benchmarks.launches import Operation, layer_step, product_step, training_step
from g2g_kernels import Neurons, SpikingLayer
from g2g_kernels.ops.g2g_linear import tiles
from g2g_kernels.ops.g2g_linear.triton import units_of
from g2g_kernels.ops.g2g_stack import triton as stack
from g2g_kernels.triton import runtime
from g2g_kernels.triton.runtime import precision_of
from g2gnet import G2GNet

META = torch.device("meta")
#: rules are simple: where both ways take about as long, they may take the other one
SLACK = 1.35
LAYERS = {"units of 64": (64, 0.15), "units of 64, 60 %": (64, 0.6), "units of 16": (16, 0.15), "full": (64, 1.0)}
T, B, IN, H, OUT = 3, 5, 32, 64, 4


def units_in_pairs(net: G2GNet, batch: int, inputs: int, dtype: torch.dtype) -> list[Operation]:
    """A training step in one way of many, whichever is faster on a card; other ways pay at larger sizes."""
    with runtime.assuming(fused=False, dense=False):
        return training_step(net, batch, inputs, dtype)


@pytest.fixture(scope="module")
def operations() -> list[Operation]:
    """Of layers of two groups that nothing joins: half of the units, of 16 × 16 (fc3: 2 × 16) weights each."""
    net = G2GNet(IN, H, OUT, "index", p_inter=0.0, block_size=16, T=T, num_groups=2)
    assert [tuple(c.values.shape) for c, _ in net.layers()] == [(4, 16, 16), (8, 16, 16), (4, 2, 16)]
    return units_in_pairs(net, B, IN, torch.bfloat16)


def named(operations, phase: str, name: str) -> list[Operation]:
    return [operation for operation in operations if (operation.phase, operation.name) == (phase, name)]


def test_products_by_hand(operations):
    """2 FLOP a weight and sample; samples, weights, currents or gradients, and the graph's int32 indices."""
    first, second, third = named(operations, "forward", "product_kernel")
    ptr_slots_columns = (2 * 2 + 1 + 4 + 4) * 4, (4 + 1 + 8 + 8) * 4
    assert first.flop == 2 * B * 4 * 256  # a held input: once, not T times
    assert first.bytes == 4 * B * IN + 2 * 4 * 256 + ptr_slots_columns[0] + 4 * H + 4 * B * H
    assert second.flop == 2 * T * B * 8 * 256
    # spikes are bytes, weights and currents bfloat16, the bias float32
    assert second.bytes == T * B * H + 2 * 8 * 256 + ptr_slots_columns[1] + 4 * H + 2 * T * B * H
    assert third.flop == 2 * T * B * 4 * 32
    third, second = named(operations, "backward", "product_kernel")  # the input gradients; layer 1 needs none
    assert second.flop == 2 * T * B * 8 * 256
    assert second.bytes == 2 * T * B * H + 2 * 8 * 256 + ptr_slots_columns[1] + 2 * T * B * H
    gradients = [gradient.flop for gradient in named(operations, "backward", "weight_gradient_kernel")]
    assert gradients == [2 * T * B * 4 * 32, 2 * T * B * 8 * 256, 2 * B * 4 * 256]


def test_the_default_floor_is_what_the_results_say_and_meets_the_aim(capsys):
    """`benchmarks/results/roofline.md` is this program's output, and 0.30 ms on an H100 was the aim."""
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "benchmarks/results/roofline.md").read_text()
    floor = float(printed.split("\n")[0].removeprefix("# Floor of a training step: ").removesuffix(" ms"))
    assert 0.1 < floor <= 0.30
    for flag, value, why in (("batch_size", "0", "0 must be a whole number"), ("p_inter", "2", "2.0 must be a number")):
        assert roofline.main([f"--{flag}", value]) == 2
        assert f"{flag}={why}" in capsys.readouterr().err


@functools.cache
def layer_and_units(layer: str, name: str = "fc2"):
    """A connection of a network with 2048 neurons, that layer, and its units."""
    block_size, p_inter = LAYERS[layer]
    net = roofline.network(block_size=block_size, p_inter=p_inter).to("meta")
    connection = getattr(net, name)
    spiking = SpikingLayer(connection.values, connection.mask, connection.bias, net.lif2.population)
    return connection, spiking, units_of(connection.mask.tensors(), connection.values)


def microseconds(operations: list[Operation], card: str) -> float:
    return 1e6 * sum(costs.seconds(operation.work, costs.CARDS[card]) for operation in operations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("layer", "name"), [*((layer, "fc2") for layer in LAYERS), ("units of 64", "fc3")])
def test_the_dense_product_is_taken_where_it_is_predicted_to_be_faster(layer, name, dtype):
    """Each product by itself: forward, input gradient, weight gradient."""
    connection, _, units = layer_and_units(layer, name)
    for card in costs.CARDS:
        for samples in (400, 12_800):
            x = torch.empty(samples, 2048, dtype=dtype, device="meta")
            with runtime.assuming(architecture=costs.CARDS[card].architecture):
                for way, outer in (("forward", units.rows), ("to x", units.cols), ("to weights", units.rows)):
                    wanted, times = (way == "to x", way == "to weights", False), {}
                    for dense in (False, True):
                        with runtime.assuming(dense=dense):
                            recorded = product_step(connection, samples, dtype, wanted)
                        phase = "forward" if way == "forward" else "backward"
                        times[dense] = microseconds([each for each in recorded if each.phase == phase], card)
                    chosen = tiles.dense_pays(units, x, outer, dtype)
                    assert times[chosen] <= SLACK * min(times.values()), (card, samples, way, times)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_fused_where_that_is_predicted_to_be_faster(layer):
    _, spiking, units = layer_and_units(layer)
    for card in costs.CARDS:
        with runtime.assuming(architecture=costs.CARDS[card].architecture):
            for batch in (128, 256, 512, 1024):
                given = units, spiking.population, batch, torch.uint8, torch.bfloat16
                with runtime.assuming(fused=True):
                    can = stack.fused_pays(*given)
                if can:
                    ways = {way: layer_step(spiking, 50, batch, torch.bfloat16, way) for way in (True, False)}
                    times = {way: microseconds(alone(operations), card) for way, operations in ways.items()}
                    assert times[stack.fused_pays(*given)] <= SLACK * min(times.values()), (card, batch, times)


def alone(operations: list[Operation]) -> list[Operation]:
    """Without the weight gradient, by units or dense, which is that of the pair's way."""
    forward = [each for each in operations if each.phase == "forward"]
    neurons = [each for each in operations if each.phase == "backward" and each.name.endswith("backward_kernel")]
    return [*forward, neurons[0]]


def test_what_is_never_fused_and_what_stays_on_chip():
    """Margins say nothing of other states than the membrane; floats and 32 bits have no kernel. Nine units of 64 and
    two steps of their spikes take 144 KB: on an H100, not where factors are registers, too."""
    _, _, units = layer_and_units("units of 64")
    spikes, bf16, fp32 = torch.uint8, torch.bfloat16, torch.float32
    assert stack.fused_pays(units, Neurons("lif", ()), 256, spikes, bf16)
    with runtime.assuming(fused=True):
        for model, x, products in (("synaptic", spikes, bf16), ("lif", bf16, bf16), ("lif", spikes, fp32)):
            assert not stack.fused_pays(units, Neurons(model, ()), 256, x, products)
    on_chip = [stack.units_on_chip(units, *factors) for factors in ((spikes, bf16), (spikes, fp32), (bf16, bf16))]
    assert on_chip == [9, 0, 0]
    assert stack.units_on_chip(layer_and_units("full")[2], spikes, bf16) == 0
    for architecture in ("sm_80", "sm_89", "gfx942"):
        with runtime.assuming(architecture=architecture):
            assert stack.units_on_chip(units, spikes, bf16) == 0


def test_a_card_for_graphics_is_no_small_h100(monkeypatch):
    """Its tensor cores multiply bfloat16 two to four times as fast as its ordinary cores float32: parts take six or
    three times as many, and L2 gives small tiles what they need."""
    _, _, units = layer_and_units("units of 16")
    x = torch.empty(12_800, 2048, dtype=torch.uint8, device="meta")
    found = {}
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"):
        major, minor = divmod(int(architecture[3:]), 10)
        of = types.SimpleNamespace(major=major, minor=minor, multi_processor_count=7, shared_memory_per_block_optin=9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, of=of: of)
        card = runtime._card_of.__wrapped__(0)
        assert card == runtime.Card(architecture, 7, 9)
        monkeypatch.setattr(runtime, "card_of", lambda device, card=card: card)
        dense = tiles.dense_pays(units, x, units.rows, torch.bfloat16)
        found[architecture] = precision_of(torch.float32, META), dense
    graphics = dict.fromkeys(("sm_86", "sm_89", "sm_120"), ("ieee", False))
    assert found == {"sm_80": ("parts", False), "sm_90": ("parts", True), **graphics}


def test_what_tiles_read_from_l2_by_hand():
    net = G2GNet(64, 256, 4, "index", p_inter=0.0, block_size=64, T=2, num_groups=2)
    assert tuple(net.fc2.values.shape) == (8, 64, 64)
    bf16, fp32 = (units_in_pairs(net, 128, 64, dtype) for dtype in (torch.bfloat16, torch.float32))
    product, by_parts = (named(operations, "forward", "product_kernel")[1] for operations in (bf16, fp32))
    # 256 samples are four tiles of 64: for each and each unit 64 × 64 spikes in bytes, 64 × 64 weights of two
    assert product.work.l2_bytes == 4 * 8 * (64 * 64 + 2 * 64 * 64)
    assert by_parts.work.l2_bytes == 4 * 8 * (64 * 64 + 6 * 64 * 64)
    assert product.work.flop == product.flop == by_parts.flop == by_parts.work.flop / 3
    gradient = named(bf16, "backward", "weight_gradient_kernel")[1]
    # 8 units in groups of 2, and in each of 4 rows a quarter of a group that is not full; 256 samples
    assert gradient.work.l2_bytes == (4 + 1) * 256 * (2 * 64 + 128)


def test_a_kernel_takes_the_longest_of_its_times_and_more_where_programs_do_not_fill_the_card():
    copy = Operation("forward", "copy", {"input": torch.empty(500), "output": torch.empty(500)}, 0)
    product = Operation("forward", "mm", {"x": torch.empty(250)}, 8_000_000)
    slow_l2, fast_l2 = (
        costs.Card("sm_90", {"bf16": 1e9, "fp32": 1e9}, 1e6, rate, 10, "imagined") for rate in (1e6, 1e9)
    )
    longest = ((copy, fast_l2, 4000 / 0.85e6), (copy, slow_l2, 4000 / 0.8e6), (product, fast_l2, 8e6 / 0.8e9))
    for operation, card, taken in longest:
        assert costs.seconds(operation.work, card) == pytest.approx(taken + costs.ASSUMED["start of a kernel, s"])
    for programs, warps, multiprocessors, times in (
        (0, 4, 108, 1),  # PyTorch's own kernels
        (128, 8, 108, 2 / (128 / 108)),  # 1.19 waves: 59 % of an A100
        (132, 8, 132, 1),
        (66, 8, 132, 2),  # half of the multiprocessors
        (132, 4, 132, 2),  # half of the warps that hide latency
        (264, 4, 132, 1),
    ):
        assert costs.waiting(programs, warps, multiprocessors) == pytest.approx(times)
