"""The state of grown units begins as the name of the state says, and a state that nobody knows is refused by name."""

import copy
import functools
from collections import deque

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch.optim import SGD, Adam

from g2gnet import DSTScheduler

X = torch.rand(6, 30, generator=seeded(0)) * 3

network = functools.partial(small_net, block_size=3)


def keeping(parameters, keep):
    """An optimizer with ``keep(parameter)`` as each one's state; its steps have no state of their own."""
    optimizer = SGD(parameters, lr=0.01)
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter].update(keep(parameter.detach()))
    return optimizer


def codes(weights):
    """As bitsandbytes keeps moments: 127 of 255 codes stands for zero."""
    state = torch.full_like(weights, 27, dtype=torch.uint8)
    return {"state1": state, "qmap1": torch.arange(-127, 128) / 127, "absmax1": torch.ones(3)}


def train(net, optimizer):
    optimizer.zero_grad()
    loss = (net(X) - 3).square().sum()
    loss.backward()
    optimizer.step(lambda: loss)


def rewired(net, optimizers, **options):
    """The fresh slots of fc2 after two steps of training and one update."""
    dst = DSTScheduler(net, optimizers, interval=1, grow="random", **options)
    for _ in range(2):
        for optimizer in optimizers:
            train(net, optimizer)
    before, draws = net.fc2.mask.flat_unit(), torch.get_rng_state()
    dst.step()
    assert torch.equal(torch.get_rng_state(), draws)
    fresh = before != net.fc2.mask.flat_unit()
    assert fresh.any()
    return fresh


@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (functools.partial(Adam, amsgrad=True), {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0}),
        (functools.partial(SGD, momentum=0.9), {"momentum_buffer": 0}),
        (torch.optim.NAdam, {"exp_avg": 0, "exp_avg_sq": 0}),
        (torch.optim.Adamax, {"exp_avg": 0, "exp_inf": 0}),
        (torch.optim.Adadelta, {"square_avg": 0, "acc_delta": 0}),
        (functools.partial(torch.optim.RMSprop, momentum=0.9, centered=True),
         {"square_avg": 0, "momentum_buffer": 0, "grad_avg": 0}),
        (torch.optim.ASGD, {"ax": 0}),
        (functools.partial(torch.optim.Rprop, lr=0.003), {"prev": 0, "step_size": 0.003}),
        (functools.partial(torch.optim.Adagrad, initial_accumulator_value=0.5), {"sum": 0.5}),
        (lambda p: keeping(p, lambda each: {"exp_avg": torch.ones(2, *each.shape)}), {"exp_avg": 0}),
        (lambda p: keeping(p, codes), {"state1": 127}),
    ],
)  # fmt: skip
def test_a_state_begins_as_its_name_says(make, begins):
    net = network()
    optimizer = make(net.parameters())
    fresh = rewired(net, [optimizer])
    state = optimizer.state[net.fc2.values]
    assert begins.keys() == {name for name, value in state.items() if torch.as_tensor(value).dim() > 2}
    for name, begin in begins.items():
        assert (state[name][..., fresh, :, :] == torch.tensor(begin)).all()
        assert (state[name][..., ~fresh, :, :] != torch.tensor(begin)).any()
    assert state.get("step", 2) == 2


@pytest.mark.parametrize("shares", [True, False])
def test_a_wrapper_shares_its_state_or_both_are_given(shares):
    """An optimizer with another one inside, as lookahead, SAM and accelerate's."""
    net = network()
    inner, optimizer = Adam(net.parameters()), keeping(net.parameters(), lambda each: {"slow_params": each + 7})
    optimizer.inner = inner
    if shares:
        inner.state.update(optimizer.state)
        optimizer.state = inner.state
    else:
        with pytest.raises(ValueError, match=r"SGD wraps Adam, .* give .* both: \[optimizer, optimizer\.inner\]"):
            DSTScheduler(net, optimizer)
    fresh = rewired(net, [optimizer] if shares else [optimizer, inner])
    states = [(optimizer, "slow_params")] if shares else [(optimizer, "slow_params"), (inner, "exp_avg")]
    for state in (each.state[net.fc2.values][name] for each, name in states):
        assert not state[fresh].any()
        assert state[~fresh].any()


class Quantised(torch.Tensor):
    """A state of the weights' shape whose class need not support indexing."""


