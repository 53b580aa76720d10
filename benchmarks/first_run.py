"""A GPU's first hour: ``python -m benchmarks.first_run --device cuda``.

Tests and measures a GPU on which nothing has run yet, in stages of at most eight minutes: are the results correct, how
long does each part take. Each stage is a separate program. It writes its record to
the folder of the run, and the page is redrawn. Run the same command again to resume: finished stages are skipped, and
stages that failed or took too long are repeated, faster, since compiled kernels are kept. ``--device cpu`` rehearses
everything at tiny sizes, so that mistakes show before there is a GPU; its times mean nothing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from g2gnet.base.files import replace_file
from g2gnet.base.messages import say
from g2gnet.base.tables import markdown
from g2gnet.programs.flags import FlagError, Parser
from g2gnet.programs.main import run_program

from . import records
from .machine import describe
from .report import seconds
from .throughput import QUANTITIES

#: time limit of a stage, in seconds
LIMIT = 480
PAGE = "first-run.md"
#: what the stages import besides PyTorch and Triton, by module
PACKAGES = ("pytest", "xdist", "hypothesis", "snntorch")

TINY = "--batch_size 8 --T 4 --hidden_dim 64 --block_size 16 --train_steps 2 --repeats 2"
FULL = "--train_steps 20 --repeats 20"
MINI = "--dataset fashionmnist-mini"
#: the GPU lane of the tests, and what of each a rehearsal runs
TESTS = {
    "tests-linear": ("test_triton_linear.py test_g2g_linear.py", "rows_and_columns_without_units"),
    "tests-neurons": ("test_triton_lif.py test_lif.py test_models.py", "one_step_by_hand"),
    "tests-stack": ("test_triton_g2g_stack.py test_g2g_stack.py", "single_weights"),
}
#: of throughput, by stage: flags, contenders (``g2g`` is ours on the device's backend)
BF16, FP32 = "g2g-bf16,g2g-pair-bf16", "g2g"  # float32 is never fused
BOTH = f"{BF16},{FP32},dense-lif-bf16"
TIMES = {
    "step": ("--kernel step", f"{BOTH},g2g-compiled-bf16,g2g-compiled,dense-lif,snntorch-masked"),
    "forward": ("--kernel forward", "g2g-bf16,g2g,dense-lif-bf16,snntorch-masked"),
    "linear": ("--kernel linear", "g2g-bf16,g2g,dense,dense-bf16,masked"),
    "linear-dense": ("--kernel linear-dense", "g2g-bf16,g2g,dense,dense-bf16,masked"),
    "lif": ("--kernel lif", "g2g,snntorch"),
    "synaptic": ("--kernel synaptic", "g2g,snntorch"),
    "dst": ("--kernel dst", "g2g,dense-correlation"),
    "step-dense": ("--model dense", BOTH),
    "step-units-32": ("--block_size 32", BOTH),
    "step-units-16": ("--block_size 16", BOTH),
    "step-units-1": ("--block_size 1", BOTH),
}
#: the values of what grows, and those of a rehearsal
GROWING = {
    "p_inter": ("0.0,0.05,0.15,0.3,0.6,1.0", "0.0,0.5"),
    "B": ("8,32,64,128,256", "2,8"),
    "H": ("256,512,1024,2048", "64,128"),
}


class Stage(NamedTuple):
    """A stage: one program."""

    name: str  # of its record, and of its rows on the page
    command: Sequence[str]  # module and flags
    measures: bool = True  # whether it accepts ``--json`` for a record with times


def stages(device: str) -> Iterator[Stage]:
    """All stages for ``cuda`` (or ``cuda:N``), or, at tiny sizes, for ``cpu``."""
    tiny = device == "cpu"
    sizes = f"--device {device} {MINI} {TINY if tiny else FULL}"

    def throughput(name: str, flags: str, contenders: str) -> Stage:
        ours = contenders if not tiny else re.sub(r",g2g-pair-\w+", "", contenders)  # which Triton alone has
        ours = re.sub(r"\bg2g\b", f"g2g-{'cpu' if tiny else 'triton'}", ours)
        return Stage(name, shlex.split(f"{__package__}.throughput --contenders {ours} {sizes} {flags}"))

    yield Stage("doctor", ["g2g_kernels.doctor", "--device", device], False)
    for name, (files, part) in TESTS.items():
        paths = [f"tests/g2g_kernels/ops/{file}" for file in files.split()]
        how = ["-n", "0", "-k", part] if tiny else ["-n", "4", "--dist", "load"]  # compiling takes longest
        yield Stage(name, ["pytest", "-p", "no:cacheprovider", *how, *paths], False)
    for name, of_stage in TIMES.items():
        yield throughput(name, *of_stage)
    for quantity, values in GROWING.items():
        grows = f"--quantity {quantity} --values {values[tiny]}"
        yield throughput(f"scaling-{quantity}-bf16", grows, BF16)
        yield throughput(f"scaling-{quantity}-fp32", grows, FP32)
    count = 2 if tiny else torch.cuda.device_count()
    if count > 1:  # the trainer compares the states of its processes
        launcher = f"torch.distributed.run --standalone --nproc_per_node={count} -m g2gnet.programs.train"
        flags = f"{MINI} --model mixer --epochs 1 --checkpoint_dir first-run/processes --device {device}"
        flags += " --batch_size 32 --hidden_dim 64 --T 4 --limit_train 96 --limit_test 32" if tiny else ""
        yield Stage("processes", shlex.split(f"{launcher} {flags}"), False)


def run(stage: Stage, folder: Path, limit: float) -> dict[str, Any]:
    """Runs a stage, whose output and record go to ``folder``, and returns its outcome, which ends up there, too.

    A stage that is stopped by Ctrl-C has none.
    """
    log, record = (folder / f"{stage.name}.{ending}" for ending in ("log", "jsonl"))
    record.unlink(missing_ok=True)  # of an earlier try
    command = [sys.executable, "-m", *stage.command, *(["--json", str(record)] if stage.measures else [])]
    start = time.monotonic()
    with log.open("wb") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        # in a session of its own: processes started by the stage end with it
        process = subprocess.Popen(command, start_new_session=True, **streams)  # type: ignore[call-overload]
        try:
            process.wait(limit)
            status = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "took too long"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    made = {
        "command": list(stage.command),
        "status": status,
        "seconds": time.monotonic() - start,
        "output": log.read_text(encoding="utf-8", errors="replace")[-4000:],
        "record": records.read(record) if record.exists() else None,
    }
    text = json.dumps(made, ensure_ascii=False)
    replace_file(folder / f"{stage.name}.json", lambda file: file.write(text.encode()))
    return made


def earlier(stage: Stage, folder: Path) -> dict[str, Any] | None:
    """The outcome of the stage from an earlier run with the same command, or None."""
    with contextlib.suppress(OSError, ValueError):
        made = json.loads((folder / f"{stage.name}.json").read_text(encoding="utf-8"))
        return made if made["command"] == list(stage.command) else None
    return None


Outcomes = Mapping[str, Mapping[str, Any]]


def measured(record: Mapping[str, Any] | None) -> dict[str, float]:
    """The median seconds of everything timed in a stage's record."""
    found = {}
    for run in (timed for timed in record["runs"] if "median" in timed) if record else ():
        what = run.get("what") or run["contender"]
        if record and (quantity := record.get("quantity")):
            what += f", {quantity} {record['workloads'][run['place']][QUANTITIES[quantity].field]}"
        found[what] = run["median"]
    return found


