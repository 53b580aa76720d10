"""The roofline's arithmetic, by hand for a network of a few units."""

import argparse
import contextlib
from collections.abc import Iterator

import pytest
import torch
from helpers import ROOT

from benchmarks import roofline
from benchmarks.roofline import CARDS, kinds
from g2gnet import G2GNet

pytest.importorskip("triton", minversion="3.3")
from benchmarks.launches import Operation, training_step
from g2g_kernels.ops.g2g_linear import tiles
from g2g_kernels.ops.g2g_stack import triton as stack

T, B, IN, H, OUT = 3, 5, 32, 64, 4


@contextlib.contextmanager
def units_in_pairs() -> Iterator[None]:
    """One way of many, whichever is faster on a card; most sizes here are too small for others to pay."""
    with stack.choose(fused=False), tiles.choose(dense=False):
        yield


def network() -> G2GNet:
    """Layers of two groups that nothing joins: half of the units, of 16 × 16 (fc3: 2 × 16) weights each."""
    return G2GNet(IN, H, OUT, "index", p_inter=0.0, block_size=16, T=T, num_groups=2)


@pytest.fixture(scope="module")
def operations() -> list[Operation]:
    net = network()
    assert [tuple(c.values.shape) for c, _ in net.layers()] == [(4, 16, 16), (8, 16, 16), (4, 2, 16)]
    with units_in_pairs():
        return training_step(net, B, IN, torch.bfloat16)


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
    assert [gradient.flop for gradient in named(operations, "backward", "weight_gradient_kernel")] == [
        2 * T * B * 4 * 32, 2 * T * B * 8 * 256, 2 * B * 4 * 256
    ]  # fmt: skip


def test_every_byte_has_a_kind_shared_memory_counts_once_and_views_not_at_all(operations):
    assert not [operation for operation in operations if operation.name in ("view", "empty", "_unsafe_view")]
    for operation in operations:
        assert sum(kinds(operation).values()) == operation.bytes > 0
    spikes = sum(kinds(operation).get("spikes", 0) for operation in operations)
    # layers 1 and 2: written, read by the next layer, read by its weight gradient; layer 3: written
    assert spikes == T * B * (3 * 2 * H + OUT)


def test_the_default_floor_is_what_the_results_say_and_meets_the_aim(capsys):
    """`benchmarks/results/roofline.md` is this program's output, and 0.30 ms on an H100 was the aim."""
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "benchmarks/results/roofline.md").read_text()
    floor = float(printed.split("\n")[0].removeprefix("# Floor of a training step: ").removesuffix(" ms"))
    assert 0.1 < floor <= 0.30


def test_sizes_precision_and_card_matter():
    defaults = vars(roofline.build_parser().parse_args([]))

    def floor(**changes) -> float:
        return float(roofline.roofline(argparse.Namespace(**defaults | changes)).split(" ms")[0].split()[-1])

    assert floor(precision="fp32") > floor()
    with units_in_pairs():  # cards may take different ways
        assert floor(card="a100") > floor() > floor(card="h200")
    assert floor(batch_size=64) < floor()
    assert set(CARDS) == {"h100", "h200", "a100"}


def test_what_is_out_of_range_is_refused(capsys):
    for flag, value, why in (("batch_size", "0", "0 must be a whole number"), ("p_inter", "2", "2.0 must be a number")):
        assert roofline.main([f"--{flag}", value]) == 2
        assert f"{flag}={why}" in capsys.readouterr().err
