"""The content of a report: settings, results, analysis and pictures of each run, and a comparison of several runs."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from g2gnet.base.tables import estimate
from g2gnet.data import DATASETS, ImageData
from g2gnet.dst.gradual_pruning import mean_density, unit_sizes
from g2gnet.inspect import Batch, NetworkAnalysis, analyze_network, figures, groups_table, headline, layers_table
from g2gnet.network import G2GNet
from g2gnet.programs.report.page import contents, details, heading, page, paragraph, picture, table
from g2gnet.stack import is_plain
from g2gnet.training import SavedRun
from g2gnet.training.evaluation import run_images
from g2gnet.training.held_out import best_of
from g2gnet.weights.patterns import FULL, GROUPINGS

#: at most how many characters of the settings that differ name a run
LONGEST = 120


@dataclass(frozen=True)
class Inspected:
    """A run, its network and its activity on test images."""

    run: SavedRun
    net: G2GNet
    analysis: NetworkAnalysis
    rasters: Sequence[figures.Raster]  # of one test image, of the layers that fire
    example: str  # that image, in words
    confusion: torch.Tensor  # int64 [C, C], number of images by true and predicted class
    silent: int  # how many of these have no output spikes
    images: int  # number of all test images


def inspect(run: SavedRun, net: G2GNet, data: ImageData, samples: int) -> Inspected:
    """Runs ``net``, the network of ``run``, on the first ``samples`` test images of ``data``, on the same device."""
    count, batches = data.num_classes, run_images(net, run.settings, run.epoch, data, count=samples)
    first = next(batches)
    confusion, silent = torch.zeros(count * count, dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def watched() -> Iterator[Batch]:
        for batch in itertools.chain([first], batches):
            output = batch.activity.output
            pairs = count * batch.labels + output.argmax(1)
            confusion.add_(torch.bincount(pairs.cpu(), minlength=len(confusion)))
            silent.add_((output == 0).all(1).sum().cpu())
            yield batch

    analysis = analyze_network(net, watched(), count)
    output = first.activity.output
    right = (output.argmax(1) == first.labels) & output.any(1)
    shown = int(right.long().argmax())  # the first image that is classified correctly, or else the first image
    fires = {layer.name for layer in analysis.layers if layer.firing_rate}
    rasters = [raster for raster in figures.rasters(net, first.activity, shown) if raster.name in fires]
    classes = _classes(run, count)
    true, found = classes[int(first.labels[shown])], classes[int(output[shown].argmax())]
    example = f"test image {shown + 1} (class {true}, classified as {found})"
    matrix = confusion.view(count, count)
    return Inspected(run, net, analysis, rasters, example, matrix, int(silent), len(data.test_labels))


def _classes(run: SavedRun, count: int) -> Sequence[str]:
    known = DATASETS.get(run.settings.dataset)
    return known.classes if known and known.classes else [str(number) for number in range(count)]


def report(inspected: Sequence[Inspected]) -> str:
    """The whole page."""
    labels = _labels([each.run for each in inspected])
    parts = []
    if len(inspected) > 1:
        anchors = {"comparison": "Comparison", **{f"run{number}": label for number, label in enumerate(labels, 1)}}
        parts += [contents(anchors), heading(2, "Comparison", "comparison")]
        parts += _comparison(dict(zip(labels, inspected, strict=True)))
    for number, (label, each) in enumerate(zip(labels, inspected, strict=True), 1):
        parts += [heading(2, label if len(inspected) > 1 else _describe(each.run), f"run{number}")]
        parts += _run(each, alone=len(inspected) == 1)
    runs = "one run" if len(inspected) == 1 else f"{len(inspected)} runs"
    return page(f"g2g: report on {runs}", parts)


def _run(each: Inspected, alone: bool) -> list[str]:
    """The section of a run. Results and curves of several runs are in the comparison."""
    run, analysis = each.run, each.analysis
    defaults = type(run.settings)(neuron=run.settings.neuron).as_dict()
    pairs = [(name, str(value), value == defaults[name]) for name, value in _settings(run).items()]
    changed, rest = ([(name, text) for name, text, usual in pairs if usual is wanted] for wanted in (False, True))
    parts = [paragraph(f"{run.path}: {_describe(run)}, {run.position}.")]
    if alone:
        results = _results(each)
        caption = (
            "Accuracy on training images, while the network learned from them, and on "
            f"{_judges(run)} images after the epoch."
        )
        parts += [heading(3, "Results"), table(list(results), [list(results.values())])]
        parts.append(picture(figures.training_curves({"training": [run.history]}), caption))
    own = ""
    if analysis.samples < each.images and "test_acc" in run.result:
        when = f" after epoch {run.epoch}" if run.interrupted else ""
        own = f" (the run's own accuracy{when}, on all {each.images:,}: {run.result['test_acc']:.4f})"
    if run.interrupted:
        text = (
            f"The run was stopped {run.position}. Accuracies, loss and seconds are those up to epoch {run.epoch}; "
            "weights, density, firing rate, synaptic operations and all pictures of the network are those of that step."
        )
        parts.append(paragraph(text))
    membranes = " The output neurons do not spike: their membranes are read." * (run.settings.readout != "counts")
    parts += [
        heading(3, "Settings"),
        paragraph("Settings that differ from the defaults:" if changed else "All settings are the defaults."),
        *([table(("setting", "value"), changed)] if changed else []),
        details("Settings left at the default", [table(("setting", "value"), rest)]),
        heading(3, "Activity of its neurons"),
        paragraph(
            f"{headline(analysis, each.images)}{own}. – means not defined: no pairs, no spikes, one group or a "
            f"constant input.{membranes}"
        ),
        table(*layers_table(analysis)),
        details("By group", [table(*groups_table(layer)) for layer in analysis.layers]),
        *_spikes(each),
        picture(
            figures.confusion(each.confusion, _classes(run, len(each.confusion))),
            "Rows: the true class of these images; columns: the predicted class."
            + f" {each.silent:,} had no output spikes and count as the first class."
            * (run.settings.readout == "counts"),
        ),
        heading(3, "Connectivity"),
    ]
    if not is_plain(each.net) and run.settings.layers is None:
        caption = (
            "Populations and their numbers of neurons. Each arrow shows the share of weights that exist and the delay. "
            "Connections on a cycle are orange."
        )
        parts.append(picture(figures.population_graph(each.net), caption))
    if run.settings.delay:
        nets = _states(each, changes=run.settings.learn_delay)
        delays = {when: {name: net.delays(name) for name in net.connections()} for when, net in nets.items()}
        how = "learned, each" if run.settings.learn_delay else "drawn for each neuron and kept,"
        caption = f"How many steps later the spikes of how many neurons arrive, or inputs in fc1: {how}"
        parts.append(picture(figures.delay_histograms(delays), f"{caption} from 0 to {run.settings.delay}."))
    return parts + _connections(each)


def _spikes(each: Inspected) -> list[str]:
    """Pictures of the layers that fire."""
    if not each.rasters:
        return [paragraph("No neuron fired, so there are no spikes to draw.")]
    silent = [layer.name for layer in each.analysis.layers if not layer.firing_rate]
    left_out = f" No neuron of {', '.join(silent)} fired, so it is not drawn." if silent else ""
    return [
        picture(
            figures.spike_rasters(each.rasters, f"Spikes for {each.example}"),
            "Each dash is a spike. Neurons are sorted by group, from top to bottom; the two colours only separate "
            f"neighbouring groups. At a synchronous step, many neurons of a group fire in one column.{left_out}",
        ),
        picture(
            figures.rate_histograms(each.analysis),
            f"Firing rates of single neurons over {each.analysis.samples} test images. Neurons that never fired are "
            "counted in the title, not in the bars.",
        ),
    ]


def _states(each: Inspected, changes: bool) -> dict[str, G2GNet]:
    """The network by when it was so: before training, too, if the part that is drawn ``changes``, and no other run is
    where it started."""
    begins = {"before training": each.run.initial_network()} if changes and not each.run.settings.start else {}
    return {**begins, "now": each.net}


def _connections(each: Inspected) -> list[str]:
    run, net = each.run, each.net
    pruned = run.settings.final_density is not None
    if run.settings.model in FULL and not pruned:
        what = "neuron" if run.settings.layers is None else "channel"
        return [paragraph(f"Every {what} is connected to every {what} of the next layer: there are no groups to draw.")]
    nets = _states(each, changes=run.settings.sparsity_mode == "dynamic")
    note = f"The run started from {run.settings.start}." if run.settings.start else "The mask never changes."
    if len(nets) > 1:
        effect = "prunes more units than it grows" if pruned else "keeps the number of units"
        note = f"Above: before training. Below: after dynamic sparse training, which {effect}."
    if run.settings.recurrent:
        names = " and ".join(name for name in net.connections() if name.startswith("rec"))
        note += f" {names}: the neurons of a hidden layer to one another, at least one step later."
    masks = {when: {name: each.mask for name, each in of.connections().items()} for when, of in nets.items()}
    inputs, whole = "features" if run.settings.use_resnet else "pixels", "whole input"
    if run.settings.sequence != "none":
        inputs, whole = "inputs", "input of one time step"
    share = "Share of the weights" if run.settings.layers is None else "Share of the kernels, or weights,"
    of_density = f"{share} from each input group (column) to each output group (row) that exist. {note}"
    of_fc1 = f"Each map is the {whole} and shows which of its {inputs} the neurons of one hidden group see."
    of_fc2 = "The same for the second layer; the hidden-1 neurons are laid out row by row."
    if run.settings.model in GROUPINGS:
        of_fc1 += " Index and Mixer give each group a band of neighbouring inputs, Random scattered ones; other bright "
        of_fc1 += "places are units between groups."
        of_fc2 += f" Index shows bands, Mixer (whose fc2 is interleaved) one neuron in {run.settings.num_groups}, "
        of_fc2 += "Random a scatter."
    parts = [picture(figures.connection_density(masks), of_density)]
    for name, what, caption in (("fc1", inputs, of_fc1), ("fc2", "hidden-1 neurons", of_fc2)):
        if run.settings.layers is None:
            layer = getattr(net, name)
            shape = figures.input_shape(layer.in_features)
            parts.append(picture(figures.group_inputs(layer.mask, shape, name, what), caption))
    if run.settings.sparsity_mode == "dynamic":
        caption = (
            "Left: the share of a layer's units that existed before an epoch but not after it. Right: the share of the "
            "units before training that still exist; a unit may go and come back."
        )
        parts.append(picture(figures.turnover(run.history), caption))
    return parts


def _comparison(inspected: Mapping[str, Inspected]) -> list[str]:
    settings = {label: _settings(each.run) for label, each in inspected.items()}
    differing = _differing([each.run for each in inspected.values()])
    results = {label: _results(each) for label, each in inspected.items()}
    header = ["run", *next(iter(results.values()))]
    groups = _groups(inspected)
    parts = []
    if len(groups) < len(inspected):
        quantities: dict[str, tuple[int, Callable[[Inspected], Any]]] = {
            "test accuracy (%)": (2, lambda each: 100 * each.run.result["test_acc"]),
            "training accuracy (%)": (2, lambda each: 100 * each.run.history[-1]["train_acc"]),
            "firing rate": (4, lambda each: each.analysis.firing_rate),
            "synaptic operations per image": (0, lambda each: each.analysis.synaptic_operations),
        }
        if not all("test_acc" in each.run.result for each in inspected.values()):
            del quantities["test accuracy (%)"]
        rows = []
        for label, runs in groups.items():
            cells = (estimate([value(each) for each in runs]).text(digits) for digits, value in quantities.values())
            rows.append((label, ", ".join(str(each.run.settings.seed) for each in runs), *cells))
        parts += [heading(3, "Mean ± standard error over seeds"), table(("settings", "seeds", *quantities), rows)]
        parts.append(heading(3, "Each run"))
    parts.append(table(header, [(label, *result.values()) for label, result in results.items()]))
    parts.append(heading(3, "Settings that differ"))
    header = ["setting", *map(_number, settings)]
    rows = [(name, *(_shown(values.get(name)) for values in settings.values())) for name in differing]
    parts.append(table(header, rows) if differing else paragraph("None."))
    curves = figures.training_curves({label: [each.run.history for each in runs] for label, runs in groups.items()})
    caption = (
        "All runs together. Solid: test accuracy, or accuracy on held-out images; dotted: training accuracy. Runs that "
        "differ only in their seed are one line, their mean, with its standard error as a band."
    )
    return [*parts, picture(curves, caption)]


def _shown(value: object) -> str:
    return "–" if value is None else str(value)


def _judges(run: SavedRun) -> str:
    """The images by which a run's epochs are compared."""
    return "test" if "test_acc" in run.history[-1] else "held-out"


