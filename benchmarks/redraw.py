"""Redraws the measured tables and pictures of the documentation from the records: ``python -m benchmarks.redraw``.

A page marks its drawn parts with ``<!-- drawn: NAME -->`` and ``<!-- end -->``. NAME is one of ``PARTS``: that of a
record, whose table it shows, or that of a shorter table, perhaps of several records. Of several records of one name the
newest is shown; a part is empty where there is none. Numbers are nowhere else, so a page cannot disagree with the
measurements; ``tests/benchmarks/test_benchmark_reports.py`` checks that. ``python -m benchmarks.redraw FILE`` prints
the whole table of any record. Pictures lie in ``docs``; ``docs/draw_result.py`` draws one more. It takes seconds.
"""

import functools
import json
import os
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from g2gnet.base.tables import markdown
from g2gnet.programs.flags import Parser

from . import brain, chunks, cpu_choices, delays, host_time, records, report, study_tables
from .first_run import RECORD as PREDICTIONS
from .first_run import comparison
from .records import RESULTS
from .registry import KERNELS
from .report import network, percent, plain, seconds, title
from .studies import BEST, CHOSEN_FEW, EXAMPLE, RELU, SEQUENCES, STUDIES
from .study_tables import TEST_IMAGES, rows_of
from .throughput import QUANTITIES
from .workload import Workload

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs"
DOCS = ("index", "performance", "results", "first-run", "populations", "connectome")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
#: the record whose picture is on a page
PICTURED = "scaling-p_inter"
#: a throughput record's name contains these where they differ
_DEFAULTS = Workload().as_dict()
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
        content = self.content
        benchmark = content["benchmark"]
        if benchmark == "throughput":
            if content["quantity"]:
                return f"scaling-{content['quantity']}"
            workload = content["workloads"][0]
            usual = USUAL_RECURRENT if workload.get("recurrent") else USUAL
            other = (f", {name} {workload[name]}" for name, value in usual.items() if workload[name] != value)
            return content["kernel"] + "".join(other)
        if benchmark not in STUDIES:
            return benchmark
        name = f"{benchmark}_study"
        if content["tested_on"] != TEST_IMAGES:
            return f"{name}, validation"
        if benchmark == "structure":
            return f"{name}, {content['epochs']} epochs"
        return f"{name}, {content['runs'][0]['row'].partition(',')[0]}" if benchmark == "sequence" else name

    @property
    def picture(self) -> Path | None:
        """The path of its picture, if a page shows it."""
        return PICTURES / self.path.with_suffix(".png").name if self.name == PICTURED else None


def read(path: Path) -> Record:
    """The record in a file."""
    return Record(path, json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else records.read(path))


def all_records() -> list[Record]:
    """All records, by the names of their files."""
    return [read(path) for path in sorted([*RESULTS.glob("*.jsonl"), PREDICTIONS])]


def redrawn(page: str, folder: Path, kept: Sequence[Record]) -> str:
    """The text of a page in ``folder``, with its drawn parts from the records.

    Raises:
        ValueError: for a part of an unknown name.
    """
    by_name: ByName = {}
    for record in sorted(kept, key=lambda record: str(record.content["machine"]["date"])):
        by_name.setdefault(record.name, []).append(record)

    def part(found: re.Match[str]) -> str:
        name = found[1]
        if name not in PARTS:
            raise ValueError(f"part {name!r} is unknown; choose one of {', '.join(PARTS)}")
        text = PARTS[name](by_name, functools.partial(_link, folder))
        return f"{name}{found[2]}\n{text}\n\n" if text else f"{name}{found[2]}"

    return _PART.sub(part, page)


def _link(folder: Path, target: Path) -> str:
    return Path(os.path.relpath(target, folder)).as_posix()


Link = Callable[[Path], str]
#: the records of each name, the newest last
ByName = dict[str, list[Record]]
#: what draws a part
Part = Callable[[ByName, Link], str]


def _range(values: Iterable[Any]) -> str:
    """The smallest to the largest value: ``1 to 3``; ``3`` if they are equal."""
    found = sorted(values)
    return " to ".join(str(value) for value in dict.fromkeys((found[0], found[-1])))


def _machine(record: Record, link: Link) -> str:
    """Where, when and with what it was measured, and a link to the record."""
    machine = record.content["machine"]
    measured = (run["measured"] for run in record.content["runs"] if "measured" in run)
    days = _range(when["date"][:10] for when in (machine, *measured))
    return f"{_processor(machine)}, PyTorch {machine['versions']['torch']}, {days} ([record]({link(record.path)}))"


