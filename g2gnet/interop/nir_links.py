"""The connections of a NIR graph: ways from neurons, by one linear node and Delay nodes, to neurons."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.choices import check_flag
from g2g_kernels.numbers import Number
from g2gnet.interop.arrays import numbers
from g2gnet.projections import DELAY

#: the nodes of neurons that are read
NEURON_NODES = ("LIF", "CubaLIF", "IF")


class LinkDelay(NamedTuple):
    """The delays of a projection, as :class:`Projection` takes them."""

    delay: int | torch.Tensor = 0
    learn_delay: bool = False
    max_delay: int | None = None


class Link(NamedTuple):
    """A linear node, the neurons before it (None: the input) and those behind it, and the delays on the way."""

    name: str
    source: str | None
    target: str
    shape: tuple[int, int]
    bias: np.ndarray | None
    later: LinkDelay

    def takes(self, steps: int) -> bool:
        """Whether this is the delay of all neurons, and stays it."""
        return isinstance(self.later.delay, int) and self.later == (steps, *LinkDelay()[1:])


def links_of(nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]], dt: float, nir: Any) -> tuple[list[Link], str]:
    """All linear nodes in the order of the edges, and the neurons that lead to the output. Raises ValueError for edges
    that are on no way from neurons, or the input, by one of them to neurons."""
    start, end = (_end_of("the graph", nodes, edges, kind) for kind in (nir.Input, nir.Output))
    edges = list(edges)
    if not isinstance(nodes[start], nir.Input):  # tools that write no ends
        nodes, edges, start = {**nodes, "": end_node(nir.Input, 1)}, [("", start), *edges], ""
    before = {name: [one for one, other in edges if other == name] for name in nodes}
    behind = {name: [other for one, other in edges if one == name] for name in nodes}
    sources, targets = (nir.Input, *neuron_kinds(nir)), neuron_kinds(nir)
    left, links = dict.fromkeys(edges), []

    def way(name: str, onward: Mapping[str, list[str]], ends: tuple[type, ...], verb: str) -> list[str]:
        """The Delay nodes from a linear node on, and the neurons behind them."""
        found = [name]
        while len(found) == 1 or isinstance(nodes[found[-1]], nir.Delay):
            last = found[-1]
            if len(onward[last]) != 1 or onward[last][0] in found:
                others = ", ".join(onward[last]) or "nothing"
                raise ValueError(
                    f"node {last} {verb} {others}; a connection joins one population to one, so give each pair a "
                    "linear node of its own"
                )
            found += onward[last]
        if not isinstance(nodes[found[-1]], ends):
            raise ValueError(
                f"node {found[-2]} {verb} {found[-1]}, a {type(nodes[found[-1]]).__name__}; a linear node joins "
                "neurons (or the input) to neurons"
            )
        return found[1:]

    for name in dict.fromkeys([*itertools.chain(*edges), *nodes]):
        if not isinstance(nodes[name], linear_kinds(nir)):
            continue
        back, ahead = way(name, before, sources, "receives from"), way(name, behind, targets, "leads to")
        for edge in itertools.pairwise([*back[::-1], name, *ahead]):
            left.pop(edge, None)
        weight = numbers(f"node {name}: weight", nodes[name].weight)
        bias, (*delays, source), (*after, target) = _bias(name, nodes[name], len(weight)), back, ahead
        if delays or after:
            of = {each: nodes[each] for each in (*delays, *after)}
            later = _later(name, of, delays, (weight.shape[1], weight.shape[0]), bias, dt)
        else:  # in a loop the least that a time step allows
            later = LinkDelay(int(source == target))
        links.append(Link(name, None if source == start else source, target, weight.shape, bias, later))
    if isinstance(nodes[end], nir.Output):
        if len(before[end]) != 1 or not isinstance(nodes[before[end][0]], targets):
            others = ", ".join(f"{name} ({type(nodes[name]).__name__})" for name in before[end]) or "nothing"
            raise ValueError(f"the output receives from {others}; it takes the spikes of one population")
        left.pop((before[end][0], end))
        end = before[end][0]
    for one, other in left:
        raise ValueError(
            f"the edge {one} → {other} is on no way from neurons, or the input, to neurons by one Linear or Affine "
            "node; join them by such a node, of the identity for spikes as they are"
        )
    for name, node in nodes.items():
        if isinstance(node, (nir.Delay, *targets)) and not before[name]:
            raise ValueError(f"node {name} receives nothing; join it to the input by a Linear or Affine node")
    return links, end


def _later(
    name: str,
    nodes: Mapping[str, Any],
    before: Sequence[str],
    sizes: tuple[int, int],
    bias: np.ndarray | None,
    dt: float,
) -> LinkDelay:
    """The delays that Delay ``nodes`` before and behind the linear node ``name`` give to the neurons of its source."""
    seconds = np.zeros(1)
    for each, node in nodes.items():
        of_node = numbers(f"node {each}: delay", node.delay, sizes[each not in before], Number(0).check)
        if each not in before:
            if differing := np.flatnonzero(of_node != of_node[0]).tolist():
                raise ValueError(
                    f"node {each}, behind node {name}, delays neuron {differing[0]} by {of_node[differing[0]]:g} s and "
                    f"neuron 0 by {of_node[0]:g} s; delays are those of a source's neurons, so put them before {name}"
                )
            if of_node[0] and bias is not None and bias.any():
                raise ValueError(
                    f"node {each} delays the bias of node {name}, and ours acts from the first step on; put the Delay "
                    f"before {name}"
                )
            of_node = of_node[:1]
        seconds = seconds + of_node
    steps = seconds / dt
    whole = steps.round()
    close = np.abs(steps - whole) <= 1e-6 * np.maximum(1, steps)  # float32 rounds by less
    for neuron in np.flatnonzero(~close).tolist():
        raise ValueError(
            f"node {', '.join(nodes)} delays neuron {neuron} by {seconds[neuron]:g} s, {steps[neuron]:g} steps of "
            f"dt={dt:g} s; delays are whole numbers of steps: round them, or give the dt that the graph was made for"
        )
    delay = torch.from_numpy(whole.clip(max=2**62)).long()
    (first, node), *more = nodes.items()
    read = functools.partial(metadata_entry, first, node)
    learned = not more and read("learn_delay", False, check_flag)
    most = None if more else read("max_delay", None, lambda key, of: of if of is None else DELAY.check(key, of))
    alone = bool((delay == delay[0]).all()) and most is None
    return LinkDelay(int(delay[0]) if alone else delay.expand(sizes[0]).clone(), learned, most)


def chain_of(links: Sequence[Link], output: str) -> list[tuple[Link, Link | None]] | None:
    """The layers of a stack, each with its loop; None: the graph is no chain without delays."""
    layers: list[tuple[Link, Link | None]] = []
    left, name = list(links), None
    while left:
        onward = [link for link in left if link.source == name]
        if len(onward) != 1 or not onward[0].takes(0):
            return None
        name = onward[0].target
        loops = [link for link in left if link.target == name and link is not onward[0]]
        if len(loops) > 1 or not all(link.source == name and link.takes(1) for link in loops):
            return None
        layers.append((onward[0], loops[0] if loops else None))
        left = [link for link in left if link.target != name]
    return layers if name == output else None


def end_node(kind: Any, size: int) -> Any:
    """An input or output node."""
    name = kind.__name__.lower()
    return kind(**{f"{name}_type": {name: np.array([size])}})


def linear_kinds(nir: Any) -> tuple[type, ...]:
    return nir.Affine, nir.Linear


def neuron_kinds(nir: Any) -> tuple[type, ...]:
    return tuple(getattr(nir, kind) for kind in NEURON_NODES)


def _end_of(what: str, nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]], kind: Any) -> str:
    """The one input or output of a graph, whose node some tools leave out."""
    side = 1 if kind.__name__ == "Input" else 0
    joined = {edge[side] for edge in edges}
    found = [name for name, node in nodes.items() if isinstance(node, kind)] or [n for n in nodes if n not in joined]
    if len(found) != 1:
        raise ValueError(f"{what} has {len(found)} {kind.__name__.lower()}s; a network takes graphs with one")
    return found[0]


def flattened(graph: Any, nir: Any, prefix: str = "") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Nodes and edges of a graph and of those inside of it, without Flatten and inner ends, which compute nothing."""
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
        edges += inside.pop(target, ())  # behind the first that leads there
    edges += itertools.chain(*inside.values())
    own = {prefix + key for key in graph.nodes}
    for name, node in list(nodes.items()):
        if isinstance(node, nir.Flatten) or (isinstance(node, nir.Input | nir.Output) and name not in own):
            del nodes[name]
            before = [source for source, target in edges if target == name and source != name]
            after = [target for source, target in edges if source == name and target != name]
            edges = [edge for edge in edges if name not in edge] + list(itertools.product(before, after))
    return nodes, list(dict.fromkeys(edges))


def _bias(name: str, node: Any, size: int) -> np.ndarray | None:
    bias = getattr(node, "bias", None)
    return None if bias is None else np.broadcast_to(numbers(f"node {name}: bias", bias, size), size)


def metadata_entry(name: str, node: Any, key: str, otherwise: Any, read: Callable[[str, Any], Any]) -> Any:
    """What ``read`` makes of an entry of a node's metadata, as :func:`to_nir` writes it."""
    if not isinstance(node.metadata, Mapping):
        raise ValueError(f"node {name}: metadata is a {type(node.metadata).__name__}; give a dict, or {{}}")
    value = node.metadata.get(key, otherwise)
    try:
        return read(key, value.item() if getattr(value, "shape", None) == () else value)  # files give NumPy's numbers
    except ValueError as error:
        raise ValueError(f"node {name}: metadata: {error}; mend or delete {key!r}") from error
