"""The state of grown units begins as the name of the state says, and a state that nobody knows is refused by name."""

import copy
import functools
from collections import deque

import pytest
import torch
from helpers import seeded
from networks import small_net

from g2gnet import DSTScheduler

X = torch.rand(6, 30, generator=seeded(0)) * 3


class Keeper(torch.optim.Optimizer):
    """Keeps what ``keep(gradient)`` returns of each parameter, as entries of its state."""

    def __init__(self, params, keep, lr=1e-3):
        super().__init__(params, {"lr": lr, "keep": keep})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] |= group["keep"](parameter.grad)


def codes(gradient):
    """As bitsandbytes keeps moments: 127 of 255 codes stands for zero."""
    state = (127 + 100 * gradient.sign()).to(torch.uint8)
    return {"step": 1, "state1": state, "qmap1": torch.arange(-127, 128) / 127, "absmax1": torch.ones(3)}


class Wrapper(torch.optim.Optimizer):
    """Has an optimizer inside, whose state it shares or not, as lookahead, SAM and accelerate's do."""

    def __init__(self, inner, shares):
        super().__init__(inner.param_groups, {})
        self.inner = inner
        if shares:
            self.state = inner.state

    def step(self, closure=None):
        self.inner.step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["slow_params"] = torch.ones_like(parameter)


class Flat(torch.optim.Optimizer):
    """Keeps one state for all parameters, under a name."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        self.state["all"] = {"moments": torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]])}


class Quantised(torch.Tensor):
    """A state of the weights' shape whose class need not support indexing."""


def parameters(net):
    return list(net.parameters())


def train(net, optimizer):
    optimizer.zero_grad()
    loss = (net(X) - 3).square().sum()
    loss.backward()
    optimizer.step(lambda: loss)


def rewired(net, optimizer, given=None, **options):
    """The fresh slots of fc2 after two steps of training and one update."""
    dst = DSTScheduler(net, given or optimizer, interval=1, grow="random", **options)
    for _ in range(2):
        train(net, optimizer)
    before = net.fc2.mask.flat_unit()
    dst.step()
    fresh = before != net.fc2.mask.flat_unit()
    assert fresh.any()
    return fresh


network = functools.partial(small_net, block_size=3)


