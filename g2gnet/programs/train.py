"""Trains a spiking network: the Dense baseline or a G2GNet, statically sparse or with dynamic sparse training."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2gnet.base.messages import quoted, say
from g2gnet.inspect import NetworkAnalysis, headline, summary_table
from g2gnet.programs import flags, output
from g2gnet.programs.main import run_program
from g2gnet.training import TrainSettings, run_training
from g2gnet.training.checkpoints import RunFiles

EXAMPLES = """\
examples:
  python train.py --dataset fashionmnist-mini --model mixer --epochs 5
  python train.py --model index --p_inter 0.15
  python train.py --model mixer --sparsity_mode dynamic --cp set --cg hebb
"""


def build_parser() -> flags.Parser:
    document = "the settings, the last epoch's results and the files' names"
    return flags.training_parser(__doc__ or "", EXAMPLES, TrainSettings, document)


def train(arguments: argparse.Namespace) -> dict[str, Any] | None:
    settings = flags.settings_from(arguments, TrainSettings)
    files = RunFiles(arguments.checkpoint_dir, settings.stem)
    output.check_json(arguments, files.files())
    checkpoint = files.checkpoint if settings.validation is None else files.best
    more = flags.run_data_flags(settings, arguments.data_dir, arguments.resnet_weights)
    machine = flags.machine_from(arguments)
    with flags.joined(arguments, "train", settings, machine, machine.device) as machine:
        result = run_training(
            settings,
            lambda: flags.load_data(arguments, settings, machine.device),
            arguments.checkpoint_dir,
            machine,
            functools.partial(show_analysis, settings, checkpoint, more),
            flags.log_from(arguments) if machine.world.leads else (),
        )
        if not machine.world.leads:
            return None
    return {"settings": settings.flag_values(), "result": result, "files": files.paths()}


def show_analysis(
    settings: TrainSettings, checkpoint: Path, more: str, analysis: NetworkAnalysis, images: int, path: Path
) -> None:
    """Prints the analysis of the network of a checkpoint, and the command that draws it, with ``more`` flags."""
    membranes = "The output neurons do not spike: their membranes are read.\n" * (settings.readout != "counts")
    say(
        f"{headline(analysis, images)}\n{summary_table(analysis)}\n{membranes}"
        f"Synchrony, correlations and all groups (docs/analysis.md): {path}\n"
        f"With pictures: g2g-report {quoted(checkpoint)}{more}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), train, argv)


if __name__ == "__main__":
    sys.exit(main())
