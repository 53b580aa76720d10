"""Trains every combination of several values of settings, each with several seeds, in parallel; prints mean and
standard error. Finished runs are skipped and stopped ones resume.
"""

import argparse
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2gnet.base.files import make_directory
from g2gnet.base.messages import OutputError, quoted, reason, say
from g2gnet.base.version import __version__
from g2gnet.network_settings import SettingsError
from g2gnet.programs import flags, output
from g2gnet.programs.main import run_program
from g2gnet.programs.sweep.engine import run
from g2gnet.programs.sweep.grid import LOG, read_grid, runs_of
from g2gnet.training import TrainingError, TrainSettings
from g2gnet.training.checkpoints import csv_of, numbers
from g2gnet.training.interruption import raised

EXAMPLES = """\
examples:
  g2g-sweep --dataset fashionmnist-mini --model mixer --epochs 5 --p_inter 0.05 0.15 0.3 --seed 1 2 3
  g2g-sweep --grid density.toml --epochs 20
"""
RESUME = "run the same command again to resume with the remaining runs"


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="g2g-sweep", description=__doc__, epilog=EXAMPLES)
    group = parser.add_argument_group("the grid: each setting of g2g-train with one value or several, spaces between")
    text = "TOML or JSON file of settings, each with a value or a list of values; flags override them"
    group.add_argument("--grid", type=flags.file_name, metavar="FILE", help=text)
    flags.add_settings_flags(parser, sweep=True)
    group = flags.add_machine_flags(parser, results=False)
    text = "folder of the runs and the results (default: sweep)"
    group.add_argument("--folder", type=flags.file_name, default="sweep", metavar="DIR", help=text)
    text = "runs at a time (default: one per core on a CPU, one on another device)"
    group.add_argument("--jobs", type=int, metavar="N", help=text)
    text = "train nothing; show the finished runs"
    group.add_argument("--finished", action="store_true", help=text)
    flags.add_json_flag(group, "the results of all runs, and their means and errors")
    parser.add_argument("--version", action="version", version=f"g2g {__version__}")
    return parser


def grid_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The grid of the file and the flags. Raises SettingsError if the file is unreadable, or there is no setting."""
    grid = read_grid(arguments.grid) if arguments.grid else {}
    given = {name: getattr(arguments, name) for name in TrainSettings().flag_values()}
    grid |= {name: values or [True] for name, values in given.items() if isinstance(values, list)}
    if not grid:
        raise SettingsError("a sweep needs a setting; give one several values, as in `seed=1 2 3`, or a file as `grid`")
    return grid


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    grid, folder = grid_from(arguments), Path(arguments.folder)
    runs = runs_of(grid, folder)
    files = {ending: folder / f"sweep.{ending}" for ending in ("csv", "json", "png")}
    own_files = [file for each in runs for file in (*each.files.files(), each.folder / LOG)]
    output.check_json(arguments, [files["csv"], files["png"], *own_files])
    if not arguments.finished:
        try:
            make_directory(folder)
        except OSError as error:
            raise OutputError(f"cannot write {folder} ({reason(error)}); give another --folder") from error
    for file in files.values():
        output.check_output(file)
    shape = " × ".join(f"{len({each.differs[name] for each in runs})} {name}" for name in runs[0].differs)
    done = sum(os.path.exists(each.files.marker) for each in runs)
    say(f"g2g {__version__} | {len(runs)} runs{f': {shape}' if shape else ''} | {done} finished | {folder}")
    machine = {name: getattr(arguments, name) for name in ("jobs", "data_dir", "device", "backend", "finished")}
    with raised(signal.SIGTERM, f"interrupted by SIGTERM; {RESUME}"):
        made = run(grid, folder, **machine)
    rows = [{**each.differs, **dict(numbers(end))} for each, end in made.ends]
    say(build_parser().in_flags(made.table()))
    output.write_output(files["csv"], csv_of(rows))
    output.write_output(files["json"], json.dumps({"g2g": __version__, **made.as_dict()}, indent=2) + "\n")
    output.write_file(files["png"], lambda file: made.picture().savefig(file, format="png", dpi=150))
    say(f"wrote {', '.join(map(str, files.values()))}")
    ended, data_dir = [each for each, _ in made.ends], arguments.data_dir
    of_data = {flags.run_data_flags(each.settings, data_dir, each.given.get("resnet_weights")) for each in ended}
    if len(of_data) == 1:
        ending = "*.pth" if any(each.settings.validation is None for each in ended) else "*.best.pth"
        say(f"with pictures: g2g-report {quoted(folder)}/*/{ending}{of_data.pop()}")
    if made.failed:
        failed = "\n".join(f"{label}: {error}" for label, error in made.failed.items())
        raise TrainingError(f"{len(made.failed)} of {len(runs)} runs failed:\n{failed}")
    return made.as_dict()


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), sweep, argv, RESUME)
