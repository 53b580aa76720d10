"""Tables of studies: one with a line per row, whose columns the study names, and some that compare rows."""

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from g2gnet.base.tables import estimate, markdown

from .report import by_column
from .studies import CONTROL, DELAYS, GRAPHS, GROWTH, RELU, STUDIES

Run = dict[str, Any]
TEST_IMAGES = "the test images"
#: what runs with ``--validation`` are tested on; older records have parts of the images in the place of drawn ones
DRAWN = "a sixth of the training images, drawn with the seed"
LAST, FIRST_SEED = "the last 10,000 training images", 1


class Row(NamedTuple):
    """A row of a record: its name and flags, its runs, and what it is compared with (none: nothing)."""

    name: str
    flags: str
    runs: list[Run]
    control: list[Run]

    def mean(self, quantity: str) -> float:
        """The mean of ``weights``, or another number, over its runs."""
        return statistics.mean(run[quantity] for run in self.runs)


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows that have runs.

    Those of the recipe are compared with the recipe, or with 20 epochs of it, by the number of their epochs.
    """
    runs: dict[str, list[Run]] = {}
    for run in record["runs"]:
        runs.setdefault(run["row"], []).append(run)
    bases = {of[0].get("epoch"): of for name in ("20 epochs", "the recipe") if (of := runs.get(name))}
    controls = {name: bases.get(of[0].get("epoch"), []) for name, of in runs.items()}
    return [
        Row(name, record["rows"].get(name, ""), of, [] if controls[name] is of else controls[name])
        for name, of in runs.items()
    ]


def accuracy(run: Run) -> float:
    """Test accuracy after the last epoch, in per cent."""
    return 100 * run["test_acc"]


def spread(runs: Sequence[Run], value: Callable[[Run], float], digits: int = 2) -> str:
    """Mean ± standard error of the mean over runs, and their number where it is not three."""
    text = estimate([value(run) for run in runs]).text(digits)
    return text if len(runs) == 3 else f"{text} (n = {len(runs)})"


def differences(runs: Sequence[Run], control: Sequence[Run]) -> list[float]:
    """Accuracy minus that of the control, in points, for each seed that both have; equal ones are equal numbers."""
    of_control = {run["seed"]: accuracy(run) for run in control}
    return [round(accuracy(run) - of_control[run["seed"]], 9) for run in runs if run["seed"] in of_control]


def _gain(row: Row) -> str:
    """Mean ± standard error of these differences, and their number if it is not that of the runs; ``–`` without any."""
    found = differences(row.runs, row.control)
    if not found:
        return "–"
    mean, error = estimate(found)
    number = "" if len(found) == len(row.runs) else f" (n = {len(found)})"
    return f"{mean:+.2f}{'' if error is None else f' ± {error:.2f}'}{number}"


def _shares(quantity: str, digits: int = 0) -> Callable[[Row], str]:
    """The mean share of hidden layers 1 and 2, in per cent, as ``8, 28``."""
    return lambda row: ", ".join(
        f"{100 * statistics.mean(run[quantity][layer] for run in row.runs):.{digits}f}" for layer in (0, 1)
    )


def _placed(row: Row, name: str) -> float:
    return statistics.mean(run["placement"][name] for run in row.runs)


#: what a column of a table shows, by its title
COLUMNS: dict[str, Callable[[Row], str]] = {
    **dict.fromkeys(("", "at most", "network", "model"), lambda row: row.name),
    "flags": lambda row: f"`{row.flags}`",
    "epochs": lambda row: str(row.runs[0]["epoch"]),
    "weights": lambda row: f"{row.mean('weights'):,.0f}",
    "weights of fc2 that exist": lambda row: f"{100 * row.mean('density'):.1f} %",
    "test accuracy, %": lambda row: spread(row.runs, accuracy),
    "training accuracy, %": lambda row: spread(row.runs, lambda run: 100 * run["train_acc"]),
    "minus the recipe, points": _gain,
    "never fires, % of layers 1 and 2": _shares("silent"),
    "firing rate, % of layers 1 and 2": _shares("firing_rate", 1),
    "seconds of training": lambda row: spread(row.runs, lambda run: run["train_seconds"], 0),
    "seconds of an epoch": lambda row: spread(row.runs, lambda run: run["train_seconds"] / run["epoch"], 1),
    "processor seconds": lambda row: spread(row.runs, lambda run: run["train_cpu_seconds"], 0),
    "memory of a step": lambda row: f"{row.mean('step_bytes') / 1e6:.0f} MB",
    "its processor time": lambda row: f"{1e3 * min(run['step_seconds'] for run in row.runs):.3g} ms",
    "spread": lambda row: f"{_placed(row, 'rows_spread'):.2f}, {_placed(row, 'cols_spread'):.2f}",
    "rows empty": lambda row: f"{100 * _placed(row, 'rows_empty'):.0f} %",
    "inside": lambda row: f"{100 * _placed(row, 'inside'):.0f} %",
}


def table(record: Mapping[str, Any]) -> str:
    """The table of a study's record."""
    columns = STUDIES[record["benchmark"]].columns
    return by_column({name: COLUMNS[name] for name in columns}, rows_of(record)) if columns else structure(record)


