"""Few weights, and better than a small dense network, on Fashion-MNIST: ``python -m benchmarks.few_study``.

Which network of at most 58,000 or 118,000 weights is best? As many have dense networks of 67 and 127 neurons per
layer. Against these stand wider sparse ones in units of 16 or single weights: static; ``rewired`` (pruned by magnitude
and grown by gradient); ``ERK`` (small layers keep more of their weights); ``gradual``: beginning with all weights
inside groups and a seventh of the others, pruned by magnitude; ``from dense``: the same, beginning with all weights;
``DEEP R`` (:mod:`benchmarks.deep_r`).
Any may be ``smoothed`` (labels, and the last membrane instead of spike counts), ``shifted`` (images, which are always
mirrored) and ``decayed`` (AdamW's decoupled decay). By default those are trained that were the best with
``--validation``, which tests on held-back training images. Memory is that of a training step, with the weights that
training begins with, above the process with its imports.
"""

import sys
from collections.abc import Sequence
from typing import Any

from g2gnet.base.tables import markdown

from . import deep_r, own_trainer
from .dst_study import REWIRED, density_flags
from .step_costs import step_costs
from .study import Study, accuracy, mean, of_hidden_layers, run_study, spread

#: neurons per layer of the dense network that has no more weights
DENSE_WIDTHS = {58_000: 67, 118_000: 127}
WIDTHS, SIDES = (512, 1024), (1, 16)
PRUNED = "--sparsity_mode dynamic --dst_interval 100 --dst_fraction 0 --dst_stop 0.75"
#: what a row's name has that is trained by DEEP R
DEEP_R = ", DEEP R"
#: flags of a way to few weights that begins with few, by the ending of a row's name
FEW_AT_FIRST = {
    "": "",
    ", ERK": "--density erk",
    ", rewired": REWIRED,
    ", rewired, ERK": f"{REWIRED} --density erk",
    DEEP_R: "--name DEEP_R",
}
#: the same of one that begins with many
MANY_AT_FIRST = {
    ", gradual": PRUNED,
    ", gradual, rewired": REWIRED,
    ", from dense": f"{PRUNED} --p_inter 1",
    ", from dense, rewired": f"{REWIRED} --p_inter 1",
}
SMOOTHED = "--readout last --label_smoothing 0.1"
#: what is added to any of them
MORE = {
    "": "--augment flip",
    ", smoothed": f"{SMOOTHED} --augment flip",
    ", smoothed, shifted": f"{SMOOTHED} --augment shift-flip",
    ", smoothed, shifted, decayed": f"{SMOOTHED} --augment shift-flip --optimizer adamw --weight_decay 0.1",
}
#: the choice of the held-back images, on which the two of 127 neurons were level
CHOSEN = (
    "58,000 weights, dense, 67, smoothed",
    "58,000 weights, H 512, units of 1, gradual, smoothed, shifted",
    "58,000 weights, H 512, units of 16, gradual, smoothed, shifted",
    "118,000 weights, dense, 127, smoothed",
    "118,000 weights, dense, 127, smoothed, shifted",
    "118,000 weights, H 512, units of 1, gradual, smoothed, shifted",
    "118,000 weights, H 1024, units of 16, gradual, smoothed, shifted",
)
#: README shows its command
EXAMPLE = CHOSEN[1]


def density_of(weights: int, width: int) -> float:
    """The share of the weights of ``width`` neurons per layer; a little less, as units are drawn."""
    return 0.995 * weights / (width * (28 * 28 + width + 10))


def _rows() -> dict[str, str]:
    rows = {}
    for weights, dense in DENSE_WIDTHS.items():
        ways = {f"dense, {dense}": f"--model dense --hidden_dim {dense}"}
        for width in WIDTHS:
            density = density_of(weights, width)
            for side in SIDES:
                network = f"--model index --hidden_dim {width} --block_size {side}"
                if side == 1:  # with units as large as 16 the number of weights depends on the draw
                    few = f"{network} {density_flags(100 * density)}"
                    ways |= {f"H {width}, units of 1{how}": f"{few} {flags}" for how, flags in FEW_AT_FIRST.items()}
                many = f"{network} --final_density {density:.4g}"
                ways |= {f"H {width}, units of {side}{how}": f"{many} {flags}" for how, flags in MANY_AT_FIRST.items()}
        for way, flags in ways.items():
            for more, others in MORE.items():
                rows[f"{weights:,} weights, {way}{more}"] = f"{flags.strip()} {others}"
    return rows


def table(record: dict[str, Any]) -> str:
    """Accuracy, weights, time and memory of each row, and its silent neurons."""
    rows = []
    for row in record["rows"]:
        ends = row["ends"]
        rows.append(
            [
                row["row"],
                f"{mean(row, 'weights'):,.0f}",
                spread(ends, accuracy),
                spread(ends, lambda end: 100 * end["train_acc"]),
                of_hidden_layers(ends, "silent"),
                spread(ends, lambda end: end["train_cpu_seconds"], 0),
                f"{mean(row, 'step_bytes') / 1e6:.0f} MB",
            ]
        )
    header = [
        "at most",
        "weights",
        "test accuracy, %",
        "training accuracy, %",
        "never fires, % of layers 1 and 2",
        "processor seconds",
        "memory of a step",
    ]
    return markdown(header, rows)


STUDY = Study(
    "few_study",
    __doc__,
    "--dataset fashionmnist --T 10 --lr_schedule cosine --standardize --weight_decay 0 --surrogate triangle",
    _rows(),
    40,
    table,
    default_rows=CHOSEN,
    others={row: deep_r.train for row in _rows() if DEEP_R in row},
    finished_others=own_trainer.finished,
    more=lambda row, settings, folder: step_costs(settings, folder),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
