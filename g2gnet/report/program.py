"""``python -m g2gnet.report``: from checkpoints to a page."""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from g2gnet import cli
from g2gnet.data import ImageData
from g2gnet.messages import say
from g2gnet.training import read_run

EXAMPLE = """\
example:
  python -m g2gnet.report checkpoints/*.pth --output report.html
"""


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m g2gnet.report",
        description="Writes one HTML page with the settings, results, analysis and pictures of training runs.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints",
        type=cli.file_name,
        nargs="+",
        metavar="CHECKPOINT",
        help="the .pth files of training runs, finished or not",
    )
    text = "the page (default: report.html)"
    parser.add_argument("--output", type=cli.file_name, default="report.html", metavar="FILE", help=text)
    cli.add_inspection_flags(parser)
    return parser


def make_report(arguments: argparse.Namespace) -> None:
    try:
        from g2gnet.report import content  # the only part that needs matplotlib
    except ImportError as error:
        raise cli.FlagError(f'the report needs matplotlib ({error}); pip install -e ".[plots]"') from error
    except ValueError as error:  # of its own settings
        raise cli.FlagError(
            f"matplotlib cannot be imported ({error}); correct MPLBACKEND or its matplotlibrc"
        ) from error
    cli.check_output(arguments.output, arguments)
    machine = cli.machine_from(arguments)
    runs = [read_run(path) for path in arguments.checkpoints]
    data: dict[tuple, ImageData] = {}
    inspected = []
    for run in tqdm(runs, desc="inspecting", unit=" runs", leave=False, disable=None):
        key = (run.settings.dataset, run.settings.use_resnet, run.settings.resnet_weights, run.settings.limit_test)
        if key not in data:
            data[key] = cli.load_run_data(arguments, run.settings, machine.device)
        net = run.network(machine.device, machine.backend)
        inspected.append(content.inspect(run, net, data[key], arguments.samples))
    cli.write_output(arguments.output, content.report(inspected))
    say(f"wrote {arguments.output}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_program(build_parser(), make_report, argv, interrupted="nothing was written")