@pytest.mark.parametrize(
    ("make", "begins"),
    [
        (lambda p: torch.optim.Adam(p, amsgrad=True), {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0}),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer": 0}),
        (lambda p: torch.optim.NAdam(p), {"exp_avg": 0, "exp_avg_sq": 0}),
        (lambda p: torch.optim.Adamax(p), {"exp_avg": 0, "exp_inf": 0}),
        (lambda p: torch.optim.Adadelta(p), {"square_avg": 0, "acc_delta": 0}),
        (
            lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
            {"square_avg": 0, "momentum_buffer": 0, "grad_avg": 0},
        ),
        (lambda p: torch.optim.ASGD(p), {"ax": 0}),
        (lambda p: torch.optim.Rprop(p, lr=0.003), {"prev": 0, "step_size": 0.003}),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), {"sum": 0.5}),
        (lambda p: Keeper(p, lambda g: {"exp_avg": torch.stack([g, g]).sign()}), {"exp_avg": 0}),
    ],
)
def test_a_state_begins_as_its_name_says(make, begins):
    net = network()
    optimizer = make(parameters(net))
    draws = torch.get_rng_state()
    fresh = rewired(net, optimizer)
    assert torch.equal(torch.get_rng_state(), draws)
    state = optimizer.state[net.fc2.values]
    assert begins.keys() == {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
    for name, begin in begins.items():
        assert (state[name][..., fresh, :, :] == torch.tensor(begin)).all()
        assert (state[name][..., ~fresh, :, :] != torch.tensor(begin)).any()
    if "step" in state:
        assert state["step"] == 2


def test_a_code_of_eight_bits_is_the_one_of_zero():
    net = network()
    optimizer = Keeper(parameters(net), codes)
    fresh = rewired(net, optimizer)
    state = optimizer.state[net.fc2.values]
    numbers = state["qmap1"][state["state1"].long()]
    assert (numbers[fresh] == 0).all()
    assert (numbers[~fresh] != 0).any()
    assert torch.equal(state["absmax1"], torch.ones(3))


@pytest.mark.parametrize("shares", [True, False])
def test_a_wrapper_shares_its_state_or_both_are_given(shares):
    net = network()
    inner = torch.optim.Adam(parameters(net))
    optimizer = Wrapper(inner, shares)
    if not shares:
        with pytest.raises(ValueError, match=r"Wrapper wraps Adam, .* give .* both: \[optimizer, optimizer\.inner\]"):
            DSTScheduler(net, optimizer)
    fresh = rewired(net, optimizer, None if shares else [optimizer, inner])
    for state in (inner.state[net.fc2.values]["exp_avg"], optimizer.state[net.fc2.values]["slow_params"]):
        assert not state[fresh].any()
        assert state[~fresh].any()


UNKNOWN = {
    "a name": (lambda g: {"kept": g.clone()}, "kept"),
    "numbers as names": (lambda g: {0: {"rows": g.clone()}, "first": torch.zeros(3)}, "0, first"),
    "factors": (lambda g: {"row_var": g.sum(-1), "col_var": g.sum(0)}, "col_var, row_var"),
    "a queue": (lambda g: {"kept": deque([g.clone()])}, "kept"),
    "an object": (lambda g: {"kept": object()}, "kept"),
    "an array": (lambda g: {"kept": g.numpy().copy()}, "kept"),
    "a subclass": (lambda g: {"exp_avg": g.clone().as_subclass(Quantised)}, "exp_avg"),
    "another shape": (lambda g: {"exp_avg": g.flatten()}, "exp_avg"),
    "codes without a table": (lambda g: {"exp_avg": g.to(torch.uint8)}, "exp_avg"),
    "one layer": (lambda g: {"kept" if g.shape[1:] == (2, 3) else "exp_avg": g.clone()}, "kept"),
}


@pytest.mark.parametrize(("keep", "names"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_state_is_refused_by_name_before_anything_changes(keep, names):
    net = network()
    assert net.fc3.values.shape[1:] == (2, 3)
    optimizer = Keeper(parameters(net), keep)
    dst = DSTScheduler(net, optimizer, interval=1, grow="random")
    train(net, optimizer)
    before, states = copy.deepcopy(net.state_dict()), {p: dict(state) for p, state in optimizer.state.items()}
    message = rf"Keeper keeps {names} in a form other .* reset_state={{.*{names[-3:]}'?: value}}"
    with pytest.raises(ValueError, match=message):
        dst.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(value is states[p][name] for p, state in optimizer.state.items() for name, value in state.items())
    with pytest.raises(ValueError, match=message):  # nor begins a scheduler with it
        DSTScheduler(net, optimizer)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # LBFGS of PyTorch 2.8
@pytest.mark.parametrize("make", [Flat, torch.optim.LBFGS])
def test_one_state_of_all_parameters_is_refused_wherever_it_is(make):
    net = network()
    optimizer = make([net.fc1.bias, *(p for p in net.parameters() if p is not net.fc1.bias)])
    with pytest.raises(ValueError, match=r"(Flat keeps all|LBFGS keeps prev_flat_grad) in a form other"):
        rewired(net, optimizer)


def test_what_only_the_user_knows_is_said_by_name():
    """A number, a function of the new units' weights, or to leave the state; of known names, too."""

    def keep(g):
        return {"rows": g.sum(-1), "shape": g.clone(), "exp_avg": g.clone(), "kept": deque([g.clone()])}

    net, seen = network(), []

    def shape(weights):
        seen.append(weights)
        return weights + 7

    optimizer = Keeper(parameters(net), keep)
    fresh = rewired(net, optimizer, reset_state={"rows": -1, "shape": shape, "exp_avg": 2.0, "kept": None})
    state = optimizer.state[net.fc2.values]
    for name, begin in {"rows": -1, "shape": 7, "exp_avg": 2}.items():
        assert (state[name][fresh] == begin).all()
        assert torch.equal(state[name][~fresh], keep(net.fc2.values.grad)[name][~fresh])
    assert state["kept"][0][fresh].any()
    assert [tuple(weights.shape[1:]) for weights in seen] == [layer.mask.unit_shape for layer, _ in net.layers()]
    assert len(seen[1]) == int(fresh.sum())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_update_that_fails_in_the_last_layer_changes_nothing_in_any(error):
    net = network()
    optimizer = torch.optim.Adam(parameters(net), lr=0.01)
    fails = [True]

    def last(weights):
        fails.append(True)
        if fails[0] and len(fails) == 4:
            raise error
        return weights

    dst = DSTScheduler(net, optimizer, interval=1, grow="gradient", reset_state={"exp_avg_sq": last})
    train(net, optimizer)

    def everything():
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        state = {"net": net.state_dict(), "gradients": gradients, "optimizer": optimizer.state_dict()["state"]}
        state["wiring"] = [layer.mask.to_dense() for layer, _ in net.layers()]
        return copy.deepcopy(state)

    before = everything()
    with pytest.raises(error):
        dst.step()
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert (dst.pruned, dst.grown) == (0, 0)
    fails[0] = False  # and whoever catches the error can go on
    train(net, optimizer)
    dst.step()
    assert dst.pruned > 0


def test_a_frozen_layer_is_in_no_optimizer_and_never_rewired():
    net = network()
    net.fc2.requires_grad_(False)
    before = net.fc2.mask.to_dense()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
    dst = DSTScheduler(net, optimizer, interval=1, grow="random")
    dst.step()
    assert dst.pruned > 0
    assert torch.equal(net.fc2.mask.to_dense(), before)
