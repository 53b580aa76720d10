"""The replacement of units in one layer: slots of the weakest units are given to the best absent ones."""

import math
from contextlib import ExitStack

import torch

from g2g_kernels import BlockMask
from g2g_kernels.mask.sampling import LARGEST_GRID, distinct
from g2g_kernels.numbers import INT32, INT64, share_of
from g2gnet.dst.gradual_pruning import units_within
from g2gnet.dst.optimizer_state import OptimizerState
from g2gnet.dst.rules import sizes_of
from g2gnet.layers import G2GLinear

#: Of more scores than this those that are too low are left out first, as one in so many tells: a prime number, which
#: meets all rows and columns.
MANY, STRIDE = 1 << 18, 61


def replace_units(
    layer: G2GLinear,
    budget: float | None,
    fraction: float,
    prune: torch.Tensor,
    grow: torch.Tensor,
    candidates: torch.Tensor | None,
    apply: torch.Tensor,
    draw: torch.Generator,
    state: OptimizerState,
    undo: ExitStack,
) -> tuple[int, int, float]:
    """Keeps units of highest ``prune`` score [num_units], and replaces a ``fraction`` of these: the lowest give their
    slots to absent units of highest ``grow`` score, which is of ``candidates`` (:class:`g2gnet.dst.rules.Evidence`).
    All together have ``budget`` weights or up to a unit fewer; None: their number stays. Nothing changes if ``apply``,
    a bool scalar, is false. Closing ``undo`` takes it back. Returns how many were pruned and grown, and what is left of
    the budget.
    """
    mask, spare = layer.mask, budget or 0.0
    exist, absent = None, len(grow)
    if candidates is None:
        exist, absent = mask.present().flatten(), len(grow) - mask.num_units
    lost = new = min(share_of(fraction, mask.num_units), absent)
    if budget is not None and mask.num_units:  # all are ranked
        lost, new = mask.num_units, absent
    weakest, best = highest(-prune, lost, draw), highest(grow, new, draw, last=exist)
    best = best if candidates is None else candidates[best]
    if budget is not None and mask.num_units:
        sizes = mask.unit_sizes[weakest.flip(0)], sizes_of(best, mask)
        stay, new, spare = units_within(budget, *sizes, fraction)
        lost = mask.num_units - stay
    removed = lost - new
    slots = weakest[removed:lost]
    units = torch.where(apply, best[:new], mask.flat_unit()[slots])
    undo.callback(layer.rewire_(slots, units, apply))
    undo.callback(state.reset_(layer.values, slots, apply))
    if removed:
        remain = torch.ones_like(prune, dtype=torch.bool)
        remain[weakest[:removed]] = False
        undo.callback(state.keep_(layer.values, remain))
        undo.callback(layer.keep_(remain))
    return lost, new, spare


def draw_candidates(mask: BlockMask, generator: torch.Generator) -> torch.Tensor | None:
    """Absent units that may grow, int64 counted row by row: of a grid that is too large for a score of each, as many as
    the mask has units (or all), drawn uniformly. None: any may."""
    total = math.prod(mask.grid)
    if total <= LARGEST_GRID:
        return None
    absent = total - mask.num_units
    _, rank = distinct(torch.tensor([min(mask.num_units, absent)]), torch.tensor([absent]), generator)
    # the number of an absent unit is its rank among these and how many exist before it
    exist = mask.sorted_units().cpu()
    before = torch.searchsorted(exist - torch.arange(len(exist)), rank, right=True)
    return (rank + before).to(mask.unit_row.device)


def highest(score: torch.Tensor, count: int, draw: torch.Generator, last: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the ``count`` entries of highest ``score`` [n], compared in float32, in the order of a uniform draw
    where they are equal; NaN after every number, and those where ``last`` [n] is true after all others."""
    if score.is_cpu and len(score) > MANY:  # to draw a turn for each and to sort all would take longest
        some = score[::STRIDE] if last is None else score[::STRIDE][~last[::STRIDE]]
        least = some.kthvalue(max(1, len(some) - 2 * count // STRIDE - 64)).values if len(some) else torch.inf
        near = (score >= least).nonzero()[:, 0]
        near = near if last is None else near[~last[near]]
        if count <= len(near) < len(score) // 2:  # else most are equal
            return near[highest(score[near], count, draw)]
    order = torch.randperm(len(score), generator=draw, device=draw.device).to(score.device)
    turn = torch.empty_like(order).scatter_(0, order, torch.arange(len(score), device=score.device))
    cost = torch.where(score.isnan(), torch.inf, -score).float() + 0.0  # −0 and 0 are equal
    # the bits of floats are ordered as they are, those of negative ones the other way round
    bits = cost.view(torch.int32)
    key = ((bits ^ ((bits >> 31) & INT32[1])).long() << 32) + turn
    if last is not None:
        key = torch.where(last, INT64[1] - len(cost) + turn, key)
    return key.topk(count, largest=False).indices
