"""The pictures show what they are given; ``g2g-report`` writes a page that is whole, safe and right."""

import base64
import html.parser
import itertools
import re
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import MASK_CASES, Largest, seeded
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from small_data import publish_resnet, write_cifar
from tiny_checkpoints import VARIANTS, rewrite, train_tiny

import train
from g2g_kernels import BlockMask, GroupLayout
from g2gnet import LIF, G2GLinear, Projection, SpikingNetwork
from g2gnet.inspect import figures, group_density
from g2gnet.programs.report import content, page
from g2gnet.programs.report import program as report
from g2gnet.training import read_run
from g2gnet.training.checkpoints import read_checkpoint


def drawn_images(figure):
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


@pytest.mark.parametrize("case", ["784 to 2048, an eighth", "single weights"])
def test_the_density_picture_shows_the_density(case):
    masks = [MASK_CASES[case].mask(p_inter) for p_inter in (0.1, 0.8)]
    states = {when: {f"fc{n}": mask for n, mask in enumerate(of, 1)} for when, of in (("a", masks), ("b", masks[::-1]))}
    figure = figures.connection_density(states)
    for image, mask in zip(drawn_images(figure), masks + masks[::-1], strict=True):
        np.testing.assert_array_equal(image, group_density(mask))
    assert [axis.get_title() for axis in figure.axes[:4]] == ["fc1, a", "fc2, a", "fc1, b", "fc2, b"]
    percent = {text.get_text() for text in figure.axes[1].texts}
    assert percent == {f"{100 * value:.0f}" for value in group_density(masks[1]).flatten().tolist() if value > 0}


def some_rates(*layers):
    """What a picture of firing rates reads of an analysis."""
    about = [(f"lif{n}", rates, rates.mean(), (rates == 0).double().mean()) for n, rates in enumerate(layers, 1)]
    names = "name", "neuron_rates", "firing_rate", "silent"
    return SimpleNamespace(layers=[SimpleNamespace(**dict(zip(names, values, strict=True))) for values in about])


def test_five_layers_and_long_labels_find_room_and_layers_without_spikes_are_left_out():
    mask, rates = MASK_CASES["784 to 2048, an eighth"].mask(0.3), torch.rand(200, generator=seeded(0))
    masks = {f"fc{n}": mask for n in range(1, 6)}
    record = {"epoch": 1, "train_loss": 1, "train_acc": 0.5, "test_acc": 0.5}
    curves = figures.training_curves({", ".join([f"setting={n}"] * 40): [[record]] for n in range(3)})
    histograms = figures.rate_histograms(some_rates(rates, rates, torch.zeros(200), rates, rates, rates))
    with pytest.raises(ValueError, match="no neuron of this analysis fired"):
        figures.rate_histograms(some_rates(torch.zeros(200)))
    names = [axis.get_title().partition(":")[0] for axis in histograms.axes if axis.axison]
    assert names == ["lif1", "lif2", "lif4", "lif5", "lif6"]
    for figure in (curves, histograms, figures.connection_density({"before training": masks, "now": masks})):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        boxes = [axis.get_tightbbox(renderer) for axis in figure.axes if axis.axison]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        assert len(boxes) == {curves: 3, histograms: 5}.get(figure, 11)
        assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_delays_are_counted_before_and_after():
    before, now = {"fc1": [0, 2, 2, 3], "fc2": [1]}, {"fc1": [0, 0, 0, 1], "fc2": [3]}
    states = {"before": before, "now": now}
    delays = {when: {name: torch.tensor(steps) for name, steps in of.items()} for when, of in states.items()}
    found = {
        axis.get_title(): [[bar.get_height() for bar in bars] for bars in axis.containers]
        for axis in figures.delay_histograms(delays).axes
    }
    assert found == {"fc1": [[1, 0, 2, 1], [3, 1, 0, 0]], "fc2": [[0, 1, 0, 0], [0, 0, 0, 1]]}


