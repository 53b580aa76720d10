"""Pictures and redrawn pages: they show what was recorded, and nothing without a record."""

import re

import pytest
from PIL import Image

from benchmarks import records, redraw
from benchmarks.report import fit, line

KEPT = records.read(records.RESULTS / "step-dense-model-2-core-zen4.jsonl")


def timed(contender: str, median: float, place: int = 0) -> dict:
    times = {"median": median, "p20": 0.9 * median, "p80": 1.1 * median, "first_seconds": 1.5}
    return {"contender": contender, "place": place, "status": "timed", "repeats": 3, "peak_bytes": 7_000_000, **times}


def with_runs(runs: list, **places) -> dict:
    """A record with these runs, and numbers of each place."""
    number = len(next(iter(places.values())))
    workloads = [{**KEPT["workloads"][0], **{name: of[at] for name, of in places.items()}} for at in range(number)]
    return {**KEPT, "workloads": workloads, "runs": runs, "limits": {}}


WRONG = {"contender": "bsr-lif", "place": 0, "status": "wrong", "reason": "counts is off by 3.0e-01"}
STEP = with_runs([timed("g2g-cpu", 0.002), timed("snntorch-masked", 0.008), WRONG], floor_seconds=[0.001])
SCALING = with_runs(
    [
        *(timed("g2g-cpu", 0.1 + x, place) for place, x in enumerate((0.25, 0.5, 1.0))),
        *(timed("snntorch-masked", 2.0, place) for place in (2, 0)),
        {**WRONG, "contender": "snntorch-masked", "place": 1},
    ],
    x=[0.25, 0.5, 1.0],
    flop=[25, 50, 100],
) | {"quantity": "p_inter", "x_is": "density of all weights"}
PAGE = "before\n<!-- drawn: step -->\nold\n<!-- end -->\nbetween\n<!-- drawn: growth -->\n<!-- end -->\nafter\n"


def record(content: dict, machine: str = "2-core-machine") -> redraw.Record:
    return redraw.Record(redraw.RESULTS / f"step-{machine}.jsonl", content)


def test_a_page_shows_the_newest_record_and_is_left_alone_elsewhere():
    later = {**STEP, "machine": {**STEP["machine"], "date": "2027-01-03T00:00:00+00:00"}}
    page = redraw.redrawn(PAGE, redraw.ROOT, [record(STEP, "2-core-other"), record(later)])
    assert "| g2g, compiled CPU kernels | 2 ms | 1.8 ms – 2.2 ms | 4 | 50 % | 7 MB |" in page
    assert "Without a time: PyTorch's block-sparse product with our LIF (counts is off by 3.0e-01)." in page
    assert "3 interleaved repeats, AMD EPYC with 2 threads, PyTorch 2.13.0+cpu, 2027-01-03" in page
    assert "(benchmarks/results/step-2-core-machine.jsonl)" in page
    assert not re.search("old|2026-", page)
    assert re.sub(r"(?<=step -->\n).*?(?=<!-- end)", "", page, flags=re.DOTALL) == PAGE.replace("old\n", "")
    assert redraw.redrawn(page, redraw.ROOT, [record(later)]) == page  # once more changes nothing
    dates = [each.content["machine"]["date"] for each in redraw.all_records()]
    assert dates == sorted(dates)
    assert redraw.redrawn(PAGE, redraw.ROOT, []) == PAGE.replace("old\n", "")  # a part without a record is empty
    with pytest.raises(ValueError, match="part 'speed' is unknown; choose one of results in short, step, in a line"):
        redraw.redrawn("<!-- drawn: speed -->\n<!-- end -->\n", redraw.ROOT, [])


def picture_is_of(content: dict, path, draw: bool = False) -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib", exc_type=ImportError)
    if draw:
        plots.draw(content, path)
    with Image.open(path) as picture:
        assert picture.text["Description"] == plots.digest(content), "run python -m benchmarks.redraw"
        assert min(picture.size) > 100


def test_a_picture_names_its_record(tmp_path):
    picture_is_of(SCALING, tmp_path / "picture.png", draw=True)


def test_the_line_is_the_least_squares_line_over_the_work_of_timed_points():
    assert fit([1, 2, 4], [5, 7, 11]) == pytest.approx((2, 3, 1))
    assert fit([0, 1, 2], [0, 1, 0]) == pytest.approx((0, 1 / 3, 0), abs=1e-12)
    runs = SCALING["runs"]
    assert line(SCALING, runs[:3]) == pytest.approx((0.01, 0.1, 1))
    assert line(SCALING, runs[5:]) is None
    alike = {**SCALING, "workloads": [{"flop": flop} for flop in (100, 101, 102)]}
    assert line(alike, runs[:3]) is None


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
        picture_is_of(kept.content, kept.picture)


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
    assert records.read(tmp_path / "record.jsonl") == STEP
    assert sum(file.stat().st_size for file in records.RESULTS.iterdir()) < 1_100_000
