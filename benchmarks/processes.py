"""Training with one process per device compared with a single process: ``python -m benchmarks.processes``.

Runs the same flags twice, once under ``torchrun``; gradients go through NCCL on GPUs and through gloo on CPUs. The
losses must agree, since both compute the same batches; only the order of sums differs.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from g2gnet.base.tables import in_columns
from g2gnet.programs.flags import Parser
from g2gnet.training import TrainingError

from . import cli
from .machine import describe
from .report import seconds

#: the largest relative difference of losses that the order of sums explains, including a few changed spikes
ALLOWED = 0.02
#: flags that a test or a rehearsal overrides
DEFAULTS = "--dataset fashionmnist-mini --model mixer --epochs 5 --batch_size 256"


def build_parser() -> Parser:
    parser = cli.build_parser("processes", __doc__, "a minute", {})
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--processes", type=int, metavar="N", help="default: the number of GPUs; 2 on the CPU")
    parser.add_argument("--flags", default=DEFAULTS, help="of g2g-train (default: %(default)s)")
    return parser


def epochs(launcher: Sequence[str], flags: str, device: str, folder: Path) -> list[dict[str, Any]]:
    """The history of one run.

    Raises:
        TrainingError: with its output, if it failed.
    """
    command = [sys.executable, *launcher, "-m", "g2gnet.programs.train", *shlex.split(flags)]
    command += ["--device", device, "--checkpoint_dir", str(folder)]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    (history,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains both, prints the table and returns the record.

    Raises:
        ValueError: for fewer than two processes, or more than there are GPUs.
        TrainingError: if a run failed, or the losses are not the same.
    """
    gpus = torch.cuda.device_count()
    count = arguments.processes or (gpus if arguments.device == "cuda" else 2)
    if count < 2 or (arguments.device == "cuda" and count > gpus):
        raise ValueError(f"processes={count}: give at least 2, and at most one per GPU ({gpus} found)")
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    found = []
    with tempfile.TemporaryDirectory() as root:
        for name, launcher in (("1 process", ()), (f"{count} processes", torchrun)):
            history = epochs(launcher, arguments.flags, arguments.device, Path(root) / name.replace(" ", "-"))
            last = history[-1]
            found.append({"what": name, "median": min(epoch["seconds"] for epoch in history), "epochs": history})
            print(
                in_columns(
                    ("", "per epoch", "loss"), [(name, seconds(found[-1]["median"]), f"{last['train_loss']:.4f}")]
                )
            )
    for epoch, (alone, shared) in enumerate(zip(*(one["epochs"] for one in found), strict=True), 1):
        if not math.isclose(alone["train_loss"], shared["train_loss"], rel_tol=ALLOWED):
            raise TrainingError(
                f"epoch {epoch}: loss {shared['train_loss']} with {count} processes, {alone['train_loss']} with one"
            )
    return {
        "benchmark": "processes",
        "flags": arguments.flags,
        "processes": count,
        "machine": describe(torch.device(arguments.device)),
        "runs": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