def test_input_maps_form_no_dense_weights_and_show_colours_plane_by_plane_of_at_most_eight_groups():
    mask = BlockMask.sample(GroupLayout(1000, 60), GroupLayout(900, 60, "random"), 1.0, 0.05, 8, seeded(0))  # ragged
    with Largest() as largest:
        images = drawn_images(figures.group_inputs(mask, (30, 30), "fc2", "neurons"))
    assert largest.numel < 1000 * 900 / 8
    dense, group_of = mask.to_dense().float(), mask.rows.layout.group_of
    for group, image in enumerate(images):
        np.testing.assert_allclose(image, dense[group_of == group].mean(0).view(30, 30), atol=1e-6)
    mask = BlockMask.sample(GroupLayout(48, 12), GroupLayout(3072, 12), 1.0, 0.0, 64)
    figure = figures.group_inputs(mask, figures.input_shape(3072), "fc1", "pixels")
    assert "the first 8 of 12 groups" in figure.get_suptitle()
    assert len(drawn_images(figure)) == 8
    expected = np.zeros((32, 96))
    expected[24:, :32] = 1  # group 4 of 12 sees the last quarter of the red plane
    np.testing.assert_array_equal(drawn_images(figure)[3], expected)


def some_network(sizes, joins, output):
    """Populations 0, 1, … of these sizes, the input 12, joined by (source, target, delay), -1 the input."""

    def linear(source, target):
        layouts = GroupLayout(sizes[target], 2), GroupLayout(12 if source < 0 else sizes[source], 2)
        return G2GLinear(BlockMask.sample(*layouts, 1.0, 0.5, 2, seeded(source + 10 * target)))

    projections = [
        Projection("input" if source < 0 else f"p{source}", f"p{target}", linear(source, target), delay=delay)
        for source, target, delay in joins
    ]
    return SpikingNetwork({f"p{number}": LIF() for number in range(len(sizes))}, projections, f"p{output}")


#: a ring whose second population is the first that the input reaches, with a skip, loops and two arrows of one pair
RING = some_network(
    (8, 6, 10, 4),
    [(-1, 1, 0), (1, 0, torch.tensor([1, 5, 2, 2, 2, 2])), (0, 1, 1), (1, 1, 1), (1, 1, 12), (0, 2, 0), (0, 2, 3),
     (-1, 3, 0), (2, 3, 0)],
    3,
)  # fmt: skip


def test_the_picture_of_populations_has_their_weights_delays_and_cycles():
    (axis,) = figures.population_graph(RING).axes
    texts = [(text.get_text(), text.get_color()) for text in axis.texts]
    columns = {text.get_text(): text.get_position()[0] for text in axis.texts}
    assert sorted(("p3", "p2", "p1", "p0", "input"), key=columns.__getitem__) == ["input", "p0", "p1", "p2", "p3"]
    cycle = {"p1_to_p0": ", 1–5 steps", "p0_to_p1": ", 1 step", "p1_to_p1": ", 1 step", "p1_to_p1_2": ", 12 steps"}
    later = {**cycle, "p0_to_p2_2": ", 3 steps"}
    expected = [
        (f"{100 * connection.mask.density:.0f} %{later.get(name, '')}", "#D55E00" if name in cycle else "#0072B2")
        for name, connection in RING.connections().items()
    ]
    assert sorted(expected) == sorted(text for text in texts if "%" in text[0])
    sizes = {name: texts[number + 1][0] for number, (name, _) in enumerate(texts) if name[0] in "ip"}
    assert sizes == {"input": "12", "p0": "8", "p1": "6", "p2": "10", "p3": "4"}
    names, arrows = [*RING.populations, "input"], [each for each in axis.patches if isinstance(each, FancyArrowPatch)]
    ends = sorted((columns[names[each.source]], columns[names[each.target]]) for each in RING.projections())
    assert sorted(tuple(arrow._path_original.vertices[[0, -1], 0]) for arrow in arrows) == ends


