"""Pictures and redrawn pages: they show what was recorded, and nothing without a record."""

import re

import pytest
from PIL import Image

from benchmarks import records, redraw, study_tables
from benchmarks.report import fit, line, text

MACHINE = {
    "cpu": "a processor", "cpu_capability": "AVX512", "threads": 2, "gpu": None, "versions": {"torch": "2.13.0"},
    "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
WORKLOAD = {
    "model": "index", "batch_size": 8, "T": 3, "hidden_dim": 16, "p_inter": 0.15, "block_size": 64, "density": 0.25,
    "dataset": "fashionmnist", "train_steps": 1, "flop": 4_000_000,
}  # fmt: skip


def timed(contender: str, median: float, place: int = 0) -> dict:
    spread = {"p20": 0.9 * median, "p80": 1.1 * median, "repeats": 3, "first_seconds": 1.5}
    about = {"contender": contender, "place": place, "status": "timed"}
    return {**about, "median": median, "peak_bytes": 7_000_000, **spread}


STEP = dict(benchmark="throughput", kernel="step", quantity=None, x_is=None, baseline="snntorch-masked")
STEP |= {
    "machine": MACHINE,
    "workloads": [{**WORKLOAD, "x": None, "floor_seconds": 0.001}],
    "runs": [
        timed("g2g-cpu", 0.002),
        timed("snntorch-masked", 0.008),
        {"contender": "bsr-lif", "place": 0, "status": "wrong", "reason": "counts is off by 3.0e-01"},
    ],
}
SCALING = {
    **STEP,
    "quantity": "p_inter",
    "x_is": "density of all weights",
    "workloads": [{**WORKLOAD, "x": x, "flop": int(100 * x), "floor_seconds": 0.001} for x in (0.25, 0.5, 1.0)],
    "runs": [
        *(timed("g2g-cpu", 0.1 + x, place) for place, x in enumerate((0.25, 0.5, 1.0))),
        timed("snntorch-masked", 2.0, 2),
        timed("snntorch-masked", 2.0, 0),
        {"contender": "snntorch-masked", "place": 1, "status": "wrong", "reason": "loss is off by 1"},
    ],
}
PAGE = "before\n<!-- drawn: step -->\nold\n<!-- end -->\nbetween\n<!-- drawn: growth -->\n<!-- end -->\nafter\n"


def record(content: dict) -> redraw.Record:
    return redraw.Record(redraw.RESULTS / "some-machine.jsonl", content)


def test_a_page_shows_the_record_and_is_left_alone_elsewhere():
    page = redraw.redrawn(PAGE, redraw.ROOT, [record(STEP)])
    assert "| g2g, compiled CPU kernels | 2 ms | 1.8 ms – 2.2 ms | 4 | 50 % | 7 MB |" in page
    assert "Without a time: PyTorch's block-sparse product with our LIF (counts is off by 3.0e-01)." in page
    assert "3 interleaved repeats, a processor with 2 threads, PyTorch 2.13.0, 2026-01-02" in page
    assert "(benchmarks/results/some-machine.jsonl)" in page
    assert "old" not in page
    assert re.sub(r"(?<=step -->\n).*?(?=<!-- end)", "", page, flags=re.DOTALL) == PAGE.replace("old\n", "")
    assert redraw.redrawn(page, redraw.ROOT, [record(STEP)]) == page  # once more changes nothing


def test_other_networks_have_a_line_each_in_a_table_of_their_own():
    single = {**STEP, "workloads": [{**WORKLOAD, "block_size": 1}]}
    dense = {**STEP, "workloads": [{**WORKLOAD, "model": "dense"}]}
    page = redraw.redrawn(PAGE.replace("growth", "other networks"), redraw.ROOT, [record(single), record(dense)])
    ordinary, other = page.split("between")
    assert "median" not in ordinary
    line = "| index, batch 8, 3 steps, 16 neurons per layer, single weights, 25.0 % of the weights | 2 ms | 8 ms: "
    assert line in other
    assert other.count("| 2 ms |") == 2


def test_of_records_of_one_name_the_newest_is_shown():
    later = {**STEP, "machine": {**MACHINE, "date": "2026-01-03T00:00:00+00:00"}, "runs": STEP["runs"][:2]}
    for kept in ([STEP, later], [later, STEP]):
        page = redraw.redrawn(PAGE, redraw.ROOT, [record(each) for each in kept])
        assert page.count("2026-01-0") == page.count("2026-01-03") == 1


def test_a_busy_machine_has_processor_time_in_its_table():
    rows = [{**row, "cpu_median": 0.003 if "g2g" in row["contender"] else 0.018} for row in STEP["runs"]]
    idle = {**STEP, "runs": rows, "limits": {"others_busy_cores": 0.05}}
    busy = {**idle, "limits": {"others_busy_cores": 1.5}, "machine": {**MACHINE, "cores": 2}}
    assert "processor time" not in redraw.redrawn(PAGE, redraw.ROOT, [record(idle)])
    page = redraw.redrawn(PAGE, redraw.ROOT, [record(busy)])
    assert "| g2g, compiled CPU kernels | 2 ms | 1.8 ms – 2.2 ms | 3 ms | 6 | 7 MB |" in page
    assert "Other programs kept 1.5 of 2 cores busy" in page


def test_recurrent_networks_of_two_sizes_have_a_line_each():
    contenders = [timed("g2g-cpu", 0.002), timed("snntorch-masked", 0.03)]
    workload = {**WORKLOAD, "hidden_dim": 2048, "recurrent": True}
    large = {**STEP, "kernel": "recurrent", "workloads": [workload], "runs": contenders}
    small = {**large, "workloads": [{**workload, "hidden_dim": 512}]}
    assert [record(each).name for each in (large, small)] == ["recurrent", "recurrent, hidden_dim 512"]
    page = redraw.redrawn("<!-- drawn: other networks -->\n<!-- end -->\n", redraw.ROOT, [record(large), record(small)])
    assert "2,048 neurons per layer" in page
    assert page.count("| 15 | – | 7, 7 |") == 2


def test_a_part_without_a_record_is_empty_and_an_unknown_one_is_refused():
    assert redraw.redrawn(PAGE, redraw.ROOT, []) == PAGE.replace("old\n", "")
    with pytest.raises(ValueError, match="part 'speed' is unknown; choose one of results in short, step, in a line"):
        redraw.redrawn("<!-- drawn: speed -->\n<!-- end -->\n", redraw.ROOT, [])


def test_a_scaling_part_says_which_points_have_no_time():
    page = redraw.redrawn("<!-- drawn: scaling-p_inter -->\n<!-- end -->\n", redraw.ROOT / "docs", [record(SCALING)])
    assert "![A training step against density of all weights](some-machine.png)" in page
    assert "(../benchmarks/results/some-machine.jsonl)" in page
    assert "| g2g, compiled CPU kernels | 350 ms | 600 ms | 1.1 s | 9 % | 1.000 |" in page
    assert "| snnTorch loop, dense weights × mask | 2 s | – | 2 s | 100 % | 1.000 |" in page
    assert "snntorch-masked at 0.5: wrong: loss is off by 1" in text(SCALING)


def test_wide_layers_stand_beside_the_memory_of_a_dense_network():
    places = [
        {**place, "x": x, "dense_bytes": 3_000_000_000 * number}
        for number, (x, place) in enumerate(zip((1024, 4096, 16384), SCALING["workloads"], strict=True), 1)
    ]
    content = {**SCALING, "quantity": "wide", "workloads": places, "runs": SCALING["runs"][:3]}
    page = redraw.redrawn("<!-- drawn: scaling-wide -->\n<!-- end -->\n", redraw.ROOT / "docs", [record(content)])
    assert "p_inter" not in page
    assert "| density of all weights | 1,024 | 4,096 | 16,384 | begins at | R² |" in page
    assert "| memory of a step, GB | 1,024 | 4,096 | 16,384 |" in page
    assert "| g2g-cpu | 0.01 | 0.01 | 0.01 |" in page
    assert "| dense weights, gradients and Adam's moments (computed) | 3.00 | 6.00 | 9.00 |" in page


def test_a_picture_names_its_record(tmp_path):
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
    plots.draw(SCALING, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.text["Description"] == plots.digest(SCALING)
        assert min(picture.size) > 100


def test_the_line_is_the_least_squares_line_over_the_work_of_timed_points():
    assert fit([1, 2, 4], [5, 7, 11]) == pytest.approx((2, 3, 1))
    assert fit([0, 1, 2], [0, 1, 0]) == pytest.approx((0, 1 / 3, 0), abs=1e-12)
    runs = SCALING["runs"]
    assert line(SCALING, runs[:3]) == pytest.approx((0.01, 0.1, 1))
    assert line(SCALING, runs[5:]) is None
    alike = {**SCALING, "workloads": [{"flop": flop} for flop in (100, 101, 102)]}
    assert line(alike, runs[:3]) is None


def test_the_time_of_a_whole_study_is_that_of_its_runs():
    numbers = {"seed": 1, "test_acc": 0.9, "weights": 7, "train_seconds": 4000.0, "train_cpu_seconds": 3600.0}
    runs = [{"row": f"units of 16, 5 %, {growth}", **numbers} for growth in ("static", "static", "random")]
    content = {
        "benchmark": "dst", "settings": "--T 2", "epochs": 1, "tested_on": "the test images",
        "machine": STEP["machine"], "rows": {}, "runs": runs,
    }  # fmt: skip
    drawn = "<!-- drawn: dst_study, in short -->\n<!-- end -->\n"
    assert "3 runs, 3.0 hours of processor time, a" in redraw.redrawn(drawn, redraw.ROOT, [record(content)])
    del runs[0]["train_cpu_seconds"]
    assert "3 runs, 3.3 hours of training, a" in redraw.redrawn(drawn, redraw.ROOT, [record(content)])


def test_parts_of_the_recipe_are_compared_seed_by_seed():
    def record(torch, tested_on, rows, cpu="one", settings="--T 2"):
        runs = [{"row": row, "seed": seed, "test_acc": of} for row, ends in rows.items() for seed, of in ends.items()]
        machine = {"cpu": cpu, "versions": {"torch": torch}}
        return {"machine": machine, "settings": settings, "tested_on": tested_on, "rows": {}, "runs": runs}

    def gains(records):
        lines = study_tables.gains_by_seed(records).splitlines()[2:]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    base = "20 epochs"
    last, each = "the last 10,000 training images", study_tables.HELD_BACK
    longer = {"40 epochs, second recipe": {1: 0.91, 2: 0.92}}
    records = [
        record("2.13", last, {base: {1: 0.90, 2: 0.5}, "H 2048": {1: 0.91, 2: 0.9}, "the recipe": {1: 0.99}}),
        record("2.15", last, {base: {1: 0.89}, "20 epochs, ReLU": {1: 0.95}, "H 2048": {1: 0.91}}),
        record("2.15", each, {base: {2: 0.92}, "H 2048": {2: 0.915}, "T 5": {1: 0.885}, **longer}),
        record("2.16", each, {"H 2048": {1: 0.99}}),  # of which no recipe was trained
        record("2.15", each, {"H 2048": {1: 0.5}}, cpu="another"),
        record("2.15", each, {"H 2048": {1: 0.5}}, settings="--T 3"),
        record("2.15", study_tables.TEST_IMAGES, {base: {1: 0.5}, "H 2048": {1: 0.6}}),
    ]
    assert gains(records) == [["H 2048", "+1.00, +2.00", "-0.50"], ["T 5", "-0.50", "–"]]
    # a recipe of its own comes before that of another record
    own = record("2.15", each, {base: {1: 0.50}, "H 2048": {1: 0.53}})
    assert gains([*records, own])[0] == ["H 2048", "+1.00, +2.00, +3.00", "-0.50"]


def test_every_part_is_on_a_page_and_every_part_of_a_page_is_known():
    names = [re.findall(r"<!-- drawn: ([^>]+) -->", page.read_text(encoding="utf-8")) for page in redraw.PAGES]
    assert all(names)
    assert sorted(name for of_page in names for name in of_page) == sorted(redraw.PARTS)  # each once


@pytest.mark.parametrize("kept", redraw.all_records(), ids=lambda kept: kept.path.stem)
def test_records_keep_their_environment_and_their_tables_and_pictures_show_them(kept, capsys):
    assert redraw.main([str(kept.path)]) == 0
    assert capsys.readouterr().out.count("\n| ") > 2
    machine = kept.content["machine"]
    assert {"cpu", "cores", "threads", "gpu", "python", "versions", "commit", "date"} <= machine.keys()
    if kept.picture:
        plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
        with Image.open(kept.picture) as picture:
            assert picture.text["Description"] == plots.digest(kept.content), "run python -m benchmarks.redraw"


@pytest.mark.parametrize("page", redraw.PAGES, ids=lambda page: page.name)
def test_tables_of_pages_are_those_of_the_records_and_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    assert redraw.redrawn(text, page.parent, redraw.all_records()) == text, "run python -m benchmarks.redraw"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


def test_a_record_is_a_line_for_what_it_is_and_one_for_each_run(tmp_path):
    (tmp_path / "record.jsonl").write_text(records.text(STEP), encoding="utf-8")
    lines = (tmp_path / "record.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(STEP["runs"])
    read = records.read(tmp_path / "record.jsonl")
    assert {name: value for name, value in read.items() if name != "g2g"} == STEP
    assert sum(file.stat().st_size for file in records.RESULTS.iterdir()) < 1_100_000
