"""Draws docs/result.png, the README's picture of speed and accuracy, from the committed records.

pip install -e ".[plots]" && python docs/draw_result.py
"""

import statistics
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.redraw import all_records
from benchmarks.report import seconds
from benchmarks.studies import EXAMPLE
from benchmarks.study_tables import Row, accuracy, density, rows_of

OURS, PEER = "#1f5a7a", "#9a9a9a"
CONTENDERS = {
    "g2g-cpu": "g2g",
    "dense-lif": "dense layers over all steps",
    "compiled-dense": "snnTorch, dense, torch.compile",
    "jax-masked": "JAX, jit, weights × mask",
    "snntorch-masked": "snnTorch, weights × mask",
}
#: lines of the accuracy panel, all of them rows of docs/results.md: density, name, colour
LINES = (("dense", "dense, 20 epochs", PEER), ("25 %, units of 64", "sparse, 20 epochs", OURS))


def record(name: str) -> dict[str, Any]:
    """The newest record of what is called ``name`` (see :mod:`benchmarks.redraw`)."""
    found = [record.content for record in all_records() if record.name == name]
    return max(found, key=lambda content: str(content["machine"]["date"]))


def draw_times(axis: Axes, content: dict[str, Any]) -> None:
    rows = {run["contender"]: run for run in content["runs"] if run["status"] == "timed"}
    for place, name in enumerate(CONTENDERS):
        median = rows[name]["median"]
        axis.barh(place, median, color=OURS if place == 0 else PEER, height=0.62)
        axis.annotate(
            seconds(median), (median, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=13
        )
    axis.set_yticks(range(len(CONTENDERS)), list(CONTENDERS.values()))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(rows[name]["median"] for name in CONTENDERS))
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    network = content["workloads"][0]
    size = f"2 × {network['hidden_dim']:,} neurons, {network['T']} steps, batch {network['batch_size']}"
    axis.set_title(f"Time of a training step\n({size})", loc="left", fontsize=13)


def draw_accuracies(axis: Axes) -> None:
    rows = rows_of(record("tradeoff-study"))
    for name, label, colour in LINES:
        line = sorted((row.mean("weights"), _accuracy(row)) for row in rows if density(row) == name)
        axis.plot(*zip(*line, strict=True), color=colour, marker="o", label=label)
    pruned = next(row for row in rows_of(record("few-study")) if row.name == EXAMPLE)
    axis.plot(
        pruned.mean("weights"),
        _accuracy(pruned),
        "*",
        color="#c4552d",
        markersize=14,
        label="pruned gradually, 40 epochs",
    )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("weights")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right", fontsize=13)
    axis.set_title("Test accuracy on Fashion-MNIST, %", loc="left", fontsize=13)


def _accuracy(row: Row) -> float:
    return statistics.mean(map(accuracy, row.runs))


def draw(folder: Path) -> None:
    with plt.rc_context({"font.size": 13}):
        figure = plt.figure(figsize=(7.2, 6.2), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.3))
        draw_times(upper.subplots(), record("step"))
        draw_accuracies(lower.subplots())
        figure.savefig(folder / "result.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parent)
