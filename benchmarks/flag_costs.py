"""What each training flag adds to the time of a training step: ``python -m benchmarks.flag_costs``.

One trainer per flag, all on the same images and the same seed, each beside one with the defaults. They take turns of a
few steps in a rotating order. A flag that changes what the network fires changes the time of event-driven kernels, too,
so the firing rates stand beside the times. Steps that update the graph (DST) are timed apart: they come once per
``--dst_interval`` steps, 1,000 by default.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from g2gnet.base.tables import markdown
from g2gnet.data import ImageData, load_dataset
from g2gnet.programs.flags import Parser, settings_from
from g2gnet.programs.train import build_parser as training_parser
from g2gnet.training import Machine, Trainer, TrainSettings

from . import cli
from .harness import turns
from .machine import describe
from .report import seconds

#: steps of a turn, the last of which updates the graph where there is DST
TURN = 10
DYNAMIC = f"--sparsity_mode dynamic --dst_interval {TURN}"
FLAGS = (
    "--lr_schedule cosine",
    "--standardize",
    "--dropout 0.2",
    "--augment flip",
    "--augment shift-flip",
    "--erase 0.5",
    "--label_smoothing 0.1",
    "--optimizer adamw",
    "--average 1000",
    f"{DYNAMIC} --cg random",
    f"{DYNAMIC} --cg random --dst_schedule cosine --dst_stop 0.75",
    f"{DYNAMIC} --cg hebb",
    f"{DYNAMIC} --cg gradient",
)


class _TurnOver(Exception):  # noqa: N818  # not an error
    """Leaves an epoch; the trainer resumes it in its next turn."""


class Contender:
    """A trainer and the seconds of its steps in each turn, by whether they updated the graph."""

    def __init__(self, flags: str, common: str, data: ImageData) -> None:
        self.flags = flags
        settings = settings_from(training_parser().parse_args(f"{common} {flags}".split()), TrainSettings)
        self.trainer = Trainer(settings, data, Machine(torch.device("cpu")))
        self.turns: list[tuple[list[float], list[float]]] = []

    def turn(self) -> None:
        """Trains for :data:`TURN` steps."""
        start = time.perf_counter()
        self.turns.append(([], []))

        def on_step(*_: Any) -> None:
            nonlocal start
            updates = self.trainer.dst is not None and self.trainer.step % TURN == 0
            self.turns[-1][updates].append(time.perf_counter() - start)
            if self.trainer.step % TURN == 0:
                raise _TurnOver
            start = time.perf_counter()

        try:
            self.trainer.train_epoch(on_step)
        except _TurnOver:
            return
        raise AssertionError("an epoch has more steps than the benchmark")

    def run(self, warm_up: int) -> dict[str, Any]:
        """The medians of all turns after the first ones, of each of them, and of the steps that updated the graph."""
        plain, updates = zip(*self.turns[warm_up:], strict=True)
        update = list(itertools.chain(*updates))
        return {
            "flags": self.flags,
            "median": statistics.median(itertools.chain(*plain)),
            "rounds": [statistics.median(of_turn) for of_turn in plain],
            "update": statistics.median(update) if update else None,
            "firing_rates": self.firing_rates(),
        }

    def firing_rates(self) -> list[float]:
        """Of the hidden layers, so far in this epoch: spikes per neuron and step, 0 to 1."""
        progress = self.trainer.progress
        assert progress is not None
        seen = self.trainer.step * self.trainer.settings.batch_size
        hidden = self.trainer.settings.hidden_dim
        return [layer.mean().item() / seen for layer in progress.firing_rates[: 2 * hidden].split(hidden)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all flags in turn, prints the table and returns the record.

    Raises:
        ValueError: for no round, or more rounds than an epoch has steps for.
    """
    data = load_dataset("fashionmnist", arguments.data_dir)
    most = len(data.train_labels) // TrainSettings().batch_size // TURN
    if arguments.rounds < 1 or arguments.warm_up < 0 or arguments.warm_up + arguments.rounds > most:
        raise ValueError(
            f"rounds={arguments.rounds} and warm_up={arguments.warm_up}: give at least 1 and 0, and together at most "
            f"{most}, since all take place in one epoch"
        )
    common = f"--model index --hidden_dim {arguments.hidden_dim} --T {arguments.T} --device cpu"
    contenders = [Contender(flags, common, data) for flags in ("", *FLAGS)]
    rounds = arguments.warm_up + arguments.rounds
    with cli.bar(rounds * len(contenders)) as bar:
        for _, _, contender in turns(contenders, rounds):
            contender.turn()
            bar.update()
    record = {
        "benchmark": "flag_costs",
        "machine": describe(torch.device("cpu")),
        "settings": common,
        "steps_before": arguments.warm_up * TURN,
        "turn": TURN,
        "runs": [contender.run(arguments.warm_up) for contender in contenders],
    }
    print(table(record))
    return record


def cost(run: dict[str, Any], default: dict[str, Any]) -> tuple[float, float]:
    """What a flag adds to a step, as a share of it: median over the rounds of the ratio of medians, and half the
    distance between the ratios' quartiles.

    The steps of one round are compared with one another, since the machine may change from round to round.
    """
    ratios = [ours / theirs for ours, theirs in zip(run["rounds"], default["rounds"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return middle - 1, (high - low) / 2


def table(record: dict[str, Any]) -> str:
    """Time of a step and of an update for each flag, and what the flag adds."""
    default = record["runs"][0]
    rows = []
    for run in record["runs"]:
        added, spread = cost(run, default)
        update = "–"
        if run["update"]:
            share = 100 * (run["update"] - default["median"]) / default["median"] / 1000
            update = f"{seconds(run['update'])} ({share:+.2f} % of 1,000 steps)"
        rows.append(
            [
                f"`{run['flags']}`" if run["flags"] else "the defaults",
                seconds(run["median"]),
                f"{100 * added:+.1f} ± {100 * spread:.1f} %" if run["flags"] else "",
                ", ".join(f"{100 * rate:.1f}" for rate in run["firing_rates"]),
                update,
            ]
        )
    header = ["", "step", "added to a step", "firing rate, %, layers 1 and 2", "step that updates the graph"]
    return markdown(header, rows)


def build_parser() -> Parser:
    quick = {"rounds": 3, "warm_up": 1, "hidden_dim": 512, "T": 10}
    parser = cli.build_parser("flag_costs", __doc__, "about nine minutes on two cores", quick)
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="directory of the data sets (default: data)")
    counts = {
        "rounds": (8, f"rounds of {TURN} timed steps"),
        "warm_up": (3, f"rounds of {TURN} steps before them"),
        "hidden_dim": (2048, "neurons in each of the two hidden layers"),
        "T": (50, "time steps per sample"),
    }
    cli.add_counts(parser, counts)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(build_parser(), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
