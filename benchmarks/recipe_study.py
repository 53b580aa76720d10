"""What each part of the recipe contributes, on Fashion-MNIST: ``python -m benchmarks.recipe_study``.

The recipe takes 40 epochs. The rows of 20 epochs are the recipe, and the recipe with one part left out or replaced;
the rows ``40 epochs, …`` have some of these, alone or together, in runs as long as the recipe's or longer. The second
recipe is what came of them: the last membrane, label smoothing, decoupled decay, ERK, shifted images and no dropout;
its other rows have one part of the first recipe instead. Choose what to keep with ``--validation``, which tests on
held-back training images; without it the rows are tested on the test images. The rows ``5 %, …`` have that share of
the weights, in units of 16 that are pruned by magnitude and grown by gradient; for still fewer see
:mod:`benchmarks.few_study`. Rows of ReLU are the same networks without spikes and time.
"""

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from g2gnet.base.tables import markdown

from . import own_trainer, relu
from .dst_study import REWIRED, density_flags
from .study import FOLDS, HELD_BACK, TEST_IMAGES, Study, accuracy, fold_of, gain, of_hidden_layers, run_study, spread

#: the flags of each part
RECIPE = {
    "network": "--model index",
    "width": "--hidden_dim 1024",
    "steps": "--T 10",
    "schedule": "--lr_schedule cosine",
    "input": "--standardize",
    "weight decay": "--weight_decay 0",
    "surrogate": "--surrogate triangle",
    "dropout": "--dropout 0.2",
    "augmentation": "--augment flip",
}
#: the replacement of a part
OTHERS = {
    "schedule": {"constant rate": "", "two epochs of warm-up": "--lr_schedule cosine --lr_warmup 470"},
    "input": {"input as it is": ""},
    "weight decay": {
        "weight decay 1e-5": "--weight_decay 1e-5",
        "weight decay 1e-4": "--weight_decay 1e-4",
        "decoupled decay 0.01": "--optimizer adamw --weight_decay 0.01",
        "decoupled decay 0.1": "--optimizer adamw --weight_decay 0.1",
    },
    "learning rate": {"learning rate 5e-4": "--lr 5e-4", "learning rate 2e-3": "--lr 2e-3"},
    "batch": {"batches of 128": "--batch_size 128"},
    "labels": {"label smoothing 0.1": "--label_smoothing 0.1"},
    "average": {"averaged over an epoch": "--average 235", "averaged over four epochs": "--average 940"},
    "surrogate": {"ATan": "", "triangle, alpha 4": "--surrogate triangle --alpha 4"},
    "dropout": {"no dropout": "", "dropout 0.1": "--dropout 0.1", "dropout 0.3": "--dropout 0.3"},
    "augmentation": {"no augmentation": "", "shifted and mirrored": "--augment shift-flip"},
    "occlusion": {"half of the images occluded": "--erase 0.5"},
    "steps": {"T 5": "--T 5", "T 16": "--T 16", "T 20": "--T 20"},
    "read-out": {"last membrane": "--readout last"},
    "neurons": {
        "a beta and threshold per neuron": "--per_neuron",
        "synaptic neurons": "--neuron synaptic",
        "adaptive neurons": "--neuron adlif",
    },
    "initial weights": {"initial weights × 3": "--init_gain 3"},
    "density": {"ERK": "--density erk"},
    "width": {"H 512": "--hidden_dim 512", "H 2048": "--hidden_dim 2048", "H 4096": "--hidden_dim 4096"},
    "network": {"mixer": "--model mixer", "dense": "--model dense"},
}
#: parts that help one another
MEMBRANE = {
    "read-out": "last membrane",
    "labels": "label smoothing 0.1",
    "weight decay": "decoupled decay 0.1",
    "density": "ERK",
}
SHIFTED = {"augmentation": "shifted and mirrored", "dropout": "no dropout"}
#: parts replaced together
TOGETHER = {"last membrane, label smoothing, decay, ERK": MEMBRANE, "shifted and mirrored, no dropout": SHIFTED}
SECOND = {**MEMBRANE, **SHIFTED}
#: what the recipe has in their place
FIRST = {
    "read-out": "spike counts",
    "labels": "hard labels",
    "weight decay": "no decay",
    "density": "uniform",
    "augmentation": "mirrored",
    "dropout": "dropout 0.2",
}
#: rows of 40 epochs, too: what prevents overfitting pays in long runs, and in wide networks
LONGER = {
    "dropout 0.1": {"dropout": "dropout 0.1"},
    "no augmentation": {"augmentation": "no augmentation"},
    "H 2048": {"width": "H 2048"},
    "H 2048, label smoothing, decay": {
        "width": "H 2048",
        "labels": "label smoothing 0.1",
        "weight decay": "decoupled decay 0.1",
    },
    "last membrane, label smoothing, decay, ERK": MEMBRANE,
    "H 2048, last membrane, label smoothing, decay, ERK": {"width": "H 2048", **MEMBRANE},
    "second recipe": SECOND,
    "second recipe, H 2048": {"width": "H 2048", **SECOND},
    "second recipe, H 4096": {"width": "H 4096", **SECOND},
    "second recipe, H 2048, dense": {
        "width": "H 2048",
        "network": "dense",
        **{part: other for part, other in SECOND.items() if part != "density"},
    },
    **{
        f"second recipe, {first}": {other: of for other, of in SECOND.items() if other != part}
        for part, first in FIRST.items()
    },
}
#: the one that is also a row of 80 epochs
LONGEST = "second recipe, H 2048"
#: the choice of the held-back images, for README: of H 1024, and of all
CHOSEN = ("the recipe", "80 epochs, second recipe, H 2048")
#: rows with a conventional network beside them
CONVENTIONAL = (
    "the recipe",
    "20 epochs",
    "40 epochs, second recipe, H 2048",
    "40 epochs, second recipe, H 2048, dense",
    "80 epochs, second recipe, H 2048",
)
#: a twentieth of the weights, rewired
FEWER = f"--block_size 16 {density_flags(5)} {REWIRED}"


