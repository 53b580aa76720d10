"""Growth rules of dynamic sparse training against static graphs on Fashion-MNIST: ``python -m benchmarks.dst_study``.

Densities below 25.6 % scale p_intra and p_inter by the same factor, so the groups do not change:
p_intra = density / 0.25625, p_inter = 0.15·p_intra. All prune by magnitude; the replaced share starts at 0.3,
every 100 steps, and falls along a cosine to zero at 75 % of training. At 25 % there is also the default schedule, 10 %
every 1,000 steps. Each run is a ``g2g-train`` on one thread; run the study again to resume it. ``--rows`` and
``--seeds`` run a part of it.
"""

import sys
from collections.abc import Sequence
from typing import Any

from g2gnet.base.tables import markdown

from .study import Study, accuracy, of_hidden_layers, run_study, spread, standard_error

#: densities in per cent, by the side of a unit
DENSITIES = {16: (25, 10, 5, 2), 64: (25, 5), 1: (5,)}
GROWTH = {
    "static": "",
    "random": "--sparsity_mode dynamic --cg random",
    "correlation": "--sparsity_mode dynamic --cg hebb",
    "gradient": "--sparsity_mode dynamic --cg gradient",
}
SCHEDULE = "--dst_interval 100 --dst_fraction 0.3 --dst_schedule cosine --dst_stop 0.75"
#: flags of rewired networks: pruned by magnitude and grown by gradient
REWIRED = f"{GROWTH['gradient']} {SCHEDULE}"
FULL = 0.25625  # the density at p_intra = 1, p_inter = 0.15 and 8 groups


def density_flags(percent: float) -> str:
    """The probabilities of a density; the default ones for 25 %."""
    p_intra = 1.0 if percent == 25 else percent / 100 / FULL
    return f"--p_intra {p_intra:.4g} --p_inter {0.15 * p_intra:.4g}"


def _rows() -> dict[str, str]:
    rows = {}
    for side, densities in DENSITIES.items():
        for percent in densities:
            for growth, flags in GROWTH.items():
                schedule = f" {SCHEDULE}" if flags else ""
                row = f"--block_size {side} {density_flags(percent)} {flags}{schedule}"
                rows[f"units of {side}, {percent} %, {growth}"] = row.strip()
    for growth in ("random", "correlation"):
        rows[f"units of 64, 25 %, {growth}, default schedule"] = f"--block_size 64 {GROWTH[growth]}"
    return rows


def table(record: dict[str, Any]) -> str:
    """Accuracy by units, density and growth; the best growth minus static; and how the graphs differ."""
    ends = {row["row"]: row["ends"] for row in record["rows"]}
    accuracies, graphs = [], []
    for side, densities in DENSITIES.items():
        for percent in densities:
            grown = {growth: ends.get(f"units of {side}, {percent} %, {growth}") for growth in GROWTH}
            if not any(grown.values()):
                continue
            cells = [spread(runs, accuracy) if runs else "–" for runs in grown.values()]
            accuracies.append([f"{side}", f"{percent} %", *cells, _gain(grown)])
            graphs += [[f"{side}", f"{percent} %", growth, *_graph(runs)] for growth, runs in grown.items() if runs]
    others = [[name, spread(runs, accuracy)] for name, runs in ends.items() if "default schedule" in name]
    parts = [
        markdown(["block size", "density", *GROWTH, "best growth − static"], accuracies) if accuracies else "",
        markdown(["", "test accuracy, %"], others) if others else "",
        "The graphs that came of it. Never fires: neurons of hidden layers 1 and 2 silent over the last epoch. Spread: "
        "standard deviation over mean of the units of a block row of fc2, and of a block column. Inside: units of "
        "fc2 that join neurons of one group.",
        markdown(["block size", "density", "growth", "never fires, %", "spread", "rows empty", "inside"], graphs),
    ]
    return "\n\n".join(part for part in parts if part)


def _gain(runs_of: dict[str, list[dict[str, Any]] | None]) -> str:
    """The growth rule of the highest mean accuracy minus static, with its standard error if that is known."""
    static = [accuracy(end) for end in runs_of["static"] or []]
    grown = {growth: [accuracy(end) for end in runs] for growth, runs in runs_of.items() if runs and growth != "static"}
    if not static or not grown:
        return "–"
    best = max(grown, key=lambda growth: sum(grown[growth]) / len(grown[growth]))
    gain = sum(grown[best]) / len(grown[best]) - sum(static) / len(static)
    if min(len(grown[best]), len(static)) == 1:
        return f"{gain:+.2f} ({best})"
    error = (standard_error(grown[best]) ** 2 + standard_error(static) ** 2) ** 0.5
    return f"{gain:+.2f} ± {error:.2f} ({best})"


def _graph(runs: list[dict[str, Any]]) -> list[str]:
    def mean(layer: str, name: str) -> float:
        return sum(run["placement"][layer][name] for run in runs) / len(runs)

    return [
        of_hidden_layers(runs, "silent"),
        f"{mean('fc2', 'rows_spread'):.2f}, {mean('fc2', 'cols_spread'):.2f}",
        f"{100 * mean('fc2', 'rows_empty'):.0f} %",
        f"{100 * mean('fc2', 'inside'):.0f} %",
    ]


STUDY = Study(
    "dst_study",
    __doc__,
    "--dataset fashionmnist --model index --T 10 --hidden_dim 1024 --lr_schedule cosine --weight_decay 0 --standardize "
    "--surrogate triangle",
    _rows(),
    20,
    table,
)


def main(argv: Sequence[str] | None = None) -> int:
    return run_study(STUDY, argv)


if __name__ == "__main__":
    sys.exit(main())
