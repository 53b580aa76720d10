"""Draws of units, also from grids so large that nothing of their size is formed."""

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


def test_every_unit_is_as_likely_as_its_probability():
    total, layout = torch.zeros(12, 12), GroupLayout(12, 3)
    for seed in range(400):
        total += BlockMask.sample(layout, layout, 0.7, 0.25, block_size=1, generator=seeded(seed)).present()
    expected = torch.where(partners(3, 3)[layout.group_of][:, layout.group_of], 0.7, 0.25)
    # the mean of 400 draws is off by four standard deviations in one of 16,000 units
    assert ((total / 400 - expected).abs() < 4.5 * (expected * (1 - expected) / 400).sqrt()).all()


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_a_density_is_that_of_all_units(density):
    mask = BlockMask.sample(GroupLayout(40), GroupLayout(30), density=density, block_size=1, generator=seeded(0))
    assert mask.density == pytest.approx(density, abs=1 / 30)
