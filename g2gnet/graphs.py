"""A network of spiking layers as one graph, and as a table with pictures for notebooks."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from g2g_kernels.mask.conversions import picture
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons

Layers = Iterable[tuple[G2GLinear, SpikingNeurons]]
Recurrents = Sequence[G2GLinear | None]


def to_networkx(layers: Layers, recurrents: Recurrents = ()) -> Any:
    """A ``networkx.DiGraph`` of all neurons: nodes ("input", j), ("lif1", i), ("lif2", i), …, edges with ``weight``.

    The ``group`` of a neuron is its group as an output; of inputs, that on the input side of ``fc1``.

    Args:
        layers: ``stack.layers()``.
        recurrents: ``stack.recurrents()``, whose edges lead from the neurons of a layer to the same neurons.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_networkx(G2GNet(64, 64, 10, block_size=8).layers())
        >>> graph.number_of_nodes()
        202
    """
    graph: Any = None
    source = "input"
    for number, (connection, _) in enumerate(layers, 1):
        target = f"lif{number}"
        part = connection.mask.to_networkx(connection.values, source, target)
        if graph is None:
            graph = part
        else:
            graph.add_nodes_from((node, data) for node, data in part.nodes(data=True) if node[0] == target)
            graph.add_edges_from(part.edges(data=True))
        source = target
    for number, recurrent in enumerate(recurrents, 1):
        if recurrent is not None:
            name = f"lif{number}"
            graph.add_edges_from(recurrent.mask.to_networkx(recurrent.values, name, name).edges(data=True))
    return graph


def to_html(layers: Layers, recurrents: Recurrents = ()) -> str:
    """One row per connection: its groups, the units that exist, the neurons that it leads to.

    Args:
        layers, recurrents: as for :func:`to_networkx`. A recurrent connection has the row below that of its layer.

    Example:
        >>> from g2gnet import G2GNet
        >>> "<img" in to_html(G2GNet(64, 64, 10, block_size=8).layers())
        True
    """
    joined = dict(enumerate(recurrents, 1))
    rows = []
    for number, (connection, neurons) in enumerate(layers, 1):
        rows.append(_row(f"fc{number}, lif{number}", connection, repr(neurons)))
        recurrent = joined.get(number)
        if recurrent is not None:
            rows.append(_row(f"rec{number}", recurrent, f"lif{number}, one step later"))
    names = ("layer", "neurons", "groups", "units", "density", "model", "units that exist")
    header = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{header}</tr>{''.join(rows)}</table>"


def _row(name: str, connection: G2GLinear, neurons: str) -> str:
    mask = connection.mask
    kinds = " ← ".join(dict.fromkeys((mask.rows.layout.kind, mask.cols.layout.kind)))
    cells = (
        name,
        f"{mask.shape[1]} → {mask.shape[0]}",
        f"{mask.rows.layout.num_groups} ({kinds})",
        f"{mask.num_units} of {mask.grid[0] * mask.grid[1]}",
        f"{100 * mask.density:.1f} %",
        neurons,
    )
    text = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f"<tr>{text}<td>{picture(mask)}</td></tr>"