def _flags(parts: dict[str, str], replaced: dict[str, str]) -> str:
    """The flags of some parts, of which others stand in place of some."""
    others = {part: OTHERS[part][other] for part, other in replaced.items()}
    return " ".join(filter(None, (parts | others).values()))


def _rows() -> dict[str, str]:
    fewer = {**RECIPE, "epochs": "--epochs 20"}
    rows = {"the recipe": " ".join(RECIPE.values()), "20 epochs": " ".join(fewer.values())}
    for part, others in OTHERS.items():
        rows |= {row: _flags(fewer, {part: row}) for row in others}
    rows |= {row: _flags(fewer, replaced) for row, replaced in TOGETHER.items()}
    for row, replaced in LONGER.items():
        rows[f"40 epochs, {row}"] = _flags(RECIPE, replaced)
        if row == LONGEST:
            rows[f"80 epochs, {row}"] = f"{rows[f'40 epochs, {row}']} --epochs 80"
    for width in (1024, 2048):
        for row, dropout in (("dropout 0.2", RECIPE["dropout"]), ("no dropout", "")):
            parts = {**RECIPE, "width": f"--hidden_dim {width}", "dropout": dropout, "sparser": FEWER}
            rows[f"5 %, H {width}, {row}"] = " ".join(filter(None, parts.values()))
    return rows | {f"{row}, ReLU": f"{rows[row]} --name ReLU" for row in CONVENTIONAL}


def table(record: dict[str, Any]) -> str:
    """Accuracy of each row, of the training images too, its silent neurons and its time.

    A row of the recipe, or of 20 epochs of it, is what others of as many epochs are compared with, seed by seed.
    """
    ends_of = {row["row"]: row["ends"] for row in record["rows"]}
    bases = {of[0]["epoch"]: of for of in (ends_of.get("the recipe"), ends_of.get("20 epochs")) if of}
    rows = []
    for row in record["rows"]:
        ends = row["ends"]
        base = bases.get(ends[0]["epoch"], [])
        rows.append(
            [
                row["row"],
                str(ends[0]["epoch"]),
                spread(ends, accuracy),
                "–" if ends is base else gain(ends, base),
                spread(ends, lambda end: 100 * end["train_acc"]),
                of_hidden_layers(ends, "silent"),
                spread(ends, lambda end: end["train_seconds"], 0),
            ]
        )
    header = [
        "",
        "epochs",
        "test accuracy, %",
        "minus the recipe, points",
        "training accuracy, %",
        "never fires, % of layers 1 and 2",
        "seconds of training",
    ]
    return markdown(header, rows)


def gains_by_seed(records: Sequence[dict[str, Any]]) -> str:
    """What each row of 20 epochs gains over the recipe of as many, seed by seed: each holds back other images.

    Runs of one seed, part, processor, version of PyTorch and common settings are compared, with the base of their own
    record if it has it. A run that several records have has several numbers.
    """
    base = "20 epochs"
    rows = {row for row, flags in STUDY.rows.items() if "--epochs 20" in flags and not row.endswith("ReLU")}
    found: dict[tuple[str, int], list[float]] = {}
    bases: list[tuple[tuple[Any, ...], int, float]] = []
    others: list[tuple[tuple[Any, ...], int, float, str]] = []
    for number, record in enumerate(records):
        machine = record["machine"]
        for row in record["rows"]:
            for end in row["ends"]:
                # older records hold back the last part whatever the seed
                held_back = record["tested_on"] == HELD_BACK or fold_of(end["seed"]) == FOLDS
                if record["tested_on"] == TEST_IMAGES or not held_back:
                    continue
                alike = (end["seed"], machine["cpu"], machine["versions"]["torch"], record["settings"])
                if row["row"] == base:
                    bases.append((alike, number, accuracy(end)))
                elif row["row"] in rows:
                    others.append((alike, number, accuracy(end), row["row"]))
    for alike, number, reached, name in others:
        of = {record: value for their, record, value in reversed(bases) if their == alike}
        if of:
            gained = reached - of.get(number, list(of.values())[-1])
            found.setdefault((name, alike[0]), []).append(round(gained, 9))
    seeds = sorted({seed for _, seed in found})
    means = {name: [statistics.mean(found[name, seed]) for seed in seeds if (name, seed) in found] for name, _ in found}
    lines = [
        [name, *(", ".join(f"{gain:+.2f}" for gain in found.get((name, seed), ())) or "–" for seed in seeds)]
        for name in sorted(means, key=lambda name: -statistics.mean(means[name]))
    ]
    return markdown(["minus the recipe of 20 epochs, points", *(f"seed {seed}" for seed in seeds)], lines)


STUDY = Study(
    "recipe_study",
    __doc__,
    "--dataset fashionmnist",
    _rows(),
    40,
    table,
    others={f"{row}, ReLU": relu.train for row in CONVENTIONAL},
    finished_others=own_trainer.finished,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
