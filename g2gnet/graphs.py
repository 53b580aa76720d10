"""A network of spiking layers as one graph."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from g2gnet.projections import PopulationGraph


def to_networkx(net: "PopulationGraph") -> Any:
    """A ``networkx.DiGraph`` of all neurons: nodes ("input", j), ("lif1", i), ("lif2", i), …, edges with ``weight``,
    and where spikes arrive later with ``delay``, in steps. A ``MultiDiGraph`` if two projections join the same pair.

    The ``group`` of a neuron is its group as an output of its first connection; of inputs, as an input.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_networkx(G2GNet(64, 64, 10, block_size=8))
        >>> graph.number_of_nodes()
        202
    """
    import networkx  # which is optional

    connections, names, routes = net.connections(), [*net.populations, "input"], net.routes()
    pairs = {(route.source, route.target) for route in routes}
    graph = networkx.DiGraph() if len(pairs) == len(routes) else networkx.MultiDiGraph()
    for number in (-1, *range(len(net.populations))):
        first = next(route.name for route in routes if number == (route.source if number < 0 else route.target))
        mask = connections[first].mask
        groups = (mask.cols if number < 0 else mask.rows).layout.group_of.tolist()
        graph.add_nodes_from(((names[number], neuron), {"group": group}) for neuron, group in enumerate(groups))
    for route in routes:
        connection, delays = connections[route.name], net.delays(route.name).tolist()
        part = connection.mask.to_networkx(connection.values, names[route.source], names[route.target])
        late = {"delay": delays} if route.most else {}
        graph.add_edges_from(
            (pre, post, data | {name: steps[pre[1]] for name, steps in late.items()})
            for pre, post, data in part.edges(data=True)
        )
    return graph
