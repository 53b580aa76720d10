"""The results of a sweep: means and standard errors over its seeds, their table and their picture."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from g2gnet.base.optional import optional_package
from g2gnet.base.tables import Estimate, markdown
from g2gnet.programs.sweep.grid import Run, in_words
from g2gnet.training.checkpoints import numbers

#: the accuracy by which rows are compared, in the runs' results and in words: where every run held images out, theirs
HELD_OUT, TESTED = ("best/val_acc", "validation accuracy"), ("test_acc", "test accuracy")


class Row(NamedTuple):
    """One combination of the varied settings, the seeds of its finished runs, and a pandas DataFrame with the rows
    ``mean`` and ``sem`` (NaN for one run) of each number that all of these runs have."""

    settings: dict[str, Any]
    seeds: list[int]
    results: Any

    def estimate(self, quantity: str) -> Estimate:
        """Mean and standard error of a number in the runs' results, as ``"test_acc"`` or ``"best/val_acc"``."""
        mean, error = map(float, self.results[quantity])
        return Estimate(mean, None if math.isnan(error) else error)

    @property
    def label(self) -> str:
        return in_words(self.settings)


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep.

    Attributes:
        ends: each finished run with its results (:func:`~g2gnet.programs.sweep.engine.outcome`).
        failed: the errors of the runs that failed, by the settings that differ.
        common: the settings of the grid with one value.
        varied: the names of those with several, without the seed.
        rows: mean and standard error over the seeds, one per combination of the varied settings.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> small = {"hidden_dim": 32, "T": 3, "epochs": 1, "limit_train": 64}
        >>> made = run({"dataset": "fashionmnist-mini", "seed": [1, 2], **small}, executor=ThreadPoolExecutor(1))
        >>> made.rows[0].seeds, sorted(made.as_dict())
        ([1, 2], ['best', 'failed', 'rows', 'runs', 'settings'])
    """

    ends: list[tuple[Run, dict[str, Any]]]
    failed: dict[str, str]

    @property
    def common(self) -> dict[str, Any]:
        run = self.ends[0][0]
        return {name: value for name, value in run.given.items() if name not in run.differs}

    @property
    def varied(self) -> tuple[str, ...]:
        return tuple(name for name in self.ends[0][0].differs if name != "seed")

    @property
    def rows(self) -> list[Row]:
        runs = [run for run, _ in self.ends]
        settings = [{name: run.given[name] for name in self.varied} for run in runs]
        found = optional_package("pandas", "sweeps").DataFrame([dict(numbers(end)) for _, end in self.ends])
        rows = []
        for _, part in found.groupby([in_words(each) for each in settings], sort=False):
            seeds = [runs[place].settings.seed for place in part.index]
            rows.append(Row(settings[part.index[0]], seeds, part.dropna(axis=1).agg(["mean", "sem"])))
        return rows

    @property
    def judge(self) -> tuple[str, str]:
        """Name of the accuracy by which rows are compared (:data:`HELD_OUT` or :data:`TESTED`)."""
        return HELD_OUT if all("best" in end for _, end in self.ends) else TESTED

    @property
    def best(self) -> Row:
        """The row with the highest mean of the accuracy by which rows are compared."""
        return max(self.rows, key=lambda row: row.estimate(self.judge[0]).mean)

    def table(self) -> str:
        """A Markdown table with one line per row: settings, number of runs, means of accuracies, weights and seconds;
        then the best row, and the images by which it was chosen."""
        rows, held_out = self.rows, self.judge is HELD_OUT
        tests = dict([HELD_OUT, ("best/test_acc", "test accuracy")] if held_out else [TESTED])
        accuracies = {**tests, "train_acc": "training accuracy"}
        lines = [
            [
                *map(str, row.settings.values()),
                str(len(row.seeds)),
                *(row.estimate(name).text(2, scale=100) for name in accuracies),
                f"{row.estimate('weights').mean:,.0f}",
                row.estimate("train_seconds").text(1),
            ]
            for row in rows
        ]
        header = [*self.varied, "runs", *(f"{text}, %" for text in accuracies.values()), "weights", "seconds"]
        notes = ["Of each run the epoch with the best validation accuracy was tested."] if held_out else []
        if len(rows) > 1:
            how = "test images, so its accuracy is too high; give `validation=0.1`"
            (name, _), best = self.judge, self.best
            notes.append(f"Best: {best.label}, chosen on {'held-out images' if held_out else how}.")
            others = [row for row in rows if row.label != best.label]
            if level := [row.label for row in others if best.estimate(name).level(row.estimate(name))]:
                notes.append(f"No certain difference (two standard errors) from {'; '.join(level)}.")
        return "\n".join([markdown(header, lines), *notes])

    def picture(self) -> Any:
        """A matplotlib figure of the mean accuracy by which rows are compared, with its standard error. The x axis has
        the setting with most values, evenly spaced, numbers in their order. Each combination of the others is a line.
        """
        from matplotlib.figure import Figure  # which is optional
        from matplotlib.ticker import PercentFormatter

        from g2gnet.inspect.figures import style

        (quantity, accuracy), rows = self.judge, self.rows
        values = {name: list(dict.fromkeys(row.settings[name] for row in rows)) for name in self.varied}
        across = max(values, key=lambda name: len(values[name]), default="")
        shown = values.get(across, [None])
        if all(type(value) in (int, float) for value in shown):
            shown.sort()
        lines: dict[str, list[tuple[int, float, float]]] = {}
        for row in rows:
            label = in_words({name: value for name, value in row.settings.items() if name != across})
            mean, error = row.estimate(quantity)
            lines.setdefault(label, []).append((shown.index(row.settings.get(across)), mean, error or 0))
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axis = figure.subplots()
        for number, (label, points) in enumerate(lines.items()):
            x, means, errors = zip(*sorted(points), strict=True)
            axis.errorbar(x, means, errors, label=label, capsize=3, markersize=5, **style(number))
        axis.set_xticks(range(len(shown)), [str(value) for value in shown])
        axis.margins(x=0.1)
        axis.set(xlabel=across, ylabel=f"{accuracy}, mean ± standard error")
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        if len(lines) > 1:
            figure.legend(loc="outside lower left", ncols=2, frameon=False)
        axis.set_title(in_words(self.common), fontsize=9, wrap=True)
        return figure

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and strings."""
        rows = [
            {**row._asdict(), "results": {name: row.estimate(name)._asdict() for name in row.results}}
            for row in self.rows
        ]
        runs = [{"settings": dict(run.differs), "folder": str(run.folder), "result": end} for run, end in self.ends]
        best = {"settings": self.best.settings, "by": self.judge[0]}
        return {"settings": self.common, "rows": rows, "best": best, "runs": runs, "failed": self.failed}
