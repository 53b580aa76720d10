"""The smaller programs of measurement: what each times, counts and records, and what it refuses."""

import shlex

import numpy as np
import pytest
import torch
from processes import fork_contenders

from benchmarks import chunks, cpu_choices, delays, host_time, records, redraw
from benchmarks.host_time import CASES, Case, Contender, PlainLoop, tiny
from g2g_kernels.cpu import library

needs_triton = pytest.mark.usefixtures("triton")
needs_kernels = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


@pytest.fixture
def triton():
    return pytest.importorskip("triton", minversion="3.3")


def test_what_is_out_of_range_is_refused(capsys):
    refused = [(chunks, flags, flags.split()[1][-1]) for flags in ("--T 0", "--chunk 0", "--chunks 5,0", "--T a")]
    for program, flags, message in (*refused, (host_time, "--turns 0", "turns=0 must be")):
        assert program.main(flags.split()) != 0
        assert message in capsys.readouterr().err


@needs_triton
def test_the_interpreter_has_no_launcher_to_time(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert host_time.main(["--launcher"]) != 0
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


# --- long sequences ---------------------------------------------------------------------------------------------------


def test_steps_in_chunks_are_timed_and_weighed_beside_the_whole(tmp_path, capsys, monkeypatch):
    fork_contenders(monkeypatch)
    monkeypatch.setattr(chunks, "USUAL", 4)
    file = tmp_path / "record.jsonl"
    flags = shlex.split("--T 4,6 --chunks 2 --chunk 3 --long 8 --hidden_dim 16 --batch_size 3 --repeats 1")
    assert chunks.main([*flags, "--json", str(file)]) == 0
    record = records.read(file)
    points = {(point["T"], point["chunk"]): point for point in record["runs"]}
    assert list(points) == [(4, None), (4, 2), (4, 3), (6, None), (6, 3), (8, 3)]
    assert all(point["median"] > 0 and point["peak_bytes"] >= 0 for point in points.values())
    assert points[4, 2]["differs"] <= chunks.ALLOWED
    assert points[4, None]["times"] == 1
    assert "times" not in points[8, 3]  # nothing is beside it
    assert points[6, 3]["times"] > 0
    table = capsys.readouterr().out
    assert "| 8 | 3 |" in table
    assert "[record](record.jsonl)" in redraw._linked(redraw._chunks(redraw.Record(file, record)), tmp_path)


def test_another_result_is_wrong():
    expected = {"counts": np.ones(3), "fc1.values": np.array([3.0, 4.0])}
    assert chunks.difference(expected, expected) == 0
    other = {**expected, "fc1.values": np.array([3.0, 4.5])}
    assert chunks.difference(other, expected) == pytest.approx(0.1)
    assert chunks.difference({**expected, "counts": np.zeros(3)}, expected) == float("inf")


# --- choices of the CPU kernels ---------------------------------------------------------------------------------------


@needs_kernels
def test_each_way_is_timed_beside_the_chosen_one(tmp_path, monkeypatch):
    points = [cpu_choices.Point(16, 0.1, 0.2, 5, 32), cpu_choices.Point(1, 0.1, 0.2, 5, 32)]
    monkeypatch.setattr(cpu_choices, "grid", lambda: iter(points))
    file = tmp_path / "record.jsonl"
    assert cpu_choices.main(["--size", "256", "--repeats", "2", "--json", str(file)]) == 0
    found = {(point["unit"], point["pass"]): point for point in records.read(file)["runs"]}
    assert len(found) == 2 * len(cpu_choices.PASSES)
    for (unit, name), point in found.items():
        wanted = {"events", "tiles"}
        if "two layers" in name:
            wanted = {"needed", "tiles"} if "per neuron" in name else {"needed", *wanted}
        elif not name.startswith("inputs"):
            wanted |= {"sums" if unit == 16 else "batch"}
        assert set(point["ms"]) == wanted, (unit, name)
        if point["chosen"]:
            assert point["over"] == point["ms"][point["chosen"]] / min(point["ms"].values())
    assert library.SUBSET_COST == 1.0, "what was forced stays"


def test_slow_choices_are_listed():
    point = cpu_choices.Point(16, 0.1, 0.2, 5, 32)._asdict() | {"pass": "forward", "ms": {"events": 1.0, "sums": 1.1}}
    record = {"runs": [{**point, "chosen": "sums", "over": 1.1}, {**point, "chosen": "events", "over": 1.0}]}
    text = cpu_choices.table(record)
    assert text.startswith("Of 2 passes 1 take more than 1.03 times the fastest way")
    assert "| forward | sums | events 1.00, sums 1.10 | 1.10 |" in text


# --- delays -----------------------------------------------------------------------------------------------------------

DELAYED = ["--hidden_dim", "32", "--block_size", "4", "--batch_size", "4", "--T", "6", "--delay", "3", "--repeats", "2"]


def test_every_network_and_the_loop_count_the_same_spikes(tmp_path, capsys):
    path = tmp_path / "delays.jsonl"
    assert delays.main([*DELAYED, "--json", str(path)]) == 0
    record = records.read(path)
    assert [run["name"] for run in record["runs"]] == [*delays.NETWORKS, delays.LOOP]
    assert all(run["equal"] == 1 and len(run["seconds"]) == 2 for run in record["runs"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|")][2:] == [*delays.NETWORKS, delays.LOOP]


def test_wrong_counts_are_an_error(monkeypatch):
    monkeypatch.setattr(delays, "loop", lambda net, x: net(x) + 1)
    assert delays.main(DELAYED) == 1


# --- the host ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_small_network_launches_what_the_default_one_does(precision):
    from benchmarks.launches import training_step
    from benchmarks.roofline import network

    contender = Contender(Case("default", "triton", precision))
    contender.turn(1)
    launched = [launch.kernel.fn.__name__ for launch in contender.launches]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert launched == [each.name for each in training_step(network(), 256, 784, dtype) if each.launch]


def test_the_plain_loop_is_the_same_network():
    stack = tiny("cpu")
    x = 5 * torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    counts = PlainLoop(stack)(x)
    assert counts.sum() > 0
    assert torch.equal(counts, stack(x))


@needs_triton
def test_every_part_of_every_case_has_a_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host_time, "TURN", 2)
    path = tmp_path / "record.jsonl"
    assert host_time.main(["--turns", "2", "--warm_up", "1", "--json", str(path)]) == 0
    rows = records.read(path)["runs"]
    assert {(row["network"], row["backend"], row["precision"]) for row in rows} == set(CASES)
    assert len(rows) == len(CASES) * 6
    assert all(0 < row["least"] <= row["median"] < 60 for row in rows)
    assert "default, triton, bf16" in capsys.readouterr().out
