"""Sweeps: every combination of some settings and seeds, trained in parallel, resumable, with means and errors."""

from g2gnet.programs.sweep.engine import Run, Sweep, run

__all__ = ["Run", "Sweep", "run"]
