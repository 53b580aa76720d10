"""Shared parts of the training studies: many resumable runs of ``g2g-train``, in parallel.

A study consists of rows of flags, each trained with several seeds by the engine of :mod:`g2gnet.programs.sweep`. Every
run has its own folder and one thread; there are as many parallel runs as cores. Finished runs are skipped, stopped ones
resume.
A study may be run in parts
(``--rows``, ``--seeds``); its record contains the finished runs, and those of an earlier record if it is extended
(``--extend``).
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from g2gnet.base.files import replace_file
from g2gnet.data import load_dataset
from g2gnet.programs import train
from g2gnet.programs.flags import Parser, add_json_flag, settings_from
from g2gnet.programs.main import run_program
from g2gnet.programs.sweep.engine import outcome, processes, train_runs
from g2gnet.programs.sweep.grid import Run
from g2gnet.programs.sweep.results import estimate
from g2gnet.training import TrainingError, TrainSettings

from .machine import describe, pytorch_threads


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows of flags to be compared.

    Attributes:
        name: of the module and of its record.
        about: the program's description.
        common: flags of every run.
        rows: the flags of each row, by its name.
        epochs: of each run.
        table: a Markdown table from the record.
        default_rows: what ``--rows`` is unless it is given.
        seeds: the same for ``--seeds``.
        others: rows that ``g2g-train`` does not train, and what does: from the settings of their flags, a folder and a
            function that prints a line, to the end of the run.
        finished_others: the end of such a run, from its settings and folder, or None.
        more: what else to record of the settings of a row, in a folder for it.
    """

    name: str
    about: str
    common: str
    rows: Mapping[str, str]
    epochs: int
    table: Callable[[dict[str, Any]], str]
    default_rows: Sequence[str] = ("*",)
    seeds: Sequence[int] = (1, 2, 3)
    others: Mapping[str, Callable[[TrainSettings, Path, Callable[[str], None]], dict[str, Any]]] = dataclasses.field(
        default_factory=dict
    )
    finished_others: Callable[[TrainSettings, Path], dict[str, Any] | None] = lambda settings, folder: None
    more: Callable[[str, TrainSettings, Path], dict[str, Any]] = lambda row, settings, folder: {}


def run_of(study: Study, row: str, epochs: int, seed: int, root: Path, dataset: Path | None = None) -> Run:
    """One run; if a flag is given twice the later one counts, so a row overrides the common flags."""
    flags = shlex.split(f"{study.common} --epochs {epochs} --seed {seed} {study.rows[row]}")
    if dataset is not None:  # of images [N, height, width], which are no sequences unless the row says so
        flags = ["--sequence", "none", *flags, "--dataset", str(dataset)]
    arguments = train.build_parser().parse_args(flags)
    settings = settings_from(arguments, TrainSettings)
    given = {name: value for name, value in vars(arguments).items() if name in settings.flag_values()}
    return Run(given, settings, {"row": row, "seed": seed}, folder_of(root, study, row, epochs, seed))


#: with ``--validation`` a run tests on one part of so many of the training images
FOLDS = 6
TEST_IMAGES = "the test images"
HELD_BACK = "a sixth of the training images, another one for each seed"


def fold_of(seed: int) -> int:
    """The part of the training images that a run holds back: with seed 1 the last, with seed 2 the last but one, ..."""
    return (1 - seed) % FOLDS or FOLDS


def validation_data(folder: Path, fold: int) -> Path:
    """A file of Fashion-MNIST's training images whose test images are one part of them; made if it is missing."""
    path = folder / "fashionmnist-validation.npz"
    if not path.exists():
        data = load_dataset("fashionmnist", "data")
        size = len(data.train_images) // FOLDS
        held_back = torch.zeros(len(data.train_images), dtype=torch.bool)
        held_back[(fold - 1) * size : fold * size] = True
        parts = {"train": ~held_back, "test": held_back}
        arrays = {f"{part}_images": data.train_images[of].numpy() for part, of in parts.items()}
        labels = {f"{part}_labels": data.train_labels[of].numpy() for part, of in parts.items()}
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: np.savez(file, **arrays, **labels))  # type: ignore[arg-type]  # they are arrays
    return path


