"""Means and standard errors over the seeds of a sweep, and their table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from g2gnet.base.tables import markdown
from g2gnet.training import TrainSettings
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


def rows_of(varied: Sequence[str], ends: Sequence[tuple[TrainSettings, dict[str, Any]]]) -> list[Row]:
    """The runs in groups that differ in nothing but the seed."""
    rows: dict[tuple, Row] = {}
    for settings, end in ends:
        values = {name: getattr(settings, name) for name in varied}
        row = rows.setdefault(tuple(values.values()), Row(values, [], []))
        row.seeds.append(settings.seed)
        row.ends.append(end)
    return list(rows.values())


#: the accuracy by which rows are compared, in the runs' results and in words: where every run held images out, theirs
HELD_OUT, TESTED = ("best/val_acc", "validation accuracy"), ("test_acc", "test accuracy")


def judge(rows: Sequence[Row]) -> tuple[str, str]:
    """By which accuracy these rows are compared: :data:`HELD_OUT` or :data:`TESTED`."""
    return HELD_OUT if all("best" in end for row in rows for end in row.ends) else TESTED


def best_row(rows: Sequence[Row]) -> Row:
    """The row with the highest mean of that accuracy."""
    return max(rows, key=lambda row: row.estimate(judge(rows)[0]).mean)


def table(varied: Sequence[str], rows: Sequence[Row]) -> str:
    """One line per row: settings, number of runs, means of what they reached; then the best, and by which images."""
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
    header = [*varied, "runs", *(f"{text}, %" for text in accuracies.values()), "weights", "seconds"]
    notes = ["Of each run the epoch with the best validation accuracy was tested."] if held_out else []
    if len(rows) > 1:
        how = "held-out images" if held_out else "test images, so its accuracy is too high; validation=SHARE mends that"
        notes.append(f"Best: {best_row(rows).label}, chosen on {how}.")
    return "\n".join([markdown(header, lines), *notes])
