"""Test accuracy against the time spent in training: ``python -m benchmarks.accuracy``.

Trains the dense network, a sparse one with a fixed graph and the same one with dynamic sparse training, one after the
other, with the library's own trainer (the code behind ``train.py``) on the same data, with the same settings and seed.
The time is that of the training steps, including the first, without evaluation. Another seed means another graph and
other weights: give several to see how much of a difference is chance.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

import g2gnet.programs.flags
from g2g_kernels.dispatch import BACKENDS
from g2gnet.base.seeding import make_deterministic
from g2gnet.base.tables import in_columns
from g2gnet.data import ImageData
from g2gnet.training import Machine, SettingsError, TrainSettings
from g2gnet.training.trainer import Trainer

from . import cli, report
from .machine import describe

#: of the run with dynamic sparse training: growth by gradient, by a falling share
DYNAMIC = {"cg": "gradient", "dst_interval": 100, "dst_schedule": "cosine", "dst_stop": 0.75}
#: small enough for a few minutes on two cores; flags override them
DEFAULTS = {"model": "index", "T": 10, "epochs": 5, **DYNAMIC}
KINDS = ("dense", "static", "dynamic")


def build_parser() -> g2gnet.programs.flags.Parser:
    parser = g2gnet.programs.flags.Parser(prog=f"python -m {__package__}.accuracy", description=__doc__)
    g2gnet.programs.flags.add_settings_flags(parser)
    parser.set_defaults(**DEFAULTS)
    group = parser.add_argument_group("comparison")
    group.add_argument("--kinds", default=",".join(KINDS), metavar="A,B,...", help="which of dense, static, dynamic")
    group.add_argument("--seeds", metavar="N,N,...", help="seeds, each for one run per kind (default: --seed)")
    group = parser.add_argument_group("machine")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="directory of the data sets (default: data)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, directml, mps, xpu or xpu:N")
    group.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="kernels to use (default: auto)")
    cli.add_report_flags(parser)
    return parser


def accuracy(arguments: argparse.Namespace) -> cli.Report:
    where = g2gnet.programs.flags.machine_from(arguments)
    runs = planned(arguments)
    machine = describe(where.device)
    print(cli.headline(machine))
    common = runs[-1].settings
    data = g2gnet.programs.flags.load_data(arguments, common, where.device)
    record: dict[str, Any] = {
        "benchmark": "accuracy",
        "machine": machine,
        "backend": where.backend or "auto",
        "settings": common.flag_values(),
        "images": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "runs": [],
    }
    images = sum(settings.epochs * len(data.train_labels[: settings.limit_train]) for _, settings in runs)
    with tqdm(total=images, unit=" samples", unit_scale=True, leave=False, disable=None) as bar:
        for kind, settings in runs:
            static = f"{settings.model}, fixed graph"
            title = {"dense": "dense", "static": static, "dynamic": f"{settings.model}, dynamic"}[kind]
            bar.set_description(f"{title}, seed {settings.seed}")
            epochs = train(settings, data, where, bar)
            record["runs"].append({"kind": kind, "title": title, "seed": settings.seed, "epochs": epochs})
            last = epochs[-1]
            bar.write(
                f"{title}, seed {settings.seed}: {last['test_acc']:.4f} after {last['epoch']} epochs in "
                f"{report.seconds(last['wall_seconds'])}"
            )
            sys.stdout.flush()
    print(table(record))
    return cli.Report(record, csv_rows(record))


class Planned(NamedTuple):
    """A planned run: its kind (one of :data:`KINDS`) and its settings."""

    kind: str
    settings: TrainSettings


def planned(arguments: argparse.Namespace) -> list[Planned]:
    """The runs in their order.

    Raises:
        ValueError: for an unknown kind, or settings out of range.
    """
    if arguments.model == "dense" or arguments.sparsity_mode != "static":
        raise SettingsError("--model names the sparse network; choose dense, static or dynamic by --kinds")
    seeds = [arguments.seed] if arguments.seeds is None else list(cli.numbers(arguments.seeds, int))
    kinds = arguments.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown; choose among {', '.join(KINDS)}")
    usual = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    fixed = {name: usual[name] for name in DYNAMIC}
    changes: dict[str, dict[str, Any]] = {
        "dense": {**fixed, "model": "dense"},
        "static": fixed,
        "dynamic": {"sparsity_mode": "dynamic"},
    }

    def settings(kind: str, seed: int) -> TrainSettings:
        own = argparse.Namespace(**{**vars(arguments), **changes[kind], "seed": seed})
        return g2gnet.programs.flags.settings_from(own, TrainSettings)

    return [Planned(kind, settings(kind, seed)) for seed in seeds for kind in kinds]


def train(settings: TrainSettings, data: ImageData, machine: Machine, bar: tqdm) -> list[dict[str, Any]]:
    """The records of all epochs, each with the seconds of training so far; ``bar`` counts the images."""
    make_deterministic(settings.seed)
    trainer = Trainer(settings, data, machine)
    epochs: list[dict[str, Any]] = []
    before, wall = bar.n, 0.0

    def after_step(seen: int, *_: Any) -> None:
        bar.update(before + trainer.epoch * len(trainer.data.train_labels) + seen - bar.n)

    while trainer.epoch < settings.epochs:
        epoch = trainer.train_epoch(after_step)
        wall += epoch["seconds"]
        epochs.append({**epoch, "wall_seconds": wall})
    return epochs


def table(record: dict[str, Any]) -> str:
    """One row per run: the time per epoch and the accuracy after each."""
    numbers = [str(epoch["epoch"]) for epoch in record["runs"][0]["epochs"]]
    rows = [
        (
            f"{run['title']}, seed {run['seed']}",
            report.seconds(run["epochs"][-1]["wall_seconds"] / len(run["epochs"])),
            *(f"{100 * epoch['test_acc']:.1f}" for epoch in run["epochs"]),
        )
        for run in record["runs"]
    ]
    return in_columns(("test accuracy, %, after epoch", "per epoch", *numbers), rows)


def csv_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per epoch."""
    names = ("epoch", "wall_seconds", "train_loss", "train_acc", "test_acc")
    return [
        {"kind": run["kind"], "seed": run["seed"], **{name: epoch[name] for name in names}}
        for run in record["runs"]
        for epoch in run["epochs"]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), accuracy, argv)


if __name__ == "__main__":
    sys.exit(main())
