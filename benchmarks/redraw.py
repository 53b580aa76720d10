"""Redraws every measured table and picture of the documentation from the records: ``python -m benchmarks.redraw``.

A page marks its drawn parts with ``<!-- drawn: NAME -->`` and ``<!-- end -->``. NAME is ``step`` or another kernel of
the default network (``…, in short`` is a sentence; ``step, block_size 1`` and the like are of other networks),
``scaling-p_inter`` or another quantity, ``accuracy``, ``model_comparison`` (``…, in short``: a sentence),
``predictions`` or the name of a study (``recipe_study, validation, by seed``: its records together). A part shows every
such record in ``benchmarks/results``, whatever machine it is from, and is empty where there is none. Pictures lie in
``docs``, under the names of their records; ``docs/draw_result.py`` draws one more. Numbers are nowhere else, so a page
cannot disagree with the measurements; ``tests/benchmarks/test_benchmark_reports.py`` checks that.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from g2gnet.cli import Parser
from g2gnet.tables import markdown

from . import (
    accuracy,
    chunks,
    cpu_choices,
    dst_study,
    few_study,
    flag_costs,
    host_time,
    model_comparison,
    recipe_study,
    recurrent_structure_study,
    sequence_study,
    structure_study,
    study,
    surrogate_study,
    tradeoff_study,
)
from .cli import BUSY
from .first_run import comparison
from .registry import COMPACT, KERNELS
from .report import curve_title, of_floor, plain, seconds, title
from .workload import Workload

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("performance.md", "results.md", "first-run.md", "other-libraries.md")),
)
#: what is on the picture of a study
STUDIES_PICTURED = {
    "tradeoff_study": "Test accuracy against time and weights",
    "structure_study": "Accuracy of each graph minus that of a regular one",
    "recurrent_structure_study": "Accuracy of each recurrent graph minus that of a regular one",
}
PICTURED = ("scaling", "accuracy", "chunks", *STUDIES_PICTURED)
STUDIES = {
    module.STUDY.name: module.STUDY
    for module in (
        model_comparison,
        surrogate_study,
        recipe_study,
        dst_study,
        few_study,
        tradeoff_study,
        sequence_study,
        structure_study,
        recurrent_structure_study,
    )
}
#: a throughput record's name contains these where they differ
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Workload)}
USUAL = {name: _DEFAULTS[name] for name in ("model", "block_size")}
#: the same for recurrent networks
USUAL_RECURRENT = {**USUAL, "hidden_dim": _DEFAULTS["hidden_dim"]}

_PART = re.compile(r"(?<=<!-- drawn: )([^>]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


class Record(NamedTuple):
    """A record and its file."""

    path: Path
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """What it measures: a kernel and how its network differs from the default, or another benchmark."""
        benchmark = self.content["benchmark"]
        if benchmark == "throughput":
            workload = self.content["workload"]
            usual = USUAL_RECURRENT if workload.get("recurrent") else USUAL
            other = (f", {name} {workload[name]}" for name, value in usual.items() if workload[name] != value)
            return self.content["kernel"] + "".join(other)
        if self.content.get("tested_on", study.TEST_IMAGES) != study.TEST_IMAGES:
            return f"{benchmark}, validation"
        return f"scaling-{self.content['quantity']}" if benchmark == "scaling" else benchmark

    @property
    def picture(self) -> Path | None:
        """The path of its picture, if it has one."""
        if self.content["benchmark"] in PICTURED:
            return PICTURES / self.path.with_suffix(".png").name
        return None


def records(folder: Path = RESULTS) -> list[Record]:
    """All records, by the names of their files."""
    return [Record(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def redrawn(page: str, folder: Path, kept: Sequence[Record]) -> str:
    """The text of a page in ``folder``, with its drawn parts from the records.

    Raises:
        ValueError: for a part of an unknown name.
    """

    def part(found: re.Match[str]) -> str:
        name = found[1]
        if name in SUMMARIES:
            wanted, summary = SUMMARIES[name]
            return f"{name}{found[2]}\n{summary([each.content for each in kept if each.name == wanted])}\n\n"
        if name not in PARTS:
            raise ValueError(f"part {name!r} is unknown; choose one of {', '.join((*PARTS, *SUMMARIES))}")
        wanted, draw = PARTS[name]
        texts = [draw(record, functools.partial(_link, folder)) for record in kept if record.name == wanted]
        return name + found[2] + "".join(f"\n{text}\n\n" for text in texts)

    return _PART.sub(part, page)


def _link(folder: Path, target: Path) -> str:
    return Path(os.path.relpath(target, folder)).as_posix()


Link = Callable[[Path], str]


def _range(values: Iterable[Any]) -> str:
    """The smallest to the largest value: ``1 to 3``; ``3`` if they are equal."""
    found = sorted(values)
    return " to ".join(str(value) for value in dict.fromkeys((found[0], found[-1])))


def _machine(record: Record, link: Link) -> str:
    """Where, when and with what it was measured, and a link to the record."""
    machine = record.content["machine"]
    ends = [end for row in record.content.get("rows", ()) for end in row.get("ends", ())]
    days = _range(when["date"][:10] for when in (machine, *(end["measured"] for end in ends if "measured" in end)))
    return (
        f"{_processor(record.content)}, PyTorch {machine['versions']['torch']}, {days}; every number, the versions and "
        f"the commit are in the [record]({link(record.path)})"
    )


def _processor(content: dict[str, Any]) -> str:
    """The name of what computed, and its threads."""
    machine = content["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return machine["gpu"] or f"{machine['cpu']} with {threads} ({machine['cpu_capability']})"


def _workload(workload: dict[str, Any]) -> str:
    model = workload["model"] + (", recurrent" if workload.get("recurrent") else "")
    return (
        f"{model}, B {workload['batch_size']}, T {workload['T']}, H {workload['hidden_dim']}, p_inter "
        f"{workload['p_inter']}, units of {workload['block_size']}: {_percent(workload['density'])} of the weights; "
        f"{workload['dataset']}, after {workload['train_steps']} training steps"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _throughput(record: Record, link: Link) -> str:
    content = record.content
    rows = content["contenders"]
    timed = [row for row in rows if row["status"] == "timed"]
    counted = _counted(content)
    baseline = next(row[counted] for row in timed if row["contender"] == content["baseline"])
    flop = content["workload"]["flop"]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "": lambda row: title(row["contender"]),
        "median": lambda row: seconds(row["median"]),
        "20–80 %": lambda row: f"{seconds(row['p20'])} – {seconds(row['p80'])}",
        f"against {title(content['baseline'])}": lambda row: f"{baseline / row[counted]:.3g} ×",
        "processor time": lambda row: seconds(row["cpu_median"]) if "cpu_median" in row else "–",
        "GFLOP/s": lambda row: f"{flop / row[counted] / 1e9:.3g}",
        "of the floor": lambda row: f"{100 * of_floor(content, row):.0f} %",
        "peak memory": lambda row: f"{row['peak_bytes'] / 1e6:.0f} MB",
        "first turn": lambda row: seconds(row["first_seconds"]),
    }
    busy = _busy(content)
    left_out = {"GFLOP/s": not flop, "processor time": not busy, "of the floor": busy}
    shown = {name: cell for name, cell in columns.items() if not left_out.get(name)}
    table = markdown(list(shown), [[cell(row) for cell in shown.values()] for row in timed])
    kernel = KERNELS[content["kernel"]].about
    text = (
        f"{kernel[0].upper()}{kernel[1:]}: {_workload(content['workload'])}. {len(timed[0]['seconds'])} interleaved "
        f"repeats on {_machine(record, link)}.\n\n{table}"
    )
    text += _said_of_others(content)
    absent = [f"{title(row['contender'])} ({row['status']}: {row['reason']})" for row in rows if row not in timed]
    if absent:
        text += f"\n\nNot timed: {'; '.join(absent)}."
    return text


def _step_in_short(record: Record, link: Link) -> str:
    """Our time against that of the baseline and of the fastest other contender."""
    content = record.content
    timed = {row["contender"]: row["median"] for row in content["contenders"] if row["status"] == "timed"}
    name = next(name for name in ("g2g-triton", "g2g-cpu", "g2g-torch") if name in timed)
    ours, compact = timed[name], timed.get(f"{name}-triangle")
    flags = f"--surrogate {COMPACT['surrogate']} --alpha {COMPACT['alpha']:g}"
    with_compact = f"; **{seconds(compact)}** with `{flags}`" if compact else ""
    others = {name: median for name, median in timed.items() if not name.startswith("g2g")}
    rivals = dict.fromkeys((content["baseline"], min(others, key=lambda name: others[name])))
    beside = [
        f"- {title(name)}: {seconds(timed[name])}, **{timed[name] / ours:.3g} times** the {seconds(ours)}"
        for name in rivals
    ]
    return "\n".join(
        [
            "**Speed** of a training step:\n",
            f"- g2g: **{seconds(ours)}**{with_compact}",
            *beside,
            f"\nThe network: {_workload(content['workload'])}. Measured on {_machine(record, link)}.",
        ]
    )


def _recurrent_in_short(record: Record, link: Link) -> str:
    """Our time and memory of a recurrent step against those of the baseline, and of a feed-forward step."""
    content = record.content
    timed = {row["contender"]: row for row in content["contenders"] if row["status"] == "timed"}
    name = next(name for name in ("g2g-triton", "g2g-cpu", "g2g-torch") if name in timed)
    counted = _counted(content)
    ours, baseline, plain = timed[name], timed[content["baseline"]], timed[f"{name}-feed-forward"]
    return (
        f"On {_processor(content)}, a training step takes **{seconds(ours[counted])}** and "
        f"{ours['peak_bytes'] / 1e6:.0f} MB. {title(content['baseline'])}: "
        f"**{baseline[counted] / ours[counted]:.3g} times** as long and "
        f"{baseline['peak_bytes'] / ours['peak_bytes']:.3g} times the memory. A step of our own feed-forward network "
        f"of as many weights takes {seconds(plain[counted])}: recurrence takes {ours[counted] / plain[counted]:.2g} "
        "times as long."
    )


def _busy(content: dict[str, Any]) -> bool:
    """Whether other programs used the machine while a record was made; then processor time is what counts."""
    return content.get("limits", {}).get("others_busy_cores", 0.0) > BUSY


def _counted(content: dict[str, Any]) -> str:
    """The time of a contender that counts."""
    return "cpu_median" if _busy(content) else "median"


def _said_of_others(content: dict[str, Any]) -> str:
    """A paragraph about a busy machine; "" where it was not."""
    if not _busy(content):
        return ""
    others = f"{content['limits']['others_busy_cores']:.1f} of {content['machine']['cores']} cores"
    return f"\n\nOther programs kept {others} busy: what counts is the processor time of all threads of a contender."


def _seeds(content: dict[str, Any]) -> str:
    """How many seeds a study's rows have: ``3 seeds``, ``1 seed``, ``1 to 3 seeds``."""
    counts = _range(len(row["ends"]) for row in content["rows"])
    return f"{counts} seed" if counts == "1" else f"{counts} seeds"


