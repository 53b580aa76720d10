"""Accuracy for time and for weights on Fashion-MNIST, dense against sparse: ``python -m benchmarks.tradeoff_study``.

Dense networks of several widths and wide sparse ones, by one recipe: which should be trained with a given budget of
time or of weights? Times are those of training without evaluation, on one thread of a machine with ``--jobs`` parallel
runs; with ``--jobs 1`` nothing else uses its caches.
"""

import sys
from collections.abc import Sequence
from typing import Any

from .dst_study import density_flags
from .study import Study, accuracy, markdown, run_study, spread

DENSE_WIDTHS = (64, 128, 256, 512, 1024, 2048)
#: (width, density in per cent)
SPARSE = ((512, 25), (1024, 25), (2048, 25), (1024, 10), (2048, 10), (4096, 10), (2048, 5), (4096, 5))


def _rows() -> dict[str, str]:
    rows = {f"dense, {width}": f"--model dense --hidden_dim {width}" for width in DENSE_WIDTHS}
    for width, percent in SPARSE:
        units = 64 if percent == 25 else 16
        flags = f"--model index --hidden_dim {width} --block_size {units} {density_flags(percent)}"
        rows[f"index, {width}, {percent} %, units of {units}"] = flags
    return rows


def table(record: dict[str, Any]) -> str:
    """Accuracy, weights and time of each network."""
    rows = []
    for row in record["rows"]:
        ends = row["ends"]
        seconds = spread(ends, lambda end: end["train_seconds"], 0)
        rows.append([row["row"], f"{ends[0]['weights']:,}", seconds, spread(ends, accuracy)])
    return markdown(["network", "weights", "seconds of training", "test accuracy, %"], rows)


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
