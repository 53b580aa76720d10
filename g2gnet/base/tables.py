"""Tables of text, in columns for a terminal or in Markdown for a page; means with their errors."""

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple


def in_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header, the first aligned left, the others right (an example: ``g2gnet.inspect.Table``)."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        (name, first), *rest = zip(cells, widths, strict=True)
        return "  ".join([f"{name:<{first}}"] + [f"{cell:>{width}}" for cell, width in rest]).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """A Markdown table; columns whose headings are in ``right`` are aligned right.

    Example:
        >>> print(markdown(("layer", "rate"), [("lif1", "0.12"), ("lif2", "0.3")], right=["rate"]))
        | layer | rate |
        | --- | --: |
        | lif1 | 0.12 |
        | lif2 | 0.3 |
    """
    lines = [header, ["--:" if heading in right else "---" for heading in header], *rows]
    return "\n".join(map(markdown_row, lines))


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


class Estimate(NamedTuple):
    """The mean of independent values and its standard error, None for a single value."""

    mean: float
    error: float | None

    def text(self, digits: int, scale: float = 1) -> str:
        """Mean ± standard error, times ``scale``."""
        error = "" if self.error is None else f" ± {scale * self.error:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{error}"

    def level(self, other: "Estimate") -> bool:
        """Whether two means differ by less than two standard errors of their difference; False for single values."""
        if self.error is None or other.error is None:
            return False
        return abs(self.mean - other.mean) < 2 * math.hypot(self.error, other.error)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.mean(values), error)
