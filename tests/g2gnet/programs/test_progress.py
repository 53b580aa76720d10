"""Long work shows on a terminal where it is and how long is left, and nothing of that in a pipe."""

import functools
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from processes import fork_contenders
from small_data import publish_resnet, write_cifar
from tqdm import tqdm

import benchmarks.workload
from benchmarks import throughput
from g2gnet.data.features import load_features
from g2gnet.programs import crossval, pretrain, train
from g2gnet.programs.report import program as report

SIZES = "--dataset fashionmnist-mini --hidden_dim 16 --T 2 --block_size 4"
TRAIN = f"{SIZES} --model mixer --limit_train 64 --limit_test 20 --batch_size 16 --epochs 2"
BENCH = f"{SIZES} --batch_size 16 --train_steps 3 --device cpu --contenders g2g-torch --repeats 2"
#: a share, then: seconds gone < seconds left
TIME_LEFT = r"\d+%\|[^\r]*\[\d\d:\d\d<\d\d:\d\d"


def calls(program, flags):
    return lambda: program.main(shlex.split(flags))


def a_report():
    return calls(train, TRAIN)() or report.main([*map(str, Path("checkpoints").glob("*.pth"))])


#: work, and the name of its bar; training also shows what it measures
WORK = {
    "train": (calls(train, TRAIN), "Epoch 02/2"),
    "crossval": (calls(crossval, f"{TRAIN} --k_folds 2"), "Epoch 02/2"),
    "pretrain": (calls(pretrain, "--epochs 1 --batch_size 16"), "Epoch 01/1"),
    "features": (lambda: load_features("cifar10"), "features"),
    "report": (a_report, "inspecting"),
    "throughput": (calls(throughput, f"{BENCH} --kernel forward"), "g2g-torch"),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch, captions_alone):
    """An empty directory with CIFAR-10, where bars are drawn at every step."""
    write_cifar(monkeypatch, tmp_path / "data", "cifar10", train=50, test=20)
    publish_resnet(monkeypatch, tmp_path / "hub", "cifar10")
    monkeypatch.chdir(tmp_path)
    fork_contenders(monkeypatch)
    monkeypatch.setattr(benchmarks.workload, "cache_dir", lambda: tmp_path / "workloads")
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, mininterval=0, miniters=1))
    return tmp_path


@pytest.mark.ci
@pytest.mark.parametrize("name", WORK)
def test_work_shows_the_time_left_on_a_terminal_and_nothing_in_a_pipe(name, workplace, monkeypatch):
    work, bar = WORK[name]
    for terminal in (True, False):
        for folder in ("checkpoints", "data/features"):
            shutil.rmtree(folder, ignore_errors=True)
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            assert work() != 1
        drawn = re.findall(r"\r([^\r]*?): *" + TIME_LEFT, stream.getvalue())
        assert any(bar in description for description in drawn) == terminal, stream.getvalue()
        measured = re.search(r", loss \d\.\d{3}, acc \d\.\d{3}, run left \d\d:\d\d\]", stream.getvalue())
        assert bool(measured) == (terminal and name in ("train", "crossval", "report", "pretrain"))
        assert terminal or not re.search(r"\r|%\|", stream.getvalue())
