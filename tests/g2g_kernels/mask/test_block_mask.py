"""BlockMask: how its graph is drawn, what it says about itself, packed weights, relabelling and saving."""

import copy
import functools
import itertools
import math
import pickle

import helpers
import pytest
import torch
from helpers import MASK_CASES, MaskCase, dense_by_loop, neurons_of_units, packed_randn, row_with, seeded, with_one
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from g2g_kernels import BlockMask, GroupLayout

BUFFERS = ("unit_row", "unit_col", "row_ptr", "row_slot", "col_ptr", "col_slot")


def indices(mask: BlockMask) -> dict[str, torch.Tensor]:
    """Every index of a mask, by name."""
    modules = {"": mask, "rows.": mask.rows, "cols.": mask.cols}
    return {prefix + name: getattr(module, name) for prefix, module in modules.items() for name in module.INDICES}


every_case = pytest.mark.parametrize("case", MASK_CASES.values(), ids=MASK_CASES.keys())


@pytest.fixture(params=MASK_CASES.values(), ids=MASK_CASES.keys())
def mask(request) -> BlockMask:
    return request.param.mask()


def assert_index_is_right(mask: BlockMask) -> None:
    """Both indices, read row by row and column by column, against the coordinates of the slots."""
    grid = torch.zeros(mask.grid, dtype=torch.bool)
    grid[mask.unit_row.long(), mask.unit_col.long()] = True
    assert torch.equal(mask.present(), grid)
    coordinates = list(zip(mask.unit_row.tolist(), mask.unit_col.tolist(), strict=True))
    for axis, ptr, slot in ((0, mask.row_ptr, mask.row_slot), (1, mask.col_ptr, mask.col_slot)):
        ptr, slot = ptr.tolist(), slot.tolist()
        assert (ptr[0], ptr[-1], len(ptr)) == (0, len(coordinates), mask.grid[axis] + 1)
        for place in range(mask.grid[axis]):
            expected = sorted((c for c in coordinates if c[axis] == place), key=lambda c: c[1 - axis])
            assert [coordinates[s] for s in slot[ptr[place] : ptr[place + 1]]] == expected


def shuffled(mask: BlockMask, seed: int = 0) -> BlockMask:
    """The same graph with its units in other slots."""
    order = torch.randperm(mask.num_units, generator=seeded(seed))
    return BlockMask(mask.rows.layout, mask.cols.layout, mask.unit_row[order], mask.unit_col[order], mask.block_size)


@every_case
def test_probabilities_0_and_1_give_all_units_of_that_kind_and_no_other(case):
    masks = {each: case.mask(*each) for each in itertools.product((0.0, 1.0), repeat=2)}
    same = masks[1, 1].rows.layout.group_of[:, None] == masks[1, 1].cols.layout.group_of[None, :]
    for (p_inter, p_intra), mask in masks.items():
        dense = mask.to_dense()
        assert torch.equal(dense, same & bool(p_intra) | ~same & bool(p_inter))
        assert mask.is_full == bool(dense.all())
        assert mask.sparsity() == 1 - mask.density == 1 - dense.double().mean().item()


def test_units_stop_at_group_edges():
    """As few ranges of neurons in each group as can be, and alike: their lengths differ by at most one."""
    for case in MASK_CASES.values():
        mask = case.mask()
        for side in (mask.rows, mask.cols):
            ranges = [side.order[a:b].tolist() for a, b in itertools.pairwise(side.bounds.tolist())]
            assert ranges == neurons_of_units(side.layout, case.block_size)
            assert side.group_of_unit.tolist() == [int(side.layout.group_of[neurons[0]]) for neurons in ranges]


def test_defaults_are_p_intra_1_p_inter_015_and_units_of_64():
    mask = BlockMask.sample(GroupLayout(2048), GroupLayout(784), generator=seeded(0))
    assert (mask.block_size, mask.grid) == (64, (32, 16))
    inside = mask.rows.group_of_unit[:, None] == mask.cols.group_of_unit
    assert mask.present()[inside].all()
    assert set((mask.present() & ~inside).sum(1).tolist()) == {2, 3}  # ⌊0.15·14⌋ and ⌈0.15·14⌉


