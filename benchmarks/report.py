"""Turns outcomes into runs of a record, and records into tables."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from g2gnet.base.tables import in_columns

from .harness import Outcome
from .registry import COMPACT


def summary(outcome: Outcome) -> dict[str, Any]:
    """One contender's run; it has times only if its results were right."""
    entry = outcome.job.entry
    run: dict[str, Any] = {
        "contender": entry.label,
        "precision": entry.precision,
        "status": outcome.status,
        "reason": outcome.reason,
        "differs": outcome.differs,
        "firing_rates": outcome.firing_rates,
        "closest": outcome.verdict.closest() if outcome.verdict else None,
    }
    if outcome.status == "timed":
        p20, median, p80 = np.percentile(outcome.seconds, (20, 50, 80)).tolist()
        run |= {"median": median, "p20": p20, "p80": p80, "repeats": len(outcome.seconds)}
        run |= {"cpu_median": float(np.median(outcome.cpu_seconds))}
        run |= {"first_seconds": outcome.first_seconds, "peak_bytes": outcome.peak_bytes}
    return run


def of_floor(record: dict[str, Any], run: dict[str, Any]) -> float:
    """The floor over a contender's median: its own floor if its workload differs from that of the others."""
    return run.get("floor_seconds", record["workloads"][run["place"]]["floor_seconds"]) / run["median"]


