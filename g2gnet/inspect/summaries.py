"""The analysis as tables: rows of text for a page, or columns for a terminal."""

import math
from typing import NamedTuple

import torch

from g2gnet.base.tables import in_columns
from g2gnet.inspect.analysis import LayerAnalysis, NetworkAnalysis


class Table(NamedTuple):
    """A heading for each column, and rows of as many cells.

    Example:
        >>> print(Table(("layer", "rate"), [("lif1", "0.12"), ("lif2", "0.3")]))
        layer  rate
        ─────  ────
        lif1   0.12
        lif2    0.3
    """

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def __str__(self) -> str:
        return in_columns(self.header, self.rows)


def headline(analysis: NetworkAnalysis, images: int | None = None) -> str:
    """How much was analysed, of ``images`` in all, and the three main numbers of the network.

    Example:
        >>> headline(analysis, images=100).partition(":")[0]
        '30 of 100 test images, 20 steps'
    """
    part = "" if images is None or images <= analysis.samples else f" of {images:,}"
    return (
        f"{analysis.samples:,}{part} test images, {analysis.steps} steps: accuracy {analysis.accuracy:.4f}, "
        f"firing rate {analysis.firing_rate:.3g} spikes per neuron and step, "
        f"{round(analysis.synaptic_operations):,} synaptic operations per image"
    )


def summary_table(analysis: NetworkAnalysis) -> Table:
    """The quantities that need no explanation, one row per layer.

    Example:
        >>> summary_table(analysis).header[:3]
        ('layer', 'neurons', 'spikes per neuron and step')
    """
    rows = [
        {
            "layer": layer.name,
            "neurons": f"{len(layer.neuron_rates):,}",
            "spikes per neuron and step": number(layer.firing_rate),
            "neurons that never fired": percent(layer.silent),
            "synaptic operations per image": f"{round(layer.accumulates + layer.multiplies):,}",
        }
        for layer in analysis.layers
    ]
    return Table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def layers_table(analysis: NetworkAnalysis) -> Table:
    """One column per layer, quantities of groups as means over them; – where not defined.

    Example:
        >>> layers_table(analysis).header
        ('', 'lif1', 'lif2', 'lif3')
    """
    columns = [_quantities(layer) for layer in analysis.layers]
    rows = [(label, *(cells[label] for cells in columns)) for label in columns[0]]
    return Table(("", *(layer.name for layer in analysis.layers)), rows)


def _quantities(layer: LayerAnalysis) -> dict[str, str]:
    other_groups = ~torch.eye(len(layer.group_sizes), dtype=torch.bool)
    operations = layer.accumulates + layer.multiplies
    parts = layer.correlation._asdict()
    return {
        "neurons": str(len(layer.neuron_rates)),
        "groups": str(len(layer.group_sizes)),
        "firing rate (spikes per neuron and step)": number(layer.firing_rate),
        "neurons that never fired": percent(layer.silent),
        "synaptic operations per image: additions": f"{round(layer.accumulates):,}",
        "synaptic operations per image: multiplications": f"{round(layer.multiplies):,}",
        "share of the operations of a dense layer with dense inputs": percent(operations / layer.dense_operations),
        "temporal synchrony within groups": _mean(layer.synchrony),
        **{f"correlation of spike counts within groups, {part}": _mean(of.diagonal()) for part, of in parts.items()},
        "correlation of spike counts between groups, noise": _mean(layer.correlation.noise[other_groups]),
        "coherence between groups": _mean(layer.cross_group_coherence),
        "coherence between groups by chance alone": _mean(layer.chance_coherence),
        "inputs from other groups": percent(float(layer.cross_group_share.nanmean())),
        "r: coherence of a group, its inputs from others": number(layer.coherence_by_share),
        "r: coherence with an input group, density": number(layer.coherence_by_pathway),
        "entropy of input groups, by connections": _mean(layer.input_entropy),
        "entropy of input groups, by weight": _mean(layer.weight_entropy),
    }


def groups_table(layer: LayerAnalysis) -> Table:
    """One row per group.

    Example:
        >>> len(groups_table(analysis.layers[0]).rows)
        8
    """
    columns = {
        f"{layer.name} group": [str(group + 1) for group in range(len(layer.group_sizes))],
        "neurons": [str(size) for size in layer.group_sizes.tolist()],
        "rate": _numbers(layer.group_rates),
        "synchrony": _numbers(layer.synchrony),
        "corr. total": _numbers(layer.correlation.total.diagonal()),
        "signal": _numbers(layer.correlation.signal.diagonal()),
        "noise": _numbers(layer.correlation.noise.diagonal()),
        "coherence": _numbers(layer.cross_group_coherence),
        "inputs from other groups": [percent(share) for share in layer.cross_group_share.tolist()],
        "entropy": _numbers(layer.input_entropy),
        "by weight": _numbers(layer.weight_entropy),
    }
    return Table(tuple(columns), list(zip(*columns.values(), strict=True)))


def number(value: float) -> str:
    """Three digits, or – for NaN."""
    if math.isnan(value):
        return "–"
    if abs(value) < 1e-9:  # zero but for rounding
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:#.3g}"


def percent(share: float) -> str:
    """A share in per cent, or – for NaN."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _numbers(values: torch.Tensor) -> list[str]:
    return [number(value) for value in values.tolist()]


def _mean(values: torch.Tensor) -> str:
    return number(float(values.nanmean()))
