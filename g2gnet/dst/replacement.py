"""The replacement of units in one layer: slots of the weakest units are given to the best absent ones."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch

from g2g_kernels import BlockMask
from g2g_kernels.mask.sampling import LARGEST_GRID, distinct
from g2g_kernels.numbers import INT32, INT64, share_of
from g2gnet.dst.optimizer_state import OptimizerState
from g2gnet.dst.rules import sizes_of
from g2gnet.layers import G2GLinear

#: Of more scores than this those that are too low are left out first, as one in so many tells: a prime number, which
#: meets all rows and columns.
MANY, STRIDE = 1 << 18, 61


class Scores(NamedTuple):
    """The scores of a layer's units.

    Attributes:
        prune: of the unit in each slot, [num_units]; the lowest are pruned.
        grow: of each of the ``candidates``, the highest of which grow.
        candidates: absent units, int64 counted row by row. None: ``grow`` is of the whole grid, and absent units grow.
    """

    prune: torch.Tensor
    grow: torch.Tensor
    candidates: torch.Tensor | None


class Replacement(NamedTuple):
    """What an update does to a layer.

    Attributes:
        pruned: the slots of units that are pruned, int64, the weakest first.
        grown: the units that grow, int64 counted row by row, at most as many as are pruned.
        spare: the weights that are left of the layer's budget, less than a unit.
    """

    pruned: torch.Tensor
    grown: torch.Tensor
    spare: float = 0.0


def plan_of_equal_number(mask: BlockMask, scores: Scores, fraction: float, draw: torch.Generator) -> Replacement:
    """Replaces a ``fraction`` of the units by as many."""
    count = min(share_of(fraction, mask.num_units), _number_absent(mask, scores))
    return Replacement(highest(-scores.prune, count, draw), _best(mask, scores, count, draw))


def plan_within(budget: float, mask: BlockMask, scores: Scores, fraction: float, draw: torch.Generator) -> Replacement:
    """Keeps as many of the strongest units as have a ``budget`` of weights, and replaces a ``fraction`` of these."""
    weakest = highest(-scores.prune, mask.num_units, draw)
    best = _best(mask, scores, _number_absent(mask, scores) if mask.num_units else 0, draw)
    if not mask.num_units:
        return Replacement(weakest, best, budget)
    sizes = mask.unit_sizes[weakest.flip(0)], sizes_of(best, mask)
    kept, grown, spare = units_within(budget, *sizes, fraction)
    return Replacement(weakest[: mask.num_units - kept], best[:grown], spare)


def _number_absent(mask: BlockMask, scores: Scores) -> int:
    return len(scores.grow) - (mask.num_units if scores.candidates is None else 0)


def _best(mask: BlockMask, scores: Scores, count: int, draw: torch.Generator) -> torch.Tensor:
    """The ``count`` absent units of highest score, int64 counted row by row, the best first."""
    if scores.candidates is None:
        return highest(scores.grow, count, draw, last=mask.present().flatten())
    return scores.candidates[highest(scores.grow, count, draw)]


def units_within(budget: float, strongest: torch.Tensor, best: torch.Tensor, fraction: float) -> tuple[int, int, float]:
    """How many units of a layer stay and grow, and what they leave of a ``budget`` of weights.

    As many stay as fit, at least one; up to a ``fraction`` of these is replaced by as many weights, fewer where less
    than a unit would not be left, as units that grow are too small. ``strongest`` are the sizes of the units that there
    are, those that stay first, int64 [n]; ``best`` those of units that can grow.
    """
    of_staying, of_grown = (np.append(0.0, sizes.cpu().numpy().cumsum(dtype=float)) for sizes in (strongest, best))
    largest = int(strongest.max())
    fit = max(1, int(np.searchsorted(of_staying, budget, side="right")) - 1)

    def outcome(stay: int) -> tuple[int, int, float]:
        room = budget - of_staying[stay]
        fit_in_room = max(0, int(np.searchsorted(of_grown, room, side="right")) - 1)
        grown = 0 if stay == fit else min(fit_in_room, len(strongest) - stay)
        return stay, grown, float(room - of_grown[grown])

    fewest = fit - min(share_of(fraction, fit), len(best))
    outcomes = map(outcome, range(fewest, fit + 1))  # the most replacements first
    fills_budget = (each for each in outcomes if each[2] < largest and each[0] + each[1] > 0)
    return next(fills_budget, outcome(fewest))


def replace_units(
    layer: G2GLinear, plan: Replacement, apply: torch.Tensor, state: OptimizerState
) -> Callable[[], None]:
    """Carries out a plan in a layer and the ``state`` of its weights: units that grow take the slots of the strongest
    that are pruned, and the other slots go. Nothing changes if ``apply``, a bool scalar, is false; the plan then is of
    an equal number. Returns what takes it back; after an error nothing has changed.
    """
    mask, removed = layer.mask, len(plan.pruned) - len(plan.grown)
    gone, reused = plan.pruned[:removed], plan.pruned[removed:]
    units = torch.where(apply, plan.grown, mask.flat_unit()[reused])
    with ExitStack() as undo:  # in reverse order
        undo.callback(layer.rewire_(reused, units, apply))
        undo.callback(state.reset_(layer.values, reused, apply))
        if removed:
            remain = torch.ones(mask.num_units, dtype=torch.bool, device=gone.device)
            remain[gone] = False
            undo.callback(state.keep_(layer.values, remain))
            undo.callback(layer.keep_(remain))
        return undo.pop_all().close


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