@pytest.mark.parametrize(
    ("out_groups", "in_groups", "own"),
    [
        (2, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (7, 8, [[0, 1], [2], [3], [4], [5], [6], [7]]),
        (1, 3, [[0, 1, 2]]),
        (5, 2, [[0], [0], [0], [1], [1]]),
        (4, 4, [[0], [1], [2], [3]]),
    ],
)
@pytest.mark.parametrize("kind", ["index", "interleaved", "random"])
def test_a_group_of_the_coarser_side_belongs_with_several_of_the_finer(out_groups, in_groups, own, kind):
    """At p_inter = 0 each neuron hears the groups that are its own, and no others; all of them are heard."""
    layouts = GroupLayout(13, out_groups, kind, seeded(0)), GroupLayout(21, in_groups, kind, seeded(1))
    mask = BlockMask.sample(*layouts, p_inter=0.0, block_size=2)
    heard = [[h in own[g] for h in layouts[1].group_of.tolist()] for g in layouts[0].group_of.tolist()]
    assert torch.equal(mask.to_dense(), torch.tensor(heard))
    assert mask.to_dense().any(0).all()


def test_units_stand_where_their_coordinates_say():
    """Seven outputs in groups 0 0 0 1 1 2 2, units of two: block rows {0,1} {2} {3,4} {5,6}."""
    mask = BlockMask(GroupLayout(7, 3), GroupLayout(4, 2), torch.tensor([3, 0, 1]), torch.tensor([0, 1, 0]), 2)
    expected = torch.zeros(7, 4, dtype=torch.bool)
    expected[5:7, 0:2] = expected[0:2, 2:4] = expected[2, 0:2] = True
    assert torch.equal(mask.to_dense(), expected)
    assert (mask.grid, mask.shape, mask.unit_shape) == ((4, 2), (7, 4), (2, 2))
    assert mask.unit_sizes.tolist() == [4, 4, 2]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (33, 50)])
def test_from_dense_gives_back_its_mask(shape, block_size):
    grid = torch.rand(*(math.ceil(side / block_size) for side in shape), generator=seeded(0)) < 0.4
    rows, cols = ([len(part) for part in neurons_of_units(GroupLayout(side, 1), block_size)] for side in shape)
    dense = grid.repeat_interleave(torch.tensor(rows), 0).repeat_interleave(torch.tensor(cols), 1)
    mask = BlockMask.from_dense(dense, block_size)
    assert torch.equal(mask.to_dense(), dense)
    assert mask.num_units == grid.sum()
    assert_index_is_right(mask)


def test_from_dense_takes_numbers_and_empty_masks_and_units_of_one_weight():
    numbers = torch.tensor([[0.0, 2.5], [1.0, 0.0]])
    assert torch.equal(BlockMask.from_dense(numbers).to_dense(), numbers.bool())
    assert BlockMask.from_dense(torch.zeros(3, 5, dtype=torch.bool), 2).num_units == 0
    assert torch.equal(BlockMask.from_dense(IN_PART, 1).to_dense(), IN_PART)


SAMPLE = functools.partial(BlockMask.sample, GroupLayout(8), GroupLayout(8))
TEN = MASK_CASES["ten outputs"].mask()
#: of which a unit of 2 × 2 is there in part
IN_PART = ~torch.eye(6, dtype=torch.bool)[:4].roll(3, 1) | (torch.arange(4)[:, None] != 2)