def _whole(content: dict[str, Any]) -> str:
    """How long all runs of a study took, each on one core: ``24 runs, 3.1 hours of processor time``."""
    ends = [end for row in content["rows"] for end in row["ends"]]
    measured = all("train_cpu_seconds" in end for end in ends)  # not in older records
    quantity, what = ("train_cpu_seconds", "processor time") if measured else ("train_seconds", "training")
    return f"{len(ends)} runs, {sum(end[quantity] for end in ends) / 3600:.1f} hours of {what}"


def _models_in_short(record: Record, link: Link) -> str:
    """The accuracies of the four default models."""
    content = record.content
    means = [
        f"{row['row']} {study.spread(row['ends'], study.accuracy)} %"
        for row in content["rows"]
        if row["flags"] == f"--model {row['row']}"
    ]
    return (
        f"**Accuracy** on {content['tested_on']}, mean ± standard error over {_seeds(content)}: "
        f"{', '.join(means)}. The flags: `{content['settings']} --epochs {content['epochs']}`. Measured on "
        f"{_machine(record, link)}."
    )


def _command(content: dict[str, Any], row: dict[str, Any]) -> str:
    """The command of a study's row, in lines that a page has room for."""
    command = f"python train.py {content['settings']} {row['flags']}"
    if "--epochs" not in row["flags"]:
        command += f" --epochs {content['epochs']}"
    whole_flags = re.sub(" (?!--)", "\0", command)
    lines = textwrap.wrap(whole_flags, 84, break_on_hyphens=False, break_long_words=False)
    return "```sh\n" + " \\\n  ".join(lines).replace("\0", " ") + "\n```"


