"""The rules of dynamic sparse training: the scores by which units are pruned and grown. To add one, add it to
:data:`PRUNE_RULES` or :data:`GROW_RULES`; flags, checks, recording and messages follow, and a test asks for a slow
score to compare it with.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from g2gnet.layers import G2GLinear

#: what a rule may need from the step before an update
ACTIVITY, GRADIENT = "activity", "gradient"


class Evidence(NamedTuple):
    """What is known about units of a layer when they are scored: those of its slots, to prune, or those of the grid
    among which some grow.

    Attributes:
        layer: the layer.
        number: how many units these are.
        correlation: if a rule needs it, the mean pre/post correlation of each [number].
        gradient: if a rule needs it, the root mean square of ∂L/∂W over each [number].
    """

    layer: G2GLinear
    number: int
    correlation: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class Rule(NamedTuple):
    """A rule that selects the units to prune or to grow.

    Attributes:
        name: as in ``prune=``, ``grow=`` and the flags.
        text: what it selects, in a few words.
        score: a number per unit. The units of lowest score are pruned, or those of highest score are grown. Ties are
            broken at random.
        needs: what must be recorded: :data:`ACTIVITY`, :data:`GRADIENT`, or None.
    """

    name: str
    text: str
    score: Callable[[Evidence], torch.Tensor]
    needs: str | None = None


def _weight(seen: Evidence) -> torch.Tensor:
    size, mask = seen.layer.values.abs(), seen.layer.mask
    size = torch.where(mask.valid(), size, 0) if mask.has_padding else size  # padding holds no weights
    return size.sum((1, 2)) / mask.unit_sizes


def _correlation(seen: Evidence) -> torch.Tensor:
    assert seen.correlation is not None
    return seen.correlation


def _gradient(seen: Evidence) -> torch.Tensor:
    assert seen.gradient is not None
    return seen.gradient


def _chance(seen: Evidence) -> torch.Tensor:
    return torch.zeros(seen.number, device=seen.layer.values.device)  # ties, which are broken at random


def _by_name(*rules: Rule) -> dict[str, Rule]:
    return {rule.name: rule for rule in rules}


def names_without(need: str, rules: Mapping[str, Rule]) -> list[str]:
    """The rules that do not need this to be recorded."""
    return [name for name, rule in rules.items() if rule.needs != need]


PRUNE_RULES = _by_name(
    Rule("set", "smallest weights", _weight),
    Rule("random", "random", _chance),
    Rule("hebb", "least correlated", _correlation, ACTIVITY),
)
GROW_RULES = _by_name(
    Rule("hebb", "most correlated", _correlation, ACTIVITY),
    Rule("random", "random", _chance),
    Rule("gradient", "largest gradient", _gradient, GRADIENT),
)