def _results(each: Inspected) -> dict[str, str]:
    history, net, tested = each.run.history, each.net, each.run.tested
    record: Mapping[str, Any]
    if _judges(each.run) == "test":
        record = max(history, key=lambda record: record["test_acc"])
        best = f"{_percent(record['test_acc'])} test, chosen by it"
    else:
        record = best_of(history)
        best = f"{_percent(record['val_acc'])} held out"
        best += f", {_percent(tested['best']['test_acc'])} test" if tested else ""
    layers = [*net.connections().values()]
    weights = sum(int(unit_sizes(layer).sum()) for layer in layers)
    return {
        "epochs": str(each.run.epoch) + ", interrupted" * each.run.interrupted,
        "test accuracy": _percent(each.run.result["test_acc"]) if "test_acc" in each.run.result else "not tested yet",
        "best (in epoch)": f"{best} ({record['epoch']})",
        "training accuracy": _percent(history[-1]["train_acc"]),
        "training loss": f"{history[-1]['train_loss']:.4f}",
        "weights": f"{weights:,}",
        "density": f"{mean_density(layers):.1%}".replace("%", " %"),
        "firing rate": f"{each.analysis.firing_rate:.3f}",
        "synaptic operations per image": f"{round(each.analysis.synaptic_operations):,}",
        "seconds": f"{sum(record['seconds'] for record in history):.0f}",
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _describe(run: SavedRun) -> str:
    settings = run.settings
    features = " (ResNet features)" if settings.use_resnet else ""
    rules = settings.cp + f"/{settings.cg}" * (settings.dst_fraction > 0)
    dst = f", DST {rules}" if settings.sparsity_mode == "dynamic" else ""
    if settings.final_density is not None:
        dst += f" to {settings.final_density:.4g} of all weights"
    steps = "" if settings.sequence == "none" else f" as sequences ({settings.sequence})"
    layers = f" {settings.layers}" if settings.layers else ""
    return f"{settings.model}{layers}{dst} on {settings.dataset}{features}{steps}"


def _settings(run: SavedRun) -> dict[str, Any]:
    """The settings of a run that have an effect."""
    values = run.settings.as_dict()
    idle = run.settings.idle(values)
    return {name: value for name, value in values.items() if name not in idle}


def _differing(runs: Sequence[SavedRun]) -> list[str]:
    """The settings in which runs differ, at the default where they have no effect; the seed comes last."""
    settings = [{**run.settings.defaults(), **_settings(run)} for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
    return sorted(differing, key=lambda name: name == "seed")


def _apart(run: SavedRun, names: Sequence[str], **instead: object) -> str:
    """A run by those of its settings that have these names, but for what it lacks."""
    settings = {**_settings(run), **instead}
    given = [(name, settings[name]) for name in names if str(settings.get(name)) not in ("None", "False")]
    return ", ".join(f"{name}={value}" for name, value in given) or _describe(run)


def _labels(runs: Sequence[SavedRun]) -> list[str]:
    """A different name for each run, by the settings that differ, unless they are many."""
    names = _differing(runs)
    texts = [_apart(run, names) for run in runs]
    if max(map(len, texts)) > LONGEST:
        texts = [_describe(run) for run in runs]
    return [f"{number}: {text}" for number, text in enumerate(texts, 1)]


def _number(label: str) -> str:
    """Of the run that has this label."""
    return label.partition(":")[0]


def _groups(inspected: Mapping[str, Inspected]) -> dict[str, list[Inspected]]:
    """The runs that differ only in seed and name, by number and the other settings that differ, if these are few."""
    shown = [name for name in _differing([each.run for each in inspected.values()]) if name not in ("seed", "name")]
    groups: dict[str, list[str]] = {}
    for label, each in inspected.items():
        run = each.run
        text = _apart(run, shown, epochs=run.epoch)
        going_on = "epochs" not in shown and run.epoch != run.settings.epochs and not run.tested
        if run.interrupted or going_on:
            text += f", {run.position}"
        groups.setdefault(text, []).append(label)
    if max(map(len, groups)) > LONGEST:
        groups = {"; ".join(labels): labels for labels in groups.values()}
    else:
        groups = {f"{', '.join(map(_number, labels))}: {text}": labels for text, labels in groups.items()}
    return {text: [inspected[label] for label in labels] for text, labels in groups.items()}
