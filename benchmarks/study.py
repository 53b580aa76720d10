"""Trains the rows of a study, each with several seeds, and makes its table: ``python -m benchmarks.study NAME``.

Runs are those of ``g2g-train``, made by the engine of ``g2g-sweep``: each has its own folder and one thread, and there
are as many at a time as cores. Finished ones are skipped, stopped ones resume. A study may be run in parts (``--rows``,
``--seeds``); its record contains the runs of the chosen rows and seeds that are finished.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.data import DATASETS, ImageData, load_dataset
from g2gnet.programs import train
from g2gnet.programs.flags import Parser, settings_from
from g2gnet.programs.sweep.engine import outcome, processes, train_runs
from g2gnet.programs.sweep.grid import Run
from g2gnet.training import Machine, TrainingError, TrainSettings, run_epochs
from g2gnet.training.checkpoints import read_checkpoint
from g2gnet.training.epochs import EpochTrainer

from . import cli, conventional
from .harness import Racer, Session, Turn, race
from .machine import pytorch_threads
from .studies import GRU, RELU, STUDIES, Study
from .study_tables import DRAWN, TEST_IMAGES, table

RESUME = "run the same command again to resume with the remaining runs"
#: what every run has with ``--quick``, whatever its row says
QUICK = "--epochs 1 --limit_train 2000 --limit_test 1000 --dst_interval 2"


def run_of(study: Study, row: str, epochs: int, seed: int, root: Path, last: str = "") -> Run:
    """One run; of a flag that is given twice the later one counts: ``last``, then a row's, then the common ones."""
    flags = shlex.split(f"{study.common} --epochs {epochs} --seed {seed} {study.rows[row]} {last}")
    arguments = train.build_parser().parse_args(flags)
    settings = settings_from(arguments, TrainSettings)
    given = {name: value for name, value in vars(arguments).items() if name in settings.flag_values()}
    return Run(given, settings, {"row": row, "seed": seed}, root / f"{_name(row)}-{epochs}-epochs-seed{seed}")


