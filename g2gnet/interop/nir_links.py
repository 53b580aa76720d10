"""The connections of a NIR graph: one linear node or convolution, perhaps between pools and behind a Delay node, or
pools alone, join neurons to neurons."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.numbers import Number
from g2gnet.interop.arrays import numbers


class Link(NamedTuple):
    """A linear node or convolution, the neurons before it (None: the input) and behind it, the shape of its weight
    (none of pools alone), what :class:`Projection` takes, and the pool nodes before and behind it."""

    name: str
    source: str | None
    target: str
    shape: tuple[int, ...]
    bias: np.ndarray | None
    delay: int | torch.Tensor
    learn_delay: bool = False
    max_delay: int | None = None
    delay_width: int = 1
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def takes(self, steps: int) -> bool:
        """Whether every neuron has this fixed delay."""
        return isinstance(self.delay, int) and self[5:9] == (steps, False, None, 1)


def links_of(nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]], dt: float, nir: Any) -> tuple[list[Link], str]:
    """All connections in the order of the edges, those of pools alone last, and the neurons that lead to the output.
    Raises ValueError for other nodes, and for edges that are not part of such a connection."""
    linear, neurons = (nir.Affine, nir.Linear, nir.Conv2d), (nir.LIF, nir.CubaLIF, nir.IF)
    pools = (nir.SumPool2d, nir.AvgPool2d)
    for name, node in nodes.items():
        if node is None:
            raise ValueError(f"node {name} is empty: the tool that wrote the graph could not express it in NIR")
        if not isinstance(node, (nir.Input, nir.Output, nir.Delay, *linear, *pools, *neurons)):
            raise ValueError(
                f"node {name} is a {type(node).__name__}; a network takes Affine, Linear, Conv2d, SumPool2d, "
                "AvgPool2d, Flatten, Delay, LIF, CubaLIF and IF"
            )
    start, end = (_end_of("the graph", nodes, edges, kind) for kind in (nir.Input, nir.Output))
    if not isinstance(nodes[start], nir.Input):  # tools that write no ends
        nodes, edges, start = {**nodes, "": end_node(nir.Input, 1)}, [("", start), *edges], ""
    before = {name: [one for one, other in edges if other == name] for name in nodes}
    behind = {name: [other for one, other in edges if one == name] for name in nodes}

    def only(name: str, joined: Mapping[str, list[str]], verb: str, kinds: tuple[type, ...]) -> str:
        """The one node, of these kinds, that a node is joined to in one direction."""
        if len(joined[name]) != 1:
            raise ValueError(
                f"node {name} {verb} {', '.join(joined[name]) or 'nothing'}, where one node is needed; give each pair "
                "of populations a linear node of its own"
            )
        (other,) = joined[name]
        if not isinstance(nodes[other], kinds):
            raise ValueError(
                f"node {name} {verb} {other}, a {type(nodes[other]).__name__}; a linear node joins neurons (or the "
                "input), perhaps behind one Delay, to neurons"
            )
        return other

    used: set[tuple[str, str]] = set()
    links: list[Link] = []

    def past_pools(name: str, joined: Mapping[str, list[str]], verb: str, kinds: tuple[type, ...]) -> tuple[str, ...]:
        """The pools that follow a node in one direction, and the first node behind them, which is of these kinds."""
        found: tuple[str, ...] = ()
        while not found or isinstance(nodes[name], pools):
            other = only(name, joined, verb, (*pools, *kinds))
            used.add((other, name) if joined is before else (name, other))
            found, name = (*found, other), other
        return found

    in_order = list(dict.fromkeys([*itertools.chain(*edges), *nodes]))
    weighted = [name for name in in_order if isinstance(nodes[name], linear)]
    for name in (*weighted, *[name for name in in_order if isinstance(nodes[name], pools)]):
        if any(name in (*link.before, *link.after) for link in links):
            continue
        *after, target = past_pools(name, behind, "leads to", neurons)
        *of_before, source = past_pools(name, before, "receives from", (nir.Delay, nir.Input, *neurons))
        shape: tuple[int, ...] = ()
        earlier, bias = tuple(of_before[::-1]), None
        if isinstance(nodes[name], linear):
            weight = nodes[name].weight
            of_images = np.size(weight) if isinstance(nodes[name], nir.Conv2d) else None
            if of_images is not None and (np.ndim(weight) != 4 or not of_images):
                raise ValueError(
                    f"node {name}: weight has shape {list(np.shape(weight))}; give [out, in, rows, columns]"
                )
            shape = np.shape(weight) if of_images else numbers(f"node {name}: weight", weight).shape
            bias = getattr(nodes[name], "bias", None)
        if bias is not None:
            bias = np.broadcast_to(numbers(f"node {name}: bias", bias, shape[0]), shape[0])
        delay: tuple[Any, ...] = (int(source == target),)  # in a loop one step, the least
        if isinstance(nodes[source], nir.Delay):
            later, source = source, only(source, before, "receives from", (nir.Input, *neurons))
            used.add((source, later))
            size = shape[1] if len(shape) == 2 and not earlier else np.size(nodes[later].delay)
            delay = _delay(later, nodes[later], size, dt)
        if not shape:  # of pools, the first names the connection
            earlier, name, after = (), (*earlier, name)[0], [*(*earlier, name)[1:], *after]
        link = Link(name, None if source == start else source, target, shape, bias, *delay)
        links.append(link._replace(before=earlier, after=tuple(after)))
    if isinstance(nodes[end], nir.Output):
        output = only(end, before, "receives from", neurons)
        used.add((output, end))
        end = output
    for one, other in edges:
        if (one, other) not in used:
            raise ValueError(
                f"the edge {one} → {other} is part of no connection from neurons (or the input) by one Linear or "
                "Affine node to neurons; add such a node, which passes spikes on if it is the identity"
            )
    for name, node in nodes.items():
        if isinstance(node, (nir.Delay, *neurons)) and not before[name]:
            raise ValueError(f"node {name} receives nothing; join it to the input by a Linear or Affine node")
    return links, end


def _delay(name: str, node: Any, size: int, dt: float) -> tuple[Any, ...]:
    """The delay of a Delay node behind ``size`` neurons, as the last fields of a link."""
    steps = numbers(f"node {name}: delay", node.delay, size, Number(0).check) / dt
    whole = steps.round()
    exact = np.abs(steps - whole) <= 1e-6 * np.maximum(1, steps)  # float32 rounds by less
    for neuron in np.flatnonzero(~exact).tolist():
        raise ValueError(
            f"node {name} delays neuron {neuron} by {steps[neuron]:g} steps of dt={dt:g} s; delays are whole numbers "
            "of steps: round them, or give the dt that the graph was made for"
        )
    delay = torch.from_numpy(whole.clip(max=2**62)).long()
    with metadata_of(name, node) as metadata:
        most = metadata.get("max_delay")
        alone = bool((delay == delay[0]).all()) and most is None
        learned = metadata.get("learn_delay", False), most, metadata.get("delay_width", 1)
        return int(delay[0]) if alone else delay.expand(size).clone(), *learned


def chain_of(links: Sequence[Link], output: str) -> list[tuple[Link, list[Link]]] | None:
    """The layers of a stack, each with its loop, if it has one, whose bias the layer gets. None: the graph is no chain
    without delays."""
    layers: list[tuple[Link, list[Link]]] = []
    left, name = list(links), None
    while left:
        onward = [link for link in left if link.source == name]
        if len(onward) != 1 or not onward[0].takes(0):
            return None
        name, bias = onward[0].target, onward[0].bias
        loops = [link for link in left if link.target == name and link is not onward[0]]
        if len(loops) > 1 or not all(loop.source == name and loop.takes(1) for loop in loops):
            return None
        for loop in loops:
            if loop.bias is not None and loop.bias.any():  # tools that know no Linear write an Affine with zeros
                bias = loop.bias if bias is None else bias + loop.bias
        layers.append((onward[0]._replace(bias=bias), [loop._replace(bias=None) for loop in loops]))
        left = [link for link in left if link.target != name]
    return layers if name == output else None


def end_node(kind: Any, *shape: int) -> Any:
    """An input or output node."""
    name = kind.__name__.lower()
    return kind(**{f"{name}_type": {name: np.array(shape)}})


def _end_of(what: str, nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]], kind: Any) -> str:
    """The one input or output of a graph; some tools write no node for it."""
    side = 1 if kind.__name__ == "Input" else 0
    joined = {edge[side] for edge in edges}
    found = [name for name, node in nodes.items() if isinstance(node, kind)] or [n for n in nodes if n not in joined]
    if len(found) != 1:
        raise ValueError(f"{what} has {len(found)} {kind.__name__.lower()}s; a network takes graphs with one")
    return found[0]


def flattened(graph: Any, nir: Any, prefix: str = "") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Nodes and edges of a graph and of the graphs inside of it. Flatten and inner ends, which compute nothing, go."""
    nodes: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    ends: dict[str, tuple[str, str]] = {}
    inside: dict[str, list[tuple[str, str]]] = {}
    for key, node in graph.nodes.items():
        name = prefix + key
        if isinstance(node, nir.NIRGraph):
            inner = flattened(node, nir, f"{name}.")
            first, last = (_end_of(f"the graph {name}", *inner, kind) for kind in (nir.Input, nir.Output))
            ends[name] = first, last
            nodes |= inner[0]
            inside[name] = inner[1]
        else:
            nodes[name] = node
    for edge in graph.edges:
        if len(edge) != 2 or not set(edge) <= set(graph.nodes):
            raise ValueError(f"the edge {tuple(edge)} does not join two of the nodes {', '.join(graph.nodes)}")
        source, target = (prefix + end for end in edge)
        edges.append((ends.get(source, (source, source))[1], ends.get(target, (target, target))[0]))
        edges += inside.pop(target, ())  # behind the first edge that leads there
    edges += itertools.chain(*inside.values())
    own = {prefix + key for key in graph.nodes}
    for name, node in list(nodes.items()):
        if isinstance(node, nir.Flatten) or (isinstance(node, nir.Input | nir.Output) and name not in own):
            del nodes[name]
            before = [source for source, target in edges if target == name and source != name]
            after = [target for source, target in edges if source == name and target != name]
            edges = [edge for edge in edges if name not in edge] + list(itertools.product(before, after))
    return nodes, list(dict.fromkeys(edges))


@contextlib.contextmanager
def metadata_of(name: str, node: Any) -> Iterator[dict[str, Any]]:
    """The metadata of a node, as :func:`to_nir` writes them. A ValueError of their reader gets the node's name."""
    if not isinstance(node.metadata, Mapping):
        raise ValueError(f"node {name}: metadata is a {type(node.metadata).__name__}; give a dict, or {{}}")
    try:  # files give NumPy's numbers
        yield {key: of.item() if getattr(of, "shape", None) == () else of for key, of in node.metadata.items()}
    except ValueError as error:
        raise ValueError(f"node {name}: metadata: {error}; correct or delete it") from error
