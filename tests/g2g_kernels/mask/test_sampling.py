"""Draws of units, also from grids so large that nothing of their size is formed."""

import math

import pytest
import torch
from helpers import seeded

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.mask import sampling
from g2g_kernels.mask.groups import partners


@pytest.fixture(params=["usual grids", "large grids"], autouse=True)
def grids(request, monkeypatch):
    if request.param == "large grids":
        monkeypatch.setattr(sampling, "LARGEST_GRID", 0)


@pytest.mark.parametrize("groups", [(4, 4), (2, 6), (6, 2), (1, 3)])
@pytest.mark.parametrize("probabilities", [(1.0, 0.15), (0.3, 0.0), (0.0, 1.0), (0.8, 0.6)])
def test_each_row_has_its_share_of_units_inside_and_between_groups(groups, probabilities):
    out, into = (GroupLayout(size, count, kind="interleaved") for size, count in zip((37, 50), groups, strict=True))
    mask = BlockMask.sample(out, into, *probabilities, block_size=2, generator=seeded(0))
    own = partners(*groups)[mask.rows.group_of_unit][:, mask.cols.group_of_unit]
    for candidates, p in ((own, probabilities[0]), (~own, probabilities[1])):
        drawn, expected = (mask.present() & candidates).sum(1), candidates.sum(1) * p
        assert ((drawn - expected).abs() < 1).all()


def test_places_within_a_row_are_uniform_and_independent():
    """3 of 20 places in each of 4,000 rows: every place, and every pair of neighbours, as often as chance has it. A
    place is drawn with probability 3/20, a pair with 3·2/(20·19). Counts of 4,000 rows must lie within 5 σ."""
    rows, draw = 4000, seeded(2)
    mask = BlockMask.sample(GroupLayout(rows, 2), GroupLayout(40, 2), 0.0, 0.15, 1, draw)
    dense = mask.to_dense()
    drawn = torch.cat([dense[: rows // 2, 20:], dense[rows // 2 :, :20]])
    assert drawn.sum(1).tolist() == [3] * rows
    p, pair = 3 / 20, 6 / 380
    assert (drawn.sum(0) - rows * p).abs().max() < 5 * math.sqrt(rows * p * (1 - p))
    together = (drawn & drawn.roll(1, dims=1)).sum(0)
    assert (together - rows * pair).abs().max() < 5 * math.sqrt(rows * pair * (1 - pair))
    # neighbouring rows are drawn apart: as many places in common as two independent draws share
    assert abs((drawn[1:] & drawn[:-1]).sum().item() - (rows - 1) * 20 * p * p) < 5 * math.sqrt(rows * 20 * p * p)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_a_density_is_that_of_all_units(density):
    mask = BlockMask.sample(GroupLayout(40), GroupLayout(30), density=density, block_size=1, generator=seeded(0))
    assert mask.density == pytest.approx(density, abs=1 / 30)
