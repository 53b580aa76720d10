"""Sweeps on dask.distributed: a real scheduler and two workers, one of which is killed."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from training_runs import SMALL, assert_equal, load

from g2gnet.programs import sweep

distributed = pytest.importorskip("distributed", reason="distributed is not installed (pip install -e '.[clients]')")


def test_a_sweep_whose_worker_dies_ends_as_if_it_had_not(tmp_path):
    grid = {**SMALL, "limit_train": 2000, "epochs": 6, "p_inter": [0.05, 0.15, 0.3], "seed": [1, 2, 3]}
    folder = tmp_path / "dask"
    options = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:

        def kill_one():
            while sum(path.read_text().count("\n") for path in folder.glob("*/*.jsonl")) < 4:
                time.sleep(0.01)
            os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_one, daemon=True)  # a sweep that fails early does not wait for it
        killer.start()
        made = sweep.run(grid, folder, executor=client.get_executor())
        killer.join()
    assert made.failed == {}
    assert len(made.ends) == 9
    with ThreadPoolExecutor(1) as executor:
        whole = sweep.run(grid, tmp_path / "whole", executor=executor)
    for (one, _), (other, _) in zip(made.ends, whole.ends, strict=True):
        assert_equal(load(one.files)["model"], load(other.files)["model"])