def units(rows, cols, block_size=2):
    return BlockMask(GroupLayout(7, 3), GroupLayout(4, 2), torch.tensor(rows), torch.tensor(cols), block_size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda p=p: SAMPLE(p_intra=p), "p_intra=.* must be a number from 0 to 1") for p in (-0.01, 1.01, math.nan)),
        *((lambda p=p: SAMPLE(p_inter=p), "p_inter=.* must be a number from 0 to 1") for p in (-0.01, 1.01, math.nan)),
        (lambda: SAMPLE(density=1.5), r"density=1\.5 must be"),
        (lambda: units([0, 4], [0, 0]), r"unit_row must lie in 0 … 3, not 0 … 4"),
        (lambda: units([0, -1], [0, 0]), r"unit_row must lie in 0 … 3, not -1 … 0"),
        (lambda: units([0, 1], [0, 2]), r"unit_col must lie in 0 … 1, not 0 … 2"),
        (lambda: units([1, 1], [0, 0]), "the mask names a unit twice"),
        (lambda: units([0, 1], [0]), "must match"),
        (lambda: units([[0], [1]], [[0], [1]]), "must match, 1-D"),
        (lambda: units([0], [0], 0), "block_size=0 must be a whole number from 1"),
        (lambda: BlockMask.from_dense(IN_PART, 2), r"unit \(1, 2\) of 2 × 2 weights is only partly present \(1 such"),
        *((lambda n=n: BlockMask.from_dense(torch.ones(*n)), "mask must be a matrix") for n in ((4,), (2, 2, 2))),
        (lambda: TEN.pack(torch.zeros(43, 10)), r"weight has shape \(43, 10\), this mask describes \(10, 43\)"),
        (lambda: TEN.unpack(torch.zeros(TEN.num_units + 1, 2, 3)), "values have shape .* this mask's packed weights"),
        (lambda: TEN.check_values(torch.zeros(2, TEN.num_units, 3)), "values have shape"),
    ],
)
def test_what_makes_no_mask_or_does_not_fit_one_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pictures_and_repr():
    layout = GroupLayout(8, 2)
    mask = BlockMask(layout, GroupLayout(6, 2), torch.tensor([0, 1, 3, 2]), torch.tensor([0, 3, 1, 2]), 2)
    assert mask.to_string() == "█░░░\n░░░█\n░░█░\n░█░░"
    assert BlockMask.full(layout, layout, 4).to_string() == "██\n██"
    assert repr(mask) == "BlockMask(8×6, 2 groups (index), block_size=2, 4 of 16 units, density=0.2500, device=cpu)"
    mixed = BlockMask.full(GroupLayout(4, 2, "interleaved"), GroupLayout(4, 2), 2)
    assert "2 groups (interleaved ← index)" in repr(mixed)


def test_picture_of_a_large_mask_is_limited():
    """Cells of 2 × 2 units: all four, two, three and none of them present, then one."""
    present = torch.zeros(4, 4, dtype=torch.bool)
    present[0:2, 0:2] = present[0, 2:4] = present[2:4, 0:2] = True
    present[3, 1] = False
    assert BlockMask.from_dense(present).to_string(max_cells=2) == "█▒\n▓░"
    present[0, 3] = False
    assert BlockMask.from_dense(present).to_string(max_cells=2) == "█▒\n▓░"
    large = MaskCase(300, 700, 2, "index", "index", 1).mask().to_string().splitlines()
    assert [len(line) for line in large] == [64] * 64


@given(
    out_size=st.integers(1, 40),
    in_size=st.integers(1, 40),
    groups=st.integers(1, 8),
    kinds=st.tuples(*[st.sampled_from(("index", "interleaved", "random"))] * 2),
    block_size=st.sampled_from((1, 2, 3, 5, 16, 64)),
    dtype=st.sampled_from((torch.float64, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 2**32),
)
def test_indices_counts_and_packed_weights_agree_for_any_sizes(
    out_size, in_size, groups, kinds, block_size, dtype, seed
):
    """Each unit in its place; unpack reads no padding, pack makes it zero."""
    mask = shuffled(MaskCase(out_size, in_size, min(groups, out_size, in_size), *kinds, block_size).mask(seed=seed))
    assert_index_is_right(mask)
    dense = dense_by_loop(mask, torch.ones(mask.num_units, *mask.unit_shape)).bool()
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.fan_in(), dense.sum(1))
    assert mask.density == dense.sum().item() / dense.numel() == mask.num_weights / dense.numel()
    assert mask.sparsity() == 1.0 - mask.density
    assert torch.equal(mask.valid().sum((1, 2)), mask.unit_sizes)
    assert mask.is_full == bool(dense.all())
    weight = torch.randn(mask.shape, generator=seeded(seed), dtype=dtype)
    values = torch.randn(mask.num_units, *mask.unit_shape, generator=seeded(1), dtype=dtype)
    packed, unpacked = mask.pack(weight), mask.unpack(values)
    assert (packed.shape, packed.dtype, unpacked.dtype) == (values.shape, dtype, dtype)
    assert torch.equal(unpacked, dense_by_loop(mask, values))
    assert torch.equal(dense_by_loop(mask, packed), weight * mask.to_dense())
    assert torch.equal(mask.unpack(packed), weight * mask.to_dense())
    assert torch.equal(mask.pack(unpacked), values * mask.valid())
    assert not packed[~mask.valid()].any()


