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
from g2gnet.layers import SparseLayer

#: with more scores than MANY, those that are clearly too low are dropped before the rest is sorted. Every STRIDE-th
#: score, a prime number that meets all rows and columns, shows where that is.
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

    def weakest(self, count: int, draw: torch.Generator) -> torch.Tensor:
        """The ``count`` slots of lowest score, int64, the weakest first."""
        return highest(-self.prune, count, draw)

    def best(self, mask: BlockMask, count: int | None, draw: torch.Generator) -> torch.Tensor:
        """The ``count`` absent units (None: all) of highest score, int64 counted row by row, the best first."""
        count = self.number_absent(mask) if count is None else count
        if self.candidates is None:
            return highest(self.grow, count, draw, last=mask.present().flatten())
        return self.candidates[highest(self.grow, count, draw)]

    def number_absent(self, mask: BlockMask) -> int:
        """How many units can grow."""
        return len(self.grow) - (mask.num_units if self.candidates is None else 0)


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
    count = min(share_of(fraction, mask.num_units), scores.number_absent(mask))
    return Replacement(scores.weakest(count, draw), scores.best(mask, count, draw))


def plan_within(budget: float, mask: BlockMask, scores: Scores, fraction: float, draw: torch.Generator) -> Replacement:
    """Keeps as many of the strongest units as fit into a ``budget`` of weights, and replaces a ``fraction`` of them."""
    weakest, best = scores.weakest(mask.num_units, draw), scores.best(mask, None, draw)
    sizes = mask.unit_sizes[weakest.flip(0)], sizes_of(best, mask)
    stay, grow, spare = units_within(budget, *sizes, fraction)
    return Replacement(weakest[: mask.num_units - stay], best[:grow], spare)


def units_within(budget: float, strongest: torch.Tensor, best: torch.Tensor, fraction: float) -> tuple[int, int, float]:
    """How many units of a layer stay and grow, and how many weights of its ``budget`` are left.

    As many units stay as fit, at least one. Up to a ``fraction`` of these is replaced by as many weights: the most for
    which less than a unit's weights is left, since the units that grow may be smaller than those that they replace.

    Args:
        strongest: sizes of the units that exist, in the order in which they stay, int64 [n].
        best: sizes of the units that can grow, in the order in which they grow.
    """
    of_strongest, of_best = (np.append(0.0, sizes.cpu().numpy().cumsum(dtype=float)) for sizes in (strongest, best))
    largest = np.diff(of_strongest).max(initial=0)

    def fitting(of_first: np.ndarray, weights: float) -> int:
        """How many of the first units fit into a number of weights."""
        return max(0, int(np.searchsorted(of_first, weights, side="right")) - 1)

    def outcome(replaced: int) -> tuple[int, int, float]:
        stay = fit - replaced
        room = budget - of_strongest[stay]
        grow = min(fitting(of_best, room), len(strongest) - stay) if replaced else 0
        return stay, grow, float(room - of_best[grow])

    fit = min(max(1, fitting(of_strongest, budget)), len(strongest))
    most = min(share_of(fraction, fit), len(best))
    for replaced in range(most, -1, -1):
        stay, grow, spare = outcome(replaced)
        if spare < largest and stay + grow > 0:
            return stay, grow, spare
    return outcome(most)  # the layer is too small for its budget


def replace_units(
    layer: SparseLayer, plan: Replacement, apply: torch.Tensor, state: OptimizerState
) -> Callable[[], None]:
    """Carries out a plan in a layer and the optimizer ``state`` of its weights: units that grow take the slots of the
    strongest pruned ones, and the other slots are removed. Nothing changes if ``apply``, a bool scalar, is false; the
    plan must then be of an equal number. Returns a function that undoes it; after an error nothing has changed."""
    mask, removed = layer.mask, len(plan.pruned) - len(plan.grown)
    gone, reused = plan.pruned[:removed], plan.pruned[removed:]
    units = torch.where(apply, plan.grown, mask.flat_unit()[reused])
    with ExitStack() as undo:  # the last step is undone first
        undo.callback(layer.rewire_(reused, units, apply))
        undo.callback(state.reset_(layer.values, reused, apply))
        if removed:
            remain = torch.ones(mask.num_units, dtype=torch.bool, device=gone.device)
            remain[gone] = False
            undo.callback(state.keep_(layer.values, remain))
            undo.callback(layer.keep_(remain))
        return undo.pop_all().close


def draw_candidates(mask: BlockMask, generator: torch.Generator) -> torch.Tensor | None:
    """Absent units that may grow, int64 counted row by row. None: any may. If the grid is too large for a score of
    each unit, as many as the mask has units (or all absent ones) are drawn uniformly."""
    total = math.prod(mask.grid)
    if total <= LARGEST_GRID:
        return None
    absent = total - mask.num_units
    _, rank = distinct(torch.tensor([min(mask.num_units, absent)]), torch.tensor([absent]), generator)
    # the number of an absent unit is its rank among these plus the number of existing units before it
    exist = mask.sorted_units().cpu()
    before = torch.searchsorted(exist - torch.arange(len(exist)), rank, right=True)
    return (rank + before).to(mask.unit_row.device)


def highest(score: torch.Tensor, count: int, draw: torch.Generator, last: torch.Tensor | None = None) -> torch.Tensor:
    """Indices of the ``count`` highest entries of ``score`` [n], compared in float32. Equal ones are in the order of a
    uniform draw, NaN comes after every number, and entries where ``last`` [n] is true come after all others."""
    if score.is_cpu and len(score) > MANY:  # drawing and sorting an order of all would take longest
        some = score[::STRIDE] if last is None else score[::STRIDE][~last[::STRIDE]]
        least = some.kthvalue(max(1, len(some) - 2 * count // STRIDE - 64)).values if len(some) else torch.inf
        near = (score >= least).nonzero()[:, 0]
        near = near if last is None else near[~last[near]]
        if count <= len(near) < len(score) // 2:  # otherwise most are equal
            return near[highest(score[near], count, draw)]
    order = torch.randperm(len(score), generator=draw, device=draw.device).to(score.device)
    turn = torch.empty_like(order).scatter_(0, order, torch.arange(len(score), device=score.device))
    cost = torch.where(score.isnan(), torch.inf, -score).float() + 0.0  # −0 and 0 are equal
    # the bits of positive floats sort as the floats do, those of negative ones in reverse
    bits = cost.view(torch.int32)
    key = ((bits ^ ((bits >> 31) & INT32[1])).long() << 32) + turn
    if last is not None:
        key = torch.where(last, INT64[1] - len(cost) + turn, key)
    return key.topk(count, largest=False).indices
