"""The benchmark of the CPU kernels' choices: what it forces, and what it counts as slow."""

import pytest

from benchmarks import cpu_choices, records
from g2g_kernels.cpu import library

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


def test_each_way_is_timed_beside_the_chosen_one(tmp_path, monkeypatch):
    points = [cpu_choices.Point(16, 0.1, 0.2, 5, 32), cpu_choices.Point(1, 0.1, 0.2, 5, 32)]
    monkeypatch.setattr(cpu_choices, "grid", lambda: iter(points))
    file = tmp_path / "record.jsonl"
    assert cpu_choices.main(["--size", "256", "--repeats", "2", "--json", str(file)]) == 0
    found = {(point["unit"], point["pass"]): point for point in records.read(file)["runs"]}
    assert len(found) == 2 * len(cpu_choices.PASSES)
    for (unit, name), point in found.items():
        ways = set(point["ms"])
        if "two layers" in name:
            assert ways == {"needed", "tiles"} if "per neuron" in name else {"needed", "events", "tiles"}, (unit, name)
        elif name.startswith("inputs"):
            assert ways == {"events", "tiles"}, (unit, name)
        else:
            assert ways == {"events", "tiles", "sums" if unit == 16 else "batch"}, (unit, name)
        if point["chosen"]:
            assert point["over"] == point["ms"][point["chosen"]] / min(point["ms"].values())
    assert library.SUBSET_COST == 1.0, "what was forced stays"


def test_the_grid_has_the_points_that_are_asked_for():
    points = list(cpu_choices.grid())
    assert len(points) >= 60
    assert len(set(points)) == len(points)


def test_slow_choices_are_listed():
    point = cpu_choices.Point(16, 0.1, 0.2, 5, 32)._asdict() | {"pass": "forward", "ms": {"events": 1.0, "sums": 1.1}}
    record = {"runs": [{**point, "chosen": "sums", "over": 1.1}, {**point, "chosen": "events", "over": 1.0}]}
    text = cpu_choices.table(record)
    assert text.startswith("Of 2 passes 1 take more than 1.03 times the fastest way")
    assert "| forward | sums | events 1.00, sums 1.10 | 1.10 |" in text
