"""The picture of a sweep: test accuracy against one setting, one line per combination of the others."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from g2gnet.inspect.figures import style
from g2gnet.programs.sweep.results import Row

#: ratio of the largest value to the smallest from which the axis is logarithmic
WIDE = 20


def draw(rows: Sequence[Row], common: str = "") -> Figure:
    """Mean test accuracy with its standard error; on the x axis the setting with most values, numbers first.

    Args:
        rows: of the sweep.
        common: what holds for all of them, in words; it becomes the title.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    names = list(rows[0].settings)
    values = {name: list(dict.fromkeys(row.settings[name] for row in rows)) for name in names}
    across = max(names, key=lambda name: (_numeric(values[name]), len(values[name])), default=None)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{name} {value}" for name, value in row.settings.items() if name != across)
        lines.setdefault(label, []).append(row)
    numeric = across is not None and _numeric(values[across])
    for number, (label, points) in enumerate(lines.items()):
        if across is None:
            x: list[Any] = [0]
        elif numeric:
            points = sorted(points, key=lambda row: row.settings[across])
            x = [row.settings[across] for row in points]
        else:
            x = [values[across].index(row.settings[across]) for row in points]
        found = [row.estimate("test_acc") for row in points]
        errors = [each.error or 0 for each in found]
        axis.errorbar(x, [each.mean for each in found], errors, label=label, capsize=3, markersize=5, **style(number))
    if across is not None and numeric:
        low, high = min(values[across]), max(values[across])
        if low > 0 and high / low >= WIDE:
            axis.set_xscale("log")
        axis.set_xticks(sorted(values[across]))
        axis.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xticks(
            range(len(values.get(across or "", [0]))), [str(value) for value in values.get(across or "", [""])]
        )
        axis.margins(x=0.2)
    axis.set(xlabel=across or "", ylabel="test accuracy, mean ± standard error")
    axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.92")
    if len(lines) > 1:
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
    if common:
        axis.set_title(common, fontsize=9, wrap=True)
    return figure


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
