"""The pictures of the records: one function per benchmark, all in the same colours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from .chunks import usual_chunk
from .report import curve_title, digest, seconds, title

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
}
