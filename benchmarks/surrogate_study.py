"""Surrogate gradients of the hidden neurons on Fashion-MNIST: ``python -m benchmarks.surrogate_study``.

Everything else has its default. The rows of the default size are long runs: ``--seeds 1 --rows "*default size*"`` runs
each once.
"""

import sys
from collections.abc import Sequence
from typing import Any

from g2gnet.base.tables import markdown

from .study import Study, accuracy, of_hidden_layers, run_study, spread

SURROGATES = {
    "ATan, alpha 2": "--surrogate atan --alpha 2",
    "triangle, alpha 2": "--surrogate triangle --alpha 2",
    "triangle, alpha 4": "--surrogate triangle --alpha 4",
    "boxcar, alpha 2": "--surrogate boxcar --alpha 2",
}
#: the flags of each size, by the ending of a row's name
SIZES = {"": "--T 10 --hidden_dim 1024", ", default size, 5 epochs": "--epochs 5"}


def table(record: dict[str, Any]) -> str:
    """Accuracy of each row, firing rates, silent neurons and time."""
    rows = []
    for row in record["rows"]:
        ends = row["ends"]
        rows.append(
            [
                row["row"],
                spread(ends, accuracy),
                of_hidden_layers(ends, "firing_rate", 1),
                of_hidden_layers(ends, "silent", 1),
                spread(ends, lambda end: end["train_seconds"], 0),
            ]
        )
    header = ["", "test accuracy, %", "firing rate, %, layers 1 and 2", "never fires, %", "seconds of training"]
    return markdown(header, rows)


ROWS = {f"{name}{size}": f"{sizes} {flags}" for size, sizes in SIZES.items() for name, flags in SURROGATES.items()}
STUDY = Study("surrogate_study", __doc__, "--dataset fashionmnist --model index", ROWS, 20, table)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