def folder_of(root: Path, study: Study, row: str, epochs: int, seed: int) -> Path:
    """The directory of a run's files."""
    return root / study.name / f"{_name(row)}-{epochs}-epochs-seed{seed}"


def _name(text: str) -> str:
    """``text`` as part of a path."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text)


def result(run: Run) -> dict[str, Any] | None:
    """The results of a run: its last epoch, its training time, where its units are; None if it is not finished."""
    return outcome(
        run,
        lambda saved: {
            "placement": {name: placement(mask) for name, mask in saved.masks().items() if name.startswith("fc")}
        },
    )


def placement(mask: Any) -> dict[str, float]:
    """How evenly the units of a layer are distributed, which distinguishes growth rules.

    ``rows_spread`` and ``cols_spread``: standard deviation of the units of a block row or column over their mean.
    ``rows_empty`` and ``cols_empty``: the share of them without a unit. ``inside``: the share of the units that join
    neurons of one group.
    """
    found: dict[str, float] = {}
    for side, axis, unit in (("rows", mask.rows, mask.unit_row), ("cols", mask.cols, mask.unit_col)):
        units = torch.bincount(unit.long(), minlength=axis.num_units).double()
        found[f"{side}_spread"] = float(units.std(correction=0) / units.mean())
        found[f"{side}_empty"] = float((units == 0).double().mean())
    same = mask.rows.group_of_unit[mask.unit_row.long()] == mask.cols.group_of_unit[mask.unit_col.long()]
    return {**found, "inside": float(same.double().mean())}


def build_parser(study: Study) -> Parser:
    parser = Parser(
        prog=f"python -m {__package__}.{study.name}",
        description=study.about,
        epilog="\n".join(["rows:", *(f"  {row!r:44} {flags}" for row, flags in study.rows.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    text = f"default: {' '.join(map(str, study.seeds))}"
    parser.add_argument("--seeds", type=int, nargs="+", default=study.seeds, metavar="N", help=text)
    text = f"epochs of each run whose row does not say it (default: {study.epochs})"
    parser.add_argument("--epochs", type=int, default=study.epochs, metavar="N", help=text)
    text = f"rows to train, or patterns of their names with * (default: {' '.join(study.default_rows)})"
    parser.add_argument("--rows", nargs="+", default=study.default_rows, metavar="NAME", help=text)
    text = "flags of every run, after the study's own and before a row's, as '--hidden_dim 256 --limit_train 10000'"
    parser.add_argument("--flags", default="", metavar="FLAGS", help=text)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="parallel runs (default: cores)")
    text = (
        f"train on {FOLDS - 1} of {FOLDS} parts of the training images, and test on the other, not on the test images; "
        "each of six seeds in a row holds back another part, seed 1 the last"
    )
    parser.add_argument("--validation", action="store_true", help=text)
    parser.add_argument("--finished", action="store_true", help="train nothing; write a record of the finished runs")
    text = "an earlier record of the study: take over its runs, train the others"
    parser.add_argument("--extend", type=Path, metavar="FILE", help=text)
    add_json_flag(parser, "the last epoch of every run")
    return parser


def chosen(study: Study, patterns: Sequence[str]) -> list[str]:
    """The rows whose names match one of the patterns.

    Raises:
        TrainingError: if a pattern matches none.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        expression = ".*".join(map(re.escape, pattern.split("*")))
        fitting = {row for row in study.rows if re.fullmatch(expression, row)}
        if not fitting:
            raise TrainingError(f"--rows {pattern!r} matches none of the rows, which --help lists")
        wanted |= fitting
    return [row for row in study.rows if row in wanted]


