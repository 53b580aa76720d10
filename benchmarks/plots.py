"""The pictures of the records: one function per benchmark, all in the same colours."""

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from .chunks import usual_chunk
from .report import curve_title, digest, seconds, title
from .structure_study import CONTROL, GRAPHS, compared, interval, pooled
from .study import accuracy, mean, standard_error
from .tradeoff_study import density, width

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

OURS = "#1f5a7a"
COLOURS = {
    "g2g-cpu": OURS,
    "g2g-triton": OURS,
    "g2g-torch": "#7fb2cc",
    "g2g-cpu-triangle": "#2f8f5b",
    "g2g-triton-triangle": "#2f8f5b",
    "snntorch-masked": "#c4552d",
    "snntorch-dense": "#e0a184",
    "compiled-masked": "#7a5195",
    "compiled-dense": "#b79bc9",
    "spikingjelly-dense": "#b08a2e",
    "dense-lif": "#6b6b6b",
    "bsr-lif": "#4f8a4a",
}
PEER = "#9a9a9a"
#: what the numbers at the points of a trade-off are
WIDTHS = "at each point: neurons of a hidden layer"
#: colour, marker and the side on which the widths stand, so that those of neighbouring lines do not overlap
TRADEOFF_STYLES = (
    ("#7a7a7a", "o", "below"),
    (OURS, "o", "above"),
    ("#2f8f5b", "s", "left"),
    ("#c4552d", "^", "right"),
    ("#7a5195", "v", "above"),
    ("#b08a2e", "D", "above"),
    ("#c77ba0", "<", "right"),
    ("#4c4c9a", ">", "above"),
    ("#1b9aaa", "P", "above"),
    ("#8a8f2a", "X", "above"),
    ("#a23b72", "*", "above"),
)
#: of text beside a point: its offset, in points, and its alignment
SIDES: dict[str, dict[str, Any]] = {
    "above": {"xytext": (-4, 4), "ha": "right", "va": "bottom"},
    "below": {"xytext": (3, -4), "ha": "left", "va": "top"},
    "right": {"xytext": (7, -2), "ha": "left", "va": "center"},
    "left": {"xytext": (-7, 0), "ha": "right", "va": "center"},
}


def draw(record: dict[str, Any], path: Path | str) -> None:
    """Draws a record into a file; the ending gives the format. A PNG names its record."""
    figure = DRAWN_BY[record["benchmark"]](record)
    metadata = {"Description": digest(record)} if Path(path).suffix == ".png" else None
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)