@pytest.mark.parametrize("case", [(6, 4, 2, "index", "index", 2), (5, 7, 3, "random", "index", 2)])  # whole, clipped
def test_gradients_of_pack_and_unpack(case):
    mask = shuffled(MaskCase(*case).mask())
    weight = torch.randn(mask.shape, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    values = packed_randn(mask, 2, torch.float64).requires_grad_()
    # cubes, so that second derivatives depend on the input and the double-backward graph is needed
    for function, tensor in ((mask.pack, weight), (mask.unpack, values)):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t) ** 3, (tensor,))
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t**3), (tensor,))


def test_relabel_moves_slots_in_place(mask):
    mask = shuffled(mask)
    expected = mask.present()
    absent = (~expected).nonzero()
    k = min(3, len(absent), mask.num_units)
    slots = torch.randperm(mask.num_units, generator=seeded(1))[:k]
    grown = absent[torch.randperm(len(absent), generator=seeded(2))[:k]]
    places = [(getattr(mask, name).data_ptr(), getattr(mask, name).shape) for name in BUFFERS]
    expected[mask.unit_row[slots].long(), mask.unit_col[slots].long()] = False
    expected[grown[:, 0], grown[:, 1]] = True

    mask.relabel_(slots, grown[:, 0], grown[:, 1])

    assert torch.equal(mask.present(), expected)
    assert torch.stack([mask.unit_row[slots], mask.unit_col[slots]], 1).tolist() == grown.tolist()
    assert [(getattr(mask, name).data_ptr(), getattr(mask, name).shape) for name in BUFFERS] == places
    assert_index_is_right(mask)
    values = packed_randn(mask, 3)
    assert torch.equal(mask.unpack(values), dense_by_loop(mask, values))
    before = [getattr(mask, name).clone() for name in BUFFERS]
    mask.relabel_(slots[:0], grown[:0, 0], grown[:0, 1])  # of nothing
    assert all(torch.equal(getattr(mask, name), old) for name, old in zip(BUFFERS, before, strict=True))


def test_a_mask_saves_its_wiring_alone_moves_every_index_and_comes_back_from_pickle(mask):
    assert not list(mask.parameters())
    assert [name for name, _ in mask.named_buffers()] == list(mask.state_dict()) == ["wiring"]
    moved = copy.deepcopy(mask).to("meta")
    assert {tensor.device.type for tensor in (*indices(moved).values(), *moved.buffers())} == {"meta"}
    torch.testing.assert_close(indices(copy.deepcopy(mask).to(torch.float16)), indices(mask), rtol=0, atol=0)
    mask = shuffled(mask)
    again = pickle.loads(pickle.dumps(mask))
    assert_same_mask(again, mask)
    assert repr(again) == repr(mask)


def assert_same_mask(loaded: BlockMask, saved: BlockMask) -> None:
    values = torch.randn(saved.num_units, *saved.unit_shape, generator=seeded(0))
    assert torch.equal(loaded.to_dense(), saved.to_dense())
    assert torch.equal(loaded.unpack(values), saved.unpack(values))  # each slot means the same unit
    assert torch.equal(loaded.rows.layout.group_of, saved.rows.layout.group_of)
    assert torch.equal(loaded.cols.layout.group_of, saved.cols.layout.group_of)
    assert loaded.block_size == saved.block_size
    assert_index_is_right(loaded)


