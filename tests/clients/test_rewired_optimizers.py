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
    fresh = fresh_units(net, optimizer, [optimizer, inner])
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
    ("kind", "inner"), [(Lookahead, "_base_optimizer"), (pytorch_optimizer.Lookahead, "optimizer")]
)
def test_wrappers_with_a_state_of_their_own_are_given_with_what_they_wrap(kind, inner):
    net = network()
    optimizer = kind(torch.optim.AdamW(net.parameters()))
    with pytest.raises(ValueError, match=rf"wraps AdamW, .* give .* both: \[optimizer, optimizer\.{inner}\]"):
        DSTScheduler(net, optimizer)
    DSTScheduler(net, [optimizer, getattr(optimizer, inner)])


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (torch.optim.Adafactor, "col_var, row_var"),
        (Adafactor, "exp_avg_sq_col, exp_avg_sq_row"),
        (pytorch_optimizer.ScalableShampoo, "graft, pre_conditioner"),
        (pytorch_optimizer.AdaShift, "grad_queue"),
        *((each, "exp_avg, exp_avg_sq") for each in (torchao.optim.AdamW8bit, torchao.optim.AdamWFp8)),
    ],
)
def test_states_that_nobody_knows_are_refused_and_left_if_the_user_says_so(make, names):
    """Small weights have plain states in torchao's."""
    net = G2GNet(256, 256, 16, block_size=16, T=4, enc_scale=3.0, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(net.parameters())
        loss = net(torch.rand(16, 256)).square().mean()
        loss.backward()
        optimizer.step(lambda: loss)
    with pytest.raises(ValueError, match=rf"\w+ keeps {names} in a form other .*: value"):
        DSTScheduler(net, optimizer)
    DSTScheduler(net, optimizer, reset_state=dict.fromkeys(names.split(", ")))
