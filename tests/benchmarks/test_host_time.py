"""The host's time where launches are free: what is timed is the default step, and every part has a time."""

import pytest
import torch

from benchmarks import host_time, records
from benchmarks.host_time import CASES, Case, Contender, PlainLoop, tiny

pytest.importorskip("triton", minversion="3.3")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_small_network_launches_what_the_default_one_does(precision):
    from benchmarks.launches import training_step
    from benchmarks.predictions import network

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


def test_every_part_of_every_case_has_a_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host_time, "TURN", 2)
    path = tmp_path / "record.jsonl"
    assert host_time.main(["--turns", "2", "--warm_up", "1", "--json", str(path)]) == 0
    rows = records.read(path)["runs"]
    assert {(row["network"], row["backend"], row["precision"]) for row in rows} == set(CASES)
    assert len(rows) == len(CASES) * 6
    assert all(0 < row["least"] <= row["median"] < 60 for row in rows)
    assert "default, triton, bf16" in capsys.readouterr().out


def test_numbers_of_turns_are_checked(capsys):
    assert host_time.main(["--turns", "0"]) != 0
    assert "turns=0 must be" in capsys.readouterr().err


def test_the_interpreter_has_no_launcher_to_time(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert host_time.main(["--launcher"]) != 0
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