def _processor(machine: dict[str, Any]) -> str:
    """The name of what computed, and its threads."""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return machine["gpu"] or f"{machine['cpu']} with {threads}"


def _throughput(record: Record, link: Link) -> str:
    content = record.content
    if content["quantity"]:
        return _scaling(record, link)
    repeats = next(run["repeats"] for run in content["runs"] if run["status"] == "timed")
    busy = report.counted(content) == "cpu_median"  # then processor time is what counts
    last = ("processor time", "times as fast") if busy else ("times as fast", "of the floor")
    table = markdown(*report.times(content, ("median", "20–80 %", *last, "peak memory"), title))
    text = (
        f"{_about(content)}: {network(content['workloads'][0])}. {repeats} interleaved repeats, "
        f"{_machine(record, link)}. *Times as fast*: as {title(content['baseline'])}.\n\n"
        f"{table}{_said_of_others(content)}"
    )
    absent = [
        f"{title(run['contender'])} ({run['reason']})"
        for run in content["runs"]
        if run["status"] not in ("timed", "skipped")
    ]
    return f"{text}\n\nWithout a time: {'; '.join(absent)}." if absent else text


def _about(content: dict[str, Any]) -> str:
    about = KERNELS[content["kernel"]].about
    return f"{about[0].upper()}{about[1:]}"


def _ours(content: dict[str, Any]) -> dict[str, Any]:
    """Our row of a throughput record."""
    timed = {run["contender"]: run for run in content["runs"] if run["status"] == "timed"}
    return next(timed[name] for name in ("g2g-triton", "g2g-cpu", "g2g-torch") if name in timed)


