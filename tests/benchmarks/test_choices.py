"""The rules by which kernels are chosen, for kinds of cards."""

import types

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")
from g2g_kernels import Neurons
from g2g_kernels.ops.g2g_linear import tiles
from g2g_kernels.ops.g2g_linear.triton import Units, units_of
from g2g_kernels.ops.g2g_stack import triton as stack
from g2g_kernels.triton import runtime
from g2g_kernels.triton.runtime import precision_of
from g2gnet import G2GNet

META = torch.device("meta")


def units_of_fc2(block_size: int = 64, p_inter: float = 0.15) -> Units:
    """The units between layers of 2,048 neurons."""
    connection = G2GNet(784, 2048, 10, "index", p_inter=p_inter, block_size=block_size, T=50).to("meta").fc2
    return units_of(connection.mask.tensors(), connection.values)


def test_what_is_never_fused_and_what_stays_on_chip():
    """Margins say nothing of other states than the membrane; floats and 32 bits have no kernel. Nine units of 64 and
    two steps of their spikes take 144 KB: on an H100, not where factors are registers, too."""
    units = units_of_fc2()
    spikes, bf16, fp32 = torch.uint8, torch.bfloat16, torch.float32
    assert stack.fused_pays(units, Neurons("lif", ()), 256, spikes, bf16)
    with runtime.assuming(fused=True):
        for model, x, products in (("synaptic", spikes, bf16), ("lif", bf16, bf16), ("lif", spikes, fp32)):
            assert not stack.fused_pays(units, Neurons(model, ()), 256, x, products)
    on_chip = [stack.units_on_chip(units, *factors) for factors in ((spikes, bf16), (spikes, fp32), (bf16, bf16))]
    assert on_chip == [9, 0, 0]
    assert stack.units_on_chip(units_of_fc2(p_inter=1.0), spikes, bf16) == 0
    for architecture in ("sm_80", "sm_89", "gfx942"):
        with runtime.assuming(architecture=architecture):
            assert stack.units_on_chip(units, spikes, bf16) == 0


def test_a_card_for_graphics_is_no_small_h100(monkeypatch):
    """Its tensor cores multiply bfloat16 two to four times as fast as its ordinary cores float32: parts take six or
    three times as many, and L2 gives small tiles what they need."""
    units = units_of_fc2(block_size=16)
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
