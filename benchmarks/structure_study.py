"""Does it matter who connects to whom? Static graphs on Fashion-MNIST: ``python -m benchmarks.structure_study``.

Groups by *index*, *random* and *mixer*, a small world of groups, distance on a ring and on the image plane, against two
graphs without modules: *Erdős–Rényi* and *regular*, whose rows have equally many units, as those of groups have. Each
is compared with *regular*, seed by seed, so that all differ from it in nothing but where units lie. The weights are
shared out by ERK: the read-out is then complete, or nearly so, and no graph is judged by a class that its draw left
without weights.

The whole study is 640 runs. By default the graphs of one size are trained; ``--rows "*, H 2048, 10 %, units of 1"``
trains those of another, and ``--extend`` adds them to an earlier record. For recurrent networks see
:mod:`benchmarks.recurrent_structure_study`.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from g2gnet.base.tables import markdown

from .dst_study import density_flags
from .study import Study, accuracy, differences, mean, run_study, spread

#: the model of each graph
GRAPHS = {
    "regular": "regular",
    "Erdős–Rényi": "erdos_renyi",
    "index": "index",
    "random": "random",
    "mixer": "mixer",
    "small world": "small_world",
    "distance": "distance",
    "image plane": "plane",
}
#: what the others are compared with
CONTROL = "regular"
WIDTHS, DENSITIES, UNITS = (1024, 2048), (25, 10, 5, 2), (16, 1)
SIZES = {
    f"H {width}, {percent} %, units of {side}": f"--hidden_dim {width} --block_size {side} {density_flags(percent)}"
    for width in WIDTHS
    for percent in DENSITIES
    for side in UNITS
}


def rows_of(sizes: Mapping[str, str]) -> dict[str, str]:
    """The flags of each graph of each size, whose own flags are given."""
    return {
        f"{graph}, {size}": f"--model {model} {flags}"
        for size, flags in sizes.items()
        for graph, model in GRAPHS.items()
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of some differences, by Student's t."""
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of one so small among so many tests, at most."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, test in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, (len(p_values) - rank) * p_values[test])
        corrected[test] = min(1.0, least)
    return corrected


def compared(record: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """For each size of a record what each graph has more than the control, in points: by seed."""
    rows = {row["row"]: row["ends"] for row in record["rows"]}
    sizes: dict[str, dict[str, list[float]]] = {}
    for row, ends in rows.items():
        graph, _, size = row.partition(", ")
        of_size = sizes.setdefault(size, {})
        if graph != CONTROL:
            of_size[graph] = differences(ends, rows.get(f"{CONTROL}, {size}", []))
    return sizes


def pooled(sizes: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Means of these differences, one per size, by graph: of all sizes, and of each width's if there are several.

    Nothing for less than three sizes.
    """
    groups: dict[str, list[dict[str, list[float]]]] = {"All sizes together": list(sizes.values())}
    for size, of_size in sizes.items():
        groups.setdefault(f"All sizes of {size.partition(', ')[0]}", []).append(of_size)
    of_all, *of_widths = groups
    return {
        name: {
            graph: [statistics.mean(each[graph]) for each in groups[name] if each.get(graph)]
            for graph in GRAPHS
            if graph != CONTROL
        }
        for name in (*of_widths, of_all)
        if len(groups[name]) > 2 and (name == of_all or len(groups[name]) < len(sizes))
    }


def table(record: dict[str, Any]) -> str:
    """Accuracy of each graph by size, and what it has more than the control: mean, interval, p.

    p-values are corrected for all tests of all sizes. Seeds of one size are no sample of sizes, so all sizes together
    are tested by their means, with p-values that are corrected for all of these tests.
    """
    sizes = compared(record)
    tested = _tested({(graph, size): values for size, more in sizes.items() for graph, values in more.items()})
    lines: dict[str, list[list[str]]] = {size: [] for size in sizes}
    for row in record["rows"]:
        graph, _, size = row["row"].partition(", ")
        cells = tested.get((graph, size), _NOTHING)
        lines[size].append([graph, f"{mean(row, 'weights'):,.0f}", spread(row["ends"], accuracy, 2), *cells])
    header = ["graph", "weights", "test accuracy, %", *_TESTED]
    parts = [f"**{size}**\n\n{markdown(header, of_size)}" for size, of_size in lines.items()]
    together = pooled(sizes)
    tested = _tested({(graph, name): values for name, of in together.items() for graph, values in of.items()})
    for name, of in together.items():
        rows = [[graph, str(len(of[graph])), *tested[graph, name]] for graph in of if (graph, name) in tested]
        parts.append(f"**{name}**\n\n{markdown(['graph', 'sizes', *_TESTED], rows)}")
    return "\n\n".join(parts)


_TESTED = (f"minus {CONTROL}, points", "95 % interval", "p (paired t, Holm)")
_NOTHING = ("–",) * len(_TESTED)


def _tested(more: dict[Any, list[float]]) -> dict[Any, tuple[str, str, str]]:
    """The cells of differences that vary: their mean, its interval, and its p-value, corrected for all of them."""
    more = {key: values for key, values in more.items() if len(set(values)) > 1}
    p_values = holm([float(stats.ttest_1samp(values, 0).pvalue) for values in more.values()])
    cells = {}
    for (key, values), p in zip(more.items(), p_values, strict=True):
        low, high = interval(values)
        cells[key] = (f"{statistics.mean(values):+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.2g}")
    return cells


STUDY = Study(
    "structure_study",
    __doc__,
    "--dataset fashionmnist --density erk --T 10 --lr_schedule cosine --weight_decay 0 --standardize "
    "--surrogate triangle",
    rows_of(SIZES),
    5,
    table,
    default_rows=("*, H 1024, 5 %, units of 16",),
    seeds=(1, 2, 3, 4, 5),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