def _peers(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The baseline's row, and that of the fastest contender that is not ours."""
    others = [run for run in content["runs"] if run["status"] == "timed" and "g2g" not in run["contender"]]
    baseline = next(run for run in others if run["contender"] == content["baseline"])
    return baseline, min(others, key=lambda run: float(run[report.counted(content)]))


def _step_in_a_line(record: Record, link: Link) -> str:
    """Our time of a training step against that of the baseline and of the fastest other contender."""
    content = record.content
    masked, fastest = _peers(content)
    page = link(PICTURES / "performance.md")
    return (
        f"A training step with {content['workloads'][0]['hidden_dim']:,} neurons per layer takes "
        f"**{seconds(_ours(content)['median'])}**; {_MASKED} takes {seconds(masked['median'])}, {_fastest(fastest)} "
        f"{seconds(fastest['median'])} ({_processor(content['machine'])}; [how it was measured]({page}))."
    )


_MASKED = "a loop over time with masked weights (snnTorch)"


def _fastest(run: dict[str, Any]) -> str:
    """What the fastest contender is that is not ours."""
    return f"the fastest dense form {'in JAX' if run['contender'].startswith('jax') else 'in PyTorch'}"


def _readme(of_step: Record, of_wide: Record, of_brain: Record, of_recipe: Record, of_few: Record, link: Link) -> str:
    """What a user gets, a line each, and where it comes from."""
    step, wide, recipe, few = (record.content for record in (of_step, of_wide, of_recipe, of_few))
    of_contender = {run["name"]: run for run in of_brain.content["runs"]}
    whole, by_hand = of_contender["g2g-cpu"], of_contender["csr-by-hand"]
    ours, (masked, fastest) = _ours(step), _peers(step)
    largest, point = wide["workloads"][-1], wide["runs"][-1]
    trained = {row.name: row for row in (*rows_of(recipe), *rows_of(few))}

    def reached(name: str) -> str:
        return f"{study_tables.spread(trained[name].runs, study_tables.accuracy)} %"

    best, (dense, sparse) = trained[BEST], CHOSEN_FEW[:2]
    rows = [
        ["A training step", f"**{seconds(ours['median'])}**",
         f"{seconds(masked['median'])}: {_MASKED}; {seconds(fastest['median'])}: {_fastest(fastest)}",
         "performance.md#a-training-step"],
        ["Its memory", f"**{ours['peak_bytes'] / 1e6:.0f} MB**",
         f"{masked['peak_bytes'] / 1e6:,.0f} MB; {fastest['peak_bytes'] / 1e6:.0f} MB",
         "performance.md#a-training-step"],
        [f"A step of {largest['hidden_dim']:,} neurons per layer",
         f"**{seconds(point['median'])}, {point['peak_bytes'] / 1e9:.1f} GB**",
         f"{largest['dense_bytes'] / 1e9:.0f} GB (computed): weights, gradients and Adam's moments of a dense network",
         "performance.md#how-it-grows"],
        [f"A step of a fly's brain: {of_brain.content['settings']['neurons']:,} neurons, "
         f"{whole['weights'] / 1e6:.1f} million synapses",
         f"**{seconds(statistics.median(whole['seconds']))}, {whole['peak'] / 1e9:.1f} GB**",
         f"{seconds(statistics.median(by_hand['seconds']))}, {by_hand['peak'] / 1e9:.1f} GB: PyTorch's CSR products, "
         "with a backward pass written by hand",
         "connectome.md#size"],
        [f"Accuracy, {best.mean('weights') / 1e6:.1f} million weights", f"**{reached(BEST)}**",
         f"{reached(f'{BEST}, {RELU}')}: the same network with ReLU instead of spikes",
         "results.md#the-recipe"],
        ["Accuracy, 58,000 weights", f"**{reached(sparse)}**",
         f"{reached(dense)}: a dense spiking network of as many weights",
         "results.md#few-weights"],
    ]  # fmt: skip
    cells = [[*row, f"[command]({link(PICTURES / page)})"] for *row, page in rows]
    usual = step["workloads"][0]
    return (
        f"{markdown(['', 'g2g', 'compared with', ''], cells)}\n\nTraining steps have batches of "
        f"{usual['batch_size']} samples, {usual['T']} time steps and two hidden layers of "
        f"{usual['hidden_dim']:,} neurons with {percent(usual['density'])} of the weights (third row: "
        f"{largest['T']} time steps, groups of 256 neurons; fourth: 100 time steps, 8 samples). They were measured on "
        f"{_processor(step['machine'])}. Accuracies are those on the test images of Fashion-MNIST, after "
        f"{best.runs[0]['epoch']} epochs (58,000 weights: {few['epochs']}), mean ± standard error over 3 seeds."
    )


def _in_one_table(*names: str) -> Part:
    """A line for each throughput record of these names: ours, the baseline and the fastest peer."""

    def part(records: ByName, link: Link) -> str:
        rows = []
        for record in (records[name][-1] for name in names if name in records):
            content = record.content
            counted, ours, (baseline, fastest) = report.counted(content), _ours(content), _peers(content)
            whole = content["kernel"] in ("step", "recurrent")
            rows.append([
                network(content["workloads"][0]) if whole else _about(content),
                seconds(ours[counted]),
                f"{seconds(baseline[counted])}: {title(baseline['contender'])}",
                f"{baseline[counted] / ours[counted]:.3g}",
                "–" if fastest is baseline else f"{seconds(fastest[counted])}: {title(fastest['contender'])}",
                f"{ours['peak_bytes'] / 1e6:.0f}, {baseline['peak_bytes'] / 1e6:.0f}",
                f"[{content['machine']['date'][:10]}]({link(record.path)})",
            ])  # fmt: skip
        header = ["", "g2g", "compared with", "times as fast", "a faster peer", "MB of both", "record"]
        return markdown(header, rows) if rows else ""

    return part


def _said_of_others(content: dict[str, Any]) -> str:
    """A paragraph about a busy machine; "" where it was not."""
    if report.counted(content) != "cpu_median":
        return ""
    others = f"{content['limits']['others_busy_cores']:.1f} of {content['machine']['cores']} cores"
    return f"\n\nOther programs kept {others} busy: what counts is the processor time of all threads of a contender."


def _seeds(content: dict[str, Any]) -> str:
    """How many seeds a study's rows have: ``3 seeds``, ``1 seed``, ``1 to 3 seeds``."""
    counts = _range(len(row.runs) for row in rows_of(content))
    return f"{counts} seed" if counts == "1" else f"{counts} seeds"


def _whole(content: dict[str, Any]) -> str:
    """How long all runs of a study took, each on one core: ``24 runs, 3.1 hours of processor time``."""
    runs = content["runs"]
    measured = all("train_cpu_seconds" in run for run in runs)  # not in older records
    quantity, what = ("train_cpu_seconds", "processor time") if measured else ("train_seconds", "training")
    return f"{len(runs)} runs, {sum(run[quantity] for run in runs) / 3600:.1f} hours of {what}"


def _command(record: Record, link: Link, name: str) -> str:
    """The command of a study's row, in lines that a page has room for."""
    content = record.content
    flags = content["rows"][name]
    command = f"python train.py {content['settings']} {flags}"
    if "--epochs" not in flags:
        command += f" --epochs {content['epochs']}"
    whole_flags = re.sub(" (?!--)", "\0", command)
    lines = textwrap.wrap(whole_flags, 84, break_on_hyphens=False, break_long_words=False)
    return "```sh\n" + " \\\n  ".join(lines).replace("\0", " ") + "\n```"


def _by_seed(records: ByName, link: Link) -> str:
    """What each part of the recipe gains on held-back images, from all records."""
    found = records.get("recipe_study, validation", [])
    links = ", ".join(f"[{number}]({link(record.path)})" for number, record in enumerate(found, 1))
    table = _in_words(study_tables.gains_by_seed([record.content for record in found]))
    return f"{table}\n\nRecords: {links}." if found else ""


def _sequences(records: ByName, link: Link) -> str:
    """The accuracy of each network on each kind of sequence."""
    found = {kind: records[name][-1] for kind in SEQUENCES if (name := f"sequence_study, {kind}") in records}
    if not found:
        return ""
    links = ", ".join(f"[{kind}]({link(record.path)})" for kind, record in found.items())
    contents = {kind: record.content for kind, record in found.items()}
    seeds = _seeds(next(iter(contents.values())))
    return f"Test accuracy, %, {seeds}; records: {links}.\n\n{study_tables.sequences(contents)}"


def _growths(records: ByName, link: Link) -> str:
    """Each quantity from its least to its most: our time, that of the masked loop, and of the fastest dense form."""
    found = [records[name][-1] for each in GROWING if (name := f"scaling-{each}") in records]
    rows = []
    for record in found:
        content = record.content
        timed = ([run for run in of if run["status"] == "timed"] for _, of in report.curves(content))
        ends = [f"{seconds(of[0]['median'])} → {seconds(of[-1]['median'])}" for of in timed]
        places = [plain(content["workloads"][end]["x"]) for end in (0, -1)]
        rows.append([f"[{content['x_is']}]({link(record.path)})", " → ".join(places), *ends])
    titles = [title(name) for name, _ in report.curves(found[-1].content)] if found else []
    return markdown(["", "from → to", *titles], rows) if found else ""


GROWING = ("T", "B", "H", "groups", "block_size")


def _scaling(record: Record, link: Link) -> str:
    content = record.content
    first = content["workloads"][0]
    grows = QUANTITIES[content["quantity"]].field
    what = "A training step" if content["kernel"] == "step" else "A forward pass"
    picture = f"![{what} against {content['x_is']}]({link(record.picture)})\n\n" if record.picture else ""
    tables = [report.growth(content, title), *([report.memory(content)] if "dense_bytes" in first else [])]
    about = f"{picture}{what}: {network(first, ('density', grows))}. {_machine(record, link)}."
    return "\n\n".join([about, *(markdown(*table) for table in tables)])


#: what the names of rows say in short, and in words
WORDS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"\bH (\d+)": lambda found: f"{int(found[1]):,} neurons",
    r"\b(dense|index|mixer), (\d+)": lambda found: f"{found[1]}, {int(found[2]):,} neurons",
    r"\bB (\d+)": r"batch \1",
    r"\bT (\d+)": r"\1 steps",
    r"\bunits of 1\b": "single weights",
    r"\bunits of (\d+)": r"\1 × \1 blocks",
    r"\bgradual\b": "gradual pruning",
    r"\bsmoothed\b": "label smoothing",
    r"\bshifted\b( and mirrored)?": r"shifted\1 images",
}


