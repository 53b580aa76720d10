"""The content of a report: settings, results, analysis and pictures of each run, and a comparison of several."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from g2gnet.analysis import NetworkAnalysis, groups_table, headline, layers_table
from g2gnet.analyze import analyze_run
from g2gnet.data import ImageData
from g2gnet.network import G2GNet
from g2gnet.report import figures
from g2gnet.report.page import details, heading, page, paragraph, picture, table
from g2gnet.training import SavedRun
from g2gnet.training.evaluation import run_images


@dataclass(frozen=True)
class Inspected:
    """A run and its activity on test images.

    Attributes:
        run: the content of its checkpoint.
        net: its current network, on the device.
        analysis: of the network.
        rasters: the spikes of one test image, layer by layer.
        example: that image, in words.
    """

    run: SavedRun
    net: G2GNet
    analysis: NetworkAnalysis
    rasters: Sequence[figures.Raster]
    example: str


def inspect(run: SavedRun, net: G2GNet, data: ImageData, samples: int) -> Inspected:
    """Runs ``net``, the network of ``run``, on the first ``samples`` test images; all on one device."""
    first = next(run_images(net, run.settings, run.epoch, data, count=samples))
    counts = first.activity.counts
    right = (counts.argmax(1) == first.labels) & (counts.sum(1) > 0)
    shown = int(right.long().argmax())  # the first that is classified correctly, or the first of all
    rasters = [
        figures.Raster(f"lif{number}", spikes.dense()[:, shown].cpu(), connection.mask.rows.layout)
        for number, (spikes, (connection, _)) in enumerate(zip(first.activity.spikes, net.layers(), strict=True), 1)
    ]
    example = f"test image {shown + 1} (class {int(first.labels[shown])}, classified as {int(counts[shown].argmax())})"
    return Inspected(run, net, analyze_run(run, net, data, samples), rasters, example)


def report(inspected: Sequence[Inspected]) -> str:
    """The whole page."""
    labels = _labels([each.run for each in inspected])
    parts = []
    if len(inspected) > 1:
        parts += [heading(2, "Comparison"), *_comparison(dict(zip(labels, inspected, strict=True)))]
    for label, each in zip(labels, inspected, strict=True):
        parts += [heading(2, label if len(inspected) > 1 else _describe(each.run)), *_run(each)]
    runs = "one run" if len(inspected) == 1 else f"{len(inspected)} runs"
    return page(f"g2g: report on {runs}", parts)


def _run(each: Inspected) -> list[str]:
    run, analysis = each.run, each.analysis
    defaults = {field.name: field.default for field in dataclasses.fields(run.settings)}
    settings = run.settings.as_dict()
    own = {name: value for name, value in settings.items() if value != defaults[name]}
    rest = {name: value for name, value in settings.items() if name not in own}
    results = _results(each)
    parts = [
        paragraph(f"{run.path}: {_describe(run)}, after epoch {run.epoch} of {run.settings.epochs}."),
        heading(3, "Results"),
        table(list(results), [list(results.values())]),
        picture(
            figures.training_curves({"training": run.history}),
            "Accuracy on training images (while the network learned from them) and on test images after each epoch.",
        ),
        heading(3, "Settings"),
        paragraph("Settings that differ from the defaults:" if own else "All settings are the defaults."),
        *([table(("setting", "value"), [(name, str(value)) for name, value in own.items()])] if own else []),
        details("Settings left at the default", [table(("setting", "value"), [(n, str(v)) for n, v in rest.items()])]),
        heading(3, "What its neurons do"),
        paragraph(f"{headline(analysis)}. – means not defined: no pairs, no spikes, one group or a constant input."),
        table(*layers_table(analysis)),
        details("By group", [table(*groups_table(layer)) for layer in analysis.layers]),
        picture(
            figures.spike_rasters(each.rasters, f"Spikes for {each.example}"),
            "Each dash is a spike. Neurons are sorted by group, from top to bottom; the two colours only tell "
            "neighbouring groups apart. At a synchronous step, many neurons of a group fire in one column.",
        ),
        picture(
            figures.rate_histograms(analysis),
            f"Firing rates of single neurons over {analysis.samples} test images. Neurons that never fired are counted "
            "in the title, not in the bars.",
        ),
        heading(3, "Who is connected to whom"),
    ]
    return parts + _wiring(each)


def _wiring(each: Inspected) -> list[str]:
    run, net = each.run, each.net
    if run.settings.model == "dense":
        return [paragraph("Every neuron is connected to every neuron of the next layer: there are no groups to draw.")]
    masks = {"now": [connection.mask for connection, _ in net.layers()]}
    note = "The graph never changes."
    if run.settings.sparsity_mode == "dynamic":
        before = [connection.mask for connection, _ in run.initial_network().layers()]
        masks = {"before training": before, "now": masks["now"]}
        note = "Above: as drawn from the seed. Below: after dynamic sparse training, which keeps the number of weights."
    size = net.fc1.in_features
    inputs = "features" if run.settings.use_resnet else "pixels"
    parts = [
        picture(
            figures.connection_density(masks),
            f"Share of the weights from each input group (column) to each output group (row) that exist. {note}",
        ),
        picture(
            figures.group_inputs(net.fc1.mask, figures.input_shape(size), "fc1", inputs),
            f"Each map is the whole input and shows which of its {inputs} the neurons of one hidden group see. Index "
            "and Mixer give each group a band of neighbouring inputs, Random scattered ones; what else is bright comes "
            "from units between groups.",
        ),
        picture(
            figures.group_inputs(net.fc2.mask, figures.input_shape(net.fc2.in_features), "fc2", "hidden-1 neurons"),
            "The same for the second layer; the hidden-1 neurons are laid out row by row. Index shows bands, Mixer "
            f"(whose fc2 is interleaved) one neuron in {run.settings.num_groups}, Random a scatter.",
        ),
    ]
    if run.settings.sparsity_mode == "dynamic":
        parts.append(
            picture(
                figures.turnover(run.history),
                "Left: the share of a layer's units that existed before an epoch but not after it. Right: the "
                "share of the units drawn from the seed that still exist; a unit may go and come back.",
            )
        )
    return parts


def _comparison(inspected: Mapping[str, Inspected]) -> list[str]:
    settings = {label: each.run.settings.as_dict() for label, each in inspected.items()}
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    differing = [name for name in names if len({str(values.get(name)) for values in settings.values()}) > 1]
    results = {label: _results(each) for label, each in inspected.items()}
    header = ["run", *next(iter(results.values()))]
    return [
        table(header, [(label, *result.values()) for label, result in results.items()]),
        heading(3, "Settings that differ"),
        table(
            ("setting", *(label.partition(":")[0] for label in settings)),
            [(name, *(str(values.get(name, "–")) for values in settings.values())) for name in differing],
        )
        if differing
        else paragraph("None."),
        picture(
            figures.training_curves({label: each.run.history for label, each in inspected.items()}),
            "All runs together: test accuracy solid, training accuracy dotted.",
        ),
    ]


def _results(each: Inspected) -> dict[str, str]:
    """The main numbers of a run by their headings."""
    history, net = each.run.history, each.net
    tests = [record["test_acc"] for record in history]
    best = max(range(len(tests)), key=tests.__getitem__)
    weights = sum(int(connection.mask.unit_sizes.sum()) for connection, _ in net.layers())
    possible = sum(connection.mask.shape[0] * connection.mask.shape[1] for connection, _ in net.layers())
    return {
        "epochs": str(each.run.epoch),
        "test accuracy": f"{tests[-1]:.2%}".replace("%", " %"),
        "best (in epoch)": f"{tests[best]:.2%} ({history[best]['epoch']})".replace("%", " %"),
        "training accuracy": f"{history[-1]['train_acc']:.2%}".replace("%", " %"),
        "training loss": f"{history[-1]['train_loss']:.4f}",
        "weights": f"{weights:,}",
        "density": f"{weights / possible:.1%}".replace("%", " %"),
        "firing rate": f"{each.analysis.firing_rate:.3f}",
        "synaptic operations per image": f"{round(each.analysis.synaptic_operations):,}",
        "seconds": f"{sum(record['seconds'] for record in history):.0f}",
    }


def _describe(run: SavedRun) -> str:
    """A run in a few words."""
    settings = run.settings
    features = " (ResNet features)" if settings.use_resnet else ""
    dst = f", DST {settings.cp}/{settings.cg}" if settings.sparsity_mode == "dynamic" else ""
    return f"{settings.model}{dst} on {settings.dataset}{features}"


def _labels(runs: Sequence[SavedRun]) -> list[str]:
    """A different name for each run."""
    return [f"{number}: {_describe(run)}" for number, run in enumerate(runs, 1)]
