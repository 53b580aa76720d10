"""Pictures of networks and their training, each a matplotlib figure: ``figure.savefig("name.png")``.

No picture touches pyplot's global state or needs a display; the extra ``plots`` has the packages. Colours are Okabe and
Ito's for lines and viridis for maps, which colour-blind readers can distinguish.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, PercentFormatter

from g2g_kernels import Activity, BlockMask, GroupLayout
from g2gnet.inspect import NetworkAnalysis, group_density
from g2gnet.inspect.connections import of_pixels
from g2gnet.layers import SparseLayer
from g2gnet.projections import cycles_of
from g2gnet.spiking_network import SpikingNetwork

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvP*"
WIDTH = 9.6  # inches, the width of the page
#: characters of a line of a legend, and the most maps or histograms side by side
LETTERS, SIDE_BY_SIDE = 120, 3
SHARES: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "viridis"}  # of a map of shares
#: in a picture of populations, in inches: their least width, their height, the height of a connection
COLUMN, HEAD, ROW = 0.8, 0.56, 0.36
#: the width of a letter and half the height of a loop, in inches; the characters of a name
LETTER, LOOP, NAME = 0.085, 0.08, 14
#: the most groups of a layer, and neurons of a raster, that are drawn; more could not be distinguished
SHOWN_GROUPS, SHOWN_NEURONS = 8, 4096

History = Sequence[Mapping[str, Any]]


class Raster(NamedTuple):
    """Spikes [T, N] of one layer for one sample, on the CPU, and the groups of its neurons.

    Example:
        >>> raster = Raster("lif1", (torch.rand(20, 16) < 0.2).float(), GroupLayout(16, 4))
        >>> spike_rasters([raster], "one layer").savefig("raster.png")
    """

    name: str
    spikes: torch.Tensor
    layout: GroupLayout


def style(number: int) -> dict[str, Any]:
    """Colour and marker of a line; no two of the first 49 are alike.

    Example:
        >>> style(0), style(7)
        ({'color': '#0072B2', 'marker': 'o'}, {'color': '#0072B2', 'marker': 's'})
    """
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}


def rasters(net: SpikingNetwork, activity: Activity, sample: int = 0) -> list[Raster]:
    """The spikes of one sample of a batch, population by population; ``activity`` is that of ``net.simulate``.

    Example:
        >>> [raster.name for raster in rasters(net, net.simulate(torch.rand(3, 64)), sample=2)]
        ['lif1', 'lif2', 'lif3']
    """
    connections, names = net.connections(), net.populations
    layouts = {name: GroupLayout(size, 1) for name, size in zip(names, net.sizes, strict=False)}
    for each in net.projections()[::-1]:  # the first one that leads to a population says its groups
        if isinstance(connections[each.name], SparseLayer):
            layout = connections[each.name].mask.rows.layout
            layouts[names[each.target]] = of_pixels(layout, net.sizes[each.target])
    trains = zip(names, activity.spikes, strict=True)
    return [Raster(name, spikes.dense()[:, sample].detach().cpu(), layouts[name]) for name, spikes in trains]


def training_curves(histories: Mapping[str, Sequence[History]]) -> Figure:
    """Accuracy and loss after each epoch, one colour and marker per label. Accuracy on test images is solid (on
    held-out images, if a run has no other), on training images dotted. Several runs, which differ in their seed, are
    shown by the mean with its standard error as a band, for the epochs that all have finished.

    Example:
        >>> history = [{"epoch": n, "train_acc": 0.5, "test_acc": 0.4 + n / 10, "train_loss": 1 / n} for n in (1, 2, 3)]
        >>> training_curves({"mixer": [history]}).savefig("curves.png")
    """
    several = len(histories) > 1
    labels = [textwrap.fill(label, LETTERS) for label in histories]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, axes = _figure(1, 2, 3.2 + 0.2 * lines * several)
    accuracy, loss = axes.flat
    for number, (label, seeds) in enumerate(zip(labels, histories.values(), strict=True)):
        epochs = [record["epoch"] for record in min(seeds, key=len)]
        look = {"markersize": 3, **style(number)}
        tested = "test_acc" in seeds[0][0]
        for axis, quantity, line in (
            (accuracy, "test_acc" if tested else "val_acc", {"label": "test" if tested else "held out"}),
            (accuracy, "train_acc", {"label": "training", "ls": ":"}),
            (loss, "train_loss", {"label": label}),
        ):
            values = np.array([[record[quantity] for record in history[: len(epochs)]] for history in seeds])
            mean = values.mean(0)
            axis.plot(epochs, mean, **look, **line)
            if len(seeds) > 1:
                error = values.std(0, ddof=1) / len(seeds) ** 0.5
                axis.fill_between(epochs, mean - error, mean + error, color=look["color"], alpha=0.2, linewidth=0)
    _whole(accuracy.xaxis)
    _whole(loss.xaxis)
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    if several:
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9)
    else:
        accuracy.legend(frameon=False)
    return figure


def connection_density(masks: Mapping[str, Mapping[str, BlockMask]]) -> Figure:
    """The share of the weights between each pair of groups that exist, at most three connections side by side, one
    state below another. Masks are by state and name: ``{"now": {"fc1": net.fc1.mask}}``. One state is not named.

    Example:
        >>> masks = {name: connection.mask for name, connection in net.connections().items()}
        >>> connection_density({"now": masks}).savefig("density.png")
    """
    count = len(next(iter(masks.values())))
    lines = -(-count // SIDE_BY_SIDE)  # of each state
    columns = -(-count // lines)
    figure, axes = _figure(lines * len(masks), columns, min(3.4, WIDTH / columns + 0.9) * lines * len(masks))
    for first, (state, by_name) in zip(range(0, lines * len(masks), lines), masks.items(), strict=True):
        places = list(axes[first : first + lines].flat)
        for axis in places[count:]:
            axis.set_axis_off()
        for axis, (name, mask) in zip(places, by_name.items(), strict=False):
            density = group_density(mask)
            outputs, inputs = density.shape
            aspect = "equal" if max(density.shape) <= 4 * min(density.shape) else "auto"
            image = axis.imshow(density.numpy(), **SHARES, aspect=aspect)
            title = f"{name}, {state}" if len(masks) > 1 else name
            axis.set(title=title, xlabel="input group", ylabel="output group")
            for set_ticks, groups in ((axis.set_xticks, inputs), (axis.set_yticks, outputs)):
                ticks = range(0, groups, 1 if groups <= 16 else groups // 8)
                set_ticks(ticks, [str(tick + 1) for tick in ticks])
            if max(density.shape) <= 10:
                _write_numbers(axis, density, 100 * density)
    _share_bar(figure, image, axes, "weights that exist (%)", shrink=0.8, pad=0.02)
    return figure


def group_inputs(mask: BlockMask, shape: tuple[int, ...], name: str, inputs: str) -> Figure:
    """Which inputs the neurons of each group see: one map of the inputs per group, at most eight.

    ``shape`` is the layout of the inputs: (rows, columns), or (3, rows, columns) for the planes of a colour image,
    which are drawn side by side. The title has the ``name`` of the connection, and ``inputs`` in words.

    Example:
        >>> net = G2GNet(784, 64, 10, block_size=8)
        >>> group_inputs(net.fc1.mask, (28, 28), "fc1", "pixels").savefig("inputs.png")
    """
    layout = mask.rows.layout
    row, col = mask.unit_row.long().cpu(), mask.unit_col.long().cpu()
    seeing = torch.zeros(layout.num_groups, mask.cols.num_units)  # neurons of each group, by range of inputs
    seeing.index_put_((mask.rows.group_of_unit.cpu()[row], col), mask.rows.lengths.cpu()[row].float(), accumulate=True)
    shares = (seeing / layout.sizes[:, None])[:, mask.cols.unit_of.cpu()]
    groups = min(layout.num_groups, SHOWN_GROUPS)
    planes, height, width = (1, *shape)[-3:]
    cell = WIDTH / 4.6
    figure, axes = _panels(groups, 4, cell * min(1.2, height / (planes * width)) + 0.35, 0.5)
    for group, axis in enumerate(axes):
        picture = shares[group].view(planes, height, width).transpose(0, 1).flatten(1)
        image = axis.imshow(picture.numpy(), **SHARES, interpolation="nearest")
        axis.set(title=f"group {group + 1}", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        for plane in range(1, planes):
            axis.axvline(plane * width - 0.5, color="white", linewidth=1)
        if planes == 3:
            axis.set_xticks([(plane + 0.5) * width for plane in range(3)], ["red", "green", "blue"])
    _share_bar(figure, image, axes, "neurons that see it (%)", pad=0.02, aspect=25)
    shown = "each group" if groups == layout.num_groups else f"the first {groups} of {layout.num_groups} groups"
    figure.suptitle(f"{name}: {inputs} seen by the neurons of {shown}", fontsize=10)
    return figure


def spike_rasters(rasters: Sequence[Raster], title: str) -> Figure:
    """One dash per spike; neurons are sorted by group, neighbouring groups in two colours. In a layer of more than
    4,096 neurons only the first are drawn, as its label says.

    Example:
        >>> spike_rasters(rasters(net, activity), "a sample").savefig("raster.png")
    """
    heights = [1.0 if raster.spikes.shape[1] > 20 else 0.45 for raster in rasters]
    figure, axes = _figure(len(rasters), 1, 2.6 * sum(heights) + 0.7, height_ratios=heights, sharex=True)
    for axis, raster, height in zip(axes.flat, rasters, heights, strict=True):
        steps, whole = raster.spikes.shape
        order = torch.argsort(raster.layout.group_of, stable=True)[:SHOWN_NEURONS]
        neurons, sizes = len(order), torch.bincount(raster.layout.group_of[order])
        step, place = raster.spikes[:, order].nonzero(as_tuple=True)
        shades = np.array(COLOURS[:2])[raster.layout.group_of[order][place] % 2]
        start = (step + 0.6).numpy()  # steps count from 1
        points = 72 * 2.6 * height / neurons  # of each neuron's line, in typographic points
        axis.hlines(place.numpy(), start, start + 0.8, colors=shades, linewidth=min(4.0, max(0.6, 0.8 * points)))
        edges = sizes.cumsum(0)
        if neurons > 20:
            shown = slice(None, None, -(-len(sizes) // 16))
            labels = [str(group + 1) for group in range(len(sizes))]
            axis.set_yticks((edges - sizes / 2)[shown].tolist(), labels[shown])
            axis.tick_params(axis="y", length=0)
            count = str(whole) if neurons == whole else f"{neurons:,} of {whole:,}"
            axis.set_ylabel(f"{raster.name} ({count} neurons)\ngroup")
            for edge in edges[:-1].tolist():
                axis.axhline(edge - 0.5, color="0.85", linewidth=0.6, zorder=0)
        else:
            axis.set_ylabel(f"{raster.name}\nneuron")
            _whole(axis.yaxis)
        axis.set_ylim(neurons - 0.25, -0.75)
        axis.set_xlim(0.5, steps + 0.5)
    axes[-1, 0].set_xlabel("time step")
    _whole(axes[-1, 0].xaxis)
    figure.align_ylabels(list(axes.flat))
    figure.suptitle(title, fontsize=10)
    return figure


def confusion(matrix: torch.Tensor, classes: Sequence[str]) -> Figure:
    """Which classes are confused: numbers of images, int64 [C, C] by true and found class, as shares of the true ones.

    Example:
        >>> confusion(torch.tensor([[8, 2], [1, 9]]), ("shirt", "coat")).savefig("confusion.png")
    """
    count = len(matrix)
    share = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    many = count > 25  # small letters on a large picture
    width = 14 if many else WIDTH
    height = 0.85 * width if many else min(0.85 * WIDTH, 1.8 + 0.3 * count)
    figure = Figure(figsize=(width, height), layout="compressed")
    axis = figure.subplots()
    image = axis.imshow(share.numpy(), **SHARES)
    axis.set_xticks(range(count), classes, rotation=90 if count > 5 else 0, fontsize=6 if many else None)
    axis.set_yticks(range(count), classes, fontsize=6 if many else None)
    axis.set(xlabel="classified as", ylabel="true class")
    if count <= 12:
        _write_numbers(axis, share, matrix)
    _share_bar(figure, image, axis, "images of the true class (%)", shrink=0.8)
    return figure


def rate_histograms(analysis: NetworkAnalysis) -> Figure:
    """Histograms of the firing rates of each layer that fires. Raises ValueError if none does.

    Example:
        >>> rate_histograms(analysis).savefig("rates.png")
    """
    layers = [layer for layer in analysis.layers if layer.firing_rate]
    if not layers:
        raise ValueError("no neuron of this analysis fired, so there are no rates to draw; raise weights or inputs")
    figure, axes = _panels(len(layers), SIDE_BY_SIDE, 2.9)
    for axis, layer in zip(axes, layers, strict=True):
        rates = layer.neuron_rates
        bins = min(40, max(10, len(rates) // 12))
        axis.hist(rates[rates > 0].numpy(), bins=bins, range=(0, float(rates.max())), color=COLOURS[0])
        axis.axvline(float(rates.mean()), color=COLOURS[1], linestyle="--", label=f"mean {float(rates.mean()):.3f}")
        axis.set(
            title=f"{layer.name}: {layer.silent:.1%} of {len(rates)} silent".replace("%", " %"),
            xlabel="firing rate (spikes per step)",
            ylabel="neurons that fire",
        )
        _whole(axis.yaxis)
        axis.legend(frameon=False, fontsize=8)
    return figure


def delay_histograms(delays: Mapping[str, Mapping[str, torch.Tensor]]) -> Figure:
    """How many sources of each connection have which delay. Delays are by state and name, as masks are in
    :func:`connection_density`; several states share an axis.

    Example:
        >>> net = G2GNet(784, 64, 10, block_size=8, delay=4)
        >>> delay_histograms({"now": {name: net.delays(name) for name in net.connections()}}).savefig("delays.png")
    """
    names = list(next(iter(delays.values())))
    figure, axes = _panels(len(names), SIDE_BY_SIDE, 2.9)
    most = max(int(steps.max()) for by_name in delays.values() for steps in by_name.values())
    for axis, name in zip(axes, names, strict=True):
        for number, (state, by_name) in enumerate(delays.items()):
            width = 0.8 / len(delays)
            place = np.arange(most + 1) + (number - (len(delays) - 1) / 2) * width
            counts = by_name[name].bincount(minlength=most + 1).cpu().numpy()
            axis.bar(place, counts, width, color=COLOURS[number], label=state)
        axis.set(title=name, xlabel="delay (steps)", ylabel="neurons or inputs")
        _whole(axis.xaxis)
        _whole(axis.yaxis)
    if len(delays) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
    return figure


def turnover(history: History) -> Figure:
    """How many units dynamic sparse training replaced in each epoch, and how many initial units are left.

    Example:
        >>> kept = [{"units_kept": {"fc1": 0.9}, "initial_units_kept": {"fc1": 1 - n / 10}} for n in (1, 2, 3)]
        >>> turnover([{"epoch": n, **record} for n, record in enumerate(kept, 1)]).savefig("turnover.png")
    """
    figure, axes = _figure(1, 2, 3.0)
    replaced, kept = axes.flat
    epochs = [record["epoch"] for record in history]
    for number, name in enumerate(history[0]["units_kept"]):
        look = {**style(number), "markersize": 4, "label": name}
        replaced.plot(epochs, [1 - record["units_kept"][name] for record in history], **look)
        kept.plot([0, *epochs], [1, *(record["initial_units_kept"][name] for record in history)], **look)
    for axis, title, top in ((replaced, "Replaced in each epoch", None), (kept, "Initial units still there", 1.05)):
        axis.set(title=title, xlabel="epoch", ylabel="units of the layer", ylim=(0, top))
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _whole(axis.xaxis)
    kept.legend(frameon=False)
    return figure


def population_graph(net: SpikingNetwork) -> Figure:
    """Which populations project to which, and how much later: the input and the populations in their order, and below
    them a row for each connection, an arrow with the share of its weights that exist and its delays. Cycles are orange.

    Example:
        >>> net = G2GNet(784, [64, 32], 10, block_size=8, feedback=True, delay=4)
        >>> population_graph(net).savefig("populations.png")
    """
    net.check_linear("population_graph")
    connections, cycles = net.connections(), cycles_of(net.projections(), net.depth)
    names = [name if len(name) <= NAME else f"{name[: NAME - 1]}…" for name in ("input", *net.populations)]
    column = max(COLUMN, LETTER * max(map(len, names)) + 0.2)
    middle = [column * (place + 0.5) for place in range(len(names))]
    projections = sorted(net.projections(), key=lambda each: (each.source, each.target))
    width, height = column * len(names), HEAD + ROW * len(projections) + 0.15

    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    centred: dict[str, Any] = {"fontsize": 8.5, "ha": "center", "va": "center"}
    for name, size, x in zip(names, (net.sizes[-1], *net.sizes), middle, strict=False):
        axis.plot((x, x), (HEAD, height), color="0.85", zorder=0)
        box = (x - column / 2 + 0.05, 0.08), column - 0.1, HEAD - 0.12
        axis.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.08", fc="0.93", ec="0.3"))
        axis.text(x, HEAD / 2 - 0.05, name, fontweight="bold", **centred)
        axis.text(x, HEAD / 2 + 0.1, f"{size:,}", **centred)
    for row, each in enumerate(projections):
        start, end = middle[each.source + 1], middle[each.target + 1]  # the input is number −1
        y = HEAD + ROW * (row + 0.8)
        corners = [(start, y), (end, y)]
        if start == end:  # a loop
            corners = [(start, y - LOOP), (start + 2 * LOOP, y - LOOP), (start + 2 * LOOP, y + LOOP), (start, y + LOOP)]
        colour = COLOURS[1] if any({each.source, each.target} <= members for members in cycles) else COLOURS[0]
        arrow = FancyArrowPatch(path=Path(corners), arrowstyle="-|>", mutation_scale=9, color=colour, lw=1.2)
        axis.add_patch(arrow)
        text = _text(connections[each.name].mask.density, net.delays(each.name))
        room = LETTER * len(text) / 2
        x = min(max((start + end) / 2, room), width - room)
        axis.text(x, y - 0.15, text, color=colour, **centred).set_bbox({"fc": "white", "ec": "none", "pad": 0.5})
    return figure


def input_shape(size: int) -> tuple[int, ...]:
    """A layout of ``size`` inputs: 28 × 28 and 3 × 32 × 32 images as they are, anything else roughly square.

    Example:
        >>> input_shape(784), input_shape(3072)
        ((28, 28), (3, 32, 32))
    """
    if size == 3072:
        return 3, 32, 32
    rows = max(divisor for divisor in range(1, int(size**0.5) + 1) if size % divisor == 0)
    return rows, size // rows


def _whole(axis: Axis) -> None:
    """Whole numbers only along an axis."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _write_numbers(axis: Any, share: torch.Tensor, numbers: torch.Tensor) -> None:
    """Writes numbers other than 0 into the cells of a map of shares, both [rows, columns]."""
    for row, column in numbers.nonzero().tolist():
        colour = "black" if share[row, column] > 0.6 else "white"
        text = f"{float(numbers[row, column]):.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _share_bar(figure: Figure, image: Any, axes: Any, label: str, **options: Any) -> None:
    """The bar of a map's colours, in per cent."""
    figure.colorbar(image, ax=axes, label=label, format=PercentFormatter(1, symbol=""), **options)


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure as wide as the page and its axes, [rows, columns]."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _panels(count: int, most: int, height: float, more: float = 0) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes, at most ``most`` side by side: rows of ``height`` inches, and ``more`` in all."""
    columns = min(most, count)
    rows = -(-count // columns)
    figure, axes = _figure(rows, columns, rows * height + more)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def _text(density: float, delays: torch.Tensor) -> str:
    """The share of weights that exist, and the delays, if there are any."""
    share = f"{100 * density:.0f} %" if density >= 0.1 else f"{100 * density:.2g} %"
    least, most = int(delays.min()), int(delays.max())
    if not most:
        return share
    return f"{share}, {f'{least}–{most}' if least < most else most} step{'s' * (most > 1)}"