def times_table(made: Outcomes) -> str:
    """Everything measured, by stage."""
    times = {name: measured(stage["record"]) for name, stage in made.items()}
    rows = [[name, what, seconds(found)] for name, of_stage in times.items() for what, found in of_stage.items()]
    return markdown(["stage", "", "measured"], rows)


def status_table(made: Outcomes, planned: Sequence[str]) -> str:
    """The outcome of each stage; for one that is not done, the last line of its output that mentions an error."""
    rows = []
    for name in planned:
        status, taken, said = "to come", "", ""
        if stage := made.get(name):
            status, taken = stage["status"], f"{stage['seconds']:.0f} s"
        if stage and status != "done":
            lines = stage["output"].strip().splitlines() or [""]
            said = next((line for line in reversed(lines) if re.search("(?i)wrong: |error", line)), lines[-1])
        rows.append([name, status, taken, said[:200]])
    return markdown(["stage", "", "took", ""], rows)


def page(made: Outcomes, planned: Sequence[str], device: str, machine: Mapping[str, Any]) -> str:
    """The page of a run."""
    note = "" if device != "cpu" else "A rehearsal on the CPU at tiny sizes: its times mean nothing. "
    return (
        f"# First run on {machine['gpu'] or machine['cpu']}\n\n{note}PyTorch {machine['versions']['torch']}, Triton "
        f"{machine['versions']['triton']}, commit {machine['commit']}.\n\n{status_table(made, planned)}\n\n"
        f"{times_table(made)}\n"
    )


def build_parser() -> Parser:
    parser = Parser(prog=f"python -m {__package__}.first_run", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal (default: cuda)")
    text = "folder of the records and the page (default: first-run)"
    parser.add_argument("--folder", type=Path, default=Path("first-run"), metavar="DIR", help=text)
    text = "run only these stages (default: all; an unknown name lists them)"
    parser.add_argument("--stages", nargs="+", metavar="NAME", help=text)
    text = f"seconds after which a stage is stopped (default: {LIMIT})"
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="X", help=text)
    return parser


def first_run(arguments: argparse.Namespace) -> None:
    """Runs the stages that are not done, and draws the page after each; raises FlagError for an unavailable device, an
    unknown stage, missing packages, or outside of the repository."""
    device, folder = arguments.device, arguments.folder
    if device != "cpu" and (not device.startswith("cuda") or not torch.cuda.is_available()):
        raise FlagError(f"device={device!r}: no such GPU was found; --device cpu runs a rehearsal")
    if not records.RESULTS.exists():
        raise FlagError(
            f"{records.RESULTS} is missing: run this from a checkout of the repository, as it has the tests"
        )
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise FlagError(f"the stages need {', '.join(absent)}, not installed here: pip install -e '.[dev]'")
    planned = {stage.name: stage for stage in stages(device)}
    unknown = [name for name in arguments.stages or [] if name not in planned]
    if unknown:
        raise FlagError(f"stage {unknown[0]!r} is unknown; choose from {', '.join(planned)}")
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe(torch.device(device))
    made = {name: before for name, stage in planned.items() if (before := earlier(stage, folder))}
    for name in arguments.stages or planned:
        if name in made and made[name]["status"] == "done":
            say(f"{name}: already done")
        else:
            made[name] = run(planned[name], folder, arguments.limit)
            say(f"{name}: {made[name]['status']}, {made[name]['seconds']:.0f} s")
        (folder / PAGE).write_text(page(made, list(planned), device, machine), encoding="utf-8")
    say(f"{folder / PAGE}")


def main(argv: Sequence[str] | None = None) -> int:
    interrupted = "run the same command again to resume with the remaining stages"
    return run_program(build_parser(), first_run, argv, interrupted)


if __name__ == "__main__":
    sys.exit(main())
