"""The rules of dynamic sparse training: the scores by which units are pruned and grown. To add one, add it to
:data:`PRUNE_RULES` or :data:`GROW_RULES`; flags, checks, recording and messages follow, and a test asks for a slow
score to compare it with.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from g2g_kernels import BlockMask
from g2gnet.layers import G2GLinear

#: what a rule may need from the step before an update
ACTIVITY, GRADIENT = "activity", "gradient"


class Evidence(NamedTuple):
    """What is known about a layer when its units are scored.

    Attributes:
        layer: the layer.
        correlation: if a rule needs it, the mean pre/post correlation of each unit [units].
        gradient: if a rule needs it, the root mean square of ∂L/∂W over each unit [units].
        candidates: int64, the absent units that may grow, counted row by row; ``units`` are then these, and before them
            those of the slots, if pruning needs them. None: any may grow, and ``units`` are those of the whole grid.
    """

    layer: G2GLinear
    correlation: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    candidates: torch.Tensor | None = None

    @property
    def mask(self) -> BlockMask:
        return self.layer.mask

    def of_slots(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores of the existing units, by slot, from ``scores`` [units]."""
        return scores[self.mask.flat_unit()] if self.candidates is None else scores[: self.mask.num_units]

    def of_candidates(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores of the units that may grow, from ``scores`` [units]."""
        return scores if self.candidates is None else scores[len(scores) - len(self.candidates) :]

    @property
    def num_candidates(self) -> int:
        """How many scores a grow rule gives."""
        return math.prod(self.mask.grid) if self.candidates is None else len(self.candidates)


class Rule(NamedTuple):
    """A rule that selects the units to prune or to grow.

    Attributes:
        name: as in ``prune=``, ``grow=`` and the flags.
        text: what it selects, in a few words.
        score: a number per unit. Prune rules score each slot, and the lowest are pruned; grow rules score each
            candidate (:class:`Evidence`), and the highest are grown. Ties are broken at random.
        needs: what must be recorded: :data:`ACTIVITY`, :data:`GRADIENT`, or None.
    """

    name: str
    text: str
    score: Callable[[Evidence], torch.Tensor]
    needs: str | None = None


def _weight(seen: Evidence) -> torch.Tensor:
    size = seen.layer.values.abs()
    size = torch.where(seen.mask.valid(), size, 0) if seen.mask.has_padding else size  # padding holds no weights
    return size.sum((1, 2)) / seen.mask.unit_sizes


def _correlation(seen: Evidence) -> torch.Tensor:
    assert seen.correlation is not None
    return seen.correlation


def _gradient(seen: Evidence) -> torch.Tensor:
    assert seen.gradient is not None
    return seen.gradient


def _chance(number: Callable[[Evidence], int]) -> Callable[[Evidence], torch.Tensor]:
    """Equal scores for that many units, so ties are broken at random."""
    return lambda seen: torch.zeros(number(seen), device=seen.layer.values.device)


def _by_name(*rules: Rule) -> dict[str, Rule]:
    return {rule.name: rule for rule in rules}


def names_without(need: str, rules: Mapping[str, Rule]) -> list[str]:
    """The rules that do not need this to be recorded."""
    return [name for name, rule in rules.items() if rule.needs != need]


PRUNE_RULES = _by_name(
    Rule("set", "smallest weights", _weight),
    Rule("random", "random", _chance(lambda seen: seen.mask.num_units)),
    Rule("hebb", "least correlated", lambda seen: seen.of_slots(_correlation(seen)), ACTIVITY),
)
GROW_RULES = _by_name(
    Rule("hebb", "most correlated", lambda seen: seen.of_candidates(_correlation(seen)), ACTIVITY),
    Rule("random", "random", _chance(lambda seen: seen.num_candidates)),
    Rule("gradient", "largest gradient", lambda seen: seen.of_candidates(_gradient(seen)), GRADIENT),
)
