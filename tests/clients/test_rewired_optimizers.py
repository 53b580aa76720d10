"""Rewiring with other people's optimizers: the state of grown units begins anew, or they are refused by name."""

import warnings

import pytest
import pytorch_optimizer
import torch
import torchao.optim
from accelerate import Accelerator
from bitsandbytes.optim import AdamW8bit
from timm.optim import Lookahead
from transformers import Adafactor

from g2gnet import DSTScheduler, G2GNet


def network():
    return G2GNet(784, 128, 10, block_size=14, T=4, enc_scale=3.0, generator=torch.Generator().manual_seed(0))


def units(mask):
    return mask.unit_row.long() * 1000 + mask.unit_col


def fresh_units(net, optimizer, wrapped=None):
    """The units of fc1 that are new after two steps and an update."""
    dst = DSTScheduler(net, wrapped or optimizer, interval=2, fraction=0.3, grow="random")
    for _ in range(2):
        before = units(net.fc1.mask)
        net(torch.rand(16, 784)).square().mean().backward()
        optimizer.step()
        dst.step()
        optimizer.zero_grad()
    return before != units(net.fc1.mask)


def test_adamw_of_eight_bits():
    net = network()
    optimizer = AdamW8bit(net.parameters())
    fresh = fresh_units(net, optimizer)
    state = optimizer.state[net.fc1.values]
    assert state["state1"].dtype == torch.uint8
    for moment in (1, 2):
        numbers = state[f"qmap{moment}"][state[f"state{moment}"].long()]
        assert (numbers[fresh] == 0).all()
        assert (numbers[~fresh] != 0).any()


def test_lookahead():
    net = network()
    inner = torch.optim.AdamW(net.parameters())
    optimizer = Lookahead(inner, k=2)
    fresh = fresh_units(net, optimizer)
    assert fresh.any()
    for state in [inner.state[net.fc1.values]["exp_avg"], inner.state[net.fc1.values]["lookahead_slow_buff"]]:
        assert not state[fresh].any()
        assert state[~fresh].any()


def test_accelerates_wrapper():
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    _, wrapped = Accelerator(cpu=True).prepare(net, optimizer)
    fresh = fresh_units(net, wrapped)
    assert not optimizer.state[net.fc1.values]["exp_avg"][fresh].any()
    assert optimizer.state[net.fc1.values]["exp_avg"][~fresh].any()


@pytest.mark.parametrize(
    "make", [torch.optim.LBFGS, torch.optim.Adafactor, Adafactor, lambda p: Lookahead(torch.optim.Adafactor(p))]
)
def test_factored_and_flat_states_are_refused_when_the_scheduler_is_made(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = network()
        optimizer = make(net.parameters())
        with pytest.raises(ValueError, match=r"(LBFGS|Adafactor) keeps .* pass reset_state="):
            DSTScheduler(net, optimizer)


@pytest.mark.parametrize("make", [pytorch_optimizer.ScalableShampoo, pytorch_optimizer.AdaShift])
def test_states_in_objects_and_queues_are_refused_when_the_scheduler_is_made(make):
    net = network()
    with pytest.raises(ValueError, match=r"(ScalableShampoo keeps .*pre_conditioner|AdaShift keeps grad_queue)"):
        DSTScheduler(net, make(net.parameters()))


QUANTISED = [torchao.optim.AdamW8bit, torchao.optim.AdamW4bit, torchao.optim.AdamWFp8]


def large_network():
    """Small weights have plain states there."""
    draw = torch.Generator().manual_seed(0)
    return G2GNet(256, 256, 16, block_size=16, T=4, enc_scale=3.0, generator=draw)


@pytest.mark.parametrize("make", QUANTISED)
def test_quantised_states_are_refused_when_the_scheduler_is_made(make):
    net = large_network()
    with pytest.raises(ValueError, match=r"AdamW\w+ keeps exp_avg, exp_avg_sq in a form other .*pass reset_state="):
        DSTScheduler(net, make(net.parameters()))


@pytest.mark.parametrize("make", QUANTISED)
def test_quantised_states_begin_anew_by_the_function_of_the_page(make):
    def reset_state(optimizer, values, fresh):
        state = optimizer.state[values]
        for name in ("exp_avg", "exp_avg_sq"):
            if type(state[name]) is not torch.Tensor:
                full = state[name].dequantize()
                full[fresh] = 0
                state[name].copy_(full)

    net = large_network()
    optimizer = make(net.parameters())
    dst = DSTScheduler(net, optimizer, interval=2, fraction=0.3, grow="random", reset_state=reset_state)
    for _ in range(2):
        before = units(net.fc1.mask)
        net(torch.rand(16, 256)).square().mean().backward()
        optimizer.step()
        dst.step()
        optimizer.zero_grad()
    fresh = before != units(net.fc1.mask)
    moment = optimizer.state[net.fc1.values]["exp_avg"]
    assert type(moment) is not torch.Tensor
    assert fresh.any()
    assert not moment.dequantize()[fresh].any()
    assert moment.dequantize()[~fresh].any()


def test_shards_of_fsdp2():
    """β and θ have a dimension: FSDP2 shards no parameter without."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        net, plain = network(), network()
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        x = torch.rand(16, 784)
        assert torch.equal(net(x), plain(x))
        net(x).square().mean().backward()
        torch.optim.Adam(net.parameters()).step()
    finally:
        torch.distributed.destroy_process_group()
