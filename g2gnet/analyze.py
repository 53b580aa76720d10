"""Prints what the neurons of a trained network do, layer by layer and group by group."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from g2gnet import cli
from g2gnet.analysis import analyze_network, groups_table, headline, layers_table
from g2gnet.files import replace_file
from g2gnet.training import read_run
from g2gnet.training.evaluation import run_test_images

EXAMPLES = """\
example:
  python -m g2gnet.analyze checkpoints/fashionmnist_mixer_p0.15_T50_current.pth --json analysis.json
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m g2gnet.analyze",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the .pth file of a training run, finished or not")
    cli.add_samples_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="write everything, with matrices between groups, to FILE")
    cli.add_machine_flags(parser)
    return parser
