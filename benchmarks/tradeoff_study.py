"""Accuracy for time and for weights on Fashion-MNIST, dense against sparse: ``python -m benchmarks.tradeoff_study``.

Dense networks of several widths and wide sparse ones, by one recipe: which should be trained with a given budget of
time or of weights? Times are processor seconds of training without evaluation, on one thread; with ``--jobs 1`` no
other run uses the caches.
"""

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from g2gnet.base.tables import markdown

from .dst_study import REWIRED, density_flags
from .study import Study, accuracy, mean, run_study, spread

DENSE_WIDTHS = (12, 32, 64, 128, 256, 512, 1024, 2048)
#: (width, density in per cent, side of a unit)
SPARSE = (
    *((width, 25, 64) for width in (256, 512, 1024, 2048)),
    *((width, percent, 16) for percent in (10, 5) for width in (1024, 2048, 4096)),
    *((width, percent, 1) for percent in (10, 5) for width in (1024, 2048)),
    # below 10,000 weights, as is dense, 12; as many as dense, 64 and dense, 128
    *((width, percent, 1) for width, percent in ((128, 8), (256, 3), (512, 8), (512, 16))),
)
#: those of the sparse ones that are also rewired, pruned by magnitude and grown by gradient
ALSO_REWIRED = ((2048, 10, 16), (2048, 5, 16))


def _rows() -> dict[str, str]:
    rows = {f"dense, {width}": f"--model dense --hidden_dim {width}" for width in DENSE_WIDTHS}
    for width, percent, units in SPARSE:
        flags = f"--model index --hidden_dim {width} --block_size {units} {density_flags(percent)}"
        rows[f"index, {width}, {percent} %, units of {units}"] = flags
        if (width, percent, units) in ALSO_REWIRED:
            rows[f"index, {width}, {percent} %, rewired, units of {units}"] = f"{flags} {REWIRED}"
    return rows


KINDS = ("dense", "sparse")
#: budgets: (quantity of a run, its unit, at most)
BUDGETS = (
    ("weights", "weights", (10_000, 100_000, 300_000, 1_000_000)),
    ("train_cpu_seconds", "processor seconds", (60, 240, 600)),
)


def density(row: dict[str, Any]) -> str:
    """``dense``, or the share of the weights, whether they are rewired, and the units."""
    return ", ".join(str(row["row"]).split(", ")[2:]) or "dense"


def best(record: dict[str, Any], kind: str, quantity: str, budget: float) -> dict[str, Any] | None:
    """The row of ``dense`` or ``sparse`` with the highest mean accuracy within a budget; None if there is none."""
    within = [row for row in record["rows"] if (density(row) == "dense") == (kind == "dense")]
    within = [row for row in within if mean(row, quantity) <= budget]
    return max(within, key=lambda row: statistics.mean(map(accuracy, row["ends"])), default=None)


def summary(row: dict[str, Any] | None) -> str:
    """What a row reaches, and its name."""
    return f"{spread(row['ends'], accuracy)}: {row['row']}" if row else "–"


def table(record: dict[str, Any]) -> str:
    """Accuracy, weights and time of each network; and the best dense and sparse one within some budgets."""
    rows = []
    for row in record["rows"]:
        ends = row["ends"]
        seconds = spread(ends, lambda end: end["train_cpu_seconds"], 0)
        rows.append([row["row"], f"{mean(row, 'weights'):,.0f}", seconds, spread(ends, accuracy)])
    within = [
        [f"{budget:,} {unit}", *(summary(best(record, kind, quantity, budget)) for kind in KINDS)]
        for quantity, unit, budgets in BUDGETS
        for budget in budgets
    ]
    return "\n\n".join(
        [
            markdown(["network", "weights", "processor seconds", "test accuracy, %"], rows),
            "The highest test accuracy, %, of a network of the table within a budget:",
            markdown(["at most", *KINDS], within),
        ]
    )


STUDY = Study(
    "tradeoff_study",
    __doc__,
    "--dataset fashionmnist --T 10 --lr_schedule cosine --weight_decay 0 --standardize --surrogate triangle",
    _rows(),
    20,
    table,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
