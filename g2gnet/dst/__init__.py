"""Dynamic sparse training: when and where connections are replaced, by which rules and scores."""

from g2gnet.dst.rules import ACTIVITY, GRADIENT, GROW_RULES, PRUNE_RULES, Evidence, Rule
from g2gnet.dst.scheduler import DSTScheduler

__all__ = ["ACTIVITY", "GRADIENT", "GROW_RULES", "PRUNE_RULES", "DSTScheduler", "Evidence", "Rule"]
