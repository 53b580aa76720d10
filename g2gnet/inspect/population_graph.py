"""The picture of a network's populations and of the connections between them with their delays."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from g2g_kernels.ops.g2g_stack.schedule import Part, parts_of
from g2gnet.projections import Route, graph_of
from g2gnet.spiking_network import SpikingNetwork

#: of connections, and of those on a cycle; Okabe and Ito's
COLOUR, ON_CYCLE = "#0072B2", "#D55E00"
#: inches: the least width of a population, the height of all of them, and that of a connection
POPULATION, HEAD, ROW = 0.8, 0.56, 0.36
#: of a letter, and of half a loop
LETTER, LOOP = 0.085, 0.08
#: characters of a population's name
NAME = 14


def population_graph(net: SpikingNetwork) -> Figure:
    """Who projects to whom, and how much later: populations side by side, and below them a row for each connection: an
    arrow with the share of its weights that exist and its delays. What is on a cycle is orange.

    Example:
        >>> net = G2GNet(784, [64, 32], 10, block_size=8, feedback=True, delay=4)
        >>> population_graph(net).savefig("populations.png")
    """
    connections, parts = net.connections(), parts_of(graph_of(net.routes(), net.depth))
    cycles = [{*part.members} for part in parts if part.period]
    order = _from_the_input(net.routes(), parts, net.depth)
    names = {number: (*net.populations, "input")[number] for number in order}
    shown = {number: name if len(name) <= NAME else f"{name[: NAME - 1]}…" for number, name in names.items()}
    column = max(POPULATION, LETTER * max(map(len, shown.values())) + 0.2)
    middle = {number: column * (place + 0.5) for place, number in enumerate(order)}
    routes = sorted(net.routes(), key=lambda route: (middle[route.source], middle[route.target]))
    width, height = column * len(order), HEAD + ROW * len(routes) + 0.15

    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    centred: dict[str, Any] = {"fontsize": 8.5, "ha": "center", "va": "center"}
    for number, x in middle.items():
        axis.plot((x, x), (HEAD, height), color="0.85", zorder=0)
        box = (x - column / 2 + 0.05, 0.08), column - 0.1, HEAD - 0.12
        axis.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.08", fc="0.93", ec="0.3"))
        axis.text(x, HEAD / 2 - 0.05, shown[number], fontweight="bold", **centred)
        axis.text(x, HEAD / 2 + 0.1, f"{net.sizes[number]:,}", **centred)
    for row, route in enumerate(routes):
        start, end = middle[route.source], middle[route.target]
        y = HEAD + ROW * (row + 0.8)
        corners = [(start, y), (end, y)]
        if start == end:  # a loop
            corners = [(start, y - LOOP), (start + 2 * LOOP, y - LOOP), (start + 2 * LOOP, y + LOOP), (start, y + LOOP)]
        colour = ON_CYCLE if any({route.source, route.target} <= members for members in cycles) else COLOUR
        arrow = FancyArrowPatch(path=Path(corners), arrowstyle="-|>", mutation_scale=9, color=colour, lw=1.2)
        axis.add_patch(arrow)
        text = _text(connections[route.name].mask.density, net.delays(route.name))
        room = LETTER * len(text) / 2
        x = min(max((start + end) / 2, room), width - room)
        axis.text(x, y - 0.15, text, color=colour, **centred).set_bbox({"fc": "white", "ec": "none", "pad": 0.5})
    return figure


def _from_the_input(routes: Sequence[Route], parts: Sequence[Part], depth: int) -> list[int]:
    """Populations from the left (−1: the input) as they run, in a cycle by distance from the input; the output last."""
    distance = {-1: 0}
    for step in range(1, depth + 1):
        reached = {route.target for route in routes if route.source in distance}
        distance.update(dict.fromkeys(reached - distance.keys(), step))
    order = [number for part in parts for number in sorted(part.members, key=distance.__getitem__)]
    return [-1, *[number for number in order if number + 1 < depth], depth - 1]


def _text(density: float, delays: torch.Tensor) -> str:
    """The share of weights that exist, and the delays, if there are any."""
    share = f"{100 * density:.0f} %" if density >= 0.1 else f"{100 * density:.2g} %"
    least, most = int(delays.min()), int(delays.max())
    if not most:
        return share
    return f"{share}, {f'{least}–{most}' if least < most else most} step{'s' * (most > 1)}"