def _in_words(table: str) -> str:
    for short, words in WORDS.items():
        table = re.sub(short, words, table)
    return table


def _study(
    record: Record,
    link: Link,
    table: Callable[[dict[str, Any]], str] = study_tables.table,
    shown: slice = slice(None),
) -> str:
    """A study and a table of it, or some paragraphs of that."""
    paragraphs = _in_words(table(record.content)).split("\n\n")
    return "\n\n".join((_of_study(record, link), *paragraphs[shown]))


def _of_study(record: Record, link: Link) -> str:
    content = record.content
    return (
        f"`{content['settings']} --epochs {content['epochs']}`, {_seeds(content)}, on "
        f"{content['tested_on']}. {_whole(content)}, {_machine(record, link)}."
    )


def _other(record: Record, link: Link) -> str:
    """The table of a record of another benchmark, and the machine."""
    return f"{_machine(record, link)}\n\n{OTHERS[record.content['benchmark']].table(record.content)}"


def _chunks(record: Record, link: Link) -> str:
    size = record.content["sizes"]
    layers = " → ".join(f"{size[name]:,}" for name in ("input_dim", "hidden_dim", "hidden_dim", "num_classes"))
    return (
        f"A training step: index, batch {size['batch_size']}, {layers} neurons, varying inputs. "
        f"{_machine(record, link)}.\n\n"
        f"{chunks.table(record.content)}{_said_of_others(record.content)}"
    )