def _recipe_in_short(record: Record, link: Link) -> str:
    """What the rows that were chosen on held-back images reach, and their commands."""
    content = record.content
    return "\n\n\n".join(
        f"**A recipe.** This command reaches {study.spread(row['ends'], study.accuracy)} % on {content['tested_on']} "
        f"with {study.mean(row, 'weights'):,.0f} weights (mean ± standard error over {len(row['ends'])} seeds, after "
        f"the last epoch). Measured on {_machine(record, link)}.\n\n{_command(content, row)}"
        for row in content["rows"]
        if row["row"] in recipe_study.CHOSEN
    )


def _few_in_short(record: Record, link: Link) -> str:
    """The networks of few weights, and the command of one."""
    content = record.content
    commands = [
        f"This command trains *{row['row']}*:\n\n{_command(content, row)}"
        for row in content["rows"]
        if row["row"] == few_study.EXAMPLE
    ]
    return "\n\n".join(
        [
            "**Few weights**: one or two hundredths of those of a dense network with H 2048. Names are explained in "
            f"the [study](docs/results.md#few-weights). {_seeds(content)}. Measured on {_machine(record, link)}.",
            markdown(
                ["at most", "weights", "test accuracy, %", "processor seconds"],
                [
                    [
                        row["row"],
                        f"{study.mean(row, 'weights'):,.0f}",
                        study.spread(row["ends"], study.accuracy),
                        f"{study.mean(row, 'train_cpu_seconds'):.0f}",
                    ]
                    for row in content["rows"]
                ],
            ),
            *commands,
        ]
    )


