"""Every test works in an empty directory: these libraries leave logs and checkpoints."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