def _by_last(record: Mapping[str, Any], names: Collection[str]) -> dict[str, dict[str, list[Run]]]:
    """The runs of the rows whose last part is one of ``names``, by the other parts and by it."""
    found: dict[str, dict[str, list[Run]]] = {}
    for row in rows_of(record):
        others, _, last = row.name.rpartition(", ")
        if last in names:
            found.setdefault(others, {})[last] = row.runs
    return found


def delays(record: Mapping[str, Any]) -> str:
    """Accuracy and processor time of each network without, with fixed and with learned delays; and the other rows."""
    lines = []
    for name, runs in _by_last(record, DELAYS).items():
        weights = statistics.mean(run["weights"] for of in runs.values() for run in of)
        times = (statistics.median(run["train_cpu_seconds"] for run in of) for of in runs.values())
        cells = (f"{spread(of, accuracy)} · {time:.0f} s" for of, time in zip(runs.values(), times, strict=True))
        lines.append([name, f"{weights:,.0f}", *cells])
    others = [run for run in record["runs"] if run["row"].rpartition(", ")[2] not in DELAYS]
    return f"{markdown(['', 'weights', *DELAYS], lines)}\n\n{table({**record, 'runs': others})}"


def growth(record: Mapping[str, Any]) -> str:
    """Accuracy by units, density and growth, and the best growth minus static, with its standard error."""
    lines = []
    for size, runs in _by_last(record, GROWTH).items():
        cells = (spread(runs[rule], accuracy) if rule in runs else "–" for rule in GROWTH)
        lines.append([*size.removeprefix("units of ").split(", "), *cells, _best_growth(runs)])
    return markdown(["block size", "density", *GROWTH, "best growth − static"], lines)


def _best_growth(runs: Mapping[str, list[Run]]) -> str:
    found = {rule: estimate([accuracy(run) for run in of]) for rule, of in runs.items()}
    static = found.pop("static", None)
    if static is None or not found:
        return "–"
    best = max(found, key=lambda rule: found[rule].mean)
    error = sum((each.error or 0.0) ** 2 for each in (found[best], static)) ** 0.5
    return f"{found[best].mean - static.mean:+.2f}{f' ± {error:.2f}' if error else ''} ({best})"


BUDGETS = (10_000, 100_000, 300_000, 1_000_000)


def density(row: Row) -> str:
    """``dense``, or the share of the weights, whether they are rewired, and the units."""
    return ", ".join(row.name.split(", ")[2:]) or "dense"


def best(rows: Sequence[Row], dense: bool, weights: float) -> Row | None:
    """The dense or sparse row with the highest mean accuracy among those of at most so many weights."""
    within = [row for row in rows if (density(row) == "dense") == dense and row.mean("weights") <= weights]
    return max(within, key=lambda row: statistics.mean(map(accuracy, row.runs)), default=None)


def budgets(record: Mapping[str, Any]) -> str:
    """The best dense and the best sparse network with each budget of weights."""

    def cells(row: Row | None) -> list[str]:
        return [row.name, spread(row.runs, accuracy), f"{row.mean('train_cpu_seconds'):.0f}"] if row else ["–"] * 3

    rows = rows_of(record)
    lines = [[f"{most:,} weights", *cells(best(rows, True, most)), *cells(best(rows, False, most))] for most in BUDGETS]
    header = [name for kind in ("dense", "sparse") for name in (kind, "accuracy, %", "seconds")]
    return markdown(["at most", *header], lines)