@every_case
def test_state_dict_into_a_mask_drawn_differently(case):
    """Other units, another number and size of them and, for random layouts, other groups."""
    saved = shuffled(case.mask(seed=1))
    for p_inter, block_size in itertools.product((0.0, 0.9), (case.block_size, 5)):
        loaded = case._replace(block_size=block_size).mask(p_inter=p_inter, seed=2)
        loaded.load_state_dict(helpers.saved_and_read(saved.state_dict()))
        assert_same_mask(loaded, saved)


def test_state_dict_into_a_mask_of_the_same_size_is_loaded_in_place():
    case = MaskCase(64, 64, 4, "random", "random", 4)
    saved, loaded = (case.mask(p_inter=0.25, seed=seed) for seed in (1, 2))
    assert saved.num_units == loaded.num_units
    assert not torch.equal(saved.to_dense(), loaded.to_dense())
    addresses = {name: tensor.data_ptr() for name, tensor in indices(loaded).items()}
    loaded.load_state_dict(helpers.saved_and_read(saved.state_dict()))
    assert {name: tensor.data_ptr() for name, tensor in indices(loaded).items()} == addresses
    assert_same_mask(loaded, saved)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_copy_and_a_mask_with_another_ones_state_are_independent_of_it(loaded):
    mask = MASK_CASES["single weights"].mask(p_inter=0.5, seed=1)
    before = mask.to_dense()
    twin = MASK_CASES["single weights"].mask(p_inter=0.1, seed=1) if loaded else copy.deepcopy(mask)
    twin.load_state_dict(mask.state_dict())
    row, col = (~twin.present()).nonzero()[0]
    twin.relabel_(torch.tensor([0]), row[None], col[None])
    assert torch.equal(mask.to_dense(), before)
    assert not torch.equal(twin.to_dense(), before)
    for each in (mask, twin):
        assert_index_is_right(each)
        assert each.describes(each.wiring)


#: what is changed in the row that describes a mask, part by part with the right checksums or as a whole
CORRUPTED = {
    "beyond": ({"unit_row": with_one(0, 99)}, r"mask: unit_row must lie in 0 … 7, not 0 … 99"),
    "below 0": ({"unit_col": with_one(0, -1)}, r"mask: unit_col must lie in 0 … \d+, not -1"),
    "twice": (dict.fromkeys(("unit_row", "unit_col"), lambda t: torch.cat([t, t[:1]])), "the mask names a unit twice"),
    "short": ({"unit_row": lambda t: t[:-1]}, r"mask: wiring of 10 × 43 weights has \d+ numbers"),
    "units of 0": ({"block_size": lambda size: 0}, "mask: block_size=0 must be a whole number from 1"),
    "one group": ({"in_group_of": lambda t: t * 0}, r"mask: unit_col must lie in"),
    "two groups": ({"out_group_of": lambda t: t.clamp(max=1)}, r"mask: unit_row must lie in"),
    "no group": ({"out_group_of": with_one(0, -3)}, r"mask: group_of must hold group numbers"),
    "11 outputs": ({"out_group_of": lambda t: torch.cat([t, t[-1:] + 1])}, r"is \(11, 43\), this layer is \(10, 43\)"),
    "long": ({"unit_row": lambda t: t.expand(99, -1).flatten()}, r"wiring has \d+ numbers, more than \(10, 43\)"),
    "halves": (lambda row: row + 0.5, "do not match: it is an average of networks with different wirings"),
    "NaN": (lambda row: row * torch.nan, "do not match"),
    "rounded": (lambda row: row.to(torch.float8_e5m2).float(), "do not match"),
    "in 16 bits": (lambda row: row.bfloat16(), "bfloat16 rounds its numbers; keep mask.wiring in float32"),
    "one number": (lambda row: torch.cat([row[:60], row[60:61] + 1, row[61:]]), "do not match"),
    "a matrix": (lambda row: row[None], r"must be a row of numbers, not of shape \(1, \d+\)"),
    "nothing": (lambda row: row[:0], "must be a row of numbers"),
    "complex": (lambda row: row.to(torch.complex64), "must be a row of numbers"),
}


