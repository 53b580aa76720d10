"""The picture of a network's populations and of the connections between them with their delays, in inches, downwards.
An arrow to the next population is straight; the others leave and arrive at the sides and run in lanes between."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from g2g_kernels.ops.g2g_stack.schedule import Component, components_of
from g2gnet.projections import Route, graph_of
from g2gnet.spiking_network import SpikingNetwork

#: of connections, and of those on a cycle; Okabe and Ito's
COLOUR, ON_CYCLE = "#0072B2", "#D55E00"
#: half the width of a population, and of the picture, which a telephone shows in full
POPULATION, HALF = 0.55, 2.0
#: between two places at a side where arrows leave or arrive, between two lanes, and of a line of text
PLACE, LANE, LINE = 0.17, 0.26, 0.15
#: characters of a population's name
NAME = 14


@dataclass(eq=False)
class _Arrow:
    """A connection: the places of its populations from the top (0: the input), its side (−1: left; 0: straight; 1:
    right), its lane there, and the heights at which it leaves, arrives and has its label."""

    source: int
    target: int
    text: str
    colour: str
    side: int = 1
    lane: int = 0
    start: float = 0.0
    end: float = 0.0
    label: float = 0.0

    def span(self) -> tuple[float, float]:
        """From where to where it runs in its lane: what ends at a population leaves room for its loops."""
        low, high = sorted((self.source, self.target))
        return (low - 0.3, high + 0.3) if low == high else (low + 0.4, high - 0.4)

    def length(self) -> int:
        return abs(self.target - self.source)


def population_graph(net: SpikingNetwork) -> Figure:
    """Who projects to whom, and how much later: populations from the input down, and an arrow for each connection, with
    the share of its weights that exist and its delays. Skips are on the left; what leads back, or to the same
    population, is on the right; what is on a cycle is orange.

    Example:
        >>> net = G2GNet(784, [64, 32], 10, block_size=8, feedback=True, delay=4)
        >>> population_graph(net).savefig("populations.png")
    """
    parts = components_of(graph_of(net.routes(), net.depth))
    order = _from_the_input(net.routes(), parts, net.depth)
    arrows = _arrows(net, parts, order)
    lanes = [max([arrow.lane + 1 for arrow in arrows if arrow.side == side], default=0) for side in (-1, 1)]
    half = max(HALF, POPULATION + 0.55 + LANE * max(lanes))
    bounds, bottom = _placed(arrows, net.depth + 1)
    figure = Figure(figsize=(2 * half, bottom))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-half, half), ylim=(bottom, 0))
    axis.set_axis_off()
    for arrow in arrows:
        _draw(axis, arrow, half)
    names = (*net.populations, "input")
    for number, (top, height) in zip(order, bounds, strict=True):
        name, size = names[number], net.sizes[number]
        box = (-POPULATION, top), 2 * POPULATION, height
        axis.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.08", fc="0.93", ec="0.3", zorder=4))
        shown = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
        for text, line, weight in ((shown, -0.5, "bold"), (f"{size:,}", 0.5, "normal")):
            middle = top + height / 2 + line * LINE
            axis.text(0, middle, text, fontsize=8.5, fontweight=weight, ha="center", va="center", zorder=5)
    return figure


def _from_the_input(routes: Sequence[Route], parts: Sequence[Component], depth: int) -> list[int]:
    """Populations from the top (−1: the input) as they run, in a cycle by distance from the input; the output last."""
    distance = {-1: 0}
    for step in range(1, depth + 1):
        reached = {route.target for route in routes if route.source in distance}
        distance.update(dict.fromkeys(reached - distance.keys(), step))
    order = [number for part in parts for number in sorted(part.members, key=distance.__getitem__)]
    return [-1, *[number for number in order if number + 1 < depth], depth - 1]


def _arrows(net: SpikingNetwork, parts: Sequence[Component], order: Sequence[int]) -> list[_Arrow]:
    connections, place = net.connections(), {number: place for place, number in enumerate(order)}
    cycles = [{*part.members} for part in parts if part.period]
    arrows: list[_Arrow] = []
    for route in net.routes():
        on_cycle = any({route.source, route.target} <= members for members in cycles)
        text = _text(connections[route.name].mask.density, net.delays(route.name))
        arrow = _Arrow(place[route.source], place[route.target], text, ON_CYCLE if on_cycle else COLOUR)
        arrow.side = -1 if arrow.target > arrow.source else 1
        ends = arrow.source, arrow.target
        if arrow.target == arrow.source + 1 and ends not in [(each.source, each.target) for each in arrows]:
            arrow.side = 0
        arrows.append(arrow)
    placed: list[_Arrow] = []
    for arrow in sorted(arrows, key=_Arrow.length):  # the shortest next to the populations
        (low, high), others = arrow.span(), [(each, *each.span()) for each in placed if each.side == arrow.side]
        beside = {each.lane for each, start, end in others if start < high and low < end and arrow.length()}
        arrow.lane = min({*range(len(arrows))} - beside)
        placed.append(arrow)
    return arrows


def _text(density: float, delays: torch.Tensor) -> str:
    """The share of weights that exist, and below it the delays, if there are any."""
    share = f"{100 * density:.0f} %" if density >= 0.1 else f"{100 * density:.2g} %"
    least, most = int(delays.min()), int(delays.max())
    if not most:
        return share
    return f"{share}\n{f'{least}–{most}' if least < most else most} step{'s' * (most > 1)}"


def _placed(arrows: Sequence[_Arrow], count: int) -> tuple[list[tuple[float, float]], float]:
    """Top and height of each population, and the height of the picture; arrows get theirs, each label its own lines."""
    between: list[list[_Arrow]] = [[] for _ in range(count - 1)]
    for arrow in sorted(arrows, key=_Arrow.length):
        if arrow.length():
            low, high = sorted((arrow.source, arrow.target))
            min(between[low:high], key=len).append(arrow)
    bounds, below = [], 0.1
    for number in range(count):
        sides = [_leaving_and_arriving(number, arrows, side) for side in (-1, 1)]
        height = max(0.42, PLACE * max(map(len, sides)) + 0.1)
        bounds.append((below, height))
        for side in sides:
            for place, (arrow, leaves) in enumerate(side):
                at = below + height / 2 + PLACE * (place - (len(side) - 1) / 2)
                if leaves:
                    arrow.start = at
                else:
                    arrow.end = at
        for arrow in arrows:
            if arrow.side == 0 and arrow.source == number:
                arrow.start = below + height
            elif arrow.side == 0 and arrow.target == number:
                arrow.end = below
        below += height
        if number + 1 < count:
            below += 0.14
            for arrow in between[number]:
                lines = 1 + arrow.text.count("\n")
                arrow.label = below + LINE * lines / 2
                below += LINE * lines + 0.06
            below += 0.16
    for arrow in arrows:
        if not arrow.length():
            arrow.label = (arrow.start + arrow.end) / 2
    return bounds, below + 0.1


def _leaving_and_arriving(number: int, arrows: Sequence[_Arrow], side: int) -> list[tuple[_Arrow, bool]]:
    """The arrows at a side of a population, top to bottom, and whether they leave it; its lines do not cross."""
    here = [arrow for arrow in arrows if arrow.side == side and number in (arrow.source, arrow.target)]
    up = [arrow for arrow in here if min(arrow.source, arrow.target) < number]
    down = [arrow for arrow in here if max(arrow.source, arrow.target) > number]
    places = [(arrow, arrow.source == number) for arrow in sorted(up, key=lambda each: each.lane)]
    for arrow in here:
        places += [(arrow, True), (arrow, False)] * (not arrow.length())
    return places + [(arrow, arrow.source == number) for arrow in sorted(down, key=lambda each: -each.lane)]


def _draw(axis: Axes, arrow: _Arrow, half: float) -> None:
    if arrow.side == 0:
        corners, codes, middle, align = (
            [(0.0, arrow.start), (0.0, arrow.end)],
            [Path.MOVETO, Path.LINETO],
            0.0,
            "center",
        )
    else:
        edge, lane = arrow.side * POPULATION, arrow.side * (POPULATION + 0.2 + LANE * arrow.lane)
        turn = min(0.08, abs(arrow.end - arrow.start) / 2)
        inside, onward = lane - arrow.side * turn, turn if arrow.end > arrow.start else -turn
        corners = [
            (edge, arrow.start), (inside, arrow.start), (lane, arrow.start), (lane, arrow.start + onward),
            (lane, arrow.end - onward), (lane, arrow.end), (inside, arrow.end), (edge, arrow.end),
        ]  # fmt: skip
        codes = [Path.MOVETO, Path.LINETO, *[Path.CURVE3] * 2, Path.LINETO, *[Path.CURVE3] * 2, Path.LINETO]
        width = 0.075 * max(map(len, arrow.text.split("\n")))
        middle, align = arrow.side * min(abs(lane), half - width / 2), "center"
        if not arrow.length():
            middle, align = lane + 0.05, "left"
    path = Path(corners, codes)
    axis.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=9, color=arrow.colour, lw=1.2))
    behind = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}
    text = axis.text(middle, arrow.label, arrow.text, fontsize=8.5, color=arrow.colour, ha=align, va="center", zorder=3)
    text.set_bbox(behind)
