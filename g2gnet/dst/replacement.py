"""The replacement of units in one layer: slots of the weakest units are given to the best absent ones."""

from contextlib import ExitStack

import torch

from g2g_kernels.numbers import share_of
from g2gnet.dst.gradual_pruning import units_within
from g2gnet.dst.optimizer_state import OptimizerState
from g2gnet.layers import G2GLinear


def replace_units(
    layer: G2GLinear,
    budget: float | None,
    fraction: float,
    prune: torch.Tensor,
    grow: torch.Tensor,
    apply: torch.Tensor,
    draw: torch.Generator,
    state: OptimizerState,
    undo: ExitStack,
) -> tuple[int, int, float]:
    """Keeps units of highest ``prune`` score [num_units], and replaces ``fraction`` of these.

    The lowest of them give their slots to absent units of highest ``grow`` score [grid]. All units together have
    ``budget`` weights or up to a unit fewer; None: their number stays. Nothing changes if ``apply``, a bool scalar,
    is false. Closing ``undo`` takes it back. Returns the units pruned and grown, and what is left of the budget.
    """
    mask, spare = layer.mask, budget or 0.0
    absent = len(grow) - mask.num_units
    active = mask.present().flatten()
    weakest = lowest(prune, mask.num_units, draw)
    best = lowest(-grow, absent, draw, last=active)
    if budget is None or not mask.num_units:
        lost = new = min(share_of(fraction, mask.num_units), absent)
    else:
        of_grid = (mask.rows.lengths[:, None] * mask.cols.lengths).flatten()
        stay, new, spare = units_within(budget, mask.unit_sizes[weakest.flip(0)], of_grid[best], fraction)
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


def lowest(
    cost: torch.Tensor, count: int, generator: torch.Generator, last: torch.Tensor | None = None
) -> torch.Tensor:
    """Indices of the ``count`` entries of least ``cost`` [n]; equal ones in the order of a uniform draw.

    NaN comes after every number. Entries where ``last`` [n] is true come after all others.
    """
    order = torch.randperm(len(cost), generator=generator, device=generator.device).to(cost.device)
    cost = torch.where(cost.isnan(), torch.inf, cost)
    for key in (cost,) if last is None else (cost, last.byte()):
        order = order[torch.argsort(key[order], stable=True)]
    return order[:count]
