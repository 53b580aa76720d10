"""The picture of a sweep: accuracy against one setting, one line per combination of the others."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from g2gnet.inspect.figures import style
from g2gnet.programs.sweep.results import Row, judge


def draw(rows: Sequence[Row], common: str = "") -> Figure:
    """The mean accuracy by which rows are compared, with its standard error; on the x axis the setting with most
    values, numbers first: evenly spaced, numbers in their order. The title is what the rows have in ``common``, in
    words.
    """
    quantity, accuracy = judge(rows)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    values = {name: list(dict.fromkeys(row.settings[name] for row in rows)) for name in rows[0].settings}
    across = max(values, key=lambda name: (_numeric(values[name]), len(values[name])), default="")
    shown = values.get(across, [""])
    shown = sorted(shown) if _numeric(shown) else shown
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: shown.index(row.settings.get(across, ""))):
        label = ", ".join(f"{name} {value}" for name, value in row.settings.items() if name != across)
        lines.setdefault(label, []).append(row)
    for number, (label, points) in enumerate(lines.items()):
        x = [shown.index(row.settings.get(across, "")) for row in points]
        found = [row.estimate(quantity) for row in points]
        errors = [each.error or 0 for each in found]
        axis.errorbar(x, [each.mean for each in found], errors, label=label, capsize=3, markersize=5, **style(number))
    axis.set_xticks(range(len(shown)), [str(value) for value in shown])
    axis.margins(x=0.1)
    axis.set(xlabel=across, ylabel=f"{accuracy}, mean ± standard error")
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
