"""Sweeps: every combination of some settings and seeds, trained in parallel, resumable, with means and errors."""

from g2gnet.programs.sweep.engine import run
from g2gnet.programs.sweep.grid import Run
from g2gnet.programs.sweep.results import Sweep

__all__ = ["Run", "Sweep", "run"]
