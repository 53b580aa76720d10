"""Tables of text: in columns for a terminal, in Markdown for a page."""

from collections.abc import Collection, Iterable, Sequence

#: a bar inside of a cell
BAR = r"\|"


def in_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header, the first to the left, the others to the right (``g2gnet.inspect.Table`` shows it)."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        (name, first), *rest = zip(cells, widths, strict=True)
        return "  ".join([f"{name:<{first}}"] + [f"{cell:>{width}}" for cell, width in rest]).rstrip()

    return "\n".join([line(header), "  ".join("─" * width for width in widths), *map(line, rows)])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """A Markdown table; the columns with headings in ``right`` are to the right.

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
    """One row of such a table, where it is written row by row."""
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"