def curves(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The runs of each contender, from the first place to the last."""
    for contender in dict.fromkeys(run["contender"] for run in record["runs"]):
        of = [run for run in record["runs"] if run["contender"] == contender]
        yield contender, sorted(of, key=lambda run: run["place"])


class Line(NamedTuple):
    """seconds = slope·x + intercept, and the share of the variance that this explains."""

    slope: float
    intercept: float
    r_squared: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line through at least two different points."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    spread = np.asarray(y) - np.mean(y)
    unexplained = float(rest @ rest / (spread @ spread)) if np.any(spread) else 0.0
    return Line(float(slope), float(intercept), 1.0 - unexplained)


def line(record: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Line | None:
    """The line through the medians of a contender over the work of their places.

    None where the work hardly differs (units of another size): a line through it would say nothing.
    """
    timed = [(record["workloads"][run["place"]]["flop"], run["median"]) for run in runs if run["status"] == "timed"]
    flop, medians = zip(*timed, strict=True) if timed else ((), ())
    return fit(flop, medians) if timed and max(flop) > 1.5 * min(flop) else None


_OURS = {
    "g2g-triton": "g2g, Triton kernels",
    "g2g-cpu": "g2g, compiled CPU kernels",
    "g2g-torch": "g2g, plain PyTorch",
}
TITLES = {
    **_OURS,
    **{f"{label}-triangle": f"{title}, hidden triangle α = 4" for label, title in _OURS.items()},
    **{f"{label}-compiled": f"{title}, under torch.compile" for label, title in _OURS.items()},
    **{f"{label}-graph": f"{title}, a step as one CUDA graph" for label, title in _OURS.items()},
    **{f"{label}-feed-forward": f"{title}, feed-forward, as many weights" for label, title in _OURS.items()},
    **{f"{label}-steps": f"{title}, a loop over `step`" for label, title in _OURS.items()},
    "snntorch-masked": "snnTorch loop, dense weights × mask",
    "snntorch-dense": "snnTorch loop, dense",
    "compiled-masked": "torch.compile of the snnTorch loop, × mask",
    "compiled-dense": "torch.compile of the snnTorch loop, dense",
    "spikingjelly-dense": "SpikingJelly 2, multi-step, dense",
    "spikingjelly-container": "SpikingJelly 2, recurrent container, dense",
    "jax-masked": "JAX, jit and scan, dense weights × mask",
    "dense-lif": "nn.Linear over all T with our LIF, dense",
    "bsr-lif": "PyTorch's block-sparse product with our LIF",
    "masked": "nn.Linear, weight × mask",
    "dense": "nn.Linear, dense",
    "bsr": "PyTorch's block-sparse product (BSR)",
    "snntorch": "snnTorch Leaky, a loop over T",
    "spikingjelly": "SpikingJelly 2, multi-step LIF",
    "dense-correlation": "dense masks, full correlation matrix",
}


def title(label: str) -> str:
    """A contender's name in words."""
    return TITLES[label.removesuffix("-bf16")] + (", bfloat16" if label.endswith("-bf16") else "")


def curve_title(label: str, quantity: str) -> str:
    """A contender's name in words where ``quantity`` grows: without its α where that is what grows."""
    name = title(label)
    return name.removesuffix(f" α = {COMPACT['alpha']:g}") if quantity == "alpha" else name


def plain(value: float) -> str:
    """A whole number as it is, others to three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    unit, scale = next(
        (pair for pair in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if abs(value) >= pair[1]), ("ns", 1e-9)
    )
    return f"{value / scale:.3g} {unit}"


def throughput_table(record: dict[str, Any]) -> str:
    """The contenders of a throughput record; then how some differ, and which have no time and why.

    GFLOP/s count multiplications and additions of active weights, whatever the contender actually does.
    """
    timed = [run for run in record["runs"] if run["status"] == "timed"]
    flop = record["workloads"][0]["flop"]
    baseline = next((run["median"] for run in timed if run["contender"] == record["baseline"]), None)
    rows = [
        (
            run["contender"],
            seconds(run["median"]),
            f"{seconds(run['p20'])} – {seconds(run['p80'])}",
            seconds(run["cpu_median"]),
            f"{baseline / run['median']:.2f}×" if baseline else "–",
            f"{flop / run['median'] / 1e9:.3g}" if flop else "–",
            f"{of_floor(record, run):.0%}",
            f"{run['peak_bytes'] / 1e6:.0f}",
            seconds(run["first_seconds"]),
            " ".join(f"{100 * rate:.1f}" for rate in run["firing_rates"]),
            run["closest"],
        )
        for run in timed
    ]
    columns = "contender,median,p20 – p80,CPU time,speed-up,GFLOP/s,of floor,peak MB,first turn,rates %,error"
    parts = [in_columns(columns.split(","), rows)] if rows else ["no contender has a time"]
    parts += [f"{run['contender']}: {run['differs']}" for run in timed if run["differs"]]
    parts += [f"{run['contender']}: {run['status']}: {run['reason']}" for run in record["runs"] if run not in timed]
    return "\n".join(parts)


def growth_table(record: dict[str, Any]) -> str:
    """One row per contender: the medians and the line; then the memory; then the points without a time and why."""
    places = record["workloads"]
    header = [plain(place["x"]) for place in places]
    times, memory, notes = [], [], []
    for contender, runs in curves(record):
        medians = [run.get("median") for run in runs]
        notes += [
            f"{contender} at {header[run['place']]}: {run['status']}: {run['reason']}"
            for run in runs
            if run["status"] != "timed"
        ]
        found, fitted = line(record, runs), ["–"] * 3
        if found:
            share = found.intercept / max(median for median in medians if median)
            fitted = [seconds(found.intercept), f"{share:.0%}", f"{found.r_squared:.4f}"]
        times.append((contender, *(seconds(median) if median else "–" for median in medians), *fitted))
        peaks = (run.get("peak_bytes") for run in runs)
        memory.append((contender, *(f"{peak / 1e6:.0f}" if peak else "–" for peak in peaks)))
    if "dense_bytes" in places[0]:
        dense = [f"{place['dense_bytes'] / 1e6:.0f}" for place in places]
        memory.append(("dense weights with gradients and Adam, computed", *dense))
    return "\n".join(
        [
            f"{record['x_is']}: median time, and the line over active multiply-adds",
            in_columns(("", *header, "intercept", "of largest", "R²"), times),
            "peak memory, MB",
            in_columns(("", *header), memory),
            *notes,
        ]
    )


def compared(record: dict[str, Any], before: dict[str, Any]) -> str:
    """How long each contender takes, and took in an earlier record."""
    was = {(run["contender"], run["place"]): run["median"] for run in before["runs"] if "median" in run}
    rows = [
        (run["contender"], seconds(was[key]), seconds(run["median"]), f"{run['median'] / was[key]:.2f}×")
        for run in record["runs"]
        if "median" in run and (key := (run["contender"], run["place"])) in was
    ]
    return in_columns((f"since {str(before['machine']['commit'])[:8]}", "was", "is", ""), rows)
