"""Redraws the measured tables and pictures of the documentation from the records: ``python -m benchmarks.redraw``.

A page marks its drawn parts with ``<!-- drawn: NAME -->`` and ``<!-- end -->``. NAME is one of ``PARTS``, which shows
the table of a record or of several; a part is empty unless it has all of its records. Numbers are nowhere else, so a
page cannot disagree with the measurements; ``tests/benchmarks/test_benchmark_reports.py`` checks that.
``python -m benchmarks.redraw FILE`` prints the whole table of any record. Pictures lie in ``docs``;
``docs/draw_result.py`` draws one more. It takes seconds.
"""

import functools
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

from . import brain, chunks, cpu_choices, delays, host_time, images, records, report, study_tables
from .records import RESULTS
from .registry import KERNELS
from .report import network, percent, plain, seconds, title
from .studies import BEST, CHOSEN_FEW, EXAMPLE, RELU, SEQUENCES, STUDIES
from .study_tables import rows_of
from .throughput import QUANTITIES

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs"
DOCS = ("index", "performance", "results", "populations", "connectome")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS))
#: the record whose picture is on a page
PICTURED = "scaling-p_inter"
#: in what is drawn: a link to a file, by its path
_LINK = re.compile(r"(?<=\]\()@([^)#]+)")
_PART = re.compile(r"(?<=<!-- drawn: )([^>]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


class Record(NamedTuple):
    """A record and its file."""

    path: Path
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """What it measures: the name of its file without that of the machine. Of several the newest is shown."""
        return re.sub(r"-\d+-core-\w+$", "", self.path.stem)

    @property
    def picture(self) -> Path | None:
        """The path of its picture, if a page shows it."""
        return PICTURES / self.path.with_suffix(".png").name if self.name == PICTURED else None


def read(paths: Iterable[Path]) -> list[Record]:
    return [Record(path, records.read(path)) for path in paths]


def all_records() -> list[Record]:
    """All records, from the oldest to the newest."""
    return sorted(read(sorted(RESULTS.glob("*.jsonl"))), key=lambda record: record.content["machine"]["date"])


def redrawn(page: str, folder: Path, kept: Sequence[Record]) -> str:
    """The text of a page in ``folder``, with its drawn parts from the records, the newest last; raises ValueError for a
    part of an unknown name."""
    newest = {record.name: record for record in kept}

    def part(found: re.Match[str]) -> str:
        if found[1] not in PARTS:
            raise ValueError(f"part {found[1]!r} is unknown; choose one of {', '.join(PARTS)}")
        draw, *names = PARTS[found[1]]
        text = f"\n{draw(*map(newest.get, names))}\n\n" if newest.keys() >= set(names) else ""
        return f"{found[1]}{found[2]}{_linked(text, folder)}"

    return _PART.sub(part, page)


def _linked(text: str, folder: Path) -> str:
    return _LINK.sub(lambda link: Path(os.path.relpath(link[1], folder)).as_posix(), text)


def _range(values: Iterable[Any]) -> str:
    """The smallest to the largest value: ``1 to 3``; ``3`` if they are equal."""
    found = sorted(values)
    return " to ".join(str(value) for value in dict.fromkeys((found[0], found[-1])))


def _machine(record: Record) -> str:
    """Where, when and with what it was measured, and a link to the record."""
    machine = record.content["machine"]
    measured = (run["measured"] for run in record.content["runs"] if "measured" in run)
    days = _range(when["date"][:10] for when in (machine, *measured))
    return f"{_processor(machine)}, PyTorch {machine['versions']['torch']}, {days} ([record](@{record.path}))"


def _processor(machine: dict[str, Any]) -> str:
    """The name of what computed, and its threads."""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return machine["gpu"] or f"{machine['cpu']} with {threads}"


def _about(content: dict[str, Any]) -> str:
    about = KERNELS[content["kernel"]].about
    return f"{about[0].upper()}{about[1:]}"


def _said_of_others(content: dict[str, Any]) -> str:
    """A paragraph about a busy machine; "" where it was not."""
    if report.counted(content) != "cpu_median":
        return ""
    others = f"{content['limits']['others_busy_cores']:.1f} of {content['machine']['cores']} cores"
    return f"\n\nOther programs kept {others} busy: what counts is the processor time of all threads of a contender."


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
    r"\bconstant rate\b": "constant learning rate",
    r"\bshifted\b( and mirrored)?": r"shifted\1 images",
}


def _in_words(table: str) -> str:
    return functools.reduce(lambda text, short: re.sub(short, WORDS[short], text), WORDS, table)


def _timed(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["status"] == "timed"]


