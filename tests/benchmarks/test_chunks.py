"""The benchmark of long sequences: what it records, and that a step with other results has no time."""

import shlex

import numpy as np
import pytest
from processes import fork_contenders

from benchmarks import chunks, records, redraw


def test_steps_in_chunks_are_timed_and_weighed_beside_the_whole(tmp_path, capsys, monkeypatch):
    fork_contenders(monkeypatch)
    monkeypatch.setattr(chunks, "USUAL", 6)
    file = tmp_path / "record.jsonl"
    flags = shlex.split("--T 6,9 --chunks 2 --chunk 4 --long 12 --hidden_dim 16 --batch_size 3 --repeats 2")
    assert chunks.main([*flags, "--json", str(file)]) == 0
    record = records.read(file)
    points = {(point["T"], point["chunk"]): point for point in record["runs"]}
    assert list(points) == [(6, None), (6, 2), (6, 4), (9, None), (9, 4), (12, 4)]
    assert all(point["median"] > 0 and point["peak_bytes"] >= 0 for point in points.values())
    assert points[6, 2]["differs"] <= chunks.ALLOWED
    assert points[6, None]["times"] == 1
    assert "times" not in points[12, 4]  # nothing is beside it
    assert points[9, 4]["times"] > 0
    table = capsys.readouterr().out
    assert "| 12 | 4 |" in table
    assert "[record](record.jsonl)" in redraw._chunks(redraw.Record(file, record), lambda path: path.name)


def test_another_result_is_wrong():
    expected = {"counts": np.ones(3), "fc1.values": np.array([3.0, 4.0])}
    assert chunks.difference(expected, expected) == 0
    other = {**expected, "fc1.values": np.array([3.0, 4.5])}
    assert chunks.difference(other, expected) == pytest.approx(0.1)
    assert chunks.difference({**expected, "counts": np.zeros(3)}, expected) == float("inf")


@pytest.mark.parametrize("flags", ["--T 0", "--chunk 0", "--chunks 5,0", "--repeats 0", "--T a"])
def test_a_number_out_of_range_is_refused(flags, capsys):
    assert chunks.main(flags.split()) == 2
    assert flags.split()[1][-1] in capsys.readouterr().err
