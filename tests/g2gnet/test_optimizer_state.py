"""The state of grown units begins anew, whatever optimizer keeps it."""

import copy
import functools
from collections import deque

import pytest
import torch
from helpers import seeded
from networks import small_net
from torch import nn

from g2gnet import DSTScheduler

X = torch.rand(6, 30, generator=seeded(0)) * 3


class EightBit(torch.optim.Optimizer):
    """Keeps signs of gradients as codes, as bitsandbytes keeps moments: 127 of 255 codes stands for zero."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                codes = 127 + 100 * parameter.grad.sign()
                self.state[parameter] = {
                    "step": 1,
                    "state1": codes.to(torch.uint8),
                    "qmap1": torch.arange(-127, 128) / 127,
                    "absmax1": torch.ones(3),
                }


class Nested:
    """Optimizers inside, with a state of its own: lookahead, SAM, accelerate's and others' wrappers are like this."""

    def __init__(self, *inside):
        self.inside = list(inside)
        self.param_groups = inside[0].param_groups
        self.state = {}

    def step(self):
        for optimizer in self.inside:
            optimizer.step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"slow": torch.ones_like(parameter)}


class Flat(torch.optim.Optimizer):
    """Keeps one state for all parameters, under a name."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        self.state["all"] = {"moments": torch.cat([p.detach().flatten() for p in self.param_groups[0]["params"]])}


class Factored(torch.optim.Optimizer):
    """Adafactor, which PyTorch has from 2.5 on, in what it keeps."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"row_var": parameter.detach().sum(-1), "col_var": parameter.detach().sum(-2)}


class Late(torch.optim.SGD):
    """Cannot be made from parameters and options alone, and keeps something by rows of units."""

    def __init__(self, params, needed):
        super().__init__(params, lr=1e-3)

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"rows": parameter.detach().flatten()[:7]}


class Keeper(torch.optim.Optimizer):
    """Keeps what ``keep(gradient)`` returns of each parameter, as an entry of its state."""

    def __init__(self, params, keep, lr=1e-3):
        super().__init__(params, {"lr": lr, "keep": keep})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["kept"] = group["keep"](parameter.grad)


class Queue:
    def __init__(self, gradient):
        self.gradients = deque([gradient.clone()])


class Slots:
    __slots__ = ("gradient",)

    def __init__(self, gradient):
        self.gradient = gradient.clone()


class Quantised(torch.Tensor):
    """A state of the weights' shape whose class need not support indexing."""


