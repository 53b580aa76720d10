"""Prints the activity of the neurons of a trained network, layer by layer and group by group."""

import argparse
from collections.abc import Sequence
from typing import Any

from g2gnet.base.messages import say
from g2gnet.inspect import analyze_network, groups_table, headline, layers_table
from g2gnet.programs import flags
from g2gnet.programs.main import run_program
from g2gnet.training import read_run
from g2gnet.training.evaluation import run_images

EXAMPLE = """\
example:
  g2g-analyze checkpoints/fashionmnist_mixer_p0.15_T50_current.pth --json analysis.json
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="g2g-analyze", description=__doc__, epilog=EXAMPLE)
    text = "the .pth file of a training run, finished or not"
    parser.add_argument("checkpoint", type=flags.file_name, metavar="CHECKPOINT", help=text)
    flags.add_json_flag(flags.add_inspection_flags(parser), "all quantities, including matrices between groups,")
    return parser


def analyze(arguments: argparse.Namespace) -> dict[str, Any]:
    machine = flags.machine_from(arguments)
    run = read_run(arguments.checkpoint)
    data = flags.load_run_data(arguments, run.settings, machine.device)
    net = run.network(machine.device, machine.backend)
    batches = run_images(net, run.settings, run.epoch, data, count=arguments.samples)
    analysis = analyze_network(net, batches, data.num_classes)
    say(f"{run.path}: {run.settings.model} on {run.settings.dataset}, {run.position}")
    say(f"{headline(analysis)}\n\n{layers_table(analysis)}")
    for layer in analysis.layers:
        say(f"\n{groups_table(layer)}")
    if len(analysis.layers[0].group_sizes) == 1:
        say("\nEach layer is one group: quantities between groups and the entropy of input groups are not defined.")
    return {
        "checkpoint": str(run.path),
        "epoch": run.epoch,
        "step": run.step,
        "interrupted": run.interrupted,
        "settings": run.settings.as_dict(),
        **analysis.as_dict(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), analyze, argv, interrupted="nothing was written")
