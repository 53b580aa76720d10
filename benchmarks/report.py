"""Tables of records."""

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from g2gnet.base.tables import in_columns, markdown

#: cores that other programs may use on average while nothing is measured
BUSY = 0.1
#: a header and lines of cells
Table = tuple[list[str], list[list[str]]]


def by_column(columns: Mapping[str, Callable[[Any], str]], rows: Collection[Any]) -> str:
    """A Markdown table, in whose columns stands what functions make of rows; without those that no row fills."""
    made = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    made = {name: cells for name, cells in made.items() if {*cells} != {"–"}}
    return markdown(list(made), zip(*made.values(), strict=True))


def curves(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The runs of each contender, from the first place to the last."""
    for contender in dict.fromkeys(run["contender"] for run in record["runs"]):
        of = [run for run in record["runs"] if run["contender"] == contender]
        yield contender, sorted(of, key=lambda run: run["place"])


class Line(NamedTuple):
    """seconds = slope·x + intercept, and the share of the variance that this explains."""

    slope: float
    intercept: float
    r_squared: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line through at least two different points."""
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = np.asarray(y) - (slope * np.asarray(x) + intercept), np.asarray(y) - np.mean(y)
    unexplained = float(rest @ rest / (spread @ spread)) if np.any(spread) else 0.0
    return Line(float(slope), float(intercept), 1.0 - unexplained)


def line(record: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Line | None:
    """The line through the medians of a contender over the work of their places.

    None where the work hardly differs (units of another size): a line through it would say nothing.
    """
    timed = [(record["workloads"][run["place"]]["flop"], run["median"]) for run in runs if run["status"] == "timed"]
    flop, medians = zip(*timed, strict=True) if timed else ((), ())
    return fit(flop, medians) if timed and max(flop) > 1.5 * min(flop) else None


_WAYS = {"": "", "-triangle": ", hidden triangle α = 4", "-compiled": ", under torch.compile",
         "-pair": ", no fused layers"}  # fmt: skip
_KERNELS = {"triton": "Triton kernels", "cpu": "compiled CPU kernels", "torch": "plain PyTorch"}
TITLES = {
    **{f"g2g-{name}{way}": f"g2g, {of}{how}" for name, of in _KERNELS.items() for way, how in _WAYS.items()},
    "snntorch-masked": "snnTorch loop, dense weights × mask",
    "snntorch-dense": "snnTorch loop, dense",
    "compiled-masked": "torch.compile of the snnTorch loop, × mask",
    "compiled-dense": "torch.compile of the snnTorch loop, dense",
    "spikingjelly-dense": "SpikingJelly 2, multi-step, dense",
    "jax-masked": "JAX, jit and scan, dense weights × mask",
    "dense-lif": "nn.Linear over all T with our LIF, dense",
    "bsr-lif": "PyTorch's block-sparse product with our LIF",
    "masked": "nn.Linear, weight × mask",
    "dense": "nn.Linear, dense",
    "bsr": "PyTorch's block-sparse product (BSR)",
    "snntorch": "snnTorch Leaky, a loop over T",
    "spikingjelly": "SpikingJelly 2, multi-step LIF",
    "onednn": "PyTorch, all steps at once",
    "compiled": "the same, torch.compile",
    "dense-correlation": "dense masks, full correlation matrix",
}


def title(label: str) -> str:
    """A contender's name in words, where it has any."""
    name = label.removesuffix("-bf16")
    return TITLES.get(name, name) + (", bfloat16" if label.endswith("-bf16") else "")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def network(workload: dict[str, Any], without: Sequence[str] = ()) -> str:
    """A workload in words, but for some of its fields."""
    side = workload["block_size"]
    words = {
        "batch_size": f"batch {workload['batch_size']}",
        "T": f"{workload['T']} steps",
        "hidden_dim": f"{workload['hidden_dim']:,} neurons per layer",
        "block_size": "single weights" if side == 1 else f"{side} × {side} blocks",
        "density": f"{percent(workload['density'])} of the weights",
    }
    model = f"{workload['model']}{', recurrent' if workload.get('recurrent') else ''}"
    return ", ".join([model, *(text for field, text in words.items() if field not in without)])


def plain(value: float) -> str:
    """A whole number as it is, others to three digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit, scale = next((pair for pair in units.items() if abs(value) >= pair[1]), ("ns", 1e-9))
    return f"{value / scale:.3g} {unit}"


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How many times as long: the median over turns."""
    return statistics.median(ours / theirs for ours, theirs in zip(times, others, strict=True))


def counted(record: dict[str, Any]) -> str:
    """The time of a contender that counts: processor time, if other programs used the machine."""
    return "cpu_median" if record.get("limits", {}).get("others_busy_cores", 0.0) > BUSY else "median"


#: cells of a throughput record's table, by column: of the record, a run, and the baseline's run or None.
#: GFLOP/s count multiplications and additions of active weights, whatever the contender actually does
CELLS: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any] | None], str]] = {
    "median": lambda record, run, baseline: seconds(run["median"]),
    "20–80 %": lambda record, run, baseline: f"{seconds(run['p20'])} – {seconds(run['p80'])}",
    "processor time": lambda record, run, baseline: seconds(run["cpu_median"]) if "cpu_median" in run else "–",
    "times as fast": lambda record, run, baseline: (
        f"{baseline[counted(record)] / run[counted(record)]:.3g}" if baseline else "–"
    ),
    "GFLOP/s": lambda record, run, baseline: f"{record['workloads'][0]['flop'] / run['median'] / 1e9:.3g}",
    # a contender whose workload differs from that of the others has a floor of its own
    "of the floor": lambda record, run, baseline: (
        f"{100 * run.get('floor_seconds', record['workloads'][run['place']]['floor_seconds']) / run['median']:.0f} %"
    ),
    "peak memory": lambda record, run, baseline: f"{run['peak_bytes'] / 1e6:.0f} MB",
    "first turn": lambda record, run, baseline: seconds(run["first_seconds"]),
    "rates, %": lambda record, run, baseline: " ".join(f"{100 * rate:.1f}" for rate in run["firing_rates"]),
    "error": lambda record, run, baseline: run["closest"],
}


