"""The benchmark of delays: every network and the loop compute what plain PyTorch does."""

from benchmarks import delays, records

SMALL = ["--hidden_dim", "32", "--block_size", "4", "--batch_size", "4", "--T", "6", "--delay", "3", "--repeats", "2"]


def test_every_network_and_the_loop_count_the_same_spikes(tmp_path, capsys):
    path = tmp_path / "delays.jsonl"
    assert delays.main([*SMALL, "--json", str(path)]) == 0
    record = records.read(path)
    assert [run["name"] for run in record["runs"]] == [*delays.NETWORKS, delays.LOOP]
    assert all(run["equal"] == 1 and len(run["seconds"]) == 2 for run in record["runs"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|")][2:] == [*delays.NETWORKS, delays.LOOP]


def test_wrong_counts_are_an_error(monkeypatch):
    monkeypatch.setattr(delays, "loop", lambda net, x: net(x) + 1)
    assert delays.main(SMALL) == 1