def _tradeoff_in_short(record: Record, link: Link) -> str:
    """The best dense and the best sparse network with each budget of weights."""
    content = record.content
    quantity, unit, budgets = tradeoff_study.BUDGETS[0]

    def cell(row: dict[str, Any] | None) -> str:
        time = f"; {study.mean(row, 'train_cpu_seconds'):.0f} s" if row else ""
        return tradeoff_study.summary(row) + time

    rows = [
        [
            f"{budget:,} {unit}",
            *(cell(tradeoff_study.best(content, kind, quantity, budget)) for kind in tradeoff_study.KINDS),
        ]
        for budget in budgets
    ]
    return (
        f"**Accuracy for weights**, with a plainer recipe: the best network within a budget, accuracy in %, neurons "
        f"of a hidden layer and processor time of {content['epochs']} epochs, {_seeds(content)}. The flags: "
        f"`{content['settings']}`, and those of the [study](docs/results.md#for-so-much-time-for-so-many-weights). "
        f"Measured on {_machine(record, link)}.\n\n{markdown(['at most', *tradeoff_study.KINDS], rows)}"
    )


def _scaling(record: Record, link: Link) -> str:
    content = record.content
    places = content["workloads"]
    rows = []
    for one in content["contenders"]:
        medians = [point.get("median") for point in one["points"]]
        fitted = ["–", "–"]
        if one["line"]:
            largest = max(median for median in medians if median)
            fitted = [f"{100 * one['line']['intercept'] / largest:.0f} %", f"{one['line']['r_squared']:.3f}"]
        name = curve_title(one["contender"], content["quantity"])
        rows.append([name, *(seconds(m) if m else "–" for m in medians), *fitted])
    first = places[0]
    fixed = [
        f"{words} {first[field]}"
        for words, field, quantity in (
            ("B", "batch_size", "B"),
            ("T", "T", "T"),
            ("H", "hidden_dim", "H"),
            ("p_inter", "p_inter", "p_inter"),
            ("units of", "block_size", "block_size"),
        )
        if quantity != content["quantity"] and not (content["quantity"] == "wide" and quantity in ("H", "p_inter"))
    ]
    if content["quantity"] == "alpha":
        alphas = ", ".join(f"{place['alpha']:g}" for place in places)
        fixed.append(f"hidden {first['surrogate']} of α = {alphas}")
    assert record.picture is not None
    what = "A training step" if content["kernel"] == "step" else "A forward pass"
    header = [content["x_is"], *(plain(place["x"]) for place in places), "begins at", "R²"]
    return (
        f"![{what} against {content['x_is']}]({link(record.picture)})\n\n"
        f"{what} of {first['model']}, {', '.join(fixed)}, on {_machine(record, link)}.\n\n"
        f"{markdown(header, rows)}{_beside_dense(content)}"
    )