def _ours_and_peers(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Our row of a throughput record, the baseline's row, and that of the fastest contender that is not ours."""
    timed = {run["contender"]: run for run in _timed(content["runs"])}
    ours = next(timed[name] for name in ("g2g-triton", "g2g-cpu", "g2g-torch") if name in timed)
    others = [run for name, run in timed.items() if "g2g" not in name]
    return ours, timed[content["baseline"]], min(others, key=lambda run: float(run[report.counted(content)]))


def _throughput(record: Record) -> str:
    content = record.content
    if content["quantity"]:
        return _scaling(record)
    busy = report.counted(content) == "cpu_median"  # then processor time is what counts
    last = ("processor time", "times as fast") if busy else ("times as fast", "of the floor")
    table = markdown(*report.times(content, ("median", "20–80 %", *last, "peak memory"), title))
    about = (
        f"{_about(content)}: {network(content['workloads'][0])}. {_timed(content['runs'])[0]['repeats']} interleaved"
    )
    text = (
        f"{about} repeats, {_machine(record)}. *Times as fast*: as {title(content['baseline'])}.\n\n"
        f"{table}{_said_of_others(content)}"
    )
    failed = [run for run in content["runs"] if run["status"] not in ("timed", "skipped")]
    absent = "; ".join(f"{title(run['contender'])} ({run['reason']})" for run in failed)
    return f"{text}\n\nWithout a time: {absent}." if absent else text


def _scaling(record: Record) -> str:
    content = record.content
    first = content["workloads"][0]
    what = "A training step" if content["kernel"] == "step" else "A forward pass"
    picture = f"![{what} against {content['x_is']}](@{record.picture})\n\n" if record.picture else ""
    tables = [report.growth(content, title), *([report.memory(content)] if "dense_bytes" in first else [])]
    about = f"{picture}{what}: {network(first, ('density', QUANTITIES[content['quantity']].field))}."
    return "\n\n".join([f"{about} {_machine(record)}.", *(markdown(*table) for table in tables)])


def _growths(*found: Record) -> str:
    """Each quantity from its least to its most: our time, that of the masked loop, and of the fastest dense form."""
    rows = []
    for record in found:
        content = record.content
        timed = [_timed(of) for _, of in report.curves(content)]
        ends = [f"{seconds(of[0]['median'])} → {seconds(of[-1]['median'])}" for of in timed]
        places = [plain(content["workloads"][end]["x"]) for end in (0, -1)]
        rows.append([f"[{content['x_is']}](@{record.path})", " → ".join(places), *ends])
    titles = [title(name) for name, _ in report.curves(found[-1].content)]
    return markdown(["", "from → to", *titles], rows)


def _in_one_table(*found: Record) -> str:
    """A line for each throughput record: ours, the baseline and the fastest peer."""
    rows = []
    for record in found:
        content = record.content
        counted, (ours, baseline, fastest) = report.counted(content), _ours_and_peers(content)
        whole = content["kernel"] in ("step", "recurrent")
        rows.append([
            network(content["workloads"][0]) if whole else _about(content),
            seconds(ours[counted]),
            f"{seconds(baseline[counted])}: {title(baseline['contender'])}",
            f"{baseline[counted] / ours[counted]:.3g}",
            "–" if fastest is baseline else f"{seconds(fastest[counted])}: {title(fastest['contender'])}",
            f"{ours['peak_bytes'] / 1e6:.0f}, {baseline['peak_bytes'] / 1e6:.0f}",
            f"[{content['machine']['date'][:10]}](@{record.path})",
        ])  # fmt: skip
    return markdown(["", "g2g", "compared with", "times as fast", "a faster peer", "MB of both", "record"], rows)


_MASKED = "a loop over time with masked weights (snnTorch)"


def _fastest(run: dict[str, Any]) -> str:
    """What the fastest contender is that is not ours."""
    return f"the fastest dense form {'in JAX' if run['contender'].startswith('jax') else 'in PyTorch'}"


def _step_in_a_line(record: Record) -> str:
    """Our time of a training step against that of the baseline and of the fastest other contender."""
    content = record.content
    ours, masked, fastest = _ours_and_peers(content)
    return (
        f"A training step with {content['workloads'][0]['hidden_dim']:,} neurons per layer takes "
        f"**{seconds(ours['median'])}**; {_MASKED} takes {seconds(masked['median'])}, {_fastest(fastest)} "
        f"{seconds(fastest['median'])} ({_processor(content['machine'])}; [how it was "
        f"measured](@{PICTURES}/performance.md))."
    )


def _readme(*found: Record) -> str:
    """What a user gets, a line each, and where it comes from."""
    step, wide, of_brain, recipe, few = (record.content for record in found)
    of_contender = {run["name"]: run for run in of_brain["runs"]}
    whole, by_hand = of_contender["g2g-cpu"], of_contender["csr-by-hand"]
    ours, masked, fastest = _ours_and_peers(step)
    largest, point, usual = wide["workloads"][-1], wide["runs"][-1], step["workloads"][0]
    trained = {row.name: row for row in (*rows_of(recipe), *rows_of(few))}

    def reached(name: str) -> str:
        return f"{study_tables.spread(trained[name].runs, study_tables.accuracy)} %"

    best, (dense, sparse) = trained[BEST], CHOSEN_FEW[:2]
    rows = [
        ["A training step", f"**{seconds(ours['median'])}**",
         f"{seconds(masked['median'])}: {_MASKED}; {seconds(fastest['median'])}: {_fastest(fastest)}",
         "performance.md#a-training-step"],
        ["Peak memory of that step", f"**{ours['peak_bytes'] / 1e6:,.0f} MB**",
         f"{masked['peak_bytes'] / 1e6:,.0f} MB: snnTorch; {fastest['peak_bytes'] / 1e6:,.0f} MB: {_fastest(fastest)}",
         "performance.md#a-training-step"],
        [f"A step of {largest['hidden_dim']:,} neurons per layer",
         f"**{seconds(point['median'])}, {point['peak_bytes'] / 1e9:.1f} GB**",
         f"{largest['dense_bytes'] / 1e9:.0f} GB (calculated): weights, gradients and Adam's state of a dense network",
         "performance.md#how-it-grows"],
        [f"A step of a random network of the size of a fly's brain: {of_brain['settings']['neurons']:,} neurons, "
         f"{whole['weights'] / 1e6:.1f} million synapses",
         f"**{seconds(statistics.median(whole['seconds']))}, {whole['peak'] / 1e9:.1f} GB**",
         f"{seconds(statistics.median(by_hand['seconds']))}, {by_hand['peak'] / 1e9:.1f} GB: PyTorch's CSR products, "
         "with a backward pass written by hand",
         "connectome.md#size"],
        [f"Accuracy, {best.mean('weights') / 1e6:.1f} million weights", f"**{reached(BEST)}**",
         f"{reached(f'{BEST}, {RELU}')}: the same network with ReLU instead of spikes",
         "results.md#the-recipe"],
        ["Accuracy, 58,000 weights", f"**{reached(sparse)}**",
         f"{reached(dense)}: a dense spiking network with the same number of weights",
         "results.md#few-weights"],
    ]  # fmt: skip
    cells = [[*row, f"[command](@{PICTURES}/{page})"] for *row, page in rows]
    return (
        f"{markdown(['on a CPU', 'g2g', 'compared with', 'how'], cells)}\n\nTraining steps have batches of "
        f"{usual['batch_size']} samples, {usual['T']} time steps and two hidden layers of "
        f"{usual['hidden_dim']:,} neurons with {percent(usual['density'])} of the weights (third row: "
        f"{largest['T']} time steps, groups of 256 neurons; fourth: 100 time steps, 8 samples). They were measured on "
        f"{_processor(step['machine'])}. Accuracies are on the test set of Fashion-MNIST, after "
        f"{best.runs[0]['epoch']} epochs (58,000 weights: {few['epochs']}), mean ± standard error over 3 seeds."
    )


def _seeds(content: dict[str, Any]) -> str:
    """How many seeds a study's rows have: ``3 seeds``, ``1 seed``, ``1 to 3 seeds``."""
    counts = _range(len(row.runs) for row in rows_of(content))
    return f"{counts} seed" if counts == "1" else f"{counts} seeds"


def _study(
    record: Record, table: Callable[[dict[str, Any]], str] = study_tables.table, shown: slice = slice(None)
) -> str:
    """A study, how long all its runs took, each on one core, and a table of it, or some paragraphs of that."""
    content, runs = record.content, record.content["runs"]
    measured = all("train_cpu_seconds" in run for run in runs)  # not in older records
    quantity, what = ("train_cpu_seconds", "processor time") if measured else ("train_seconds", "training")
    hours = sum(run[quantity] for run in runs) / 3600
    about = (
        f"`{content['settings']} --epochs {content['epochs']}`, {_seeds(content)}, on {content['tested_on']}. "
        f"{len(runs)} runs, {hours:.1f} hours of {what}, {_machine(record)}."
    )
    return "\n\n".join((about, *_in_words(table(content)).split("\n\n")[shown]))


def _command(record: Record, name: str) -> str:
    """The command of a study's row, in lines that a page has room for."""
    content = record.content
    flags = content["rows"][name]
    command = f"python train.py {content['settings']} {flags}"
    if "--epochs" not in flags:
        command += f" --epochs {content['epochs']}"
    whole_flags = re.sub(" (?!--)", "\0", command)
    lines = textwrap.wrap(whole_flags, 84, break_on_hyphens=False, break_long_words=False)
    return "```sh\n" + " \\\n  ".join(lines).replace("\0", " ") + "\n```"


def _by_seed(*found: Record) -> str:
    """What each part of the recipe gains on held-back images, from all records."""
    links = ", ".join(f"[{number}](@{record.path})" for number, record in enumerate(found, 1))
    table = _in_words(study_tables.gains_by_seed([record.content for record in found]))
    return f"{table}\n\nRecords: {links}."


def _sequences(*found: Record) -> str:
    """The accuracy of each network on each kind of sequence."""
    links = ", ".join(f"[{kind}](@{record.path})" for kind, record in zip(SEQUENCES, found, strict=True))
    table = study_tables.sequences(dict(zip(SEQUENCES, (record.content for record in found), strict=True)))
    return f"Test accuracy, %, {_seeds(found[0].content)}; records: {links}.\n\n{table}"


def _images(record: Record) -> str:
    """The times of a network of images."""
    content, busy = record.content, report.counted(record.content) == "cpu_median"
    columns = ("median", *(("processor time",) if busy else ()), "times as fast", "peak memory", "rates, %")
    about = content["workloads"][0]
    size = f"{about['T']} steps, batch {about['batch_size']}"
    table = markdown(*report.times(content, columns, title))
    return f"`--network {about['network']}`, {size}. {_machine(record)}.\n\n{table}{_said_of_others(content)}"


def _other(record: Record) -> str:
    """The table of a record of another benchmark, and the machine."""
    return f"{_machine(record)}\n\n{OTHERS[record.content['benchmark']].table(record.content)}"


def _chunks(record: Record) -> str:
    size = record.content["sizes"]
    layers = " → ".join(f"{size[name]:,}" for name in ("input_dim", "hidden_dim", "hidden_dim", "num_classes"))
    return (
        f"A training step: index, batch {size['batch_size']}, {layers} neurons, varying inputs. {_machine(record)}.\n\n"
        f"{chunks.table(record.content)}{_said_of_others(record.content)}"
    )


#: benchmarks whose tables need no words
OTHERS = {each.PROGRAM.name: each.PROGRAM for each in (brain, delays, host_time, cpu_choices)}
OTHERS |= {"brain_growth": brain.PROGRAM, "brain_second": brain.PROGRAM}
#: the whole table of a record, by its benchmark
WHOLE: dict[str, Callable[[Record], str]] = {
    "throughput": _throughput,
    "chunks": _chunks,
    images.PROGRAM.name: _images,
    **dict.fromkeys(OTHERS, _other),
    **dict.fromkeys(STUDIES, _study),
}
#: the parts that a page may contain: the function that draws each, and the names of its newest records
PARTS: dict[str, tuple[Any, ...]] = {
    "results in short": (_readme, "step", "scaling-wide", "brain", "recipe-study-wide", "few-study"),
    "step, in a line": (_step_in_a_line, "step"),
    "step": (_throughput, "step"),
    "other networks": (
        _in_one_table, "step-units-32", "step-units-1", "step-dense-model", "recurrent", "recurrent-512"
    ),
    "parts of a step": (_in_one_table, "forward", "linear", "linear-dense", "lif", "dst"),
    "growth": (_growths, *(f"scaling-{each}" for each in ("T", "B", "H", "groups", "block_size"))),
    **{name: (_scaling, name) for name in ("scaling-p_inter", "scaling-wide")},
    **{name: (_other, name) for name in ("brain", "brain_growth", "brain_second", "delays")},
    "chunks": (_chunks, "chunks"),
    **{name: (_images, name) for name in ("conv", "conv-tutorial")},
    "recipe_study": (_study, "recipe-study-wide"),
    "recipe_study, command": (functools.partial(_command, name=BEST), "recipe-study-wide"),
    "recipe_study, by seed": (
        _by_seed, *(f"recipe-validation{which}" for which in ("", "-relu", "-flags", "-second"))
    ),
    "few_study": (_study, "few-study"),
    "few_study, command": (functools.partial(_command, name=EXAMPLE), "few-study"),
    "tradeoff_study, in short": (functools.partial(_study, table=study_tables.budgets), "tradeoff-study"),
    "dst_study, in short": (functools.partial(_study, table=study_tables.growth), "dst-study"),
    "structure_study, in short": (functools.partial(_study, shown=slice(-1, None)), "structure-study"),
    "sequence_study": (_sequences, *(f"sequence-study-{kind}" for kind in SEQUENCES)),
    "delayed_study": (functools.partial(_study, table=study_tables.delays), "delayed-study"),
    "memory_study": (_study, "memory-study"),
    "memory_study_256": (_study, "memory-study-256"),
    "images_study": (_study, "images-study"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.redraw", description=__doc__.split("\n")[0])
    text = "a record whose table to print; without any, the pages and pictures are redrawn"
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help=text)
    files = parser.parse_args(argv).files
    for record in read(files):
        print(_linked(WHOLE[record.content["benchmark"]](record), Path.cwd()))
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
