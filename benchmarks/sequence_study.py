"""Sequences with and without recurrence and adaptation, on Fashion-MNIST: ``python -m benchmarks.sequence_study``.

Images come row by row (T 28), as pixels in a fixed random order, four at a time (T 196), or pixel by pixel (T 784, 56
steps at a time). Each is learned by networks that are feed-forward, recurrent, adaptive or both, sparse (a quarter of
the weights in units of 16, or a twentieth in units of 4 that is rewired, pruned by magnitude and grown by gradient;
small layers keep more of theirs) and dense, and by PyTorch's GRU with as many weights as the recurrent network of a
quarter. Only the rows are trained unless ``--rows`` names others: pixels take hours. The settings of each data set were
chosen on held-back training images, once for all spiking networks (docs/results.md). Memory and processor time are
those of a training step; memory above the process with its imports.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2gnet import G2GNet
from g2gnet.base.tables import markdown
from g2gnet.training import TrainSettings

from . import gru
from .dst_study import REWIRED, density_flags
from .step_costs import step_costs
from .study import Study, accuracy, mean, run_study, spread

#: how an image unfolds; where steps are many, a longer memory, and against exploding gradients a lower surrogate and
#: smaller steps
DATA = {
    "rows": "--sequence rows",
    "permuted": "--sequence permuted --sequence_step 4 --beta 0.97 --alpha 0.05 --lr 0.002",
    "pixels": "--sequence pixels --chunk 56 --beta 0.97 --alpha 0.02 --lr 0.001",
}
NETWORKS = {
    "feed-forward": "",
    "recurrent": "--recurrent",
    "adaptive": "--neuron adlif",
    "both": "--recurrent --neuron adlif",
}
#: which weights a network has
WEIGHTS = {
    "25 %": f"--model index --density erk --block_size 16 {density_flags(25)}",
    # in units of 16, 37 % of the second layer never fired
    "5 %, rewired": f"--model index --density erk --block_size 4 {density_flags(5)} {REWIRED}",
    "dense": "--model dense",
}
#: the network whose weights are those of the GRU
AS_MANY = ("recurrent", "25 %")
#: the best learning rates of a GRU on held-back images
GRU = {"rows": "--lr 0.008", "permuted": "--lr 0.016", "pixels": "--lr 0.032"}


def _rows() -> dict[str, str]:
    rows = {}
    for data, sequence in DATA.items():
        for network, flags in NETWORKS.items():
            for kept, sparsity in WEIGHTS.items():
                rows[f"{data}, {network}, {kept}"] = " ".join(filter(None, (sequence, flags, sparsity)))
        rows[f"{data}, GRU"] = f"{rows[', '.join((data, *AS_MANY))]} {GRU[data]} --name GRU"
    return rows


ROWS = _rows()


def table(record: dict[str, Any]) -> str:
    """Accuracy, weights, and the memory and processor time of a step, of each row."""
    rows = []
    for row in record["rows"]:
        ends = row["ends"]
        rows.append(
            [
                row["row"],
                f"{mean(row, 'weights'):,.0f}",
                f"{mean(row, 'step_bytes') / 1e6:.0f} MB",
                f"{1e3 * min(end['step_seconds'] for end in ends):.3g} ms",
                spread(ends, accuracy),
            ]
        )
    return markdown(["", "weights", "memory of a step", "its processor time", "test accuracy, %"], rows)


def costs(row: str, settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """Memory and processor time of a training step."""
    return step_costs(settings, folder, gru.build if row.endswith("GRU") else G2GNet.from_settings)


#: flags of every network
COMMON = (
    "--dataset fashionmnist --hidden_dim 256 --batch_size 128 --lr 0.004 --lr_schedule cosine --weight_decay 0 "
    "--standardize --readout last --per_neuron --surrogate triangle --alpha 0.5"
)
STUDY = Study(
    "sequence_study",
    __doc__,
    COMMON,
    ROWS,
    20,
    table,
    default_rows=("rows, *",),
    others={row: gru.train for row in ROWS if row.endswith("GRU")},
    finished_others=gru.finished,
    more=costs,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