def times(record: dict[str, Any], columns: Iterable[str] = CELLS, name: Callable[[str], str] = str) -> Table:
    """A line per contender that has a time, the fastest first."""
    timed = sorted((run for run in record["runs"] if run["status"] == "timed"), key=lambda run: run[counted(record)])
    baseline = next((run for run in timed if run["contender"] == record["baseline"]), None)
    cells = [[name(run["contender"]), *(CELLS[column](record, run, baseline) for column in columns)] for run in timed]
    return ["", *columns], cells


def growth(record: dict[str, Any], name: Callable[[str], str] = str) -> Table:
    """A line per contender: the median at each place, where the line begins, over the longest time, and its R²."""
    lines = []
    for contender, runs in curves(record):
        medians, fitted = [run.get("median") for run in runs], ["–", "–"]
        if found := line(record, runs):
            share = found.intercept / max(median for median in medians if median)
            fitted = [f"{100 * share:.0f} %", f"{found.r_squared:.3f}"]
        lines.append([name(contender), *(seconds(median) if median else "–" for median in medians), *fitted])
    return [record["x_is"], *(plain(place["x"]) for place in record["workloads"]), "begins at", "R²"], lines


def memory(record: dict[str, Any]) -> Table:
    """A line per contender, in GB, above what a dense network of that size needs if the record has this."""
    places = record["workloads"]
    lines = [
        [name, *(f"{run['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in run else "–" for run in runs)]
        for name, runs in curves(record)
    ]
    if "dense_bytes" in places[0]:
        dense = [f"{place['dense_bytes'] / 1e9:.2f}" for place in places]
        lines.append(["dense weights, gradients and Adam's moments (computed)", *dense])
    return ["memory of a step, GB", *(plain(place["x"]) for place in places)], lines


def text(record: dict[str, Any], columns: Iterable[str] = CELLS) -> str:
    """The tables of a throughput record, with these columns; then how some contenders differ, and which have no time
    and why."""
    tables = (growth(record), memory(record)) if record["quantity"] else (times(record, columns),)
    parts = [in_columns(*table) if table[1] else "no contender has a time" for table in tables]
    differing = {run["contender"]: run["differs"] for run in record["runs"] if run.get("differs")}
    parts += [f"{contender}: {differs}" for contender, differs in differing.items()]
    for run in (run for run in record["runs"] if run["status"] != "timed"):
        x = record["workloads"][run["place"]]["x"]
        parts.append(f"{run['contender']}{'' if x is None else f' at {plain(x)}'}: {run['status']}: {run['reason']}")
    return "\n".join(parts)


def compared(runs: Iterable[dict[str, Any]], before: dict[str, Any]) -> str:
    """How long each contender takes, and took in an earlier record."""
    was = {(run["contender"], run["place"]): run["median"] for run in before["runs"] if "median" in run}
    rows = [
        (run["contender"], seconds(was[key]), seconds(run["median"]), f"{run['median'] / was[key]:.2f}×")
        for run in runs
        if "median" in run and (key := (run["contender"], run["place"])) in was
    ]
    return in_columns((f"since {str(before['machine']['commit'])[:8]}", "was", "is", ""), rows)
