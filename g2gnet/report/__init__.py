"""Pictures of training runs, and a page that shows them with settings, results and analysis."""

from g2gnet.report.program import build_parser, main

__all__ = ["build_parser", "main"]
