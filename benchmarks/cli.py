"""What all benchmarks share: flags, progress, and what a program does with its record."""

import argparse
import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import g2gnet
from g2g_kernels import select_device
from g2g_kernels.numbers import COUNT
from g2gnet.base.messages import say
from g2gnet.programs.flags import METAVARS, FlagError, Parser, add_json_flag, file_name
from g2gnet.programs.main import run_program
from g2gnet.programs.output import STDOUT, write_output
from g2gnet.training import TrainSettings
from g2gnet.weights.patterns import SPARSE

from . import records, report
from .machine import describe, pytorch_threads
from .registry import PRECISIONS
from .workload import Prepared, Workload, load, prepare

#: of a workload with ``--quick``
QUICK = {"batch_size": 64, "T": 20, "hidden_dim": 1024, "repeats": 5}
#: seconds between two states of the progress where it goes to a file
SELDOM = 30


@dataclasses.dataclass(frozen=True)
class Program:
    """A benchmark as a program: ``python -m benchmarks.NAME``."""

    name: str
    about: str | None
    takes: str  # how long, and where
    measure: Callable[[argparse.Namespace], dict[str, Any]]  # what its record says besides machine and settings
    table: Callable[[dict[str, Any]], str]  # of a record
    counts: Mapping[str, tuple[int, str]]  # flags that are whole numbers of at least 1: their defaults and texts
    quick: Mapping[str, Any]  # what flags are with ``--quick``, unless they are given
    more: Callable[[Parser], None] = lambda parser: None  # adds other flags; where it runs, if ``--device`` is one
    threads: int | None = None  # PyTorch's; None: as many as it has
    epilog: str = ""
    interrupted: str = "nothing was written"  # what is said after Ctrl-C

    def build_parser(self) -> Parser:
        about = f"{self.about}\nIt takes {self.takes}; with --quick at most two minutes."
        parser = Parser(prog=f"python -m {__package__}.{self.name}", description=about, epilog=self.epilog)
        what = ", ".join(f"--{flag} {value}" for flag, value in self.quick.items())
        parser.add_argument("--quick", action="store_true", help=f"a small version for a first look: {what}")
        add_json_flag(parser, "the record, a line per run,")
        for name, (default, text) in self.counts.items():
            text = f"{text} (default: {default})"
            parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
        self.more(parser)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs it, prints its table and writes its record; the exit status is 1 if a run's results were wrong, else
        that of :func:`g2gnet.programs.main.run_program`."""
        parser, status, to_print = self.build_parser(), 0, ""

        def program(arguments: argparse.Namespace) -> None:
            nonlocal status, to_print
            for name, value in self.quick.items() if arguments.quick else ():
                if getattr(arguments, name) == parser.get_default(name):
                    setattr(arguments, name, value)
            try:
                made = self._record(arguments)
            except ValueError as error:
                raise FlagError(str(error)) from error
            status = int(any(run.get("status") == "wrong" for run in made["runs"]))
            if arguments.json == STDOUT:
                to_print = records.text(made)
            elif arguments.json:
                write_output(arguments.json, records.text(made))

        failed = run_program(parser, program, argv, self.interrupted)
        if to_print:  # now that standard output is not standard error any more
            say(to_print.removesuffix("\n"))
        return failed or status

    def _record(self, arguments: argparse.Namespace) -> dict[str, Any]:
        settings = {name: getattr(arguments, name) for name in self.counts}
        for name, value in settings.items():
            COUNT.check(name, value)
        device = device_from(arguments) if "device" in arguments else torch.device("cpu")
        with pytorch_threads(self.threads) if self.threads else contextlib.nullcontext():
            machine = describe(device)
            print(headline(machine), flush=True)
            record = {"benchmark": self.name, "machine": machine, "settings": settings, **self.measure(arguments)}
        print(self.table(record))
        busy = record.get("limits", {}).get("others_busy_cores", 0.0)
        if busy > report.BUSY:
            print(
                f"Other programs kept {busy:.1f} of {machine['cores']} cores busy: do not trust these times, least "
                "of all those of loops over many small operations; CPU time says more."
            )
        return record


def bar(of: Any, text: str = "", unit: str = " turns") -> tqdm:
    """A progress bar over things or of a total: on a terminal one that goes when it ends, in a file a line now and
    then."""
    total = {"total": of} if isinstance(of, int) else {"iterable": of}
    often = sys.stderr.isatty()
    return tqdm(**total, desc=text, unit=unit, leave=False, mininterval=0.1 if often else SELDOM, delay=0.5)


def counts(arguments: argparse.Namespace, name: str) -> list[int]:
    """The numbers of a comma-separated flag; raises ValueError unless all are whole and at least 1."""
    found = [int(part) for part in getattr(arguments, name).split(",")]
    for number in found:
        COUNT.check(name, number)
    return found


def add_sizes(parser: Parser) -> None:
    """Adds the flags of the workload's network and batch."""
    default = {field.name: field.default for field in dataclasses.fields(Workload)}
    group = parser.add_argument_group("workload")
    texts = {field.name: field.metadata["text"] for field in dataclasses.fields(TrainSettings)}
    texts["T"] = "time steps per sample"
    texts["train_steps"] = "optimizer steps before anything is measured"
    for name in ("batch_size", "T", "hidden_dim", "p_inter", "block_size", "num_groups", "train_steps", "seed"):
        kind = type(default[name])
        group.add_argument(
            f"--{name}", type=kind, metavar=METAVARS[kind], help=f"{texts[name]} (default: {default[name]})"
        )
    group.add_argument("--model", choices=("dense", *SPARSE), help=f"network (default: {default['model']})")


