"""Random sequences of what people do to networks, their copies and their files, beside dense twins with explicit masks.

After every rule the dense weights and masks of all networks are those of their twins, or an error was raised and
nothing changed. The faults at the end, planted one by one, are found.
"""

import copy
import functools
import io
import itertools
from dataclasses import dataclass

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

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.mask import packing
from g2gnet import DSTScheduler, G2GLinear, sync_wiring, tie_wiring, untie_wiring
from g2gnet.dst import scheduler as scheduler_module
from g2gnet.weights import packed_weights, tied_averages

SIZES = (7, 9, 5)  # units of 2: some are shorter than others, so there is padding
INPUTS = torch.rand(3, SIZES[0], generator=seeded(1))
DECAY = 0.7


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


def in_another_order(net: nn.Sequential, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """The state of a network with the same units in other slots."""
    state = {}
    for number, layer in enumerate(net):
        order = torch.randperm(layer.mask.num_units, generator=draw)
        state[f"{number}.values"] = layer.values.detach()[order]
        state[f"{number}.bias"] = layer.bias.detach().clone()
        changes = {name: lambda index, order=order: index[order] for name in ("unit_row", "unit_col")}
        state[f"{number}.mask.wiring"] = row_with(layer.mask, **changes)
    return state


@dataclass(eq=False)
class Dense:
    """A network as it should be: the dense weights, masks and biases of its layers, and which unit each slot has."""

    weights: list[torch.Tensor]
    masks: list[torch.Tensor]
    biases: list[torch.Tensor]
    slots: list[torch.Tensor]

    @classmethod
    def of(cls, net: nn.Sequential) -> "Dense":
        return cls.of_state(net.state_dict())

    @classmethod
    def of_state(cls, state: dict[str, torch.Tensor]) -> "Dense":
        """What a state says, read without a layer."""
        parts: tuple[list, ...] = [], [], [], []
        for number in (0, 1):
            mask = network(0)[number].mask  # the grid of all of them
            units = packing.View(*units_of(state[f"{number}.mask.wiring"]), mask.rows.side, mask.cols.side)
            values = state[f"{number}.values"].detach()
            dense = packing.unpacked(values, units), packing.unpacked(torch.ones_like(values), units) > 0
            found = *dense, state[f"{number}.bias"].detach().clone(), packing.flat_unit(units)
            for part, tensor in zip(parts, found, strict=True):
                part.append(tensor)
        return cls(*parts)

    def copy(self) -> "Dense":
        return Dense(*([tensor.clone() for tensor in part] for part in vars(self).values()))

    def take(self, other: "Dense", layers=(0, 1)) -> None:
        for number in layers:
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
                mine[number] = theirs[number].clone()

    def follow(self, source: "Dense", number: int) -> None:
        """Takes over the units of ``source``: those that it has keep their weights, others get source's."""
        kept = self.masks[number]
        weight = torch.where(kept, self.weights[number], source.weights[number])
        self.masks[number], self.slots[number] = source.masks[number].clone(), source.slots[number].clone()
        self.weights[number] = weight * self.masks[number]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for weight, mask, bias in zip(self.weights, self.masks, self.biases, strict=True):
            x = x @ (weight * mask).T + bias
        return x


@dataclass(eq=False)
class Twins:
    """A network, what it should be, and the network that it is a tied average of."""

    net: nn.Sequential
    dense: Dense
    source: "Twins | None" = None


class PlantedError(RuntimeError):
    pass


def fail(*_):
    raise PlantedError


class Networks(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 3), tied=st.integers(0, 2))
    def begin(self, seed, tied):
        net = copy.deepcopy(network(2 * seed))
        self.nets = [Twins(net, Dense.of(net))]  # the first one is trained and rewired
        self.optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
        self.dst = DSTScheduler(net, self.optimizer, interval=1, fraction=0.5, prune="random", grow="random")
        self.files: list[tuple[dict, Dense | Twins]] = []  # a state and what is in it: a copy, or the network's own
        self.draw = seeded(seed)
        self.save(0, "kept")
        self.save(0, "another order")
        for number in (0, 1):
            self.copy_a_network(number)
            if number < tied:  # an average, and an average of that
                self.tie(number, 1)

    def pick(self, which) -> Twins:
        return self.nets[which % len(self.nets)]

    def averages(self, source: Twins) -> list[Twins]:
        return [each for each in self.nets if each.source is source]

    def follow(self, source: Twins, number: int) -> None:
        for each in self.averages(source):
            each.dense.follow(source.dense, number)
            self.follow(each, number)

    def took_a_mask(self, twins: Twins, number: int) -> None:
        """The twins after a layer was given units from outside: equal ones get equal slots, others end a tie."""

        def same(one: Twins, other: Twins) -> bool:
            return torch.equal(one.dense.masks[number], other.dense.masks[number])

        if twins.source is not None:
            if not same(twins, twins.source):
                twins.source = None
                self.took_a_mask_as_source(twins, number, same)
                return
            twins.dense.slots[number] = twins.source.dense.slots[number].clone()
        self.took_a_mask_as_source(twins, number, same)

    def took_a_mask_as_source(self, twins, number, same):
        for each in self.averages(twins):
            if same(twins, each):
                each.dense.slots[number] = twins.dense.slots[number].clone()
                self.follow(each, number)
            else:
                each.source = None

    # --- what is done to a network ------------------------------------------------------------------------------

    @rule(which=st.integers(0, 3), through_data=st.booleans())
    def write(self, which, through_data):
        """Training, rounding in place: whatever is written to one changes no other."""
        twins = self.pick(which)
        for number, layer in enumerate(twins.net):
            change = torch.randn(layer.mask.shape, generator=self.draw)
            with torch.no_grad():
                (layer.values.data if through_data else layer.values).add_(layer.mask.pack(change))
                layer.bias.add_(1)
            twins.dense.weights[number] += change * twins.dense.masks[number]
            twins.dense.biases[number] += 1

    @rule(fails=st.booleans())
    def rewire(self, fails):
        twins = self.nets[0]
        if fails:
            twins.net[1].rewire_ = fail  # after the first layer was rewired
            with pytest.raises(PlantedError):
                self.dst.step()
            del twins.net[1].rewire_
            return
        before = [layer.mask.flat_unit() for layer in twins.net]
        self.dst.step()
        twins.source = None  # it goes its own way
        for number, layer in enumerate(twins.net):
            assert not torch.equal(before[number], layer.mask.flat_unit())
            twins.dense.masks[number], twins.dense.slots[number] = layer.mask.to_dense(), layer.mask.flat_unit()
            twins.dense.weights[number] *= twins.dense.masks[number]
            self.follow(twins, number)

    @rule(which=st.integers(0, 3), dtype=st.sampled_from([None, torch.float64]))
    def convert(self, which, dtype):
        self.pick(which).net.to(dtype or torch.float32).float()
        self.files = [each for each in self.files if each[1] is not self.pick(which)]  # those have the old tensors

    # --- files --------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 3), how=st.sampled_from(["kept", "copied", "written", "another order"]))
    def save(self, which, how):
        twins = self.pick(which)
        state = twins.net.state_dict() if how != "another order" else in_another_order(twins.net, self.draw)
        if how == "copied":
            state = copy.deepcopy(state)
        if how == "written":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.files.append((state, twins if how == "kept" else Dense.of_state(state)))

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 99), into=st.integers(0, 3))
    def load(self, which, into):
        state, content = self.files[which % len(self.files)]
        dense = content.dense if isinstance(content, Twins) else content
        self.load_into(self.pick(into), state, dense.copy())

    @rule(seed=st.integers(4, 9), into=st.integers(0, 3))
    def load_another(self, seed, into):
        """Of an odd seed it has another number of units."""
        net = copy.deepcopy(network(seed))
        self.load_into(self.pick(into), net.state_dict(), Dense.of(net))

    def load_into(self, twins, state, dense, layers=(0, 1)):
        self.leave_kept_states(twins, state)
        twins.net.load_state_dict(state)
        self.loaded(twins, dense, layers)

    def leave_kept_states(self, twins, state):
        """Weights of another number of units are in memory of their own: those who kept the old ones have them."""
        if any(state[f"{n}.values"].shape != twins.net[n].values.shape for n in (0, 1)):
            self.files = [each for each in self.files if each[1] is not twins]

    def loaded(self, twins, dense, layers=(0, 1)):
        for number in layers:
            twins.dense.take(dense, [number])
            self.took_a_mask(twins, number)

    @rule(
        seed=st.integers(4, 9),
        into=st.integers(0, 3),
        spoil=st.sampled_from(["values", "mask.wiring", "short values", "a unit twice", "an average", "whole numbers"]),
    )
    def load_half(self, seed, into, spoil):
        """Layer 0 is spoiled and stays as it is; layer 1 is loaded, as PyTorch does."""
        twins, other = self.pick(into), copy.deepcopy(network(seed))
        state = other.state_dict()
        self.leave_kept_states(twins, state)
        if f"0.{spoil}" in state:
            del state[f"0.{spoil}"]
        elif spoil == "short values":
            state["0.values"] = state["0.values"][1:]
        elif spoil == "an average":
            state["0.mask.wiring"] = (state["0.mask.wiring"] + network(seed - 2)[0].mask.wiring) / 2
        elif spoil == "whole numbers":
            state["0.values"] = state["0.values"].long()
        else:
            changes = dict.fromkeys(("unit_row", "unit_col"), lambda index: torch.cat([index[1:2], index[1:]]))
            state["0.mask.wiring"] = row_with(other[0].mask, **changes)
        with pytest.raises(RuntimeError, match=r"0\.(values|mask)"):
            twins.net.load_state_dict(state)
        twins.dense.biases[0] = other[0].bias.detach().clone()
        self.loaded(twins, Dense.of(other), [1])

    # --- copies, ties and what is written into buffers --------------------------------------------------------------

    @precondition(lambda self: len(self.nets) < 4)
    @rule(which=st.integers(0, 3))
    def copy_a_network(self, which):
        twins = self.pick(which)
        self.nets.append(Twins(copy.deepcopy(twins.net), twins.dense.copy()))

    @rule(which=st.integers(0, 3), to=st.integers(1, 3))
    def tie(self, which, to):
        source, average = self.pick(which), self.pick(which + to)
        if source is average:
            return
        if any(a.values.shape != b.values.shape for a, b in zip(source.net, average.net, strict=True)):
            with pytest.raises(ValueError, match="packed weights"):
                tie_wiring(source.net, average.net)
            return
        above = source
        while above.source is not None:
            above = above.source
            if above is average:
                with pytest.raises(ValueError, match="untie_wiring"):
                    tie_wiring(source.net, average.net)
                return
        tie_wiring(source.net, average.net)
        average.source = source
        for number in (0, 1):
            average.dense.follow(source.dense, number)
            self.follow(average, number)

    @rule(which=st.integers(0, 3))
    def untie(self, which):
        untie_wiring(self.pick(which).net)
        self.pick(which).source = None

    @rule(which=st.integers(0, 3), to=st.integers(1, 3))
    def sync(self, which, to):
        source, target = self.pick(which), self.pick(which + to)
        shapes = [[layer.values.shape for layer in each.net] for each in (source, target)]
        if source is target or target.source not in (None, source) or self.averages(target) or shapes[0] != shapes[1]:
            return
        sync_wiring(source.net, target.net)
        for number in (0, 1):
            target.dense.follow(source.dense, number)

    @rule(which=st.integers(0, 3))
    def average(self, which):
        """A step of a tied average, over buffers too, which rounds them."""
        twins = self.pick(which)
        if twins.source is None:
            return
        self.files = [each for each in self.files if each[1] is not twins]  # those have the rounded buffers
        with torch.no_grad():
            for mine, theirs in zip(twins.net.parameters(), twins.source.net.parameters(), strict=True):
                mine.copy_(DECAY * mine + (1 - DECAY) * theirs)
            for mine, theirs in zip(twins.net.buffers(), twins.source.net.buffers(), strict=True):
                mine.copy_((DECAY + 1e-3) * mine + (1 - DECAY) * theirs)
        for mine, theirs in ((part(twins), part(twins.source)) for part in (weights, biases)):
            for number in (0, 1):
                mine[number] = DECAY * mine[number] + (1 - DECAY) * theirs[number]

    @rule(which=st.integers(0, 3), to=st.integers(1, 3))
    def copy_parameters_and_buffers(self, which, to):
        """A hard update, and what DistributedDataParallel does."""
        source, target = self.pick(which), self.pick(which + to)
        shapes = [[layer.values.shape for layer in each.net] for each in (source, target)]
        if source is target or target.source not in (None, source) or shapes[0] != shapes[1]:
            return
        with torch.no_grad():
            for mine, theirs in zip(
                [*target.net.parameters(), *target.net.buffers()],
                [*source.net.parameters(), *source.net.buffers()],
                strict=True,
            ):
                mine.copy_(theirs)
        target.net(INPUTS)
        if target.source is None:
            self.loaded(target, source.dense)
        else:
            target.dense.take(source.dense)

    @rule(which=st.integers(0, 3), to=st.integers(0, 3), detached=st.booleans())
    def call_with_the_tensors_of_another(self, which, to, detached):
        host, other = self.pick(which), self.pick(which + to)
        given = {**dict(other.net.named_parameters()), **other.net.state_dict()}
        if detached:
            given = {name: tensor.detach().clone() for name, tensor in given.items()}
        result = torch.func.functional_call(host.net, given, (INPUTS,))
        torch.testing.assert_close(result, other.dense(INPUTS))

    # --- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def networks_are_their_twins(self):
        for each in getattr(self, "nets", ()):
            for number, layer in enumerate(each.net):
                values, mask = layer.weights()
                weight = packing.unpacked(values.detach(), mask._view())
                compare(weight, mask.flat_unit(), each.dense, number)

    def teardown(self):
        if not hasattr(self, "nets"):
            return
        for each in self.nets:
            torch.testing.assert_close(each.net(INPUTS), each.dense(INPUTS))
            self.save(self.nets.index(each), "copied")
        for state, content in self.files:
            found = Dense.of_state(state)
            for number in (0, 1):
                expected = content.dense if isinstance(content, Twins) else content
                compare(found.weights[number], found.slots[number], expected, number)
                again = copy.deepcopy(network(4))
                again.load_state_dict(state)  # its checksums are right