def test_nothing_lies_on_another_thing_in_the_picture_of_populations():
    figure = figures.population_graph(RING)
    (axis,) = figure.axes
    assert figure.get_figwidth() * 390 / 358 < 4.4, "small enough for a telephone"
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axis.texts]
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    lines: dict[tuple[int, float], list[list[float]]] = {}  # upright (0) and level (1) ones, by their place
    for patch in (patch for patch in axis.patches if isinstance(patch, FancyArrowPatch)):
        for ends in itertools.pairwise(patch._path_original.vertices.round(6).tolist()):
            for along in (along for along in (0, 1) if ends[0][along] == ends[1][along]):
                lines.setdefault((along, ends[0][along]), []).append(sorted(end[1 - along] for end in ends))
    for parts in lines.values():
        assert not [1 for (a, b), (c, d) in itertools.combinations(parts, 2) if min(b, d) > max(a, c)]


def test_a_raster_has_a_dash_at_each_spike():
    spikes = (torch.rand(7, 24, generator=seeded(0)) < 0.2).float()
    raster = figures.Raster("lif1", spikes, GroupLayout(24, 3, "interleaved"))
    silent = figures.Raster("lif3", torch.zeros(7, 5), GroupLayout(5, 1))
    axis = figures.spike_rasters([raster, silent], "title").axes[0]
    (dashes,) = axis.collections
    found = {(round(path.vertices[:, 0].mean()), round(path.vertices[0, 1])) for path in dashes.get_paths()}
    # group after group: the neuron i of group i mod 3 stands at place 8·(i mod 3) + i // 3
    assert found == {(t + 1, 8 * (i % 3) + i // 3) for t, i in spikes.nonzero().tolist()}
    assert axis.get_ylabel() == "lif1 (24 neurons)\ngroup"


def test_turnover_and_curves_show_the_records_and_seeds_are_one_with_a_band_of_the_standard_error():
    history = [
        {"epoch": epoch, "train_loss": 1 / epoch, "train_acc": 0.5, "test_acc": 0.1 * epoch}
        | {"units_kept": {"fc1": 0.9, "fc2": 0.75}, "initial_units_kept": {"fc1": 0.9**epoch, "fc2": 0.75**epoch}}
        for epoch in (1, 2, 3)
    ]
    replaced, kept = figures.turnover(history).axes
    assert [line.get_ydata()[1] for line in replaced.lines] == pytest.approx([0.1, 0.25])
    assert list(kept.lines[1].get_xdata()) == [0, 1, 2, 3]
    assert list(kept.lines[1].get_ydata()) == pytest.approx([1, 0.75, 0.75**2, 0.75**3])
    figure = figures.training_curves({"first": [history], "second": [history[:1]]})
    accuracy, loss = figure.axes
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    assert list(loss.lines[0].get_ydata()) == pytest.approx([1, 1 / 2, 1 / 3])
    first, second = (line.get_color() for line in loss.lines)
    assert [line.get_color() for line in accuracy.lines] == [first, first, second, second]
    assert len({tuple(figures.style(number).values()) for number in range(49)}) == 49  # no two of many look alike
    accuracies = [0.1, 0.3], [0.3, 0.5, 0.7], [0.2, 0.7]
    seeds = [[{**each, "test_acc": found} for each, found in zip(history, run, strict=False)] for run in accuracies]
    accuracy, _ = figures.training_curves({"seeds": seeds}).axes
    assert list(accuracy.lines[0].get_xdata()) == [1, 2]  # as far as all have come
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([0.2, 0.5])
    bounds = accuracy.collections[0].get_paths()[0].get_extents()
    assert (bounds.y0, bounds.y1) == pytest.approx((0.2 - 0.1 / 3**0.5, 0.5 + 0.2 / 3**0.5))


def test_the_confusion_picture_has_names_and_shares():
    figure = figures.confusion(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ("shirt", "shoe", "bag"))
    np.testing.assert_allclose(drawn_images(figure)[0], [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert {text.get_text() for text in figure.axes[0].texts} == {"3", "1", "2"}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["shirt", "shoe", "bag"]


class Reader(html.parser.HTMLParser):
    """Collects a page's tags, images and visible text; every tag has to be closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text, self.attributes = [], set(), [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch):
    monkeypatch.setattr(page, "DPI", 20)


def read_page(path):
    text = path.read_text()
    reader = Reader(text)
    assert not re.search(r"https?:|//", re.sub(r"base64,[^\"]*", "", text)), "the page must need nothing from outside"
    assert "script" not in reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    places = {value for name, value in reader.attributes if name == "id"}
    assert {value for name, value in reader.attributes if name == "href"} <= {f"#{place}" for place in places}
    for image in reader.images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert len(image["alt"]) > 30
    return reader


@pytest.fixture
def reported(tmp_path):
    def run(*checkpoints):
        target = tmp_path / "report.html"
        assert report.main([*map(str, checkpoints), "--output", str(target), "--samples", "20"]) == 0
        return " ".join(read_page(target).text.split())

    return run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: train_tiny(tmp_path_factory.mktemp("run"), flags) for name, flags in VARIANTS.items()}


@pytest.mark.parametrize("name", ["index, dynamic", "dense"])
def test_the_page_of_one_run_shows_its_settings_results_and_pictures(checkpoints, tmp_path, capsys, name):
    target = tmp_path / "report.html"
    assert report.main([str(checkpoints[name]), "--output", str(target)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {target}\n")
    reader = read_page(target)
    run = read_run(checkpoints[name])
    for value in (run.settings.model, str(checkpoints[name]), f"{run.history[-1]['test_acc']:.2%}".replace("%", " %")):
        assert value in reader.text
    idle = run.settings.idle(run.settings.as_dict())
    text = " ".join(reader.text.split())
    for setting, given in run.settings.as_dict().items():
        assert (f" {setting} {given} " in text) == (setting not in idle), setting
    # curves, rasters, histograms, confusion; of sparse networks density and two kinds of inputs; with DST the turnover
    assert len(reader.images) == (4 if name == "dense" else 8)
    assert ("before an epoch but not after it" in reader.text) == ("dynamic" in name)
    assert ("after dynamic sparse training" in reader.text) == ("dynamic" in name)
    assert "Comparison" not in reader.text


@pytest.mark.ci
@pytest.mark.parametrize(
    ("flags", "pictures", "words"),
    [
        ("--model index --num_groups 1 --p_intra 0.2", 7, ["which of its pixels"]),
        ("--use_resnet --model mixer --num_groups 10 --delay 3 --recurrent 2", 7,
         ["No neuron fired, so there", "ResNet features", "one neuron in 10", "kept, from 0 to 3.",
          "Connections on a cycle are orange", "changes. rec2: the"]),
    ],
)  # fmt: skip
def test_every_kind_of_data_and_grouping_can_be_drawn(tmp_path, monkeypatch, flags, pictures, words):
    """T = 1 in all of them, and untrained networks of which many neurons are silent."""
    monkeypatch.chdir(tmp_path)
    write_cifar(monkeypatch, tmp_path / "data", "cifar10", train=50, test=20)
    publish_resnet(monkeypatch, tmp_path / "hub", "cifar10")
    small = "--dataset cifar10 --hidden_dim 32 --block_size 4 --T 1 --epochs 1"
    assert train.main(shlex.split(f"{small} {flags}")) == 0
    assert report.main([str(path) for path in Path("checkpoints").glob("*.pth")]) == 0
    reader = read_page(Path("report.html"))
    assert len(reader.images) == pictures
    assert all(word in reader.text for word in words)


@pytest.mark.ci
def test_the_page_of_several_runs_compares_them(checkpoints, tmp_path, monkeypatch):
    draw = content.picture

    def picture(figure, caption):
        curves = any(axis.get_title() == "Training loss" for axis in figure.axes)
        return draw(figure, caption) if curves else page.paragraph(caption)

    monkeypatch.setattr(content, "picture", picture)
    paths = [str(checkpoints[name]) for name in ("mixer", "dense", "index, dynamic")]
    assert report.main([*paths, "--output", str(tmp_path / "report.html"), "--samples", "20"]) == 0
    reader = read_page(tmp_path / "report.html")
    assert len(reader.images) == 1
    text = " ".join(reader.text.split())
    assert "Comparison" in text
    assert "setting 1 2 3 model mixer dense index enc current current rate precision fp32 bf16 fp32" in text
    assert "dst_interval – – 3" in text  # which has no effect on the others
    labels = "1: model=mixer, enc=current, p", "2: model=dense, enc=current, precision=bf16", "3: model=index, enc"
    assert [text.count(label) for label in labels] == [3, 3, 3]  # in the contents, the table and the heading
    assert "20 of 100 test images" in text
    assert "the run's own accuracy, on all 100: " in text
    assert "Mean ± standard error over seeds" not in text
    assert all(f"{read_run(path).history[-1]['train_loss']:.4f}" in text for path in paths)
    runs = [read_run(path) for path in paths]
    monkeypatch.setattr(content, "LONGEST", 50)
    described = ["mixer", "dense", "index, DST set/hebb"]
    assert content._labels(runs) == [f"{n}: {text} on fashionmnist-mini" for n, text in enumerate(described, 1)]


def test_a_folder_gives_each_run_with_a_finished_epoch_once(checkpoints, tmp_path, captions_alone, capsys, reported):
    run, before, new = (tmp_path / name for name in ("run.pth", "run.previous.pth", "new.pth"))
    for path in (run, before):
        rewrite(checkpoints["mixer"], path)
    rewrite(checkpoints["mixer"], new, epoch=0, history=[], step=3, progress={})
    text, printed = reported(before, new, run), capsys.readouterr().err
    assert f"{before} is left out: {run} is the later checkpoint of this run\n" in printed
    assert f"{new} is left out: its run has finished no epoch\n" in printed
    assert "report on one run" in text
    assert f"{run}: mixer on fashionmnist-mini, after epoch 2 of 2." in text
    assert report.main([str(new), "--output", str(tmp_path / "none.html")]) == 1
    assert "error: no run has finished an epoch; run the same command again to resume one" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


def test_a_run_with_held_out_images_shows_what_was_tested(tmp_path, captions_alone, capsys, reported):
    last = train_tiny(tmp_path, "--model mixer --validation 0.25 --readout last --lr 0.1 --seed 3")
    run, text = read_run(last), reported(last, last.with_suffix(".best.pth"))
    assert "in one column. No neuron of lif3 fired, so it is not drawn." in text
    assert "report on one run" in text
    found = run.tested["best"]
    shown = f"{100 * found['val_acc']:.2f} % held out, {100 * found['test_acc']:.2f} % test ({found['epoch']})"
    for value in (f"{100 * run.result['test_acc']:.2f} % {shown}", "and on held-out images after the epoch"):
        assert value in text
    # patience ends each run when it will
    seeded = {**run.settings.as_dict(), "seed": 1}
    early = rewrite(last, tmp_path / "early.pth", epoch=1, history=run.history[:1], step=3, settings=seeded)
    assert "Mean ± standard error" in reported(last, early)
    best = reported(last.with_suffix(".best.pth"))  # which has numbers of its own
    assert found["epoch"] < 2
    assert run.result["test_acc"] != found["test_acc"]
    assert f"{found['epoch']} {100 * found['test_acc']:.2f} % {shown} {100 * run.history[0]['train_acc']:.2f} %" in best
    text = reported(rewrite(last, tmp_path / "unfinished.pth", tested={}))
    assert f"not tested yet {100 * found['val_acc']:.2f} % held out ({found['epoch']})" in text
    assert "the run's own accuracy" not in text
    assert capsys.readouterr().err == ""


def test_learned_delays_are_drawn_before_and_after_and_idle_settings_are_not_named(
    checkpoints, tmp_path, captions_alone, monkeypatch, reported
):
    drawn = []
    monkeypatch.setattr(content.figures, "delay_histograms", drawn.append)
    learned = train_tiny(tmp_path, "--model mixer --delay 3 --learn_delay --delay_lr_factor 1000")
    text, run = reported(learned, checkpoints["index, dynamic"], checkpoints["dense"]), read_run(learned)
    assert "arrive, or inputs in fc1: learned, each from 0 to 3." in text
    expected = {"before training": run.initial_network(), "now": run.network()}
    (found,) = drawn
    assert found.keys() == expected.keys()
    for when, net in expected.items():
        assert all(torch.equal(steps, net.delays(name)) for name, steps in found[when].items())
    assert not torch.equal(found["now"]["fc2"], found["before training"]["fc2"])
    labels = (
        "enc=current, delay=3, learn_delay=True, delay_lr_factor=1000.0, precision=fp32, sparsity_mode=static 2: mo"
    )
    assert f"1: model=mixer, {labels}" in text
    assert "3: model=dense, enc=current, delay=0, precision=bf16, sparsity_mode=static Comp" in text
    assert "delay_lr_factor 1000.0 – –" in text


def test_a_graph_that_was_pruned_is_drawn_and_not_called_full(tmp_path, captions_alone, reported):
    flags = "--model dense --sparsity_mode dynamic --dst_interval 3 --dst_fraction 0 --final_density 0.3"
    text = reported(train_tiny(tmp_path, flags))
    assert "dense, DST set to 0.3 of all weights on fashionmnist-mini" in text
    assert "Below: after dynamic sparse training, which prunes more units than it grows." in text
    for wrong in ("Every neuron is connected", "keeps the number", "Index and Mixer"):
        assert wrong not in text


def test_runs_that_differ_in_their_seed_are_shown_with_their_mean(checkpoints, tmp_path, captions_alone, reported):
    paths, found = [], {"dense": [0.2, 0.4, 0.9], "mixer": [0.5, 0.6]}
    for model, accuracies in found.items():
        run, settings = read_run(checkpoints[model]), read_checkpoint(checkpoints[model])["settings"]
        for seed, accuracy in enumerate(accuracies, 1):
            changes = {"history": [*run.history[:-1], {**run.history[-1], "test_acc": accuracy}]}
            changes["settings"] = {**settings, "seed": seed}
            paths.append(rewrite(run.path, tmp_path / f"{model}{seed}.pth", **changes))
    text = reported(*paths)
    for numbers, accuracies in zip(("1, 2, 3", "1, 2"), found.values(), strict=True):
        error = 100 * statistics.stdev(accuracies) / len(accuracies) ** 0.5
        assert f"{numbers} {100 * statistics.mean(accuracies):.2f} ± {error:.2f}" in text
    assert "seed=1" in text


def test_accuracies_of_an_interrupted_run_are_not_those_of_its_network(checkpoints, tmp_path, captions_alone, reported):
    changes = {"epoch": 1, "history": read_run(checkpoints["mixer"]).history[:1]}
    inside = rewrite(checkpoints["mixer"], tmp_path / "run.pth", step=6, progress={}, **changes)
    text = reported(inside, rewrite(checkpoints["mixer"], tmp_path / "other.pth", step=4, **changes))
    assert (
        "The run was stopped inside epoch 2 of 2, after step 6 of the run. Accuracies, loss and seconds are those up to"
        in text
    )
    assert f"the run's own accuracy after epoch 1, on all 100: {changes['history'][0]['test_acc']:.4f}" in text
    assert "1, interrupted" in text
    assert "Mean ± standard error" not in text  # of networks after different steps


def test_every_part_of_a_page_escapes_its_text():
    attack = "</td><script>\"'&"
    parts = [page.heading(2, attack), page.paragraph(attack), page.table((attack,), [(attack,)])]
    parts += [page.details(attack, []), page.picture(Figure(), attack), page.page(attack, [])]
    for part in parts:
        assert "<script" not in part
        assert attack in Reader(part).text


def test_without_matplotlib_the_report_says_what_to_install(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(checkpoints["mixer"]), "--output", str(tmp_path / "report.html")]) == 2
    assert "this needs the package matplotlib; pip install 'g2gnet[plots]'" in capsys.readouterr().err
