"""Random draws of units."""

import torch

from g2g_kernels.mask.groups import partners
from g2g_kernels.mask.sides import UnitAxis

#: the largest grid whose units are drawn one by one; for a larger one no tensor of its size is formed
LARGEST_GRID = 1 << 24


def sample_units(
    rows: UnitAxis, cols: UnitAxis, p_intra: float, p_inter: float, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The coordinates of units drawn with probability ``p_intra`` inside groups and ``p_inter`` between them, by row.
    Each row gets ⌊p·n⌋ or ⌈p·n⌉ of its n candidates of either kind, at uniform places, so rows have equal work."""
    own = partners(rows.layout.num_groups, cols.layout.num_groups)
    if rows.num_units * cols.num_units <= LARGEST_GRID:
        same_group = own[rows.group_of_unit][:, cols.group_of_unit]
        inside = _sample_rows(same_group, p_intra, generator)
        between = _sample_rows(~same_group, p_inter, generator)
        unit_row, unit_col = (inside | between).nonzero(as_tuple=True)
        return unit_row, unit_col
    # the ranges of a group are neighbours, and so are the groups that belong to one
    per_group = torch.bincount(cols.group_of_unit, minlength=cols.layout.num_groups)
    inside = (own * per_group).sum(1)[rows.group_of_unit]
    first = torch.searchsorted(cols.group_of_unit, own.int().argmax(1))[rows.group_of_unit]
    row, column = _sample_lists(inside, p_intra, generator)
    other_row, other = _sample_lists(cols.num_units - inside, p_inter, generator)
    other += torch.where(other >= first[other_row], inside[other_row], 0)
    units = torch.cat([row * cols.num_units + column + first[row], other_row * cols.num_units + other]).sort().values
    return units // cols.num_units, units % cols.num_units


def _rounded(count: torch.Tensor, p: float, generator: torch.Generator | None) -> torch.Tensor:
    """int64, ⌊p·count⌋ or ⌈p·count⌉, whose mean is p·count."""
    rounding = torch.rand(len(count), generator=generator, dtype=torch.float64)
    return torch.floor(count.double() * p + rounding).long()


def _sample_rows(candidates: torch.Tensor, p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Draws among ``candidates``, bool [block rows, block columns]; as such a tensor."""
    count = _rounded(candidates.sum(1), p, generator)
    # candidates in uniformly random order first, the others behind them
    key = torch.rand(candidates.shape, generator=generator).masked_fill_(~candidates, 2.0)
    rank = torch.empty_like(key, dtype=torch.int64)
    rank.scatter_(1, key.argsort(dim=1), torch.arange(key.shape[1]).expand_as(rank))
    return candidates & (rank < count[:, None])


def _sample_lists(
    candidates: torch.Tensor, p: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws among the numbers below ``candidates``, int64 [rows]: the row and the number of each one that is drawn."""
    count = _rounded(candidates, p, generator)
    dense = 2 * count > candidates  # rows for which the absent numbers are drawn
    row, number = distinct(torch.where(dense, candidates - count, count), candidates, generator)
    left_out = dense[row]
    every_row = torch.repeat_interleave(torch.arange(len(count)), torch.where(dense, candidates, 0))
    every = torch.arange(len(every_row)) - torch.searchsorted(every_row, torch.arange(len(count)))[every_row]
    width = int(candidates.max()) + 1 if len(candidates) else 1
    kept = ~torch.isin(every_row * width + every, (row * width + number)[left_out])
    return torch.cat([row[~left_out], every_row[kept]]), torch.cat([number[~left_out], every[kept]])


def distinct(
    count: torch.Tensor, below: torch.Tensor, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws ``count`` different numbers ``below`` a limit for each row, int64 [rows] both. Returns their rows and the
    numbers, ascending in each row. Every set of numbers is equally likely: duplicates are drawn again."""
    width = int(below.max()) + 1 if len(below) else 1
    drawn = torch.zeros(0, dtype=torch.int64)
    missing = count
    while True:
        row = torch.repeat_interleave(torch.arange(len(count)), missing)
        if not len(row):
            return drawn // width, drawn % width
        number = (torch.rand(len(row), generator=generator, dtype=torch.float64) * below[row]).long()
        drawn = torch.cat([drawn, row * width + number]).unique()
        missing = count - torch.bincount(drawn // width, minlength=len(count))
