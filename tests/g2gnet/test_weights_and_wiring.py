"""Random sequences of what people do to a network, its copies and its files, beside dense twins with explicit masks.

After every rule the dense weights and masks of all networks are those of their twins, or an error was raised and
nothing changed.
"""

import copy
import functools
import io
import itertools
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from helpers import row_with, seeded, units_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from g2g_kernels import BlockMask, GroupLayout, packing
from g2gnet import DSTScheduler, G2GLinear, sync_wiring, tie_wiring, untie_wiring

SIZES = (7, 9, 5)  # units of 2: some are shorter than others, so there is padding
INPUTS = torch.rand(3, SIZES[0], generator=seeded(1))
DECAY = 0.5


@functools.cache
def network(seed: int) -> nn.Sequential:
    """Two layers; those of odd seeds have one unit more. To read, or to copy."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(SIZES)):
        rows, cols = GroupLayout(outputs, 2), GroupLayout(inputs, 2)
        grid = BlockMask.full(rows, cols, 2).grid
        draw = seeded(10 * seed + number)
        units = torch.randperm(grid[0] * grid[1], generator=draw)[: 7 + seed % 2]
        mask = BlockMask(rows, cols, units // grid[1], units % grid[1], 2)
        layers.append(G2GLinear(mask, backend="torch", generator=draw))
    return nn.Sequential(*layers)


@dataclass(eq=False)
class Dense:
    """A network as it should be: dense weights, masks and biases of its layers, and which unit each slot has."""

    weights: list[torch.Tensor]
    masks: list[torch.Tensor]
    biases: list[torch.Tensor]
    slots: list[torch.Tensor]

    @classmethod
    def of(cls, net: nn.Sequential) -> "Dense":
        return cls(
            [packing.unpacked(layer.values.detach(), layer.mask._view()) for layer in net],
            [packing.unpacked(torch.ones_like(layer.values), layer.mask._view()) > 0 for layer in net],
            [layer.bias.detach().clone() for layer in net],
            [layer.mask.flat_unit() for layer in net],
        )

    def copy(self) -> "Dense":
        parts = self.weights, self.masks, self.biases, self.slots
        return Dense(*([tensor.clone() for tensor in part] for part in parts))

    def take(self, other: "Dense", layers=(0, 1)) -> None:
        for number in layers:
            self.weights[number] = other.weights[number].clone()
            self.masks[number] = other.masks[number].clone()
            self.biases[number] = other.biases[number].clone()
            self.slots[number] = other.slots[number]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for weight, mask, bias in zip(self.weights, self.masks, self.biases, strict=True):
            x = x @ (weight * mask).T + bias
        return x


@functools.cache
def dense_network(seed: int) -> Dense:
    """The twin of :func:`network`, to read."""
    return Dense.of(network(seed))


@functools.cache
def saved(seed: int) -> dict[str, torch.Tensor]:
    """The state of :func:`network`, to read."""
    return network(seed).state_dict()


@dataclass(eq=False)
class Copy:
    """A copy of the network, its twin, and for each layer what a user knows about it."""

    net: nn.Sequential
    dense: Dense
    tied: bool = False
    own: list[bool] = field(default_factory=lambda: [False, False])
    averaged: list[bool] = field(default_factory=lambda: [False, False])  # written to at some time
    written: list[bool] = field(default_factory=lambda: [False, False])  # since the slots were last compared
    in_step: list[bool] = field(default_factory=lambda: [True, True])


class ResetError(RuntimeError):
    pass


class Networks(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 3), ties=st.booleans())
    def begin(self, seed, ties):
        self.net = copy.deepcopy(network(2 * seed))
        untie_wiring(self.net)
        self.dense = dense_network(2 * seed).copy()
        self.net[0].values.requires_grad_(False)  # frozen when the scheduler is made, and not in the optimizer
        self.optimizer = torch.optim.Adam(self.net[1].parameters(), lr=0.1)
        self.fails = 0
        options = {"prune": "random", "grow": "random", "reset_state": {"exp_avg": self.reset}}
        self.dst = DSTScheduler(self.net, self.optimizer, interval=1, fraction=0.5, **options)
        self.copies: list[Copy] = []
        self.files: list[tuple[dict, Dense | None]] = []  # a state and what is in it; None: the network as it is
        self.draw = seeded(seed)
        if ties:
            self.copy_network()
            tie_wiring(self.net, self.copies[0].net)
            self.copies[0].tied, self.copies[0].averaged = True, [True, True]

    def reset(self, weights):
        self.fails -= 1
        if self.fails == 0:
            raise ResetError
        return weights

    # --- the rules by which a copy follows, in dense terms ------------------------------------------------------

    def use(self, each: Copy, number: int) -> None:
        """A copy is looked at: if it was averaged with another wiring, it takes that over."""
        if each.own[number] or not each.written[number]:
            return
        each.averaged[number] = True
        if not each.in_step[number]:
            self.follow(each, number)

    def follow(self, each: Copy, number: int) -> None:
        kept = self.same_slots(each, number)
        mask = self.dense.masks[number]
        each.dense.weights[number] = torch.where(kept, each.dense.weights[number], self.dense.weights[number]) * mask
        each.dense.masks[number], each.dense.slots[number] = mask.clone(), self.dense.slots[number]
        each.in_step[number], each.written[number] = True, False

    def same_slots(self, each: Copy, number: int) -> torch.Tensor:
        """Where the network and the copy have the same unit in the same slot: bool [out, in]."""
        mine, theirs = each.dense.slots[number], self.dense.slots[number]
        if len(mine) != len(theirs):
            return torch.zeros_like(self.dense.masks[number])
        mask = network(0)[number].mask  # the grid of all of them
        grid = torch.zeros(mask.grid).flatten().index_fill_(0, theirs[mine == theirs], 1.0).view(mask.grid)
        rows, cols = mask.rows.unit_of, mask.cols.unit_of
        return grid[rows][:, cols] > 0

    def change(self, number: int, become, follow: bool) -> None:
        """The twins after a change of the network's wiring; ``become`` changes that of the network."""
        for each in self.copies:
            self.use(each, number)
        moved = [
            each for each in self.copies if not each.own[number] and each.averaged[number] and each.in_step[number]
        ]
        become()
        for each in self.copies:
            if each.own[number]:
                continue
            if follow and each in moved:
                gone = each.dense.weights[number] * self.dense.masks[number]
                grown = self.dense.masks[number] & ~each.dense.masks[number]
                each.dense.weights[number] = torch.where(grown, self.dense.weights[number], gone)
                each.dense.masks[number] = self.dense.masks[number].clone()
                each.dense.slots[number] = self.dense.slots[number]
                each.written[number] = False
            elif each.in_step[number]:
                each.in_step[number], each.written[number] = False, False

    # --- what is done to the network ----------------------------------------------------------------------------

    @rule(through_data=st.booleans())
    def train(self, through_data):
        for number, layer in enumerate(self.net):
            change = torch.randn(layer.mask.shape, generator=self.draw)
            with torch.no_grad():
                (layer.values.data if through_data else layer.values).add_(layer.mask.pack(change))
                layer.bias.add_(1)
            self.dense.weights[number] += change * self.dense.masks[number]
            self.dense.biases[number] += 1

    @rule(fails=st.integers(0, 2))
    def rewire(self, fails):
        for layer in self.net:
            layer.values.grad = torch.ones_like(layer.values) if layer.values.requires_grad else None
        for parameter in self.net[1].parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.after_zero_step()
        thawed = self.net[0].values.requires_grad
        held = any(self.net[0].values is each for group in self.optimizer.param_groups for each in group["params"])
        changing = [0, 1] if thawed else [1]
        self.fails = fails
        if thawed and not held:
            with pytest.raises(ValueError, match="layer 0"):
                self.dst.step()
            return
        if 0 < fails <= len(changing):
            with pytest.raises(ResetError):
                self.dst.step()
            for number in changing:  # what was written to is noticed, whether or not the update succeeds
                for each in self.copies:
                    self.use(each, number)
            return
        before = [layer.mask.flat_unit() for layer in self.net]
        self.dst.step()
        for number in changing:

            def become(number=number):
                mask = self.net[number].mask
                slots = (before[number] != mask.flat_unit()).sum()
                assert slots > 0
                now = mask.to_dense()
                self.dense.weights[number] *= now
                self.dense.masks[number], self.dense.slots[number] = now, mask.flat_unit()

            self.change(number, become, follow=True)

    def after_zero_step(self):
        """Adam's step on gradients of layer 1 that are zero moves weights by their moments only: read them again."""
        for number, layer in enumerate(self.net):
            self.dense.weights[number] = packing.unpacked(layer.values.detach(), layer.mask._view())
            self.dense.biases[number] = layer.bias.detach().clone()

    @rule()
    def freeze_or_thaw(self):
        self.net[0].values.requires_grad_(not self.net[0].values.requires_grad)

    @rule()
    def give_to_the_optimizer(self):
        held = any(self.net[0].values is each for group in self.optimizer.param_groups for each in group["params"])
        if not held:
            self.optimizer.add_param_group({"params": [self.net[0].values]})

    # --- files --------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["kept", "copied", "written"]))
    def save(self, how):
        state = self.net.state_dict()
        if how == "copied":
            state = copy.deepcopy(state)
        if how == "written":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.files.append((state, None if how == "kept" else self.dense.copy()))

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 99))
    def load(self, which):
        state, dense = self.files[which % len(self.files)]
        self.load_into_network(state, (dense or self.dense).copy())

    @rule(seed=st.integers(4, 9))
    def load_another(self, seed):
        """Of an odd seed it has another number of units."""
        self.load_into_network(saved(seed), dense_network(seed))

    def load_into_network(self, state, dense):
        same = [self.net[n].mask.describes(state[f"{n}.mask.wiring"]) for n in (0, 1)]
        self.leave_kept_states(state)
        self.net.load_state_dict(state)
        self.optimizer.state.clear()
        self.loaded(dense, [0, 1], same)

    def leave_kept_states(self, state):
        """Weights of another number of units are in memory of their own: those who kept the old ones have them."""
        if any(state[f"{n}.values"].shape != self.net[n].values.shape for n in (0, 1)):
            self.files = [each for each in self.files if each[1] is not None]

    def loaded(self, dense, layers, same):
        for number in layers:

            def become(number=number):
                self.dense.take(dense, [number])

            if same[number]:
                for each in self.copies:
                    self.use(each, number)
            self.change(number, become, follow=False)

    @rule(
        seed=st.integers(4, 9),
        spoil=st.sampled_from(["no values", "short values", "a unit twice", "an average", "whole numbers"]),
    )
    def load_half(self, seed, spoil):
        """Layer 0 is spoiled and stays as it is; layer 1 is loaded, as PyTorch does."""
        other, state = network(seed), saved(seed).copy()
        if spoil == "no values":
            del state["0.values"]
        elif spoil == "short values":
            state["0.values"] = state["0.values"][1:]
        elif spoil == "an average":
            state["0.mask.wiring"] = (state["0.mask.wiring"] + network(seed - 2)[0].mask.wiring) / 2
        elif spoil == "whole numbers":
            state["0.values"] = state["0.values"].long()
        else:
            state["0.mask.wiring"] = row_with(other[0].mask, unit_row=second_for_first, unit_col=second_for_first)
        self.leave_kept_states(saved(seed))
        with pytest.raises(RuntimeError, match=r"0\.(values|mask)"):
            self.net.load_state_dict(state)
        self.optimizer.state.clear()
        self.dense.biases[0] = other[0].bias.detach().clone()
        self.loaded(dense_network(seed), [1], [False, False])

    # --- copies -------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.copies) < 3)
    @rule()
    def copy_network(self):
        self.copies.append(Copy(copy.deepcopy(self.net), self.dense.copy()))

    def pick(self, which) -> Copy:
        return self.copies[which % len(self.copies)]

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 2), how=st.sampled_from(["lerp_", "data", "new storage", "copy_"]))
    def average(self, which, how):
        each = self.pick(which)
        for number, (mine, theirs) in enumerate(zip(each.net, self.net, strict=True)):
            if mine.values.shape != theirs.values.shape:
                return  # such tensors cannot be averaged
            if each.own[number] and not mine.mask.equals(theirs.mask):
                return  # as its user said, they are two networks
            before, kept = mine.values.detach().clone(), self.same_slots(each, number)
            weight = 1.0 if how == "copy_" else DECAY
            with torch.no_grad():
                if how == "lerp_":
                    mine.values.lerp_(theirs.values, weight)
                elif how == "data":
                    mine.values.data.mul_(1 - weight).add_(theirs.values.data, alpha=weight)
                elif how == "new storage":
                    mine.values.data = mine.values.data * (1 - weight) + theirs.values.data * weight
                else:
                    mine.values.data.copy_(theirs.values.data)
                mine.bias.copy_(theirs.bias)
            mixed = each.dense.weights[number].lerp(self.dense.weights[number], weight)
            each.dense.weights[number] = torch.where(kept, mixed, each.dense.weights[number])
            each.dense.biases[number] = self.dense.biases[number].clone()
            each.written[number] |= not torch.equal(before, mine.values)

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 2))
    def make_own(self, which):
        each = self.pick(which)
        for number in (0, 1):
            self.use(each, number)
            _ = each.net[number].weight
        untie_wiring(each.net)
        each.tied, each.own = False, [True, True]

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 2))
    def quantise(self, which):
        """Of a copy that is its own, in place."""
        each = self.pick(which)
        if all(each.own):
            for number, layer in enumerate(each.net):
                layer.values.data.mul_(4).round_().div_(4)
                each.dense.weights[number] = (each.dense.weights[number] * 4).round() / 4

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 2))
    def train_copy(self, which):
        each = self.pick(which)
        if each.tied:
            return
        for number in (0, 1):
            self.use(each, number)
        each.net.zero_grad()
        each.net(INPUTS).sum().backward()
        with torch.no_grad():
            for number, layer in enumerate(each.net):
                if layer.values.grad is None:
                    continue
                each.dense.weights[number] -= layer.mask.unpack(layer.values.grad)
                layer.values.sub_(layer.values.grad)
                each.own[number] = True
        each.net.zero_grad()

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 2), tie=st.booleans())
    def sync(self, which, tie):
        each = self.pick(which)
        for mine, theirs in zip(each.net, self.net, strict=True):
            if mine.values.shape != theirs.values.shape:
                with pytest.raises(ValueError, match="packed weights"):
                    sync_wiring(self.net, each.net)
                return
        for number in (0, 1):
            self.use(each, number)
            _ = each.net[number].weight
            self.follow(each, number)
            if tie:
                each.own[number], each.averaged[number] = False, True
        (tie_wiring if tie else sync_wiring)(self.net, each.net)
        each.tied = each.tied or tie

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 2), buffers=st.booleans())
    def call_with_weights_of_a_copy(self, which, buffers):
        each = self.pick(which)
        for number in (0, 1):
            self.use(each, number)
            _ = each.net[number].weight  # looked at
        given = dict(each.net.named_parameters())
        if buffers:  # which describe the wiring of weights that are no longer the copy's own
            given = {name: parameter.detach().clone() for name, parameter in given.items()}
            given |= dict(each.net.named_buffers())
        result = torch.func.functional_call(self.net, given, (INPUTS,))
        torch.testing.assert_close(result, each.dense(INPUTS))

    # --- what must hold -----------------------------------------------------------------------------------------

    @rule()
    def look_at_the_copies(self):
        for each in self.copies:
            for number, layer in enumerate(each.net):
                self.use(each, number)
                equal(layer, each.dense, number)

    @invariant()
    def the_network_is_its_twin(self):
        for number, layer in enumerate(getattr(self, "net", ())):
            equal(layer, self.dense, number)

    def teardown(self):
        if not hasattr(self, "net"):
            return
        torch.testing.assert_close(self.net(INPUTS), self.dense(INPUTS))
        self.look_at_the_copies()
        for each in self.copies:
            torch.testing.assert_close(each.net(INPUTS), each.dense(INPUTS))
        for state, dense in self.files:
            for number in (0, 1):
                mask = network(0)[number].mask  # the grid of all of them
                row, col = units_of(state[f"{number}.mask.wiring"])  # what the state says, read without a layer
                units = packing.View(row, col, mask.rows.side, mask.cols.side)
                weight = packing.unpacked(state[f"{number}.values"].detach(), units)
                compare(weight, packing.flat_unit(units), dense or self.dense, number)


def second_for_first(index: torch.Tensor) -> torch.Tensor:
    return torch.cat([index[1:2], index[1:]])


def equal(layer: G2GLinear, dense: Dense, number: int) -> None:
    values, mask = layer.weights()
    compare(packing.unpacked(values.detach(), mask._view()), mask.flat_unit(), dense, number)


def compare(weight: torch.Tensor, slots: torch.Tensor, dense: Dense, number: int) -> None:
    expected = dense.weights[number]
    assert torch.equal(weight, expected) or torch.allclose(weight, expected, rtol=1e-5, atol=1e-6), (weight, expected)
    assert torch.equal(slots, dense.slots[number])
    assert not (weight * ~dense.masks[number]).any()


# of nine faults planted in g2gnet/copies.py 1,000 sequences find three, 2,000 find four: the long lane is the stronger
@pytest.mark.parametrize("sequences", [200, pytest.param(20000, marks=pytest.mark.long)])
def test_weights_and_wiring_never_come_apart(sequences):
    run_state_machine_as_test(
        Networks,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            report_multiple_bugs=False,
        ),
    )