def add_flags(parser: Parser) -> None:
    """Adds the flags of the workload, the device and the contenders."""
    add_sizes(parser)
    group = parser.add_argument_group("measurement")
    text = f"images (default: {Workload.dataset})"
    group.add_argument("--dataset", choices=("fashionmnist", "fashionmnist-mini"), help=text)
    text = "directory of the data sets (default: data)"
    group.add_argument("--data_dir", type=file_name, default="data", metavar="DIR", help=text)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group = parser.add_argument_group("contenders (default: all in float32, our own kernels in bfloat16 too)")
    group.add_argument("--contenders", metavar="A,B,...", help="only these; add -bf16 to a name for bfloat16")
    group.add_argument("--backend", metavar="A,B,...", help="of our own backends only these: triton, cpu, torch")
    group.add_argument("--precision", choices=PRECISIONS, help="all contenders in this precision only")


def workload_from(arguments: argparse.Namespace, usual: Mapping[str, Any] | None = None, **changes: Any) -> Workload:
    """The workload of the flags, where they do not say it of ``usual``; raises SettingsError if it is out of range."""
    names = [field.name for field in dataclasses.fields(Workload)]
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return Workload(**{**(usual or {}), **given, **changes})


def device_from(arguments: argparse.Namespace) -> torch.device:
    """The device to measure on; raises ValueError unless this is a CPU or a CUDA device that this machine has."""
    device = select_device(arguments.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={arguments.device!r}: benchmarks run on cpu and cuda only")
    return device


def prepare_with_bar(workload: Workload, data_dir: str) -> tuple[Path, Prepared]:
    """Prepares the workload under a progress bar, and reads it."""
    with bar(workload.train_steps, "training", " steps") as progress:
        path = prepare(workload, data_dir, lambda steps: progress.update(steps - progress.n) and None)
    prepared = load(path)
    if prepared.note:
        print(prepared.note, file=sys.stderr)
    return path, prepared


def headline(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    commit = re.sub(r"^(.{8})[^+]*", r"\1", machine["commit"] or "") or "no commit"
    return f"g2g {g2gnet.__version__} ({commit.replace('+', ' with ')}) on {device}; {versions}"
