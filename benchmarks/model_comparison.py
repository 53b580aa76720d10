"""Test accuracy of every model over several seeds on Fashion-MNIST, by ``g2g-train`` itself; prints a Markdown table.

The last row of the static ones is the control that keeps such tables honest: an unstructured random graph with as many
weights. Each run has a folder of its own under ``--runs``, so that a second start resumes where the first one stopped.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from g2gnet.cli import add_json_flag, run_program

from .machine import describe

COMMON = "--dataset fashionmnist --T 10 --hidden_dim 1024"
DST = "--sparsity_mode dynamic --cp hebb --cg hebb --dst_interval 200"
#: the flags of each row
VARIANTS = {
    "dense": "--model dense",
    "index": "--model index",
    "random": "--model random",
    "mixer": "--model mixer",
    "index, DST": f"--model index {DST}",
    "random, DST": f"--model random {DST}",
    "mixer, DST": f"--model mixer {DST}",
    "index, units of 32": "--model index --block_size 32",
    "index, units of 16": "--model index --block_size 16",
    "index, single weights": "--model index --block_size 1",
    "unstructured random graph": "--model index --block_size 1 --num_groups 1 --p_intra 0.25625",
}


def command(flags: str, epochs: int, seed: int, folder: Path) -> list[str]:
    """The command of one run."""
    return [
        sys.executable,
        "-m",
        "g2gnet.train",
        *shlex.split(f"{COMMON} {flags} --epochs {epochs} --seed {seed}"),
        "--checkpoint_dir",
        str(folder),
    ]


def run(flags: str, epochs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Trains, unless that was done before, and returns the record of the last epoch."""
    subprocess.run(command(flags, epochs, seed, folder), check=True, stdout=subprocess.DEVNULL)
    (marker,) = folder.glob("*.DONE")
    return json.loads(marker.read_text())["result"]


def table(record: dict[str, Any]) -> str:
    """Markdown: mean ± standard deviation (n − 1) over the seeds, in per cent, and the density at the end."""
    lines = [
        "| model | test accuracy, % | training accuracy, % | weights of fc2 that exist | flags |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in record["models"]:
        test, train = ([100 * end[key] for end in row["last_epochs"]] for key in ("test_acc", "train_acc"))
        density = row["last_epochs"][0]["density"]["fc2"]
        lines.append(
            f"| {row['model']} | {_spread(test)} | {_spread(train)} | {100 * density:.1f} % | `{row['flags']}` |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.model_comparison", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs go (default: runs)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="epochs of each run (default: 5)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add_json_flag(parser, "the last epoch of every run")
    return parser


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    record = {
        "benchmark": "model_comparison",
        "machine": describe(torch.device("cpu")),
        "settings": COMMON,
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
        "models": [{"model": name, "flags": VARIANTS[name], "last_epochs": []} for name in arguments.variants],
    }
    runs = [(seed, row) for seed in arguments.seeds for row in record["models"]]
    # one line below the bar that each run draws for itself
    with tqdm(runs, desc="all", unit=" runs", position=1, leave=False, disable=None) as bar:
        for seed, row in bar:
            folder = arguments.runs / f"{row['model'].replace(', ', '-').replace(' ', '-')}-seed{seed}"
            end = run(row["flags"], arguments.epochs, seed, folder)
            row["last_epochs"].append(end)
            bar.write(f"{row['model']}, seed {seed}: test accuracy {end['test_acc']:.4f}", file=sys.stderr)
    print(table(record))
    return record


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
