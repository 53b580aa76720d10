"""Writes one HTML page with the settings, results, analysis and pictures of training runs."""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from g2gnet.base.files import expanded
from g2gnet.base.messages import say, warn
from g2gnet.base.optional import optional_package
from g2gnet.data import ImageData
from g2gnet.programs import flags, output
from g2gnet.programs.main import run_program
from g2gnet.training import CheckpointError, SavedRun, read_run
from g2gnet.training.checkpoints import RunFiles

#: the settings that decide the test images (T: of recordings)
DECIDING = ("dataset", "use_resnet", "resnet_weights", "limit_test", "bins", "dt", "T")
EXAMPLE = """\
example:
  g2g-report checkpoints/*.pth --output report.html
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="g2g-report", description=__doc__, epilog=EXAMPLE)
    text = "the .pth files of training runs, finished or not"
    parser.add_argument("checkpoints", type=flags.file_name, nargs="+", metavar="CHECKPOINT", help=text)
    text = "the page (default: report.html)"
    parser.add_argument("--output", type=flags.file_name, default="report.html", metavar="FILE", help=text)
    flags.add_inspection_flags(parser)
    return parser


def make_report(arguments: argparse.Namespace) -> None:
    try:
        optional_package("matplotlib", "plots")
        from g2gnet.programs.report import content
    except ValueError as error:  # of matplotlib's own settings
        raise flags.FlagError(f"matplotlib cannot be imported ({error}); correct MPLBACKEND or matplotlibrc") from error
    output.check_output(arguments.output, arguments)
    machine = flags.machine_from(arguments)
    runs = _read_runs(arguments.checkpoints)
    data: dict[tuple, ImageData] = {}
    inspected = []
    for run in tqdm(runs, desc="inspecting", unit=" runs", leave=False, disable=None):
        key = tuple(getattr(run.settings, name) for name in DECIDING)
        if key not in data:
            data[key] = flags.load_run_data(arguments, run.settings, machine.device)
        net = run.network(machine.device, machine.backend)
        inspected.append(content.inspect(run, net, data[key], arguments.samples))
    output.write_output(arguments.output, content.report(inspected))
    say(f"wrote {arguments.output}")


def _read_runs(names: Sequence[str]) -> list[SavedRun]:
    """The runs that have a finished epoch, each once. Other checkpoints are left out with a warning; that of the best
    epoch without one, if the last is given, too. Raises CheckpointError if one cannot be read, or no run is left."""
    paths, runs = expanded(names), []
    for path in paths:
        files = RunFiles.of(path)
        if path == files.best and files.checkpoint in paths:
            continue
        if path == files.previous and files.checkpoint in paths:
            warn(f"{path} is left out: {files.checkpoint} is the later checkpoint of this run")
        elif (run := read_run(path)).history:
            runs.append(run)
        else:
            warn(f"{path} is left out: its run has finished no epoch")
    if not runs:
        raise CheckpointError("no run has finished an epoch; run the same command again to resume one")
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), make_report, argv, interrupted="nothing was written")
