"""GroupLayout: who belongs to which group."""

import numpy as np
import pytest
import torch
from helpers import seeded
from hypothesis import given
from hypothesis import strategies as st

from g2g_kernels import BlockMask, GroupLayout


@pytest.mark.parametrize(
    ("layout", "group_of"),
    [
        (GroupLayout(10, 8), [0, 0, 1, 1, 2, 3, 4, 5, 6, 7]),
        (GroupLayout(7, 3, "index"), [0, 0, 0, 1, 1, 2, 2]),
        (GroupLayout(7, 3, "interleaved"), [0, 1, 2, 0, 1, 2, 0]),  # i mod G
        (GroupLayout(2048), [i // 256 for i in range(2048)]),  # eight, by default
    ],
    ids=repr,
)
def test_groups_by_hand(layout, group_of):
    assert layout.group_of.tolist() == group_of
    assert layout.sizes.tolist() == [group_of.count(group) for group in range(layout.num_groups)]


@given(
    size=st.integers(1, 300),
    num_groups=st.integers(1, 17),
    kind=st.sampled_from(("index", "interleaved", "random")),
    seed=st.integers(0, 99),
)
def test_groups_are_balanced_and_the_first_are_the_larger(size, num_groups, kind, seed):
    num_groups = min(size, num_groups)
    layout = GroupLayout(size, num_groups, kind, seeded(seed))
    assert layout.group_of.shape == (size,)
    assert layout.group_of.dtype == torch.int64
    whole, larger = divmod(size, num_groups)
    counted = [layout.group_of.tolist().count(group) for group in range(num_groups)]
    assert counted == [whole + 1] * larger + [whole] * (num_groups - larger)
    assert layout.sizes.tolist() == counted


def test_random_groups_follow_the_generator_or_else_the_global_seed():
    drawn, again, other = (GroupLayout(100, 8, "random", seeded(seed)).group_of for seed in (1, 1, 2))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert not torch.equal(drawn, GroupLayout(100, 8, "index").group_of)
    torch.manual_seed(1)
    assert torch.equal(drawn, GroupLayout(100, 8, "random").group_of)


def test_random_assignment_is_uniform():
    """Each neuron is in group 0 with probability 3/10: over 2,000 draws within 5 σ (σ = √(n·p·q) = 20.5)."""
    draw = seeded(0)
    in_group_0 = sum((GroupLayout(10, 4, "random", draw).group_of == 0).long() for _ in range(2000))
    assert (in_group_0 - 600).abs().max() < 5 * 20.5


@given(size=st.integers(1, 60), num_groups=st.integers(1, 9), kind=st.sampled_from(("index", "interleaved", "random")))
def test_from_assignment_gives_back_the_layout_from_a_copy(size, num_groups, kind):
    layout = GroupLayout(size, min(size, num_groups), kind, seeded(3))
    given = layout.group_of.clone()
    again = GroupLayout.from_assignment(given)
    given.zero_()
    assert torch.equal(again.group_of, layout.group_of)
    assert (again.size, again.num_groups) == (layout.size, layout.num_groups)
    if size > 20 and num_groups > 1:
        assert again.kind == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 10, "kind": "rows"}, "kind='rows' is not a group layout; choose one of index, interleaved, random"),
        ({"size": 10, "num_groups": 0}, "num_groups=0 must be a whole number from 1"),
        ({"size": 3, "num_groups": 4}, "3 neurons cannot fill num_groups=4 groups"),
        ({"sizes": []}, "at least one"),
        ({"sizes": [3, 0]}, r"sizes\[1\]=0 must be"),
        ({"size": 8, "sizes": [4, 4]}, "neither size nor kind"),
        ({"sizes": [4, 4], "kind": "random"}, "neither size nor kind"),
    ],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupLayout(**arguments)


@pytest.mark.parametrize("whole", [np.int64, np.uint8, torch.tensor])
def test_sizes_may_be_integers_of_numpy_or_tensors(whole):
    """``labels.max() + 1`` is one."""
    layout = GroupLayout(whole(10), whole(5))
    assert repr(layout) == "GroupLayout(10, num_groups=5, kind='index')"
    assert (type(layout.size), type(layout.num_groups)) == (int, int)
    assert torch.equal(layout.group_of, GroupLayout(10, 5).group_of)
    assert type(BlockMask.full(layout, layout, whole(2)).block_size) is int


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), np.float64(2), torch.tensor(2.0), torch.tensor([2, 3]), "2", None]
)
def test_what_is_no_whole_number_is_no_size(value):
    with pytest.raises(ValueError, match=r"size=.* must be a whole number from 1"):
        GroupLayout(value)


def test_malformed_assignments_are_refused():
    """Nobody in group 1; more groups than neurons; one below 0; no neurons; a matrix."""
    for group_of in ([0, 2, 0, 2], [0, 5, 0, 1], [0, -1, 1], [], [[0, 1], [0, 1]]):
        with pytest.raises(ValueError, match="group"):
            GroupLayout.from_assignment(torch.tensor(group_of, dtype=torch.int64))


def test_groups_of_unequal_sizes_are_contiguous_and_saved_with_a_layer():
    layout = GroupLayout(sizes=[9, 1, 4])
    assert layout.group_of.tolist() == [0] * 9 + [1] + [2] * 4
    assert (layout.size, layout.num_groups, layout.kind) == (14, 3, "index")
    mask = BlockMask.sample(layout, layout, p_intra=1.0, p_inter=0.0, block_size=3)
    same = layout.group_of[:, None] == layout.group_of
    assert torch.equal(mask.to_dense(), same)
    assert BlockMask.from_state(mask.state_dict()).equals(mask)
    again = GroupLayout.from_assignment(torch.tensor([1, 0, 0, 0, 1, 0]))
    assert again.sizes.tolist() == [4, 2]
    assert again.kind == "random"