def weights(twins: Twins) -> list[torch.Tensor]:
    return twins.dense.weights


def biases(twins: Twins) -> list[torch.Tensor]:
    return twins.dense.biases


def compare(weight: torch.Tensor, slots: torch.Tensor, dense: Dense, number: int) -> None:
    torch.testing.assert_close(weight, dense.weights[number], rtol=1e-5, atol=1e-5)
    assert torch.equal(slots, dense.slots[number])
    assert not (weight * ~dense.masks[number]).any()


def run(sequences: int, derandomize: bool = False) -> None:
    run_state_machine_as_test(
        Networks,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=10,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            report_multiple_bugs=False,
        ),
    )


#: sequences of the default run
SEQUENCES = 150


@pytest.mark.parametrize("sequences", [SEQUENCES, pytest.param(20000, marks=pytest.mark.long)])
def test_weights_and_wiring_never_come_apart(sequences):
    run(sequences)


def keeps_what_is_in_the_slot(source, target):
    """New units have the weights of those that had their slots, as if packed weights were averaged blindly."""
    values = target.values.detach().clone()
    TAKE_WIRING(source, target)
    if values.shape == target.values.shape:
        target.write_(values)


def takes_the_mask_only(source, target):
    target.mask.become_(source.mask)


def shares_the_mask(self, memo):
    twin = DEEPCOPY(self, memo)
    twin._modules["mask"] = self._own_mask
    return twin


