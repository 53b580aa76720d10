"""The benchmark of a brain's recurrent network: contenders are compared with float64, and failures are results."""

import numpy as np
import pytest
import torch
from processes import fork_contenders

from benchmarks import brain, records
from g2g_kernels.cpu import library

SMALL = ["--neurons", "300", "--weights", "3000", "--batch_size", "2", "--T", "5", "--repeats", "1"]
pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="the compiled kernels are not built")


@pytest.mark.parametrize("name", ["g2g-cpu", "csr-by-hand"])
def test_a_contender_is_that_of_float64(monkeypatch, name):
    monkeypatch.setattr(library, "LIST_COST", 0.0)
    monkeypatch.setattr(brain, "CHECKED", 300)
    assert brain.farthest(name) < 1e-5


def test_wrong_gradients_are_told(monkeypatch):
    monkeypatch.setattr(brain, "CHECKED", 100)

    def wrong(graph, drive, steps):
        step = brain.by_hand(graph, drive, steps)
        return lambda: (lambda counts, weights, x: (counts, 1.001 * weights, x))(*step())

    monkeypatch.setitem(brain.CONTENDERS, "csr-by-hand", wrong)
    assert brain.farthest("csr-by-hand") > brain.CLOSE


def test_edges_of_a_file_are_the_graph(tmp_path):
    pandas = pytest.importorskip("pandas")
    columns = {"pre_root_id": [9000, 9000, 9001, 9000], "post_root_id": [9001, 9002, 9000, 9001]}
    more = {"syn_count": [5, 10, 2, 3], "nt_type": ["ACH", "GABA", "ACH", "ACH"]}
    pandas.DataFrame(columns | more).to_csv(tmp_path / "edges.csv.gz", index=False)
    graph = brain.from_file(str(tmp_path / "edges.csv.gz"))
    dense = np.zeros((3, 3), np.float32)
    dense[graph.post, graph.pre] = graph.weight
    expected = np.array([[0, 2, 0], [8, 0, 0], [-10, 0, 0]], np.float32) * 0.001
    assert np.allclose(dense, expected)
    pandas.DataFrame({"a": [1]}).to_csv(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="has the columns"):
        brain.from_file(str(tmp_path / "other.csv"))
    for name, content, why in (
        ("missing", b"pre,post,weight\n0,1,\n", "is missing"),
        ("nothing", b"", "cannot be read"),
        ("bytes", bytes(range(256)), "cannot be read"),
    ):
        (tmp_path / f"{name}.csv").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.csv .*{why}"):
            brain.from_file(str(tmp_path / f"{name}.csv"))
    assert brain.main(["--edges", str(tmp_path / "nothing.csv")]) == 2


def test_the_table_has_a_row_each_and_says_what_failed(monkeypatch, tmp_path, capsys):
    fork_contenders(monkeypatch)
    path = tmp_path / "brain.jsonl"
    assert brain.main([*SMALL, "--contenders", "g2g-cpu,csr-by-hand", "--json", str(path)]) == 0
    runs = {run["name"]: run for run in records.read(path)["runs"]}
    assert all(run["status"] == "timed" and len(run["seconds"]) == 1 and run["off"] < 1e-4 for run in runs.values())
    assert torch.tensor([run["rate"] for run in runs.values()]).diff().abs() < 1e-3
    runs["csr-by-hand"] |= {"status": "failed", "reason": "not enough memory"}
    assert "fails: not enough memory" in brain.table({"runs": [*runs.values()]})
    assert brain.main([*SMALL, "--contenders", "none"]) == 2
    assert "'none' is unknown" in capsys.readouterr().err
    monkeypatch.setattr(brain, "CLOSE", 0.0)
    assert brain.main([*SMALL, "--contenders", "csr-by-hand"]) == 1


def test_growth_is_fitted_to_weights_and_neurons():
    runs = [
        {"status": "ok", "neurons": n, "weights": w, "seconds": [2e-9 * w + 3e-6 * n], "base": 10**8}
        | {"peak": 10**8 + 40 * w + 500 * n}
        for w, n in ((10**5, 10**4), (10**6, 3 * 10**4), (10**7, 10**5))
    ]
    text = brain.growth_table({"runs": runs})
    assert "time grows by 2 ns per weight and 3e+03 ns per neuron" in text
    assert "memory grows by 40 bytes per weight and 500 bytes per neuron" in text
