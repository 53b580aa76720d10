"""The picture of how a step grows, from its record."""

import hashlib
from pathlib import Path
from typing import Any

import matplotlib

from . import records
from .report import curves, title

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

OURS, PEER = "#1f5a7a", "#9a9a9a"
COLOURS = {"g2g-cpu": OURS, "g2g-triton": OURS, "snntorch-masked": "#c4552d", "dense-lif": "#6b6b6b"}


def digest(record: dict[str, Any]) -> str:
    """Identifies a record; its picture has this as its description."""
    return hashlib.sha256(records.text(record).encode()).hexdigest()


def draw(record: dict[str, Any], path: Path | str) -> None:
    """Seconds and memory against the density of the weights, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained")
    left, right = axes
    flop = {place["x"]: place["flop"] for place in record["workloads"]}
    for name, runs in curves(record):
        timed = [run for run in runs if run["status"] == "timed"]
        x, medians = ([list(flop)[run["place"]] for run in timed], [run["median"] for run in timed])
        colour = COLOURS.get(name, PEER)
        spread = [[run["median"] - run["p20"] for run in timed], [run["p80"] - run["median"] for run in timed]]
        style = {"color": colour, "marker": "o", "markersize": 4}
        left.errorbar(x, medians, spread, capsize=3, label=title(name), **style)
        right.plot(x, [run["peak_bytes"] / 1e6 for run in timed], **style)
        if colour == OURS:
            ideal = [medians[-1] * flop[place] / flop[x[-1]] for place in x]
            text = "ideal: proportional to active multiply-adds"
            left.plot(x, ideal, color="black", linestyle="--", linewidth=1, label=text)
    left.set_ylabel("seconds per training step")
    right.set_ylabel("peak memory, MB")
    for axis in axes:
        axis.set_xlabel(record["x_is"])
        axis.set_ylim(bottom=0)
        axis.set_xlim(0, 1.02)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Description": digest(record)})
    plt.close(figure)
