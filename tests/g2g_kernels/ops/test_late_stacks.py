"""Chains with delays in the fused CPU kernels, against float64: what arrives, and the gradient of learned delays."""

import itertools

import pytest
import torch
from covering import every_pair
from helpers import chained, changed, lif_layer, packed_randn, seeded

from g2g_kernels import BlockMask, GroupLayout, Neurons, g2g_stack
from g2g_kernels.ops.g2g_stack.delays import Delay

T, B, SIZES = 12, 5, (20, 96, 80, 9)


def late_chain(groups: tuple[str, str], block_size: int, most: int, recurrent: bool, dropped: bool, started: bool):
    """The tensors and masks of a chain whose second and third connections have delays, and its layers of them."""
    draw = seeded(3)
    kinds = *groups, "index"
    layouts = [GroupLayout(SIZES[0], 2)]
    layouts += [GroupLayout(size, 4 if size > 9 else 1, kind=kind) for size, kind in zip(SIZES[1:], kinds, strict=True)]
    leaves, masks = {}, []
    for number, (below, above) in enumerate(itertools.pairwise(layouts)):
        masks.append(BlockMask.sample(above, below, p_inter=0.3, block_size=block_size, generator=draw))
        leaves[f"values{number}"] = packed_randn(masks[-1], number) * 0.6
        leaves[f"theta{number}"] = torch.rand(above.size, generator=draw) / 2 + 0.2
        if number:
            leaves[f"delay{number}"] = torch.rand(below.size, generator=draw) * (most + 2) - 1
        if started:
            leaves[f"state{number}"] = torch.randn(1, B, above.size, generator=draw)
    own = BlockMask.sample(layouts[1], layouts[1], p_inter=0.3, block_size=block_size, generator=draw)
    if recurrent:
        leaves["recurrent"] = packed_randn(own, 8) * 0.5
    leaves["x"] = torch.rand(T, B, SIZES[0], generator=draw) * 2
    silent = [torch.rand(B, size, generator=draw) < 0.2 for size in SIZES[1:3]]
    before = [(torch.rand(most + 1, B, size, generator=draw) < 0.3).float() for size in SIZES[1:3]]
    if started:  # the last spikes are those of the states
        for number, sent in enumerate(before):
            sent[-1] = leaves[f"state{number}"][0] > leaves[f"theta{number}"]
            if dropped:
                sent[-1, silent[number]] = 0

    def layers_of(leaves, dtype):
        layers = []
        for number, mask in enumerate(masks):
            learned, hidden = leaves.get(f"delay{number}"), number < 2
            population = Neurons("lif", (torch.tensor([0.9], dtype=dtype), leaves[f"theta{number}"]))
            late = {"delay": Delay(0, most, learned.detach().clamp(0, most).round().long(), learned)} if number else {}
            joined = (leaves["recurrent"], own) if recurrent and not number else None
            state = leaves.get(f"state{number}")
            layer = chained(number, leaves[f"values{number}"], mask, None, population, joined, state=state, **late)
            if started and hidden:
                layer = layer._replace(sent=before[number].to(dtype))
            layers.append(layer._replace(dropped=silent[number]) if dropped and hidden else layer)
        return layers

    return leaves, layers_of


@every_pair(
    groups=(("index", "index"), ("random", "interleaved"), ("index", "random")), block_size=(1, 4, 16), most=(1, 5, 30),
    recurrent=(False, True), dropped=(False, True), started=(False, True), surrogate=("triangle", "atan"),
    threads=(1, 2),
)  # fmt: skip
def test_learned_delays_of_the_fused_kernels(groups, block_size, most, recurrent, dropped, started, surrogate, threads):
    leaves, layers_of = late_chain(groups, block_size, most, recurrent, dropped, started)
    found = {}
    for backend, dtype in (("torch", torch.float64), ("cpu", torch.float32)):
        own = {name: tensor.to(dtype).requires_grad_() for name, tensor in leaves.items()}
        layers = layers_of(own, dtype)
        layers = [changed(each, surrogate=surrogate) for each in layers]
        if backend == "cpu":
            torch.set_num_threads(threads)
        activity = g2g_stack(own["x"], layers, backend=backend)
        weights = torch.linspace(-1, 1, SIZES[-1], dtype=dtype)
        ((activity.counts * weights).sum() + activity.rates[0].sum() * 3).backward()
        found[backend] = {name: tensor.grad for name, tensor in own.items()}
        found[backend] |= {"counts": activity.counts.detach(), "spikes": activity.spikes[1].dense()}
    assert any(found["torch"][name].any() for name in ("delay1", "delay2"))
    for name, expected in found["torch"].items():
        near = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
        torch.testing.assert_close(found["cpu"][name].double(), expected, **near, msg=name)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inputs_with_a_delay_of_no_step_are_the_inputs(backend, held):
    mask = BlockMask.full(GroupLayout(9, 1), GroupLayout(20, 1), block_size=4)
    layer = lif_layer(packed_randn(mask, 1), mask, None, torch.tensor(0.9), torch.tensor(1.0))
    x = torch.rand(T, B, 20, generator=seeded(2))
    x, steps = (x[0], T) if held else (x, None)
    counts = g2g_stack(x, [layer], steps, backend=backend).counts
    assert counts.any()
    for delay in (Delay(0, 0), Delay(0, 0, torch.zeros(20, dtype=torch.int64))):
        assert torch.equal(g2g_stack(x, [changed(layer, delay=delay)], steps, backend=backend).counts, counts)