def _beside_dense(content: dict[str, Any]) -> str:
    """The memory of each contender, above that of a dense network, if the record has this."""
    places = content["workloads"]
    if "dense_bytes" not in places[0]:
        return ""
    rows = [
        [one["contender"], *(f"{point['peak_bytes'] / 1e9:.2f}" for point in one["points"])]
        for one in content["contenders"]
    ]
    rows.append(
        [
            "dense weights, gradients and Adam's moments (computed)",
            *(f"{each['dense_bytes'] / 1e9:.2f}" for each in places),
        ]
    )
    return f"\n\n{markdown(['memory of a step, GB', *(plain(place['x']) for place in places)], rows)}"


def _accuracy(record: Record, link: Link) -> str:
    content = record.content
    settings = content["settings"]
    last = content["runs"][0]["epochs"][-1]["epoch"]
    rows = [
        [
            run["title"],
            str(run["seed"]),
            seconds(run["epochs"][-1]["wall_seconds"] / last),
            _percent(run["epochs"][-1]["test_acc"]),
        ]
        for run in content["runs"]
    ]
    dynamic = " ".join(f"--{name} {settings[name]}" for name in accuracy.DYNAMIC)
    assert record.picture is not None
    return (
        f"![Test accuracy against training time]({link(record.picture)})\n\n"
        f"{settings['dataset']}, {settings['limit_train'] or content['images']['train']:,} training images, T "
        f"{settings['T']}, H {settings['hidden_dim']}, batches of {settings['batch_size']}; dynamic: `{dynamic}`. "
        f"On {_machine(record, link)}.\n\n"
        f"{markdown(['', 'seed', 'time per epoch', f'test accuracy after {last} epochs'], rows)}"
    )


def _study(record: Record, link: Link) -> str:
    content = record.content
    shown = STUDIES_PICTURED.get(content["benchmark"])
    picture = f"![{shown}]({link(record.picture)})\n\n" if record.picture else ""
    return (
        f"{picture}`{content['settings']} --epochs {content['epochs']}`, {_seeds(content)}: mean ± standard "
        f"error of the mean after the last epoch, on {content['tested_on']}. {_whole(content)}, on "
        f"{_machine(record, link)}.\n\n"
        f"{STUDIES[content['benchmark']].table(content)}"
    )


def _flag_costs(record: Record, link: Link) -> str:
    content = record.content
    rounds = len(content["rows"][0]["seconds"]) // content["turn"]
    return (
        f"`--dataset fashionmnist {content['settings']}` and the flags of each row; {rounds} rounds of "
        f"{content['turn']} steps in turn, after {content['steps_before']} steps. Median of a step; median over the "
        f"rounds of what the flag adds, ± half the distance between the quartiles. On {_machine(record, link)}.\n\n"
        f"{flag_costs.table(content)}"
    )


def _host_time(record: Record, link: Link) -> str:
    content = record.content
    return (
        f"CPU time of one thread, in {content['turns'] * content['turn']:,} steps. On {_machine(record, link)}.\n\n"
        f"{markdown(*host_time.table(content))}"
    )


def _cpu_choices(record: Record, link: Link) -> str:
    content = record.content
    return (
        f"Processor time of one pass of layers of {content['size']} neurons on {_machine(record, link)}.\n\n"
        f"{cpu_choices.table(content)}"
    )


def _chunks(record: Record, link: Link) -> str:
    size = record.content["sizes"]
    layers = " → ".join(f"{size[name]:,}" for name in ("input_dim", "hidden_dim", "hidden_dim", "num_classes"))
    assert record.picture is not None
    return (
        f"![Memory and time against T]({link(record.picture)})\n\n"
        f"A training step of index, B {size['batch_size']}, {layers}, varying inputs, on {_machine(record, link)}.\n\n"
        f"{chunks.table(record.content)}{_said_of_others(record.content)}"
    )


