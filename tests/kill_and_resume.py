"""Kills training runs at random instants and lets them go on: ``python -m tests.kill_and_resume [KILLS]``.

A run is a fork of this process, so that it begins within milliseconds. It tells through a pipe when it enters and
leaves a step, an update of the units, and a write; the parent waits for a drawn one of these, then for a random part of
the time it takes, and sends SIGKILL. What the killed run left is gone on from, to the end; then weights, optimizer and
history have to be those of a run that nobody killed, to the last bit. Prints how many runs died where.
"""

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from g2gnet.base.tensor_files import read_tensors
from g2gnet.data import load_dataset
from g2gnet.dst.scheduler import DSTScheduler
from g2gnet.training import Machine, Trainer, TrainSettings, run_training
from g2gnet.training.checkpoints import RunFiles
from tests.training_runs import SMALL, assert_equal

SETTINGS = TrainSettings(
    **{**SMALL, "limit_train": 96, "batch_size": 32, "limit_test": 32, "epochs": 2}, sparsity_mode="dynamic",
    dst_interval=2, cp="hebb", chunk=2, sequence="permuted", sequence_step=98, validation=0.25, patience=1,  # T is 8
)  # fmt: skip
PHASES = {
    "step": (Trainer, "_train_step"),
    "units update": (DSTScheduler, "_update"),
    "checkpoint write": (RunFiles, "save_checkpoint"),
    "best write": (RunFiles, "save_best"),
    "test": (Trainer, "test"),
    "marker write": (RunFiles, "mark_done"),
}


def announced(number, function, pipe):
    """``function``, telling the pipe when it begins (2·number) and ends (2·number + 1)."""

    def call(*args, **kwargs):
        os.write(pipe, bytes([2 * number]))
        result = function(*args, **kwargs)
        os.write(pipe, bytes([2 * number + 1]))
        return result

    return call


def start(directory, data):
    """A run in a child process: its id, and the reading end of its pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for number, (owner, name) in enumerate(PHASES.values()):
            setattr(owner, name, announced(number, getattr(owner, name), writing))
        run_training(SETTINGS, lambda: data, directory, Machine(torch.device("cpu")))
        status = 0
    finally:
        os._exit(status)


def finish(directory, data):
    """A run to its end; returns for each phase the instants at which it began and ended."""
    child, pipe = start(directory, data)
    times = [[] for _ in range(2 * len(PHASES))]
    while event := os.read(pipe, 1):
        times[event[0]].append(time.perf_counter())
    os.close(pipe)
    assert os.waitpid(child, 0)[1] == 0, f"the run in {directory} failed"
    return times


def kill(directory, data, phase, occurrence, delay):
    """Kills a run ``delay`` seconds after that phase began for that time; returns where it was, None if it was over."""
    child, pipe = start(directory, data)
    inside, begun = [], 0
    while event := os.read(pipe, 1):
        number, ended = divmod(event[0], 2)
        inside.pop() if ended else inside.append(number)
        begun += not ended and number == phase
        if begun == occurrence:
            until = time.perf_counter() + delay
            while time.perf_counter() < until:
                pass
            os.kill(child, signal.SIGKILL)
            break
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    while event := os.read(pipe, 1):
        inside.pop() if event[0] % 2 else inside.append(event[0] // 2)
    os.close(pipe)
    return (list(PHASES)[inside[-1]] if inside else "between") if killed else None


def content(directory):
    files = RunFiles(directory, SETTINGS.stem)
    assert files.marker.exists()
    left = sorted(path.name for path in directory.iterdir())
    assert left == sorted(path.name for path in files.files() if path != files.previous), f"{left} were left"
    return {"last": read_tensors(files.checkpoint), "best": read_tensors(files.best)}


def main(kills):
    torch.set_num_threads(1)
    draw = random.Random(0)
    data = load_dataset(SETTINGS.dataset)
    died = Counter()
    with tempfile.TemporaryDirectory() as root:
        # autograd starts a thread for each GPU, and no thread survives a fork
        if not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()):
            # what a first run imports and looks up is there in every fork of this process
            with contextlib.redirect_stdout(io.StringIO()):
                run_training(SETTINGS, lambda: data, Path(root, "first"), Machine(torch.device("cpu")))
        whole = Path(root, "whole")
        times = finish(whole, data)
        expected = content(whole)
        while died.total() < kills:
            phase = died.total() % len(PHASES)
            begins, ends = times[2 * phase : 2 * phase + 2]
            occurrence = draw.randrange(len(begins))
            delay = draw.uniform(0, 1) * (ends[occurrence] - begins[occurrence])
            directory = Path(root, str(draw.random()))
            where = kill(directory, data, phase, occurrence + 1, delay)
            if where is not None:
                died[where] += 1
                finish(directory, data)
                assert_equal(content(directory), expected)
    print(f"{died.total()} kills:", ", ".join(f"{count} in a {where}" for where, count in sorted(died.items())))
    print("every run ended with the same weights")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
