"""What the compiled kernels' surroundings do under odd circumstances: collectors, modes, systems, names."""

import mmap
import threading

import pytest
import torch
from compiled_kernels import instruction_set
from helpers import MASK_CASES, packed_randn

from benchmarks.machine import pytorch_threads
from g2g_kernels import (
    BackendError,
    BlockMask,
    GroupLayout,
    Neurons,
    SpikingLayer,
    available_backends,
    backend_status,
    g2g_linear,
    g2g_stack,
)
from g2g_kernels.cpu import plans
from g2g_kernels.cpu.workspace import Workspace

compiled = pytest.mark.skipif("cpu" not in available_backends(), reason=f"{backend_status()['cpu']}")


def test_a_finalizer_may_run_while_the_pool_is_locked():
    """As where the garbage collector frees outputs inside a call: 840b5ea hung."""
    pool = Workspace()
    tensors = [pool.bytes(1 << 20)]
    address = tensors[0].data_ptr()

    def free() -> None:
        with pool._lock:
            tensors.clear()

    freeing = threading.Thread(target=free, daemon=True)
    freeing.start()
    freeing.join(30)
    assert not freeing.is_alive()
    assert pool.bytes(1 << 20).data_ptr() == address


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_a_kernel_without_huge_pages_is_no_error(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert Workspace().empty((1 << 20,)).fill_(1).sum() == 1 << 20


@compiled
@pytest.mark.parametrize("flush", [False, True])
def test_denormal_numbers_count_as_zero_on_every_thread(flush):
    """Whatever the caller's mode, which stays what it was. Products here are denormal numbers, or the operands are."""
    mask = MASK_CASES["ragged groups of 64"].mask()
    values, x = packed_randn(mask, 0), torch.randn(4096, mask.shape[1])
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU has no such mode")
    try:
        for operands in ((values * 1e-20, x * 1e-20), (values, x.sign() * 1e-40), (values.sign() * 1e-40, x)):
            for number in (1, 2, 2, 2, 2, 2):  # in one of these the other thread comes in time for a task
                with pytorch_threads(number):
                    assert not g2g_linear(operands[1], operands[0], mask, backend="cpu").any()
        smallest = torch.tensor(2e-38) * torch.tensor(0.5)
        assert (smallest == 0) == flush
    finally:
        torch.set_flush_denormal(False)


@compiled
@pytest.mark.parametrize("asked", ["AVX2", "avx1024"])
def test_an_instruction_set_that_does_not_exist_is_said(asked, tmp_path, caplog):
    mask = BlockMask.full(GroupLayout(8, 1), GroupLayout(8, 1), 4)
    reason = f"G2G_CPU_ISA='{asked}' asks for an instruction set which is not one of baseline, avx2"
    with instruction_set(asked, tmp_path), pytest.raises(BackendError, match=reason):
        g2g_linear(torch.ones(2, 8), torch.ones(mask.num_units, *mask.unit_shape), mask, backend="cpu")
    assert [record.levelname for record in caplog.records if reason in record.getMessage()] == ["WARNING"]


@compiled
def test_plans_of_many_small_layers_are_built_once(monkeypatch):
    """840b5ea kept 64: a network of 65 layers built every plan at every pass."""
    built = []
    make = plans.Plan.__init__
    monkeypatch.setattr(plans.Plan, "__init__", lambda self, *rest: (built.append(1), make(self, *rest))[1])
    layers = [BlockMask.full(GroupLayout(8, 2), GroupLayout(8, 2), 1) for _ in range(70)]
    values = torch.ones(layers[0].num_units, 1, 1)
    for _ in range(2):
        for mask in layers:
            g2g_linear(torch.ones(1, 8), values, mask, backend="cpu")
    assert len(built) == 70


@compiled
def test_plans_of_large_layers_are_bounded(monkeypatch):
    monkeypatch.setattr(plans, "_PLANS", 5)
    monkeypatch.setattr(plans, "_UNITS", 7 * plans._LEAST_UNITS)
    for _ in range(9):
        mask = BlockMask.full(GroupLayout(8, 2), GroupLayout(8, 2), 1)
        g2g_linear(torch.ones(1, 8), torch.ones(mask.num_units, 1, 1), mask, backend="cpu")
    assert len(plans._plans) <= 7


# --- what outlives a pass, and what is too large ------------------------------------------------------------------


@compiled
def test_spikes_are_those_of_the_neurons_they_had_when_a_mask_is_loaded_anew():
    """840b5ea gave them in the order of the new mask."""
    draw = torch.Generator().manual_seed(0)
    layouts = [GroupLayout(24, 3, "random", draw) for _ in range(3)]
    masks = [BlockMask.full(layout, layouts[2], 8) for layout in layouts[:2]]
    layer = SpikingLayer(torch.rand(9, 8, 8), masks[0], None, Neurons("lif", (torch.tensor(0.9), torch.tensor(9.0))))
    spikes = g2g_stack(torch.rand(5, 2, 24), [layer], backend="cpu").spikes[0]
    before = spikes.dense()
    assert 0 < before.mean() < 1
    masks[0].load_state_dict(masks[1].state_dict())
    assert not torch.equal(masks[0].rows.order, layouts[0].group_of.argsort(stable=True))
    assert torch.equal(spikes.dense(), before)
