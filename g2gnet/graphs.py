"""A network of populations as a graph of networkx, and as a table with pictures for notebooks."""

import html
from typing import TYPE_CHECKING, Any

from g2g_kernels.mask.conversions import picture

if TYPE_CHECKING:
    from g2gnet.projections import PopulationGraph


def to_networkx(net: "PopulationGraph") -> Any:
    """A ``networkx.DiGraph`` of all neurons: nodes ("input", j), ("lif1", i), ("lif2", i), …, edges with ``weight``,
    and with ``delay``, in steps, if their projection has one. A ``MultiDiGraph`` if two projections join the same pair.
    The ``group`` of a neuron is its group as an output of its first connection; of an input, as an input.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_networkx(G2GNet(64, 64, 10, block_size=8))
        >>> graph.number_of_nodes()
        202
    """
    import networkx  # which is optional

    net.check_linear("to_networkx")
    connections, names, projections = net.connections(), [*net.populations, "input"], net.projections()
    pairs = {(each.source, each.target) for each in projections}
    graph = networkx.DiGraph() if len(pairs) == len(projections) else networkx.MultiDiGraph()
    for number in (-1, *range(len(net.populations))):
        first = next(each.name for each in projections if number == (each.source if number < 0 else each.target))
        mask = connections[first].mask
        groups = (mask.cols if number < 0 else mask.rows).layout.group_of.tolist()
        graph.add_nodes_from(((names[number], neuron), {"group": group}) for neuron, group in enumerate(groups))
    for each in projections:
        connection, delays = connections[each.name], net.delays(each.name).tolist()
        part = connection.mask.to_networkx(connection.values, names[each.source], names[each.target])
        for (_, sender), _, data in part.edges(data=True) if each.most else ():
            data["delay"] = delays[sender]
        graph.add_edges_from(part.edges(data=True))
    return graph


def to_html(net: "PopulationGraph") -> str:
    """One row per connection: its groups, its units, its delays, and the neurons that it leads to.

    Example:
        >>> from g2gnet import G2GNet
        >>> "█" in to_html(G2GNet(64, 64, 10, block_size=8))
        True
    """
    connections: dict[str, Any] = dict(net.connections())
    neurons = [*net.neurons().items()]
    rows, seen = [], set()
    for each in net.projections():
        name, module = neurons[each.target]
        label, text = (each.name, name) if each.target in seen else (f"{each.name}, {name}", repr(module))
        seen.add(each.target)
        if each.most:
            delays = net.delays(each.name)
            least, most = int(delays.min()), int(delays.max())
            text += f", {f'{least} to {most}' if least < most else most} step{'s' * (most > 1)} later"
        rows.append(_row(label, connections[each.name], text))
    names = ("layer", "neurons", "groups", "units", "density", "model", "units that exist")
    header = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{header}</tr>{''.join(rows)}</table>"


def _row(name: str, connection: Any, neurons: str) -> str:
    mask = getattr(connection, "mask", None)
    if mask is None:  # images are joined by every kernel, or by a pool
        joined, module, after = map(html.escape, (name, repr(connection), neurons))
        return f"<tr><td>{joined}</td><td colspan=4>{module}</td><td>{after}</td><td></td></tr>"
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
