"""The time that a training flag adds to a step."""

import pytest

from benchmarks import flag_costs, records
from g2gnet.data import load_dataset


def test_flags_take_turns_and_updates_are_timed_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flag_costs, "load_dataset", lambda *_: load_dataset("fashionmnist-mini"))
    monkeypatch.setattr(flag_costs, "TURN", 2)
    monkeypatch.setattr(flag_costs, "FLAGS", ("--standardize", "--sparsity_mode dynamic --dst_interval 2 --cg random"))
    path = tmp_path / "record.jsonl"
    arguments = ["--rounds", "2", "--warm_up", "1", "--hidden_dim", "16", "--T", "2", "--json"]
    assert flag_costs.main([*arguments, str(path)]) == 0
    default, standardized, dynamic = records.read(path)["runs"]
    assert [run["update"] is None for run in (default, standardized, dynamic)] == [True, True, False]
    assert all(len(run["rounds"]) == 2 for run in (default, standardized, dynamic))
    assert all(min(run["rounds"]) <= run["median"] <= max(run["rounds"]) for run in (default, standardized, dynamic))
    assert default["firing_rates"] != standardized["firing_rates"]
    assert "| `--standardize` |" in capsys.readouterr().out


def test_steps_of_one_round_are_compared():
    """The machine is twice as slow in the second round; the flag adds a tenth, then two tenths, then nothing."""
    added, spread = flag_costs.cost({"rounds": [1.1, 2.4, 1.0]}, {"rounds": [1.0, 2.0, 1.0]})
    assert added == pytest.approx(0.1)
    assert spread == pytest.approx(0.1)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--warm_up", "-1"], ["--rounds", "24", "--warm_up", "0"]])
def test_rounds_that_an_epoch_does_not_have_are_refused(flags, capsys):
    assert flag_costs.main(flags) != 0
    assert "and together at most" in capsys.readouterr().err
