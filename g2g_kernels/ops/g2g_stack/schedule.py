"""In which order the populations of a graph run, and how many steps at a time.

What has no cycle runs population by population, over all steps. A cycle runs block by block. In an order of its
populations, connections lead forward, to a later population, or back. Block k of population p ends before step
(k + 1)·L + φ_p. Population q then finds what it reads, if for each connection from p with delay d

    φ_q − φ_p ≤ d  (forward),    φ_q − φ_p ≤ d − L  (back),

since block k of p has run before that of q (forward), or block k − 1 (back). Such φ exist for every L up to the least
sum of delays of a cycle, divided by its connections that lead back (Leiserson and Saxe 1991 move delays in circuits
so). Delays of 0 lead forward: they form no cycle, unless it passes a population that acts a step later on what it
receives, as one that is reset in the step of its spike. Connections to that one then count one step more: its block
is sent before what arrives in the last step of it.
"""

import functools
import graphlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from graphlib import TopologicalSorter
from typing import NamedTuple

from g2g_kernels.tracing import constant_when_traced

#: for each population the connections to it, as (source, least delay); the source −1 is the input
Graph = tuple[tuple[tuple[int, int], ...], ...]


class Component(NamedTuple):
    """Populations that run together: their numbers, in the order in which they run; the ``period`` L, the steps of a
    block (0: all at once, since nothing leads back); φ of each, how far it is ``ahead``; and the numbers of those that
    send a block before they receive its last step (``late``)."""

    members: tuple[int, ...]
    period: int
    ahead: tuple[int, ...]
    late: tuple[int, ...] = ()

    def blocks(self, total: int) -> Iterator[tuple[int, int, int]]:
        """(population, first step, step after the last) of each block, in the order in which they run."""
        if not self.period:
            yield self.members[0], 0, total
            return
        done = dict.fromkeys(self.members, 0)
        first_block = -(max(self.ahead) // self.period) - 1  # before it, even the population most ahead has no steps
        for block in itertools.count(first_block):
            for number, ahead in zip(self.members, self.ahead):  # noqa: B905
                last = min((block + 1) * self.period + ahead, total)
                if last > done[number]:
                    yield number, done[number], last
                    done[number] = last
            if min(done.values()) == total:
                return


class CycleError(ValueError):
    """A cycle of connections without delay: its populations in order, ``cycle``."""

    def __init__(self, cycle: Sequence[int]) -> None:
        self.cycle = tuple(cycle)
        super().__init__(f"the populations {list(cycle)} form a cycle without delay; give one of its connections one")


@constant_when_traced  # it knows neither SciPy nor caches
def components_of(graph: Graph, late: tuple[int, ...] = ()) -> Sequence[Component]:
    """The strongly connected components, each after those that it reads; CycleError for a cycle whose delays are 0, and
    which passes none of the populations ``late``, those that act a step later on what they receive."""
    components = []
    for number, sources in enumerate(graph):
        own = [delay for source, delay in sources if source == number]
        if any([source > number for source, _ in sources]) or 0 in own:
            return _components_of_any(graph, late)
        components.append(Component((number,), min(own) if own else 0, (0,)))
    return components


@functools.lru_cache(256)
def _components_of_any(graph: Graph, late: tuple[int, ...]) -> tuple[Component, ...]:
    """The same for a graph whose populations are not in order."""
    import numpy as np
    from scipy.sparse.csgraph import connected_components  # (SciPy is slow to import, and changes warnings)

    inside = [{source for source, _ in sources if source >= 0} for sources in graph]
    joined = [[source in sources for source in range(len(graph))] for sources in inside]
    component = connected_components(np.array(joined), connection="strong")[1].tolist()
    of_components: dict[int, set[int]] = {each: set() for each in component}
    for number, sources in enumerate(inside):
        of_components[component[number]] |= {component[source] for source in sources} - {component[number]}
    components = []
    for own in TopologicalSorter(of_components).static_order():
        members = [number for number in range(len(graph)) if component[number] == own]
        if len(members) == 1 and members[0] not in inside[members[0]]:
            components.append(Component(tuple(members), 0, (0,)))
            continue
        own_late: tuple[int, ...] = ()
        try:
            order = _instant_order(graph, members)
        except CycleError:
            own_late = tuple([number for number in members if number in late])
            order = _instant_order(graph, members, own_late)
        place = {number: position for position, number in enumerate(order)}
        connections = [
            (place[p], place[q], delay + (q in own_late)) for q in order for p, delay in graph[q] if p in place
        ]
        period, ahead = 1, [0] * len(order)
        for candidate in range(2, sum(delay for _, _, delay in connections) + 1):
            found = _ahead(len(order), connections, candidate)
            if found is None:
                break
            period, ahead = candidate, found
        components.append(Component(tuple(order), period, tuple(ahead), own_late))
    return tuple(components)


def _instant_order(graph: Graph, members: Sequence[int], late: Collection[int] = ()) -> list[int]:
    """Members of a component in an order in which delays of 0 lead forward, but those to ``late`` ones."""
    of_each = {
        number: {p for p, delay in graph[number] if p in members and delay == 0 and number not in late}
        for number in members
    }
    try:
        return [*TopologicalSorter(of_each).static_order()]
    except graphlib.CycleError as error:
        raise CycleError(error.args[1][:-1]) from None


def _ahead(count: int, connections: Sequence[tuple[int, int, int]], period: int) -> list[int] | None:
    """φ of each population, the least of them 0; None if there are none for this period (Bellman and Ford).
    ``connections``: the places of source and target in the order, and the delay, of each."""
    ahead = [0] * count
    for _ in range(count + 1):  # one more than φ take to settle
        settled = True
        for p, q, delay in connections:
            leads_back = p >= q
            bound = ahead[p] + (delay - period if leads_back else delay)
            if ahead[q] > bound:
                ahead[q], settled = bound, False
        if settled:
            least = min(ahead)
            return [each - least for each in ahead]
    return None