def _name(text: str) -> str:
    """``text`` as part of a path."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-")


def result(run: Run) -> dict[str, Any] | None:
    """What a finished run reached, in the numbers that tables read; None if it is not finished."""
    tested = "test_acc" if run.settings.validation is None else "val_acc"
    if GRU in run.label:
        last = run.files.load_marker(run.settings)
        history = read_checkpoint(run.files.checkpoint)["history"] if last else []
        taken = {f"train_{name}": sum(record[name] for record in history) for name in ("seconds", "cpu_seconds")}
        about = {name: last[name] for name in ("epoch", "train_acc", "weights", "hidden_dim")} if last else {}
        return last and {**about, **taken, "test_acc": last[tested]}
    second = "fc2" if run.settings.layers is None else "conv2"
    end = outcome(run, lambda saved: {"placement": placement(saved.masks()[second])})
    if end is None:
        return None
    names = ("epoch", "train_acc", "train_seconds", "train_cpu_seconds", "weights", "placement")
    shares = {name: [round(end[name][layer], 5) for layer in ("lif1", "lif2")] for name in ("silent", "firing_rate")}
    more = {"test_acc": end[tested], "density": end["density"][second]}
    return {**{name: end[name] for name in names}, **shares, **more}


def placement(mask: Any) -> dict[str, float]:
    """How evenly the units of a layer are distributed, which distinguishes growth rules.

    ``rows_spread`` and ``cols_spread``: standard deviation of the units of a block row or column over their mean.
    ``rows_empty``: the share of rows without a unit. ``inside``: the share of the units that join neurons of one group.
    """
    found: dict[str, float] = {}
    for side, axis, unit in (("rows", mask.rows, mask.unit_row), ("cols", mask.cols, mask.unit_col)):
        units = torch.bincount(unit.long(), minlength=axis.num_units).double()
        found[f"{side}_spread"] = float(units.std(correction=0) / units.mean())
        found[f"{side}_empty"] = float((units == 0).double().mean())
    same = mask.rows.group_of_unit[mask.unit_row.long()] == mask.cols.group_of_unit[mask.unit_col.long()]
    return {name: round(value, 5) for name, value in {**found, "inside": float(same.double().mean())}.items()}


def program(name: str) -> cli.Program:
    """The program of a study."""
    study = STUDIES[name]

    def add_flags(parser: Parser) -> None:
        def add(flag: str, text: str, **options: Any) -> None:
            parser.add_argument(f"--{flag}", help=text, **options)

        add("runs", "folder of the runs (default: runs)", type=Path, default=Path("runs"), metavar="DIR")
        seeds = f"default: {' '.join(map(str, study.seeds))}"
        add("seeds", seeds, type=int, nargs="+", default=study.seeds, metavar="N")
        rows = f"rows to train, or patterns of their names with * (default: {' '.join(study.default_rows)})"
        add("rows", rows, nargs="+", default=study.default_rows, metavar="NAME")
        text = "flags of every run, after the study's own and before a row's, as '--hidden_dim 256 --limit_train 10000'"
        add("flags", text, default="", metavar="FLAGS")
        add("last", "flags of every run, after a row's", default="", metavar="FLAGS")
        text = "hold back a sixth of the training images, others for each seed, to be tested on"
        add("validation", text, action="store_true")
        add("finished", "train nothing; write a record of the finished runs", action="store_true")

    counts = {
        "epochs": (study.epochs, "epochs of each run whose row does not say it"),
        "jobs": (os.cpu_count() or 1, "parallel runs"),
    }
    rows = "\n".join(["rows:", *(f"  {row!r:44} {flags}" for row, flags in study.rows.items())])
    return cli.Program(
        f"study {name}", textwrap.fill(study.about, 100), f"{study.takes}, of one core", functools.partial(make, name),
        table, counts, {"seeds": [1], "last": QUICK}, add_flags, 1, rows, RESUME,
    )  # fmt: skip


def chosen(study: Study, patterns: Sequence[str]) -> list[str]:
    """The rows whose names match one of the patterns; raises TrainingError if a pattern matches none."""
    wanted: set[str] = set()
    for pattern in patterns:
        expression = ".*".join(map(re.escape, pattern.split("*")))
        fitting = {row for row in study.rows if re.fullmatch(expression, row)}
        if not fitting:
            raise TrainingError(f"--rows {pattern!r} matches none of the rows, which --help lists")
        wanted |= fitting
    return [row for row in study.rows if row in wanted]


def runs_of(name: str, study: Study, arguments: argparse.Namespace) -> list[Run]:
    """The runs of the chosen rows and seeds; ``study`` has the flags of ``--flags``, too."""
    root = arguments.runs / ("validation" if arguments.validation else "")
    folder = root / _name(f"{arguments.flags} {arguments.last}") / f"{name}_study"
    held_back = f" --validation {1 / 6:.4f} --validation_seed {{}}" if arguments.validation else ""
    return [
        run_of(study, row, arguments.epochs, seed, folder, arguments.last + held_back.format(seed))
        for seed in arguments.seeds
        for row in chosen(study, arguments.rows)
    ]


#: the trainer of rows with such a word, which ``g2g-train`` has not
OWN: dict[str, Callable[[TrainSettings, ImageData, Machine], EpochTrainer]] = {
    GRU: conventional.GRUTrainer,
    RELU: conventional.ReLUTrainer,
}


def has_own(run: Run) -> bool:
    return any(word in run.label for word in OWN)


def train_own(run: Run) -> None:
    """Trains a run whose row has a trainer of its own, or resumes it, on one thread."""
    with pytorch_threads(1), contextlib.redirect_stdout(None):  # which is the table's
        machine, data = Machine(torch.device("cpu")), load_dataset(run.settings.dataset, "data")
        trainer = next(trainer for word, trainer in OWN.items() if word in run.label)
        run_epochs(run.settings, lambda: trainer(run.settings, data, machine), run.folder, machine)


def make(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the unfinished runs and returns the record; raises TrainingError if a run failed, or none is finished."""
    common = f"{STUDIES[name].common} {arguments.flags}".strip()
    study = dataclasses.replace(STUDIES[name], common=common)
    runs = runs_of(name, study, arguments)
    ends = {run.folder: result(run) for run in runs}

    def line(run: Run) -> str:
        end = ends[run.folder] = result(run) or {}
        return f"{run.label}: test accuracy {end['test_acc']:.4f}, {end['train_seconds']:.0f} s"

    missing = [run for run in runs if ends[run.folder] is None and not arguments.finished]
    failed: dict[str, str] = {}
    if ours := [run for run in missing if not has_own(run)]:
        with processes(arguments.jobs, threads=1) as executor:
            failed = train_runs(ours, executor, {"device": "cpu"}, name, line)
    for run in (bar := cli.bar([run for run in missing if has_own(run)], name, " runs")):
        train_own(run)
        bar.write(line(run), file=sys.stderr)
    if failed:
        raise TrainingError("\n".join(f"{label}: {error}" for label, error in failed.items()))
    if not any(ends.values()):
        raise TrainingError(f"no run of {name} is finished in {arguments.runs}")
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in study.rows}
    for run in sorted(runs, key=lambda run: run.settings.seed):
        if end := ends[run.folder]:
            others = found[run.differs["row"]]
            costs = {name: others[0][name] for name in COSTS if name in others[0]} if others else {}
            if study.costs and not others:
                costs = step_costs(run)
            others.append({**run.differs, **end, **costs})
    return {
        "benchmark": name,
        "settings": f"{common} {arguments.last}".strip(),
        "epochs": arguments.epochs,
        "tested_on": DRAWN if arguments.validation else TEST_IMAGES,
        "rows": {row: study.rows[row] for row, of in found.items() if of},
        "runs": [run for of in found.values() for run in of],
    }


COSTS = ("step_bytes", "step_seconds")


def step_costs(run: Run) -> dict[str, float]:
    """What a training step on images of 28 × 28 pixels takes, in a process of its own with one thread: the most memory,
    above the process with its imports, during the second step, and the least processor time of the three after it."""
    racer = Racer("step", step_of, (run.settings, GRU in run.label))
    race([racer], repeats=3)
    if racer.reason:
        raise TrainingError(f"a step cannot be measured: {racer.reason}")
    return dict(zip(COSTS, (racer.peak_bytes or 0, min(racer.cpu_seconds)), strict=True))


def step_of(settings: TrainSettings, is_gru: bool) -> Session:
    """A training step on random inputs, which count."""
    torch.set_num_threads(1)
    yield None
    values, classes = 28 * 28, DATASETS["fashionmnist"].num_classes
    steps, per_step = ((), values) if settings.sequence == "none" else ((settings.T,), values // settings.T)
    x = torch.randn(*steps, settings.batch_size, per_step)
    labels = torch.randint(classes, (settings.batch_size,))
    net = (conventional.build_gru if is_gru else G2GNet.from_settings)(settings, per_step, classes)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = net.simulate(x, chunk=settings.chunk).output if isinstance(net, G2GNet) else net(x)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    yield Turn(step)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    about = "\n".join(f"  {name:20} {study.about.partition('. ')[0]}" for name, study in STUDIES.items())
    names = Parser(
        prog=f"python -m {__package__}.study",
        description=__doc__,
        epilog=f"studies; STUDY --help lists the flags and rows of one:\n{about}",
    )
    names.add_argument("study", choices=STUDIES)
    return program(names.parse_args(argv[:1]).study).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