def gains_by_seed(records: Sequence[Mapping[str, Any]]) -> str:
    """What each row of 20 epochs gains over the recipe of as many, seed by seed: each holds back other images.

    Runs of one seed, part, processor, version of PyTorch and common settings are compared, with the base of their own
    record if it has it. A run that several records have has several numbers.
    """
    rows = {row for row, flags in STUDIES["recipe"].rows.items() if "--epochs 20" in flags and RELU not in row}
    runs: list[tuple[tuple[Any, ...], int, dict[str, Any]]] = []
    for number, record in enumerate(records):
        machine, tested_on = record["machine"], record["tested_on"]
        for run in record["runs"] if tested_on != TEST_IMAGES else ():
            # the oldest hold back the last part whatever the seed, later ones with this seed
            if tested_on != LAST or run["seed"] == FIRST_SEED:
                about = machine["cpu"], machine["versions"]["torch"], record["settings"], tested_on == DRAWN
                runs.append(((run["seed"], *about), number, run))
    bases: dict[tuple[Any, ...], dict[int, float]] = {}
    for alike, number, run in runs:
        if run["row"] == "20 epochs":
            bases.setdefault(alike, {})[number] = accuracy(run)
    found: dict[str, dict[int, list[float]]] = {}
    for alike, number, run in runs:
        if run["row"] in rows - {"20 epochs"} and (base := bases.get(alike)):
            gained = accuracy(run) - base.get(number, next(iter(base.values())))
            found.setdefault(run["row"], {}).setdefault(run["seed"], []).append(round(gained, 9))
    seeds = sorted({seed for of_seeds in found.values() for seed in of_seeds})
    lines = [
        [name, *(", ".join(f"{gain:+.2f}" for gain in found[name].get(seed, ())) or "–" for seed in seeds)]
        for name in sorted(found, key=lambda name: -statistics.mean(map(statistics.mean, found[name].values())))
    ]
    return markdown(["minus the recipe of 20 epochs, points", *(f"seed {seed}" for seed in seeds)], lines)


TESTED = (f"minus {CONTROL}, points", "95 % interval", "p (paired t, Holm)")


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): upper bounds on the chance of one so small among all tests."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, test in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, (len(p_values) - rank) * p_values[test])
        corrected[test] = min(1.0, least)
    return corrected


def structure(record: Mapping[str, Any]) -> str:
    """Accuracy of each graph by size, and what it has more than the control, seed by seed: mean, interval, p.

    p-values are corrected for all tests of all sizes. Seeds of one size are no sample of sizes, so three and more sizes
    together (of each width, and all) are tested by their means, with p-values corrected for all of these tests.
    """
    rows = [(*row.name.partition(", ")[::2], row) for row in rows_of(record)]
    control = {size: row.runs for graph, size, row in rows if graph == CONTROL}
    gains = {
        (size, graph): differences(row.runs, control.get(size, [])) for graph, size, row in rows if graph != CONTROL
    }
    tested = _tested(gains)
    lines: dict[str, list[list[str]]] = {size: [] for _, size, _ in rows}
    for graph, size, row in rows:
        cells = tested.get((size, graph), ("–",) * len(TESTED))
        lines[size].append([graph, f"{row.mean('weights'):,.0f}", spread(row.runs, accuracy), *cells])
    header = ["graph", "weights", "test accuracy, %", *TESTED]
    parts = [f"**{size}**\n\n{markdown(header, of_size)}" for size, of_size in lines.items()]

    widths = dict.fromkeys(size.partition(",")[0] for size in lines)
    of_widths = {f"All sizes of {width}": [size for size in lines if size.startswith(f"{width},")] for width in widths}
    groups = {**(of_widths if len(widths) > 1 else {}), "All sizes together": list(lines)}
    means = {
        (name, graph): [statistics.mean(gains[size, graph]) for size in sizes if gains.get((size, graph))]
        for name, sizes in groups.items()
        for graph in GRAPHS
        if len(sizes) > 2
    }
    tested = _tested(means)
    for name in dict.fromkeys(name for name, _ in means):
        found = [[graph, str(len(means[key])), *tested[key]] for graph in GRAPHS if (key := (name, graph)) in tested]
        parts.append(f"**{name}**\n\n{markdown(['graph', 'sizes', *TESTED], found)}")
    return "\n\n".join(parts)


def _tested(more: Mapping[Any, list[float]]) -> dict[Any, tuple[str, str, str]]:
    """The cells of differences that vary: their mean, its interval (Student's t), its p-value, corrected for all."""
    tests = {key: stats.ttest_1samp(gains, 0) for key, gains in more.items() if len(set(gains)) > 1}
    p_values = holm([float(test.pvalue) for test in tests.values()])
    cells = {}
    for (key, test), p in zip(tests.items(), p_values, strict=True):
        low, high = test.confidence_interval(0.95)
        cells[key] = (f"{statistics.mean(more[key]):+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.2g}")
    return cells


def sequences(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracy of each network on each kind of sequence, and its weights on the first."""
    lines: dict[str, list[str]] = {}
    for record in records.values():
        for row in rows_of(record):
            cells = lines.setdefault(row.name.partition(", ")[2], [f"{row.mean('weights'):,.0f}"])
            cells.append(spread(row.runs, accuracy))
    return markdown(
        ["", f"weights ({next(iter(records))})", *records], [[name, *cells] for name, cells in lines.items()]
    )