@pytest.mark.parametrize(("change", "message"), CORRUPTED.values(), ids=CORRUPTED)
def test_corrupted_state_is_refused_and_leaves_the_mask_alone(change, message):
    saved, layer = MASK_CASES["ten outputs"].mask(), nn.ModuleDict({"mask": MASK_CASES["ten outputs"].mask(seed=5)})
    row = row_with(saved, **change) if isinstance(change, dict) else change(row_with(saved))
    before = {name: tensor.clone() for name, tensor in indices(layer["mask"]).items()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({"mask.wiring": row})
    torch.testing.assert_close(indices(layer["mask"]), before, rtol=0, atol=0)
    assert layer["mask"].block_size == 3


def test_a_state_averaged_with_equal_ones_is_the_same_mask():
    row = row_with(TEN)
    for average in ((row + row) / 2, row.double(), sum(row * w for w in [0.1] * 10)):  # the last one rounds
        layer = nn.ModuleDict({"mask": MASK_CASES["ten outputs"].mask(seed=5)})
        layer.load_state_dict({"mask.wiring": average})
        assert torch.equal(layer["mask"].state_dict()["wiring"], row)


def test_an_average_of_two_wirings_is_refused_where_every_mean_is_whole():
    """Two units in other rows, whose means are rows."""
    case = MASK_CASES["single weights"]
    for seed in range(50):
        mask = case.mask(seed=seed)
        row, other = row_with(mask), row_with(mask, unit_row=lambda t: (t + 2 * (torch.arange(len(t)) % 3 == 0)) % 12)
        mean = (row + other) / 2
        mean[-2:] = mean[-2:].round()  # as if those were whole, too
        with pytest.raises(ValueError, match="average of networks with different wirings"):
            BlockMask.from_state({"wiring": mean}, mask.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask, other: mask.relabel_(torch.tensor([0]), mask.unit_row[:1].clone(), mask.unit_col[:1].clone()),
        lambda mask, other: mask.load_state_dict(other.state_dict()),
        lambda mask, other: mask.become_(other),
        lambda mask, other: mask.replace_by_(other),
        lambda mask, other: mask.to("meta"),
        lambda mask, other: copy.deepcopy(mask),
        lambda mask, other: pickle.loads(pickle.dumps(mask)),
    ],
    ids=["relabel_", "load_state_dict", "become_", "replace_by_", "to", "deepcopy", "pickle"],
)
@pytest.mark.parametrize("kind", ["random", "index"])  # of other groups, or of none that need a permutation
def test_operators_get_the_tensors_that_a_mask_has_now(change, kind):
    mask = BlockMask.sample(GroupLayout(32, 4), GroupLayout(32, 4), block_size=8, generator=seeded(0))
    layout = GroupLayout(32, 4, kind, seeded(1))
    other = BlockMask.sample(layout, layout, p_inter=0.15, block_size=8, generator=seeded(2))
    assert mask.tensors() is mask.tensors()
    changed = change(mask, other)
    mask = changed if isinstance(changed, BlockMask) else mask
    index = (getattr(mask, name) for name in mask.INDICES)
    found = mask.tensors()
    assert vars(found).keys() == {"rows_then"}  # nothing that a backend derived
    for then, now in zip(found.rows_then, (found.row_order, found.row_bounds), strict=True):
        assert now.is_meta or (torch.equal(then, now) and then is not now)
    for own, tensor in zip((*index, *mask.rows.tensors(), *mask.cols.tensors()), found, strict=True):
        assert tensor is own or tensor.numel() == own.numel() == 0
    assert (found.shape, found.grid) == (mask.shape, mask.grid)


def test_missing_keys_are_named():
    layer = nn.ModuleDict({"mask": MASK_CASES["ten outputs"].mask()})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mask.wiring"'):
        layer.load_state_dict({})
