"""Draws the pictures of docs/concepts.md and docs/populations.md, each from what the library itself computes.

pip install -e ".[plots]" && python docs/draw_concepts.py
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from g2g_kernels import BlockMask, GroupLayout, lif_step
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2gnet import LIF, AdLIF, DSTScheduler, G2GLinear, G2GNet, Projection, SpikingNetwork
from g2gnet.data import as_samples, load_dataset
from g2gnet.dst.rules import unit_correlation
from g2gnet.inspect import figures

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: the optimizer step after which docs/dst.png shows an update
UPDATE = 46
PAPER, INK, DARK, BRIGHT = "#f1efe8", "#333333", "#1f5a7a", "#d9822b"


# --- units and their packed weights -------------------------------------------------------------------------------


def draw_units() -> Figure:
    """A layer of 32 × 40 weights in group order and in neuron order, and its packed weights."""
    draw = torch.Generator().manual_seed(1)
    layouts = GroupLayout(32, 4, "interleaved"), GroupLayout(40, 4, "interleaved")
    mask = BlockMask.sample(*layouts, p_inter=0.2, block_size=4, generator=draw)
    layer = G2GLinear(mask, generator=draw)
    weight = layer.dense_weight().detach().masked_fill(~mask.to_dense(), torch.nan)
    colours = plt.get_cmap("RdBu_r").with_extremes(bad=PAPER)
    shown = {"cmap": colours, "vmin": -0.35, "vmax": 0.35, "interpolation": "nearest"}

    figure, places = plt.subplot_mosaic(
        [["grouped", "neurons"], ["packed", "packed"]],
        figsize=(9, 5.8),
        layout="constrained",
        height_ratios=(3.4, 1.0),
    )
    grouped = places["grouped"]
    grouped.imshow(weight[mask.rows.order][:, mask.cols.order].numpy(), **shown)
    _lines(grouped, mask)
    for slot, (row, col) in enumerate(zip(mask.unit_row.tolist(), mask.unit_col.tolist(), strict=True)):
        y, x = (_middle(axis.bounds, place) for axis, place in ((mask.rows, row), (mask.cols, col)))
        number = grouped.text(x, y, str(slot), fontsize=7, ha="center", va="center")
        number.set_path_effects([withStroke(linewidth=2, foreground="white")])
    grouped.set_title("neurons in the order of their groups:\nunits of up to 4 × 4, alike in each group", fontsize=10)
    grouped.set(xlabel="40 inputs, 10 a group", ylabel="32 outputs, 8 a group")

    neurons = places["neurons"]
    neurons.imshow(weight.numpy(), **shown)
    neurons.set_title("the same weights in the order of the neurons\n(group = i mod 4)", fontsize=10)
    neurons.set(xlabel="input", ylabel="output")
    for axis in (grouped, neurons):
        axis.set(xticks=[], yticks=[])

    columns = -(-mask.num_units // 2)
    strip = torch.full((2 * 5, columns * 5), torch.nan)
    packed = layer.values.detach().masked_fill(~mask.valid(), torch.nan)
    for slot, unit in enumerate(packed):
        top, left = divmod(slot, columns)
        strip[5 * top : 5 * top + 4, 5 * left : 5 * left + 4] = unit
    axis = places["packed"]
    axis.imshow(strip.numpy(), **{**shown, "cmap": colours.with_extremes(bad="white")})
    for slot in range(mask.num_units):
        top, left = divmod(slot, columns)
        axis.add_patch(Rectangle((5 * left - 0.5, 5 * top - 0.5), 4, 4, fill=False, edgecolor=INK, linewidth=0.5))
        axis.text(5 * left + 1.5, 5 * top + 4.1, str(slot), fontsize=6.5, ha="center", va="center")
    axis.set_title(f"the parameter: values {list(layer.values.shape)}, one tile a slot", fontsize=10)
    axis.axis("off")
    return figure


def _lines(axis: Axes, mask: BlockMask, in_units: bool = False) -> None:
    """Thin lines between units, thick ones between groups; the picture has a cell a weight, or a cell a unit."""
    for side, line in ((mask.rows, axis.axhline), (mask.cols, axis.axvline)):
        groups = side.group_of_unit.tolist()
        for unit in range(1, side.num_units):
            edge = groups[unit] != groups[unit - 1]
            place = unit if in_units else side.bounds[unit].item()
            line(place - 0.5, color=INK if edge else "#bbbbbb", linewidth=0.9 if edge else 0.4)


def _middle(bounds: torch.Tensor, unit: int) -> float:
    return (bounds[unit] + bounds[unit + 1]).item() / 2 - 0.5


# --- readouts -----------------------------------------------------------------------------------------------------


def draw_readouts() -> Figure:
    """fc3 of Index with 2, 7 and 10 classes, and what share of the hidden neurons each class hears."""
    hidden, p_inter = 128, 0.15
    figure, axes = plt.subplots(
        3, 2, figsize=(9, 5.4), layout="constrained", height_ratios=(2, 7, 10), width_ratios=(3, 1)
    )
    for (picture, bars), classes in zip(axes, (2, 7, 10), strict=True):
        net = G2GNet(8, hidden, classes, block_size=4, p_inter=p_inter, generator=torch.Generator().manual_seed(0))
        weights = net.fc3.mask.to_dense()
        picture.imshow(weights.numpy(), cmap=ListedColormap([PAPER, DARK]), interpolation="nearest", aspect="auto")
        for side, line in ((net.fc3.mask.rows, picture.axhline), (net.fc3.mask.cols, picture.axvline)):
            for edge in side.layout.sizes.cumsum(0)[:-1].tolist():
                line(edge - 0.5, color=INK, linewidth=0.7)
        picture.set(xticks=[], yticks=[], ylabel=f"{classes} classes")
        groups = min(classes, 8)
        mean = 1 / groups + (1 - 1 / groups) * p_inter
        bars.barh(range(classes), weights.float().mean(1).numpy(), color=DARK)
        bars.axvline(mean, color=BRIGHT, linewidth=1.5)
        bars.text(mean + 0.02, classes - 0.6, f"{mean:.1%}", color=BRIGHT, fontsize=9, va="bottom")
        bars.set(yticks=[], xlim=(0, 0.75), ylim=(classes - 0.5, -0.5))
        bars.xaxis.set_major_formatter("{x:.0%}")
        bars.tick_params(labelsize=8, labelbottom=classes == 10)
        bars.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_title(f"weights from {hidden} hidden neurons in 8 groups", fontsize=10)
    axes[0, 1].set_title("share of hidden neurons wired\nto each class, and its mean", fontsize=10)
    return figure


# --- dynamic sparse training --------------------------------------------------------------------------------------


def draw_dst() -> Figure:
    """One update of fc2 of a network that has learned for a while: scores, what goes, what comes."""
    data = load_dataset("fashionmnist-mini")
    draw = torch.Generator().manual_seed(0)
    net = G2GNet(784, 128, 10, block_size=8, T=20, generator=draw)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    dst = DSTScheduler([net.fc1, net.fc2, net.fc3], optimizer, interval=UPDATE)
    for _ in range(UPDATE):
        index = torch.randint(len(data.train_labels), (256,), generator=draw)
        x = as_samples(data.train_images[index])
        activity = net.simulate(x)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(activity.counts, data.train_labels[index]).backward()
        optimizer.step()
        before = present(net.fc2.mask)
        strength = torch.full_like(before, torch.nan, dtype=torch.float32)
        strength[before] = net.fc2.values.detach().abs().mean((1, 2))[net.fc2.mask.row_slot.long()]
        dst.step(x, activity)
    correlation = unit_correlation(activity.spikes[0].dense(), activity.spikes[1].dense(), net.fc2.mask)
    after = present(net.fc2.mask)
    kept, pruned, grown = before & after, before & ~after, after & ~before

    figure, axes = plt.subplots(1, 3, figsize=(10, 4.5), layout="constrained")
    weakest = "mean |w| of the units that exist;\n× the weakest tenth, which is pruned"
    strongest = "correlation of every unit;\n+ highest where there was none: grown"
    for axis, score, colours, title, marked, marker in (
        (axes[0], strength, "Blues", weakest, pruned, "x"),
        (axes[1], correlation, "Oranges", strongest, grown, "+"),
    ):
        picture = axis.imshow(score.numpy(), cmap=plt.get_cmap(colours).with_extremes(bad=PAPER), vmin=0)
        figure.colorbar(picture, ax=axis, orientation="horizontal", shrink=0.8, pad=0.02)
        y, x = marked.nonzero(as_tuple=True)
        axis.scatter(x.numpy(), y.numpy(), marker=marker, color="black", s=34, linewidths=1.4)
        axis.set_title(title, fontsize=10)
    picture = axes[2].imshow((kept + 2 * grown).numpy(), cmap=ListedColormap([PAPER, DARK, BRIGHT]), vmin=0, vmax=3)
    key = figure.colorbar(picture, ax=axes[2], orientation="horizontal", shrink=0.8, pad=0.02)
    key.set_ticks([0.5, 1.5, 2.5], labels=["none", "kept", "grown"])
    axes[2].set_title(f"after: {kept.sum()} units kept,\n{grown.sum()} grown, their weights zero", fontsize=10)
    for axis in axes:
        axis.set(xticks=[], yticks=[], xlabel="units of inputs (hidden 1)")
        _lines(axis, net.fc2.mask, in_units=True)
    axes[0].set_ylabel("units of outputs (hidden 2)")
    return figure


def present(mask: BlockMask) -> torch.Tensor:
    """bool [block rows, block columns]: the units that exist."""
    grid = torch.zeros(mask.grid, dtype=torch.bool)
    grid[mask.unit_row.long(), mask.unit_col.long()] = True
    return grid


# --- neurons ------------------------------------------------------------------------------------------------------


def draw_lif() -> Figure:
    """The membrane under a current that begins, and the four surrogate derivatives."""
    steps, beta, theta = 40, 0.9, 1.0
    current = torch.zeros(steps)
    current[5:32] = 0.55
    figure, (axis, slopes) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(1.6, 1))
    for reset, colour, style in (("subtract", DARK, "-"), ("zero", BRIGHT, "--")):
        membrane, membranes, spikes = None, [], []
        for current_t in current:
            fired, membrane = lif_step(current_t[None], membrane, beta, theta, reset)
            membranes.append(membrane.item())
            spikes.append(fired.item() == 1)
        axis.plot(membranes, style, color=colour, label=f'membrane U, reset="{reset}"')
        at = [t for t, fired in enumerate(spikes) if fired]
        axis.scatter(at, [1.95 if reset == "subtract" else 1.8] * len(at), marker="|", s=60, color=colour)
    axis.axhline(theta, color=INK, linewidth=0.8, linestyle=":")
    axis.step(range(steps), current.numpy(), where="mid", color="#999999", linewidth=1, label="input current I")
    axis.text(-1.7, theta + 0.03, "threshold θ", fontsize=9)
    axis.text(-1.7, 1.84, "spikes S", fontsize=9)
    axis.set(xlabel="time step t", ylim=(-0.05, 2.1))
    axis.set_title(f"β = {beta}, θ = {theta}, I = 0.55 from step 5 to step 31", fontsize=10)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)

    distance = torch.linspace(-2, 2, 401)
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for (name, surrogate), style in zip(SURROGATES.items(), styles, strict=True):
        slopes.plot(distance.numpy(), surrogate.derivative(distance, 2.0).numpy(), linestyle=style, label=name)
    slopes.set(xlabel="U − θ", ylabel="what stands for dS/dU")
    slopes.set_title("surrogate derivatives, α = 2", fontsize=10)
    slopes.legend(fontsize=8)
    for side in (axis, slopes):
        side.spines[["top", "right"]].set_visible(False)
    return figure


# --- recurrence ---------------------------------------------------------------------------------------------------


def draw_recurrence() -> Figure:
    """A recurrent layer: the weights of both connections, and its spikes for one image with and without the second."""
    draw = torch.Generator().manual_seed(0)
    net = G2GNet(
        28, 64, 10, T=28, sequence="rows", block_size=4, num_groups=4, threshold=0.3, recurrent=True, rec_gain=1.0,
        generator=draw,
    )  # fmt: skip
    image = as_samples(load_dataset("fashionmnist-mini").test_images[:1])
    colours = plt.get_cmap("RdBu_r").with_extremes(bad=PAPER)
    figure, places = plt.subplot_mosaic(
        [["fc1", "rec1", "with", "without"]],
        figsize=(11, 3.2),
        layout="constrained",
        width_ratios=(0.75, 1.3, 1.2, 1.2),
    )
    for name, inputs in (("fc1", "28 inputs of a row"), ("rec1", "64 neurons, one step before")):
        connection = net.connections()[name]
        weight = connection.dense_weight().detach().masked_fill(~connection.mask.to_dense(), torch.nan)
        limit = float(connection.values.detach().abs().max())
        places[name].imshow(
            weight.numpy(), cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto"
        )
        _lines(places[name], connection.mask)
        places[name].set(title=name, xlabel=inputs, ylabel="64 neurons")
    for name, title in (("with", "spikes of lif1"), ("without", "without rec1")):
        with torch.no_grad():
            spikes = net.simulate(net.encode(image)).spikes[0].dense()[:, 0]
            net.rec1.values.zero_()
        step, neuron = spikes.nonzero().T
        places[name].scatter(step + 1, neuron, s=4, color=DARK, marker="|")
        places[name].set(title=title, xlabel="time step = row", xlim=(0, 29), ylim=(63.5, -0.5))
    return figure


# --- populations --------------------------------------------------------------------------------------------------


def two_areas() -> tuple[SpikingNetwork, torch.Tensor]:
    """The network of docs/populations.md, and its inputs."""
    draw = torch.Generator().manual_seed(0)

    def joined(source: int, target: int, bias: bool = True) -> G2GLinear:
        mask = BlockMask.sample(GroupLayout(target), GroupLayout(source), p_inter=0.2, block_size=4, generator=draw)
        return G2GLinear(mask, bias=bias, generator=draw)

    net = SpikingNetwork(
        {"v1": LIF(threshold=0.5), "lm": AdLIF(threshold=0.3), "out": LIF()},
        [
            Projection("input", "v1", joined(64, 128)),
            Projection("v1", "lm", joined(128, 96), delay=4),
            Projection("lm", "v1", joined(96, 128, bias=False), delay=6),
            Projection("lm", "out", joined(96, 10), delay=torch.randint(0, 9, (96,), generator=draw)),
        ],
        output="out",
        T=30,
    )
    net.v1_to_lm.bias.data.zero_()
    return net, torch.rand(32, 64, generator=draw) * 4


def draw_populations() -> Figure:
    return figures.population_graph(two_areas()[0])


def draw_lag() -> Figure:
    net, inputs = two_areas()
    with torch.no_grad():
        activity = net.simulate(inputs)
    return figures.spike_rasters(figures.rasters(net, activity), "one sample")


PICTURES = {
    "units.png": draw_units,
    "readouts.png": draw_readouts,
    "dst.png": draw_dst,
    "lif.png": draw_lif,
    "over-time.png": draw_recurrence,
    "populations.png": draw_populations,
    "populations-spikes.png": draw_lag,
}


def draw(folder: Path) -> None:
    for name, picture in PICTURES.items():
        figure = picture()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parent)
