"""Turns outcomes into a record, and the record into tables."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from g2gnet.base.tables import in_columns

from .harness import Outcome
from .registry import COMPACT


def summary(outcome: Outcome) -> dict[str, Any]:
    """One contender's part of a record; it has times only if its results were right."""
    entry = outcome.job.entry
    row: dict[str, Any] = {
        "contender": entry.label,
        "precision": entry.precision,
        "status": outcome.status,
        "reason": outcome.reason,
        "differs": outcome.differs,
        "firing_rates": outcome.firing_rates,
        "correctness": outcome.verdict.as_dict() if outcome.verdict else None,
    }
    if outcome.status == "timed":
        p20, median, p80 = np.percentile(outcome.seconds, (20, 50, 80)).tolist()
        row |= {"median": median, "p20": p20, "p80": p80, "seconds": outcome.seconds}
        row |= {"cpu_median": float(np.median(outcome.cpu_seconds)), "cpu_seconds": outcome.cpu_seconds}
        row |= {"first_seconds": outcome.first_seconds, "peak_bytes": outcome.peak_bytes}
    return row


def of_floor(record: dict[str, Any], row: dict[str, Any]) -> float:
    """The floor over a contender's median: its own floor if its workload differs from that of the others."""
    return row.get("floor_seconds", record["floor_seconds"]) / row["median"]


def digest(record: dict[str, Any]) -> str:
    """Identifies a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_csv(path: Path | str, rows: Sequence[dict[str, Any]], machine: dict[str, Any]) -> None:
    """One line per measured point, with machine and versions, so files of many runs can be joined."""
    where = {name: machine[name] for name in ("cpu", "threads", "gpu", "commit", "date")}
    where |= {name: version or "" for name, version in machine["versions"].items()}
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a CSV file filled by a contender's :func:`summary`; empty if it has no time."""
    names = ("contender", "precision", "status", "reason", "p20", "median", "p80", "first_seconds", "peak_bytes")
    return {name: row.get(name, "") for name in names}


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


def closest(errors: dict[str, float], limits: dict[str, float], **_: Any) -> str:
    """The error that is closest to its limit, of a verdict."""
    name = max(errors, key=lambda name: errors[name] / limits[name])
    return f"{errors[name]:.1e} ≤ {limits[name]:.1e}, {name}"


def throughput_table(record: dict[str, Any]) -> str:
    """The contenders of a throughput record; then how some differ, and which have no time and why.

    GFLOP/s count multiplications and additions of active weights, whatever the contender actually does.
    """
    timed = [row for row in record["contenders"] if row["status"] == "timed"]
    flop = record["workload"]["flop"]
    baseline = next((row["median"] for row in timed if row["contender"] == record["baseline"]), None)
    rows = [
        (
            row["contender"],
            seconds(row["median"]),
            f"{seconds(row['p20'])} – {seconds(row['p80'])}",
            seconds(row["cpu_median"]),
            f"{baseline / row['median']:.2f}×" if baseline else "–",
            f"{flop / row['median'] / 1e9:.3g}" if flop else "–",
            f"{of_floor(record, row):.0%}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            seconds(row["first_seconds"]),
            " ".join(f"{100 * rate:.1f}" for rate in row["firing_rates"]),
            closest(**row["correctness"]),
        )
        for row in timed
    ]
    columns = "contender,median,p20 – p80,CPU time,speed-up,GFLOP/s,of floor,peak MB,first turn,rates %,error"
    parts = [in_columns(columns.split(","), rows)] if rows else ["no contender has a time"]
    parts += [f"{row['contender']}: {row['differs']}" for row in timed if row["differs"]]
    parts += [
        f"{row['contender']}: {row['status']}: {row['reason']}"
        for row in record["contenders"]
        if row["status"] != "timed"
    ]
    return "\n".join(parts)
