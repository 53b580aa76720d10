"""Draws docs/result.png, the README's picture of speed and accuracy, from the committed records.

pip install -e ".[plots]" && python docs/draw_result.py
"""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from benchmarks.few_study import EXAMPLE
from benchmarks.plots import draw_tradeoff
from benchmarks.redraw import records
from benchmarks.report import seconds, title
from benchmarks.study import mean
from benchmarks.tradeoff_study import density, width

OURS, PEER = "#1f5a7a", "#b5b5b5"
CONTENDERS = ("g2g-cpu", "dense-lif", "compiled-dense", "spikingjelly-dense", "snntorch-masked")
#: densities of the accuracy panel; all are in docs/results.md
SHOWN = ("dense", "25 %, units of 64", "8 %, units of 1")


def record(name: str) -> dict[str, Any]:
    """The first record of what is called ``name`` (see :mod:`benchmarks.redraw`)."""
    return next(record.content for record in records() if record.name == name)


def draw_times(axis: Axes, content: dict[str, Any]) -> None:
    rows = {row["contender"]: row for row in content["contenders"] if row["status"] == "timed"}
    shown = [rows[name] for name in CONTENDERS if name in rows]
    for place, row in enumerate(shown):
        axis.barh(place, row["median"], color=OURS if row["contender"].startswith("g2g") else PEER, height=0.66)
        axis.annotate(
            seconds(row["median"]), (row["median"], place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axis.set_yticks(range(len(shown)), [title(row["contender"]) for row in shown])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.16 * max(row["median"] for row in shown))
    axis.set_xlabel("seconds per training step, ¼ of the weights active")


def width_and_time(row: dict[str, Any]) -> str:
    return f"{width(row)} · {mean(row, 'train_cpu_seconds'):.0f} s"


def pruned() -> dict[str, Any]:
    """The network that is pruned to the fewest single weights, named as a row of the other study."""
    row = next(row for row in record("few_study")["rows"] if row["row"] == EXAMPLE)
    return {**row, "row": "index, 512, pruned, smoothed, 40 epochs"}


def draw(folder: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained", width_ratios=(1, 1.15))
    draw_times(left, record("step"))
    study = record("tradeoff_study")
    shown = [row for row in study["rows"] if density(row) in SHOWN]
    draw_tradeoff(right, {**study, "rows": [*shown, pruned()]}, "weights", width_and_time)
    right.set_xlim(left=2000)  # room for a label
    right.xaxis.set_major_locator(LogLocator())
    right.set_xlabel("weights; at each point: neurons of a layer, time of training")
    right.set_ylabel("test accuracy, %")
    right.legend(frameon=False, loc="lower right", fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "result.png", dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).parent)
