"""Cross-validates a spiking network: k models, each trained without one k-th of the training images."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from g2gnet.base.messages import say
from g2gnet.base.tables import markdown
from g2gnet.programs import flags, output
from g2gnet.programs.main import run_program
from g2gnet.training.checkpoints import RunFiles
from g2gnet.training.cross_validation import ACCURACIES, FoldSettings, cross_validate

EXAMPLES = """\
examples:
  python crossval.py --dataset fashionmnist --model mixer --p_inter 0.15 --epochs 5 --k_folds 5
  python crossval.py --dataset cifar10 --model index --sparsity_mode dynamic
"""


def build_parser() -> flags.Parser:
    document = "the settings, the results of all folds and the files' names"
    return flags.training_parser(__doc__ or "", EXAMPLES, FoldSettings, document)


def table(results: dict[str, Any]) -> str:
    """The accuracies of each fold, their mean and standard deviation, as a Markdown table."""
    rows = [(str(result["fold"]), str(result["seed"]), result) for result in results["folds"]]
    rows += [("mean", "", results["mean"]), ("std", "", results["std"])]
    return markdown(
        ["fold", "seed", *ACCURACIES],
        [[name, seed, *(f"{values[accuracy]:.4f}" for accuracy in ACCURACIES)] for name, seed, values in rows],
    )


def files_of_fold(arguments: argparse.Namespace, settings: FoldSettings) -> Sequence[Path]:
    """The files of the fold that the name of the target of ``--json`` mentions, if any."""
    numbers = re.findall(r"_fold(\d{1,18})of", Path(arguments.json or "").resolve().name)
    if not numbers or not 1 <= int(numbers[-1]) <= settings.k_folds:
        return ()
    return RunFiles(arguments.checkpoint_dir, settings.of_fold(int(numbers[-1])).stem).files()


def crossval(arguments: argparse.Namespace) -> dict[str, Any] | None:
    settings = flags.settings_from(arguments, FoldSettings)
    machine = flags.machine_from(arguments)
    file = Path(arguments.checkpoint_dir) / f"{settings.summary_stem}.json"
    output.check_json(arguments, [file, *files_of_fold(arguments, settings)])
    with flags.joined(arguments, "crossval", settings, machine, torch.device("cpu")) as machine:
        if machine.world.leads:
            RunFiles(arguments.checkpoint_dir, settings.of_fold(settings.k_folds).stem).check()
            output.check_output(file, arguments)
        results = cross_validate(
            settings,
            lambda: flags.load_data(arguments, settings, machine.device),
            arguments.checkpoint_dir,
            machine,
            flags.log_from(arguments),
        )
        if not machine.world.leads:
            return None
    say(table(results))
    document = {"settings": settings.flag_values(), **results}
    output.write_output(file, json.dumps(document, indent=2) + "\n")
    say(f"wrote {file}")
    folds = [settings.of_fold(result["fold"]).stem for result in results["folds"]]
    files = {"results": str(file), "folds": [RunFiles(arguments.checkpoint_dir, stem).paths() for stem in folds]}
    return {**document, "files": files}


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), crossval, argv)
