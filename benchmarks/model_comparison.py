"""Test accuracy of every model on Fashion-MNIST, static graphs: ``python -m benchmarks.model_comparison``.

The last row is a control: an unstructured random graph with as many weights.
"""

import sys
from collections.abc import Sequence
from typing import Any

from g2gnet.base.tables import markdown

from .study import Study, accuracy, run_study, spread

ROWS = {
    "dense": "--model dense",
    "index": "--model index",
    "random": "--model random",
    "mixer": "--model mixer",
    "index, units of 32": "--model index --block_size 32",
    "index, units of 16": "--model index --block_size 16",
    "index, single weights": "--model index --block_size 1",
    "unstructured random graph": "--model index --block_size 1 --num_groups 1 --p_intra 0.25625",
}


def table(record: dict[str, Any]) -> str:
    """Test and training accuracy of each row, the density of fc2 and the flags."""
    rows = [
        [
            row["row"],
            spread(row["ends"], accuracy),
            spread(row["ends"], lambda end: 100 * end["train_acc"]),
            f"{100 * row['ends'][0]['density']['fc2']:.1f} %",
            f"`{row['flags']}`",
        ]
        for row in record["rows"]
    ]
    return markdown(["model", "test accuracy, %", "training accuracy, %", "weights of fc2 that exist", "flags"], rows)


STUDY = Study("model_comparison", __doc__, "--dataset fashionmnist --T 10 --hidden_dim 1024", ROWS, 5, table)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