class Outside(torch.optim.Optimizer):
    """Keeps its state in an attribute, beside a table that never changes."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.table = torch.arange(256)
        self.moments = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        for moment, parameter in zip(self.moments, self.param_groups[0]["params"], strict=True):
            if parameter.grad is not None:
                moment.add_(parameter.grad)


class Tabled(torch.optim.SGD):
    """Keeps nothing of its own but a table, and a reference to what it trains."""

    def __init__(self, params, lr=1e-3):
        params = list(params)
        super().__init__(params, lr=lr)
        self.table, self.trained = torch.arange(256), params


def parameters(net):
    return list(net.parameters())


def rewired(net, optimizer, **options):
    """The fresh slots of fc2 after a step of training and one update."""
    dst = DSTScheduler(net, optimizer, interval=1, grow="random", **options)
    for _ in range(2):
        net.zero_grad()
        (net(X) - 3).square().sum().backward()
        optimizer.step()
    before = net.fc2.mask.flat_unit()
    dst.step()
    fresh = before != net.fc2.mask.flat_unit()
    assert fresh.any()
    return fresh


network = functools.partial(small_net, block_size=3)


def test_a_code_of_eight_bits_is_the_one_of_zero():
    net = network()
    optimizer = EightBit(parameters(net))
    fresh = rewired(net, optimizer)
    state = optimizer.state[net.fc2.values]
    numbers = state["qmap1"][state["state1"].long()]
    assert (numbers[fresh] == 0).all()
    assert (numbers[~fresh] != 0).any()
    assert torch.equal(state["absmax1"], torch.ones(3))


def test_optimizers_in_others_are_found():
    net = network()
    adam, averaged = torch.optim.Adam(parameters(net)), torch.optim.SGD(parameters(net), lr=0.1, momentum=0.9)
    optimizer = Nested(Nested(adam), averaged)
    fresh = rewired(net, optimizer)
    values = net.fc2.values
    for state in (
        adam.state[values]["exp_avg"],
        averaged.state[values]["momentum_buffer"],
        optimizer.state[values]["slow"],
        optimizer.inside[0].state[values]["slow"],
    ):
        assert not state[fresh].any()
        assert state[~fresh].any()


@pytest.mark.parametrize(
    ("make", "name", "begin"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.003), "step_size", 0.003),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum", 0.5),
        (lambda p: torch.optim.NAdam(p), "exp_avg_sq", 0.0),
    ],
)
def test_a_state_begins_with_what_it_begins_with(make, name, begin):
    net = network()
    optimizer = make(parameters(net))
    draws = torch.get_rng_state()
    fresh = rewired(net, optimizer)
    assert torch.equal(torch.get_rng_state(), draws)
    state = optimizer.state[net.fc2.values][name]
    assert (state[fresh] == torch.tensor(begin)).all()
    assert (state[~fresh] != torch.tensor(begin)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, r"LBFGS keeps d, prev_flat_grad in a form other than plain .* shape, \[56, 3, 3\]"),
        (Flat, "Flat keeps state of 'all' in a form other"),
        (getattr(torch.optim, "Adafactor", Factored), "(Adafactor|Factored) keeps col_var, row_var in"),
        (lambda p: Nested(torch.optim.SGD(p), torch.optim.LBFGS(p[1:2])), "LBFGS keeps d, prev_flat_grad"),
    ],
)
def test_what_cannot_be_reset_is_refused_by_name_when_the_scheduler_is_made(make, message):
    net = network()
    with pytest.raises(ValueError, match=message + ".*pass reset_state="):
        DSTScheduler(net, make([net.fc2.values, *(p for p in net.parameters() if p is not net.fc2.values)]))


@pytest.mark.parametrize(
    "keep",
    [
        lambda gradient: deque([gradient.clone()]),
        Queue,
        Slots,
        lambda gradient: {"inside": [Queue(gradient)]},
        lambda gradient: gradient.numpy().copy(),
        lambda gradient: gradient.clone().as_subclass(Quantised),
    ],
    ids=["deque", "object", "slots", "nested", "array", "subclass"],
)
def test_a_state_in_queues_objects_arrays_and_other_tensors_is_refused(keep):
    net = network()
    with pytest.raises(ValueError, match=r"Keeper keeps kept in a form other than plain tensors .*pass reset_state="):
        DSTScheduler(net, Keeper(parameters(net), keep))


def test_states_under_numbers_are_refused_by_name():
    """As heavyball keeps them."""

    class Numbered(Keeper):
        def step(self, closure=None):
            super().step()
            for state in self.state.values():
                state |= {0: {"rows": state.pop("kept")}, "first": torch.zeros(3)}

    net = network()
    with pytest.raises(ValueError, match=r"Numbered keeps 0, first in a form other .*pass reset_state="):
        DSTScheduler(net, Numbered(parameters(net), torch.clone))


def test_a_state_outside_of_the_state_is_refused_and_a_table_is_not():
    net = network()
    with pytest.raises(ValueError, match="Outside keeps attribute moments in a form other"):
        DSTScheduler(net, Outside(parameters(net)))
    DSTScheduler(net, Tabled(parameters(net)))


def test_one_layer_that_is_kept_in_another_way_is_enough():
    """Quantised optimizers keep only large weights in their own way, or only those of some sizes."""
    net = network()
    size = net.fc3.values.numel()
    assert size < net.fc1.values.numel()
    with pytest.raises(ValueError, match="Keeper keeps kept"):
        DSTScheduler(net, Keeper(parameters(net), lambda g: deque([g.clone()]) if g.numel() == size else g.clone()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_update_that_fails_in_the_last_layer_changes_nothing_in_any(error):
    net = network()
    optimizer = torch.optim.Adam(parameters(net), lr=0.01)
    fails = True

    def reset_state(optimizer, values, fresh):
        optimizer.state[values]["exp_avg"].fill_(7)
        if fails and values is net.fc3.values:
            raise error

    dst = DSTScheduler(net, optimizer, interval=1, grow="gradient", reset_state=reset_state)
    (net(X) - 3).square().sum().backward()
    optimizer.step()
    average = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.9)

    def everything():
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        state = {"net": net.state_dict(), "average": average.state_dict(), "gradients": gradients}
        state["optimizer"] = optimizer.state_dict()["state"]
        state["wiring"] = [layer.mask.to_dense() for each in (net, average) for layer, _ in each.layers()]
        return copy.deepcopy(state)

    before = everything()
    with pytest.raises(error):
        dst.step()
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert (dst.pruned, dst.grown) == (0, 0)

    fails = False  # and whoever catches the error can go on
    net.zero_grad()
    (net(X) - 3).square().sum().backward()
    optimizer.step()
    dst.step()
    assert dst.pruned > 0
    for (ours, _), (theirs, _) in zip(net.layers(), average.layers(), strict=True):
        assert torch.equal(theirs.dense_weight() != 0, ours.mask.to_dense() & (theirs.dense_weight() != 0))
        assert torch.equal(theirs.mask.to_dense(), ours.mask.to_dense())


def test_a_state_that_comes_later_is_refused_before_anything_is_replaced():
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"Late keeps rows in a form other .*pass reset_state="):
        rewired(net, Late(parameters(net), needed=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_ones_own_function_resets_what_only_it_knows():
    net, calls = network(), []

    def reset_state(optimizer, values, fresh):
        calls.append((values, fresh))
        optimizer.state[values]["rows"][fresh[:7]] = -1

    optimizer = Late(parameters(net), needed=True)
    fresh = rewired(net, optimizer, reset_state=reset_state)
    assert [values for values, _ in calls] == [net.fc1.values, net.fc2.values, net.fc3.values]
    assert torch.equal(calls[1][1], fresh)
    assert (optimizer.state[net.fc2.values]["rows"] == -1).tolist() == fresh[:7].tolist()


def test_a_model_of_nothing_to_reset_needs_no_state():
    """A frozen layer is in no optimizer, and never rewired."""
    net = network()
    net.fc2.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
    dst = DSTScheduler(net, optimizer, interval=1, grow="random")
    dst.step()
    assert dst.pruned > 0
    assert isinstance(net.fc2.values, nn.Parameter)
