"""The benchmarks' shared flags, and the preparation before measuring."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import g2gnet
from g2g_kernels import select_device
from g2g_kernels.numbers import COUNT
from g2gnet.programs.flags import METAVARS, FlagError, Parser, add_json_flag, file_name
from g2gnet.programs.main import run_program
from g2gnet.programs.output import check_output
from g2gnet.training import TrainSettings
from g2gnet.weights.patterns import MODELS

from . import report
from .registry import PRECISIONS
from .workload import Prepared, Workload, load, prepare

#: the sizes of ``--quick``; flags override them
QUICK = {"batch_size": 64, "T": 20, "hidden_dim": 1024}
QUICK_REPEATS = 5
#: cores that other programs may use on average while nothing is measured
BUSY = 0.1


def add_flags(parser: Parser, repeats: int) -> None:
    """Adds the flags of the workload, the device, the repeats and the reports."""
    default = {field.name: field.default for field in dataclasses.fields(Workload)}
    group = parser.add_argument_group("workload")
    texts = {field.name: field.metadata["text"] for field in dataclasses.fields(TrainSettings)}
    texts["T"] = "time steps per sample"
    texts["train_steps"] = "optimizer steps before anything is measured"
    for name in ("batch_size", "T", "hidden_dim", "p_inter", "block_size", "num_groups", "train_steps", "seed"):
        quick = f", {QUICK[name]} with --quick" if name in QUICK else ""
        kind = type(default[name])
        text = f"{texts[name]} (default: {default[name]}{quick})"
        group.add_argument(f"--{name}", type=kind, metavar=METAVARS[kind], help=text)
    group.add_argument("--model", choices=MODELS, help=f"network (default: {default['model']})")
    group.add_argument(
        "--dataset", choices=("fashionmnist", "fashionmnist-mini"), help=f"images (default: {default['dataset']})"
    )
    text = "directory of the data sets (default: data)"
    group.add_argument("--data_dir", type=file_name, default="data", metavar="DIR", help=text)
    group = parser.add_argument_group("measurement")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    text = f"timed turns (default: {repeats}, {QUICK_REPEATS} with --quick)"
    group.add_argument("--repeats", type=int, metavar="N", help=text)
    parser.set_defaults(usual_repeats=repeats)
    group.add_argument("--quick", action="store_true", help="smaller sizes: under two minutes on two cores")
    group = parser.add_argument_group("contenders (default: all in float32, our own kernels in bfloat16 too)")
    group.add_argument("--contenders", metavar="A,B,...", help="only these; add -bf16 to a name for bfloat16")
    group.add_argument("--backend", metavar="A,B,...", help="of our own backends only these: triton, cpu, torch")
    group.add_argument("--precision", choices=PRECISIONS, help="all contenders in this precision only")
    add_report_flags(parser)


def add_report_flags(parser: Parser) -> None:
    """Adds the flags for output files."""
    group = parser.add_argument_group("report")
    add_json_flag(group, "the record, with every timing,")
    group.add_argument("--csv", type=file_name, metavar="FILE", help="write one line per point to FILE")
    text = "draw the picture FILE (.png, .svg; needs matplotlib)"
    group.add_argument("--plot", type=file_name, metavar="FILE", help=text)


class Report(NamedTuple):
    """The results of a benchmark: its record, the rows of a CSV file, and its exit status."""

    record: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    status: int = 0


def check_report_flags(arguments: argparse.Namespace) -> None:
    """Checks before any measurement that the reports can be written.

    Raises:
        OutputError: for a file that cannot be written.
        ValueError: for a picture without matplotlib.
    """
    for path in (arguments.csv, arguments.plot):
        if path is not None:
            check_output(path)
    if arguments.plot is not None:
        try:
            import matplotlib as matplotlib  # its settings are read, and may be wrong
        except ImportError as error:
            raise ValueError("plot: matplotlib is not installed (pip install matplotlib)") from error
        except ValueError as error:
            raise ValueError(f"plot: matplotlib cannot be imported ({error}); correct MPLBACKEND") from error


def write_files(arguments: argparse.Namespace, made: Report) -> None:
    """Writes the table and the picture requested by the flags."""
    if arguments.csv:
        report.write_csv(arguments.csv, made.rows, made.record["machine"])
    if arguments.plot:
        from . import plots  # needs matplotlib

        plots.draw(made.record, arguments.plot)


def workload_from(arguments: argparse.Namespace, **changes: Any) -> Workload:
    """The workload requested by the flags, with ``changes``; raises SettingsError if it is out of range."""
    names = [field.name for field in dataclasses.fields(Workload) if hasattr(arguments, field.name)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Workload(**{**(QUICK if arguments.quick else {}), **given, **changes})


def repeats_from(arguments: argparse.Namespace) -> int:
    """The number of timed turns; raises ValueError if the flag is out of range."""
    if arguments.repeats is None:
        return QUICK_REPEATS if arguments.quick else arguments.usual_repeats
    wanted = COUNT.refuses(arguments.repeats)
    if wanted:
        raise ValueError(f"repeats={arguments.repeats} must be {wanted}")
    return arguments.repeats


def device_from(arguments: argparse.Namespace) -> torch.device:
    """The device to measure on.

    Raises:
        ValueError: unless this is a CPU or a CUDA device that this machine has.
    """
    device = select_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={arguments.device!r}: benchmarks run on cpu and cuda only")
    return device


def prepare_with_bar(workload: Workload, data_dir: str) -> tuple[Path, Prepared]:
    """Prepares the workload under a progress bar, and reads it."""
    with tqdm(total=workload.train_steps, desc="training", unit=" steps", leave=False, disable=None) as bar:
        path = prepare(workload, data_dir, lambda steps: bar.update(steps - bar.n) and None)
    prepared = load(path)
    if prepared.note:
        print(prepared.note, file=sys.stderr)
    return path, prepared


def headline(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    commit, changes = (machine["commit"] or "no commit"), ""
    if commit.endswith("+changes"):
        commit, changes = commit.removesuffix("+changes"), " with changes"
    return f"g2g {g2gnet.__version__} ({commit[:8]}{changes}) on {device}; {versions}"


def warn_if_busy(machine: dict[str, Any], rates: dict[str, float]) -> None:
    """Warns if other programs used part of the machine during the measurement."""
    busy = rates.get("others_busy_cores", 0.0)
    if busy > BUSY:
        print(
            f"Other programs kept {busy:.1f} of {machine['cores']} cores busy: do not trust these times, least "
            "of all those of loops over many small operations; CPU time says more."
        )


def run(parser: Parser, benchmark: Callable[[argparse.Namespace], Report], argv: Any) -> int:
    """Runs ``benchmark`` on the parsed flags as :func:`g2gnet.programs.main.run_program` does, and writes its reports.

    Returns:
        The exit status: the report's, or that of :func:`g2gnet.programs.main.run_program` on an error.
    """
    status = 0

    def program(arguments: argparse.Namespace) -> dict[str, Any]:
        nonlocal status
        try:
            check_report_flags(arguments)
            made = benchmark(arguments)
        except ValueError as error:
            raise FlagError(str(error)) from error
        write_files(arguments, made)
        status = made.status
        return made.record

    return run_program(parser, program, argv, interrupted="nothing was written") or status


def numbers(text: str, kind: Callable[[str], Any]) -> Sequence[Any]:
    """A comma-separated list."""
    return [kind(part) for part in text.split(",")]
