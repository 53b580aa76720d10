"""Programs in processes of their own without another import of PyTorch, alone or as ``torchrun`` starts several. They
are forks of a server that has imported what they need, so that each begins within milliseconds."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

from benchmarks import harness, machine

#: seconds after which a process that still runs is killed, which fails its test
LIMIT = 200
SERVER: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    SERVER.set_forkserver_preload(
        ["pytest", "torch._dynamo", "torch.nn.parallel.distributed", "sklearn.model_selection", "g2gnet.programs.train",
         "g2gnet.programs.crossval"]
    )  # fmt: skip


class Ended(NamedTuple):
    """What became of them: their exit statuses by rank (negative: killed by that signal), and all that they printed."""

    statuses: list[int]
    stdout: str
    stderr: str


def fork_contenders(patch: pytest.MonkeyPatch) -> None:
    """Has the benchmarks' contenders be forks, too, and the machine's own rates measured by little work."""
    hurry(patch)
    patch.setattr(harness, "multiprocessing", SimpleNamespace(get_context=lambda method: SERVER))


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Has the benchmarks measure the machine's own rates by little work: none of these rates is tested."""
    patch.setattr(machine.Limits, "side", 64)
    patch.setattr(machine.Limits, "size", 1 << 16)


def start(program: Path | str, *arguments: object, output: Path, **variables: str) -> BaseProcess:
    """Starts a program (``python PROGRAM ARGUMENTS``), which prints into the files OUTPUT.out and OUTPUT.err."""
    for name in ("out", "err"):
        Path(f"{output}.{name}").touch()
    process = SERVER.Process(target=_run, args=(str(program), [*map(str, arguments)], variables, output))
    process.start()
    return process


def wait_for(text: str, process: BaseProcess, file: Path) -> None:
    """Waits until a started program has printed ``text`` into that file."""
    while text not in file.read_text():
        assert process.is_alive(), file.read_text()
        time.sleep(0.005)


def run(program: Path | str, *arguments: object, output: Path, **variables: str) -> Ended:
    """Runs a program to its end."""
    process = start(program, *arguments, output=output, **variables)
    _join([process])
    return Ended([process.exitcode], *(Path(f"{output}.{name}").read_text() for name in ("out", "err")))


def _join(processes: Sequence[BaseProcess]) -> None:
    """Waits for all, up to the limit."""
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} processes still ran after {LIMIT} seconds"


def launch(processes: int, program: Path | str, *arguments: object, folder: Path, size: int | None = None) -> Ended:
    """Runs a program in several processes that find one another; waits for all. With ``size`` they expect that many."""
    folder.mkdir(parents=True, exist_ok=True)
    # as torchrun does, this process answers for their meeting point: no port has to be free later on
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))
    common = {
        "WORLD_SIZE": str(size or processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        start(program, *arguments, output=folder / str(rank), **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]
    _join(started)
    stdout, stderr = (
        "".join((folder / f"{rank}.{name}").read_text() for rank in range(processes)) for name in ("out", "err")
    )
    # gloo of PyTorch 2.8 says there that it is connected
    stdout = "".join(line for line in stdout.splitlines(keepends=True) if not line.startswith("[Gloo]"))
    return Ended([process.exitcode for process in started], stdout, stderr)


def _run(program: str, arguments: Sequence[str], variables: dict[str, str], output: Path) -> None:
    """The life of such a process."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, f"std{name}", open(number, "w", buffering=-1 if number == 1 else 1, closefd=False))  # noqa: SIM115
    os.environ.update(variables)
    os.fsync = lambda descriptor: None  # as in every_test.py
    torch.set_num_threads(1)  # what the variable says is for those that import PyTorch anew
    os.chdir(ROOT)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")  # an exception is printed, and makes the status 1