def reads_in_evaluation_mode_only(self):
    if not self.training:
        READ_WIRING(self)


def publishes_anew(self, other):
    self.replace_by_(copy.deepcopy(other))


def loads_what_is_there(layer, state, prefix):
    """Without a look at what is missing or does not fit."""
    try:
        return MASK_TO_LOAD(layer, state, prefix)
    except ValueError:
        return None


def forgets_to_undo(self, slots, units, apply):
    REWIRE(self, slots, units, apply)
    return lambda: None


def rewires_its_averages_only(layer):
    for average in tied_averages.averages_of(layer):
        tied_averages.take_wiring(layer, average)


TAKE_WIRING, DEEPCOPY, MASK_TO_LOAD = tied_averages.take_wiring, G2GLinear.__deepcopy__, packed_weights._mask_to_load
READ_WIRING, REWIRE = G2GLinear._read_wiring, G2GLinear.rewire_

FAULTS = {
    "an average keeps what is in the slot": (tied_averages, "take_wiring", keeps_what_is_in_the_slot),
    "an average takes the mask only": (tied_averages, "take_wiring", takes_the_mask_only),
    "a copy shares the mask": (G2GLinear, "__deepcopy__", shares_the_mask),
    "the wiring is read in evaluation mode only": (G2GLinear, "_read_wiring", reads_in_evaluation_mode_only),
    "ties take no notice of a load": (packed_weights, "after_other_units", lambda layer: None),
    "an average is saved as it drifted": (G2GLinear, "settle", lambda self: None),
    "a new buffer for the same weights": (BlockMask, "become_", publishes_anew),
    "half a state is loaded": (packed_weights, "_mask_to_load", loads_what_is_there),
    "an update that failed is not undone": (G2GLinear, "rewire_", forgets_to_undo),
    "the average of an average stays": (tied_averages, "rewire_averages", rewires_its_averages_only),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    monkeypatch.setattr(*fault)
    if fault[1] == "rewire_averages":
        monkeypatch.setattr(scheduler_module, "rewire_averages", fault[2])
    with pytest.raises(Exception):  # noqa: B017, PT011  (groups of errors, of a rule and of the end)
        run(SEQUENCES, derandomize=True)