def _throughput(record: dict[str, Any]) -> Figure:
    rows = [row for row in record["contenders"] if row["status"] == "timed"]
    figure, axis = plt.subplots(figsize=(8.2, 1.1 + 0.42 * len(rows)), layout="constrained")
    places = range(len(rows))
    medians = [row["median"] for row in rows]
    spread = [[row["median"] - row["p20"] for row in rows], [row["p80"] - row["median"] for row in rows]]
    colours = [OURS if row["contender"].startswith("g2g") else PEER for row in rows]
    axis.barh(places, medians, xerr=spread, color=colours, ecolor="black", capsize=3, height=0.65)
    for place, row in zip(places, rows, strict=True):
        axis.annotate(
            seconds(row["median"]), (row["p80"], place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axis.axvline(record["floor_seconds"], color="black", linestyle=":", linewidth=1)
    axis.annotate("floor", (record["floor_seconds"], 1), xycoords=("data", "axes fraction"), va="bottom", ha="center")
    axis.set_yticks(places, [title(row["contender"]) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(row["p80"] for row in rows))
    axis.set_xlabel("seconds: median, 20th and 80th percentile")
    _tidy(axis)
    return figure


def _scaling(record: dict[str, Any]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained")
    flop = {place["x"]: place["flop"] for place in record["workloads"]}
    for one in record["contenders"]:
        points = sorted((p for p in one["points"] if p["status"] == "timed"), key=lambda point: point["x"])
        if not points:
            continue
        name, x = one["contender"], [point["x"] for point in points]
        colour = COLOURS.get(name, PEER)
        spread = [[p["median"] - p["p20"] for p in points], [p["p80"] - p["median"] for p in points]]
        style = {"color": colour, "marker": "o", "markersize": 4}
        label = curve_title(name, record["quantity"])
        left.errorbar(x, [p["median"] for p in points], spread, capsize=3, label=label, **style)
        right.plot(x, [p["peak_bytes"] / 1e6 for p in points], **style)
        if colour == OURS and record["quantity"] != "alpha":  # which does not change ATan
            largest = max(points, key=lambda point: flop[point["x"]])
            ideal = [largest["median"] * flop[place] / flop[largest["x"]] for place in x]
            name = "ideal: proportional to active multiply-adds"
            left.plot(x, ideal, color="black", linestyle="--", linewidth=1, label=name)
    left.set_ylabel("seconds per training step" if record["kernel"] == "step" else "seconds per forward pass")
    right.set_ylabel("peak memory, MB")
    for axis in (left, right):
        axis.set_xlabel(record["x_is"])
        axis.set_ylim(bottom=0)
        if record["quantity"] == "block_size":
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(flop), [str(place) for place in flop])
        elif record["quantity"] in ("p_inter", "alpha"):
            axis.set_xlim(0, 1.02 * max(1 if record["quantity"] == "p_inter" else 0, *flop))
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axis.set_xlim(left=0)
        _tidy(axis)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _accuracy(record: dict[str, Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(7.6, 4.3), layout="constrained")
    styles = {"dense": ("#6b6b6b", "o"), "static": (OURS, "o"), "dynamic": ("#c4552d", "s")}
    named = set()
    for run in record["runs"]:
        colour, marker = styles[run["kind"]]
        axis.plot(
            [epoch["wall_seconds"] for epoch in run["epochs"]],
            [epoch["test_acc"] for epoch in run["epochs"]],
            color=colour,
            marker=marker,
            markersize=5,
            label=None if run["kind"] in named else run["title"],  # once, however many seeds there are
        )
        named.add(run["kind"])
    axis.set_xlabel("seconds of training so far (one mark per epoch)")
    axis.set_ylabel("test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(left=0)
    axis.legend(frameon=False, loc="lower right")
    _tidy(axis)
    return figure


def _tradeoff(record: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.1), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, ("train_cpu_seconds", "weights"), strict=True):
        draw_tradeoff(axis, record, quantity)
        _tidy(axis)
    axes[0].set_xlabel(f"processor seconds of training; {WIDTHS}")
    axes[1].set_xlabel(f"weights; {WIDTHS}")
    axes[0].set_ylabel("test accuracy, %")
    axes[1].legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def draw_tradeoff(
    axis: Axes, record: dict[str, Any], quantity: str, label: Callable[[dict[str, Any]], str] = width
) -> None:
    """Test accuracy against ``weights`` or ``train_cpu_seconds``; one line per density, each point with a label.

    The label is the width, the number of neurons of each hidden layer, unless another is given.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        lines.setdefault(density(row), []).append(row)
    for (name, rows), (colour, marker, side) in zip(lines.items(), itertools.cycle(TRADEOFF_STYLES)):
        accuracies = [[accuracy(end) for end in row["ends"]] for row in rows]
        means = [statistics.mean(values) for values in accuracies]
        errors = [standard_error(values) for values in accuracies]
        x = [mean(row, quantity) for row in rows]
        style = f"{marker}{':' if name == 'dense' else '-'}"
        axis.errorbar(
            x, means, errors, fmt=style, color=colour, markersize=5, linewidth=1, capsize=2, label=name, zorder=4
        )
        for row, place, height in zip(rows, x, means, strict=True):
            axis.annotate(
                label(row), (place, height), textcoords="offset points", fontsize=7, color=colour, **SIDES[side]
            ).set_path_effects([withStroke(linewidth=2, foreground="white")])
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(0.1)


def _structure(record: dict[str, Any]) -> Figure:
    """What each graph has more than the control: a bar per size, in the table's order, and those of all sizes."""
    sizes = compared(record)
    together = pooled(sizes)
    units = [size.rpartition(", ")[2] for size in sizes]
    colours = dict(zip(dict.fromkeys(units), (OURS, "#c4552d"), strict=False))  # one or two
    colours |= dict(zip(reversed(together), ("black", "dimgrey", "darkgrey"), strict=False))
    bars = list(zip(units, sizes.values(), strict=True)) + list(together.items())
    graphs = [graph for graph in GRAPHS if any(graph in of for _, of in bars)]
    figure, axis = plt.subplots(figsize=(8.2, 1 + (0.6 + 0.04 * len(bars)) * len(graphs)), layout="constrained")
    for row, graph in enumerate(graphs):
        for number, (label, of) in enumerate(bars, 1):
            values = of.get(graph, [])
            if len(set(values)) > 1:
                middle, (low, high) = statistics.mean(values), interval(values)
                errors = [[middle - low], [high - middle]]
                place = row - 0.4 + 0.8 * number / (len(bars) + 1)
                axis.errorbar(middle, place, xerr=errors, fmt="o", color=colours[label], markersize=3, linewidth=1)
    for label, colour in colours.items():
        axis.plot([], [], "o-", color=colour, markersize=3, linewidth=1, label=label)
    axis.axvline(0, color="black", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(graphs)), graphs)
    axis.invert_yaxis()
    axis.set_xlabel(f"points more than {CONTROL}: mean and 95 % interval")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _tidy(axis)
    return figure


def _chunks(record: dict[str, Any]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained")
    usual = usual_chunk(record)
    for chunk, label, colour, marker in (
        (None, "all steps at once", PEER, "o"),
        (usual, f"in chunks of {usual} steps", OURS, "s"),
    ):
        points = [point for point in record["points"] if point["chunk"] == chunk and point["status"] == "timed"]
        for axis, quantity, unit in ((left, "peak_bytes", 1e6), (right, "median", 1)):
            style = {"color": colour, "marker": marker, "markersize": 5}
            axis.plot([p["T"] for p in points], [p[quantity] / unit for p in points], label=label, **style)
    left.set_ylabel("peak memory above the process, MB")
    right.set_ylabel("seconds per training step")
    for axis in (left, right):
        axis.set_xlabel("time steps T")
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            side.set_minor_formatter(NullFormatter())
        _tidy(axis)
    left.legend(frameon=False)
    return figure


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)


DRAWN_BY: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "throughput": _throughput,
    "scaling": _scaling,
    "accuracy": _accuracy,
    "chunks": _chunks,
    "tradeoff_study": _tradeoff,
    "structure_study": _structure,
    "recurrent_structure_study": _structure,
}