def taken_over(study: Study, path: Path, record: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs of an earlier record, by row and seed, each with the commit and date that it was measured at.

    Raises:
        TrainingError: if ``path`` has other settings or another machine than ``record``, or rows of other flags.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TrainingError(f"--extend {path} is not a record: {error}") from error
    parts = ("benchmark", "settings", "epochs", "tested_on")
    if not isinstance(earlier, dict) or not {*parts, "machine", "rows"} <= set(earlier):
        raise TrainingError(f"--extend {path} is not a record of a study")
    for name, was, now in (
        *((name, earlier[name], record[name]) for name in parts),
        *((name, earlier["machine"].get(name), record["machine"][name]) for name in ("cpu", "cpu_capability")),
        ("torch", earlier["machine"]["versions"]["torch"], record["machine"]["versions"]["torch"]),
    ):
        if was != now:
            raise TrainingError(f"--extend {path} cannot be extended: its {name} is {was!r}, now it is {now!r}")
    when = {name: earlier["machine"][name] for name in ("commit", "date")}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in earlier["rows"]:
        if study.rows.get(row["row"]) != row["flags"]:
            raise TrainingError(f"--extend {path} cannot be extended: the study has no row {row['row']!r} of its flags")
        found |= {(row["row"], end["seed"]): {"measured": when, **end} for end in row["ends"]}
    return found


def _flag_names(flags: str) -> list[str]:
    """The names of some flags: ``["--T", "--lr"]`` of ``--T 5 --lr=0.01``."""
    return [flag.partition("=")[0] for flag in shlex.split(flags) if flag.startswith("--")]


def with_flags(study: Study, flags: str, rows: Sequence[str]) -> Study:
    """The study with more flags of every run.

    Raises:
        TrainingError: for one that would change no run.
    """
    own = {"--epochs": "--epochs", "--seed": "--seeds"}
    for name in _flag_names(flags):
        if name in own:
            raise TrainingError(f"--flags {flags!r}: {name} has no effect there; give the study {own[name]}")
        if all(name in _flag_names(study.rows[row]) for row in rows):
            raise TrainingError(f"--flags {flags!r}: {name} has no effect, since every row has one of its own")
    return dataclasses.replace(study, common=f"{study.common} {flags}")


def _runs(
    study: Study, rows: Sequence[str], arguments: argparse.Namespace, known: Collection[tuple[str, int]]
) -> dict[tuple[str, int], Run]:
    """The runs that are not ``known``, by row and seed.

    Raises:
        TrainingError: if ``--validation`` cannot hold back what the seeds or flags ask for.
    """
    if arguments.validation:
        by_fold: dict[int, int] = {}
        for seed in arguments.seeds:
            if by_fold.setdefault(fold_of(seed), seed) != seed:
                raise TrainingError(
                    f"--validation holds back the same images with seeds {by_fold[fold_of(seed)]} and {seed}; give at "
                    f"most {FOLDS} seeds in a row"
                )
        if "--dataset" in _flag_names(arguments.flags):
            raise TrainingError("--validation is of Fashion-MNIST; leave --dataset out of --flags")
        for seed in arguments.seeds:  # what no run can have is refused before data is written
            run_of(study, rows[0], arguments.epochs, seed, arguments.runs)
    runs = {}
    for seed in arguments.seeds:
        folder, dataset = arguments.runs, None
        if arguments.validation:
            folder = folder / "validation" / f"fold-{fold_of(seed)}"
            if arguments.finished and not folder.exists():
                continue
            dataset = validation_data(folder, fold_of(seed))
        folder /= "_".join(map(_name, shlex.split(arguments.flags.replace("=", " ")))).lstrip("-")
        for row in rows:
            if (row, seed) not in known:
                runs[row, seed] = run_of(study, row, arguments.epochs, seed, folder, dataset)
    return runs


def make(study: Study, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the unfinished runs, prints the table and returns the record."""
    rows = chosen(study, arguments.rows)
    if arguments.flags:
        study = with_flags(study, arguments.flags, rows)
    record: dict[str, Any] = {
        "benchmark": study.name,
        "machine": {**describe(torch.device("cpu")), "threads": 1},  # those of a run
        "settings": study.common,
        "epochs": arguments.epochs,
        "tested_on": HELD_BACK if arguments.validation else TEST_IMAGES,
    }
    known = taken_over(study, arguments.extend, record) if arguments.extend else {}
    runs = _runs(study, rows, arguments, known)
    others = {key: runs.pop(key) for key in list(runs) if key[0] in study.others}
    missing = [] if arguments.finished else [run for run in runs.values() if not run.files.marker.exists()]

    results: dict[Path, dict[str, Any] | None] = {}

    def line(run: Run) -> str:
        end = results[run.folder] = result(run) or {}
        return f"{run.label}: test accuracy {end['test_acc']:.4f}, {end['train_seconds']:.0f} s"

    if missing:
        jobs = max(1, arguments.jobs)
        with processes(jobs, threads=1) as executor:
            failed = train_runs(missing, executor, {"device": "cpu"}, study.name, line)
        if failed:
            raise TrainingError("\n".join(f"{label}: {error}" for label, error in failed.items()))
    ends = dict(known)
    for (row, seed), run in runs.items():
        end = results[run.folder] if run.folder in results else result(run)
        if end is not None:
            ends[row, seed] = {"seed": seed, **end}
    with pytorch_threads(1):  # those of a run
        for (row, seed), run in others.items():

            def note(text: str, label: str = run.label) -> None:
                print(f"{label}: {text}", file=sys.stderr)

            own = (run.settings, run.folder)
            end = study.finished_others(*own) if arguments.finished else study.others[row](*own, note)
            if end is not None:
                ends[row, seed] = {"seed": seed, **end}
    for (row, seed), run in {**runs, **others}.items():
        if (row, seed) in ends:
            ends[row, seed] |= study.more(row, run.settings, run.folder)
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in study.rows}
    for row, seed in sorted(ends):
        found[row].append(ends[row, seed])
    record["rows"] = [{"row": row, "flags": study.rows[row], "ends": of} for row, of in found.items() if of]
    if not record["rows"]:
        raise TrainingError(f"no run of {study.name} is finished in {arguments.runs}")
    print(study.table(record))
    return record


def spread(ends: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], digits: int = 2) -> str:
    """Mean ± standard error of the mean over runs, and their number where it is not three."""
    text = estimate([value(end) for end in ends]).text(digits)
    return text if len(ends) == 3 else f"{text} (n = {len(ends)})"


def of_hidden_layers(ends: Sequence[dict[str, Any]], quantity: str, digits: int = 0) -> str:
    """``silent`` or another share of hidden layers 1 and 2, in per cent, as ``8, 28``: the mean over runs."""
    means = (100 * statistics.mean(end[quantity][layer] for end in ends) for layer in ("lif1", "lif2"))
    return ", ".join(f"{value:.{digits}f}" for value in means)


def mean(row: dict[str, Any], quantity: str) -> float:
    """The mean of ``weights``, or another number, over the runs of a row."""
    return statistics.mean(end[quantity] for end in row["ends"])


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; 0 for a single one, where it is unknown."""
    return estimate(values).error or 0.0


def accuracy(end: dict[str, Any]) -> float:
    """Test accuracy after the last epoch, in per cent."""
    return 100 * end["test_acc"]


def differences(ends: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> list[float]:
    """Accuracy minus that of the control, in points, for each seed that both have; equal ones are equal numbers."""
    of_control = {end["seed"]: accuracy(end) for end in control}
    return [round(accuracy(end) - of_control[end["seed"]], 9) for end in ends if end["seed"] in of_control]


def gain(ends: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard error of these differences, and their number if it is not that of the runs; ``–`` without any."""
    found = differences(ends, control)
    if not found:
        return "–"
    mean, error = estimate(found)
    text = f"{mean:+.2f}" if error is None else f"{mean:+.2f} ± {error:.2f}"
    return text if len(found) == len(ends) else f"{text} (n = {len(found)})"


def run_study(study: Study, argv: Sequence[str] | None = None) -> int:
    """The program of a study."""
    interrupted = "run the same command again to resume with the remaining runs"
    return run_program(build_parser(study), lambda arguments: make(study, arguments), argv, interrupted)