UNKNOWN = {
    "a name": (lambda p: {"kept": p}, "kept"),
    "numbers as names": (lambda p: {0: {"rows": p}, "first": torch.zeros(3)}, "0, first"),
    "factors": (lambda p: {"row_var": p.sum(-1), "col_var": p.sum(0)}, "col_var, row_var"),
    "a queue": (lambda p: {"kept": deque([p])}, "kept"),
    "an array": (lambda p: {"kept": p.numpy()}, "kept"),
    "a subclass": (lambda p: {"exp_avg": p.clone().as_subclass(Quantised)}, "exp_avg"),
    "another shape": (lambda p: {"exp_avg": p.flatten()}, "exp_avg"),
    "codes without a table": (lambda p: {"exp_avg": p.to(torch.uint8)}, "exp_avg"),
    "one layer": (lambda p: {"kept" if p.shape[1:] == (2, 3) else "exp_avg": p.clone()}, "kept"),  # that is fc3
}


@pytest.mark.parametrize(("keep", "names"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_state_is_refused_by_name_before_anything_changes(keep, names):
    net, reference = network(), network()
    optimizer = keeping(net.parameters(), lambda p: {})
    dst = DSTScheduler(net, optimizer, interval=1, grow="random")
    optimizer.state.update(keeping(net.parameters(), keep).state)
    states = {p: dict(state) for p, state in optimizer.state.items()}
    message = rf"SGD keeps {names} in a form other .* reset_state={{.*{names[-3:]}'?: value}}"
    for update in (dst.step, lambda: DSTScheduler(net, optimizer)):  # nor begins a scheduler with it
        with pytest.raises(ValueError, match=message):
            update()
    assert all(map(torch.equal, net.state_dict().values(), reference.state_dict().values()))
    assert all(value is states[p][name] for p, state in optimizer.state.items() for name, value in state.items())


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # LBFGS of PyTorch 2.8
@pytest.mark.parametrize(("make", "name"), [(SGD, "all"), (torch.optim.LBFGS, "prev_flat_grad")])
def test_one_state_of_all_parameters_is_refused_wherever_it_is(make, name):
    net = network()
    optimizer = make([net.fc1.bias, *(p for p in net.parameters() if p is not net.fc1.bias)])
    if make is SGD:
        optimizer.state["all"] = {"moments": torch.zeros(99)}
    else:
        train(net, optimizer)
    with pytest.raises(ValueError, match=rf"{make.__name__} keeps {name} in a form other"):
        DSTScheduler(net, optimizer)


def test_what_only_the_user_knows_is_said_by_name():
    """A number, a function of the new units' weights, or to leave the state; of known names, too."""
    net, seen = network(), []

    def keep(p):
        return {"rows": p[..., 0] + 5, "shape": p + 5, "exp_avg": p + 5, "kept": deque([p.clone()])}

    def shape(weights):
        seen.append(weights)
        return weights + 7

    optimizer = keeping(net.parameters(), keep)
    before = copy.deepcopy(optimizer.state[net.fc2.values])
    fresh = rewired(net, [optimizer], reset_state={"rows": -1, "shape": shape, "exp_avg": 2.0, "kept": None})
    state = optimizer.state[net.fc2.values]
    for name, begin in {"rows": -1, "shape": 7, "exp_avg": 2}.items():
        assert (state[name][fresh] == begin).all()
        assert torch.equal(state[name][~fresh], before[name][~fresh])
    assert torch.equal(state["kept"][0], before["kept"][0])
    assert [tuple(weights.shape[1:]) for weights in seen] == [layer.mask.unit_shape for layer, _ in net.layers()]
    assert len(seen[1]) == int(fresh.sum())


@pytest.mark.parametrize(
    ("error", "options"),
    [(RuntimeError, {}), (KeyboardInterrupt, {}), (RuntimeError, {"final_density": 0.05, "total_steps": 9})],
)
def test_an_update_that_fails_in_the_last_layer_changes_nothing_in_any(error, options):
    net, calls = network(), []
    optimizer = Adam(net.parameters(), lr=0.01)

    def last(weights):
        calls.append(weights)
        if len(calls) == 3:
            raise error
        return weights

    dst = DSTScheduler(net, optimizer, interval=1, grow="gradient", reset_state={"exp_avg_sq": last}, **options)
    average = copy.deepcopy(net)
    train(net, optimizer)

    def everything():
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        state = {"net": net.state_dict(), "gradients": gradients, "optimizer": optimizer.state_dict()["state"]}
        state["wiring"] = [layer.mask.to_dense() for each in (net, average) for layer, _ in each.layers()]
        return copy.deepcopy(state)

    before = everything()
    with pytest.raises(error):
        dst.step()
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert (dst.pruned, dst.grown) == (0, 0)
    train(net, optimizer)  # and whoever catches the error can go on
    dst.step()
    assert dst.pruned > 0