def _predictions(record: Record, link: Link) -> str:
    content = record.content
    nexts = markdown(
        ["what decides", "what to try next"], [[f"`{name}`", text] for name, text in content["next"].items()]
    )
    assumed = markdown(["assumed", ""], [[name, f"{value:g}"] for name, value in content["assumed"].items()])
    return (
        f"Written down on {content['written']} for an H100; those for H200 and A100 "
        f"are in the [record]({link(record.path)}).\n\n{_in_words(comparison(content, {}, 'h100', tiny=False))}\n\n"
        f"{nexts}\n\n{assumed}"
    )


#: benchmarks whose tables need no words
OTHERS = {each.PROGRAM.name: each.PROGRAM for each in (brain, delays, host_time, cpu_choices)}
OTHERS |= {"brain_growth": brain.PROGRAM}
#: the whole table of a record, by its benchmark
WHOLE: dict[str, Callable[[Record, Link], str]] = {
    "throughput": _throughput,
    "chunks": _chunks,
    **dict.fromkeys(OTHERS, _other),
    "predictions": _predictions,
    **dict.fromkeys(STUDIES, _study),
}


def _newest(draw: Callable[..., str], *names: str, **how: Any) -> Part:
    """What ``draw`` makes of the newest record of each name; "" if one is missing."""
    return lambda records, link: (
        draw(*(records[name][-1] for name in names), link, **how) if records.keys() >= set(names) else ""
    )


#: the parts that a page may contain
PARTS: dict[str, Part] = {
    "results in short": _newest(_readme, "step", "scaling-wide", "brain", "recipe_study", "few_study"),
    "step, in a line": _newest(_step_in_a_line, "step"),
    "step": _newest(_throughput, "step"),
    "other networks": _in_one_table(
        *(f"step, {other}" for other in ("block_size 32", "block_size 1", "model dense")),
        "recurrent",
        "recurrent, hidden_dim 512",
    ),
    "parts of a step": _in_one_table("forward", "linear", "linear-dense", "lif", "dst"),
    "scaling-p_inter": _newest(_scaling, "scaling-p_inter"),
    "growth": _growths,
    "scaling-wide": _newest(_scaling, "scaling-wide"),
    **{name: _newest(_other, name) for name in ("brain", "brain_growth", "delays")},
    "chunks": _newest(_chunks, "chunks"),
    "recipe_study": _newest(_study, "recipe_study"),
    "recipe_study, command": _newest(_command, "recipe_study", name=BEST),
    "recipe_study, by seed": _by_seed,
    "few_study": _newest(_study, "few_study"),
    "few_study, command": _newest(_command, "few_study", name=EXAMPLE),
    "tradeoff_study, in short": _newest(_study, "tradeoff_study", table=study_tables.budgets),
    "dst_study, in short": _newest(_study, "dst_study", table=study_tables.growth),
    "structure_study, in short": _newest(_study, "structure_study, 2 epochs", shown=slice(-1, None)),
    "sequence_study": _sequences,
    "delayed_study": _newest(_study, "delayed_study", table=study_tables.delays),
    "predictions": _newest(_predictions, "predictions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.redraw", description=__doc__.split("\n")[0])
    text = "a record whose table to print; without any, the pages and pictures are redrawn"
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help=text)
    files = parser.parse_args(argv).files
    for record in map(read, files):
        print(WHOLE[record.content["benchmark"]](record, Path.as_posix))
    if files:
        return 0
    from . import plots  # needs matplotlib

    kept = all_records()
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