def _chunks_in_short(record: Record, link: Link) -> str:
    points = {(point["T"], point["chunk"]): point for point in record.content["points"]}
    chunk = chunks.usual_chunk(record.content)
    whole, part = points[chunks.USUAL, None], points[chunks.USUAL, chunk]
    size = record.content["sizes"]
    ratio, what = ("cpu_times", "processor time") if _busy(record.content) else ("times", "time")
    return (
        f"At T = {chunks.USUAL:,} (B {size['batch_size']}, {size['input_dim']} → {size['hidden_dim']:,} → "
        f"{size['hidden_dim']:,} → {size['num_classes']}) a training step in chunks of {chunk} takes "
        f"{part['peak_bytes'] / 1e6:.0f} MB above the process instead of {whole['peak_bytes'] / 1e6:.0f}, and "
        f"{part[ratio]:.2f} times the {what} (`python -m benchmarks.chunks`, on {_machine(record, link)})."
    )


def _predictions(record: Record, link: Link) -> str:
    content = record.content
    nexts = markdown(
        ["what decides", "what to try next"], [[f"`{name}`", text] for name, text in content["next"].items()]
    )
    assumed = markdown(["assumed", ""], [[name, f"{value:g}"] for name, value in content["assumed"].items()])
    return (
        f"Written down on {content['written']} for an H100; those for H200 and A100 "
        f"are in the [record]({link(record.path)}).\n\n{comparison(content, {}, 'h100', tiny=False)}\n\n"
        f"{nexts}\n\n{assumed}"
    )


#: the parts that a page may contain: the record's name, and the function that draws it
PARTS: dict[str, tuple[str, Callable[[Record, Link], str]]] = {
    **{name: (name, _throughput) for name in KERNELS},
    "step, in short": ("step", _step_in_short),
    **{f"step, {other}": (f"step, {other}", _throughput) for other in ("block_size 32", "block_size 1", "model dense")},
    "recurrent, hidden_dim 512": ("recurrent, hidden_dim 512", _throughput),
    "recurrent, in short": ("recurrent", _recurrent_in_short),
    **{
        f"scaling-{name}": (f"scaling-{name}", _scaling)
        for name in ("p_inter", "block_size", "groups", "T", "B", "H", "wide", "alpha")
    },
    "accuracy": ("accuracy", _accuracy),
    "chunks": ("chunks", _chunks),
    "chunks, in short": ("chunks", _chunks_in_short),
    "flag_costs": ("flag_costs", _flag_costs),
    "host_time": ("host_time", _host_time),
    "cpu_choices": ("cpu_choices", _cpu_choices),
    "model_comparison, in short": ("model_comparison", _models_in_short),
    "recipe_study, in short": ("recipe_study", _recipe_in_short),
    "few_study, in short": ("few_study", _few_in_short),
    "tradeoff_study, in short": ("tradeoff_study", _tradeoff_in_short),
    **{name: (name, _study) for name in STUDIES},
    **{f"{name}, validation": (f"{name}, validation", _study) for name in ("recipe_study", "few_study")},
    "predictions": ("predictions", _predictions),
}

#: those that show all records of a name together
SUMMARIES: dict[str, tuple[str, Callable[[Sequence[dict[str, Any]]], str]]] = {
    "recipe_study, validation, by seed": ("recipe_study, validation", recipe_study.gains_by_seed),
    "recipe_study, validation, second recipe": ("recipe_study, validation", recipe_study.second_by_seed),
}


def main(argv: Sequence[str] | None = None) -> int:
    Parser(prog="python -m benchmarks.redraw", description=__doc__.split("\n")[0]).parse_args(argv)
    from . import plots  # needs matplotlib

    kept = records()
    for record in kept:
        if record.picture:
            plots.draw(record.content, record.picture)
            print(f"{record.picture.relative_to(ROOT)}: {record.name}")
    for page in PAGES:
        page.write_text(redrawn(page.read_text(encoding="utf-8"), page.parent, kept), encoding="utf-8")
        print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
