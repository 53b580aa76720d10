"""What a sweep reached: means and standard errors over its seeds, their table and their picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from g2gnet.base.tables import markdown
from g2gnet.programs.sweep.grid import Run
from g2gnet.training.checkpoints import numbers


class Estimate(NamedTuple):
    """The mean of independent values, and its standard error, which is unknown (None) for one value."""

    mean: float
    error: float | None

    def text(self, digits: int, scale: float = 1) -> str:
        """Mean ± standard error, times ``scale``."""
        error = "" if self.error is None else f" ± {scale * self.error:.{digits}f}"
        return f"{scale * self.mean:.{digits}f}{error}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of some values, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.mean(values), error)


@dataclass(frozen=True)
class Row:
    """One combination of the varied settings, the seeds of its finished runs, and what each of these reached."""

    settings: dict[str, Any]
    seeds: list[int]
    ends: list[dict[str, Any]]

    @property
    def label(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())

    def estimate(self, quantity: str) -> Estimate:
        """Mean and error over the seeds of a number in the runs' results, as ``"test_acc"`` or ``"best/val_acc"``."""
        return estimate([dict(numbers(end))[quantity] for end in self.ends])

    def as_dict(self) -> dict[str, Any]:
        quantities = [dict(numbers(end)) for end in self.ends]
        shared = [name for name in quantities[0] if all(name in each for each in quantities)]
        estimates = {name: estimate([each[name] for each in quantities])._asdict() for name in shared}
        return {"settings": self.settings, "seeds": self.seeds, "results": estimates}


#: the accuracy by which rows are compared, in the runs' results and in words: where every run held images out, theirs
HELD_OUT, TESTED = ("best/val_acc", "validation accuracy"), ("test_acc", "test accuracy")


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """By which accuracy these rows are compared: :data:`HELD_OUT` or :data:`TESTED`."""
    return HELD_OUT if all("best" in end for row in rows for end in row.ends) else TESTED


@dataclass(frozen=True)
class Sweep:
    """What a sweep reached.

    Attributes:
        common: the settings of the grid with one value.
        varied: the names of those with several, without the seed.
        ends: what each finished run reached (:func:`~g2gnet.programs.sweep.engine.outcome`), by the run.
        failed: the errors of the runs that failed, by the settings that differ.
        rows: mean and standard error over the seeds, one per combination of the varied settings.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> small = {"hidden_dim": 32, "T": 3, "epochs": 1, "limit_train": 64}
        >>> made = run({"dataset": "fashionmnist-mini", "seed": [1, 2], **small}, executor=ThreadPoolExecutor(1))
        >>> made.rows[0].seeds, sorted(made.as_dict())
        ([1, 2], ['best', 'failed', 'rows', 'runs', 'settings'])
    """

    common: dict[str, Any]
    varied: tuple[str, ...]
    ends: list[tuple[Run, dict[str, Any]]]
    failed: dict[str, str]

    @property
    def rows(self) -> list[Row]:
        rows: dict[tuple, Row] = {}
        for run, end in self.ends:
            values = {name: getattr(run.settings, name) for name in self.varied}
            row = rows.setdefault(tuple(values.values()), Row(values, [], []))
            row.seeds.append(run.settings.seed)
            row.ends.append(end)
        return list(rows.values())

    @property
    def best(self) -> Row:
        """The row with the highest mean of the accuracy by which rows are compared."""
        quantity, _ = judge(self.rows)
        return max(self.rows, key=lambda row: row.estimate(quantity).mean)

    def table(self) -> str:
        """One line per row: settings, number of runs, means of what they reached; then the best, and by which images it
        was chosen."""
        rows = self.rows
        held_out = judge(rows) is HELD_OUT
        tests = dict([HELD_OUT, ("best/test_acc", "test accuracy")] if held_out else [TESTED])
        accuracies = {**tests, "train_acc": "training accuracy"}
        lines = [
            [
                *(str(value) for value in row.settings.values()),
                str(len(row.ends)),
                *(row.estimate(name).text(2, scale=100) for name in accuracies),
                f"{row.estimate('weights').mean:,.0f}",
                row.estimate("train_seconds").text(1),
            ]
            for row in rows
        ]
        header = [*self.varied, "runs", *(f"{text}, %" for text in accuracies.values()), "weights", "seconds"]
        notes = ["Of each run the epoch with the best validation accuracy was tested."] if held_out else []
        if len(rows) > 1:
            how = "test images, so its accuracy is too high; validation=SHARE mends that"
            notes.append(f"Best: {self.best.label}, chosen on {'held-out images' if held_out else how}.")
        return "\n".join([markdown(header, lines), *notes])

    def picture(self) -> Any:
        """A matplotlib figure: the mean accuracy by which rows are compared, with its standard error. On the x axis is
        the setting with most values, numbers first: evenly spaced, numbers in their order. Each combination of the
        others is a line."""
        from matplotlib.figure import Figure  # which is optional
        from matplotlib.ticker import PercentFormatter

        from g2gnet.inspect.figures import style

        rows = self.rows
        quantity, accuracy = judge(rows)
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        values = {name: list(dict.fromkeys(row.settings[name] for row in rows)) for name in self.varied}
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
            y, errors = [each.mean for each in found], [each.error or 0 for each in found]
            axis.errorbar(x, y, errors, label=label, capsize=3, markersize=5, **style(number))
        axis.set_xticks(range(len(shown)), [str(value) for value in shown])
        axis.margins(x=0.1)
        axis.set(xlabel=across, ylabel=f"{accuracy}, mean ± standard error")
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        if len(lines) > 1:
            figure.legend(loc="outside lower left", ncols=2, frameon=False)
        axis.set_title(", ".join(f"{name}={value}" for name, value in self.common.items()), fontsize=9, wrap=True)
        return figure

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and strings."""
        runs = [{"settings": dict(run.differs), "folder": str(run.folder), "result": end} for run, end in self.ends]
        return {
            "settings": self.common,
            "rows": [row.as_dict() for row in self.rows],
            "best": {"settings": self.best.settings, "by": judge(self.rows)[0]},
            "runs": runs,
            "failed": self.failed,
        }


def _numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
