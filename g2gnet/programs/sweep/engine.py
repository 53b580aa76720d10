"""Trains the runs of a sweep on an executor and collects their results."""

import concurrent.futures
import contextlib
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from g2g_kernels.numbers import COUNT
from g2gnet.base.files import make_directory, open_own
from g2gnet.base.messages import OutputError, reason
from g2gnet.base.optional import optional_package
from g2gnet.network_settings import SettingsError
from g2gnet.programs import train
from g2gnet.programs.flags import machine_from
from g2gnet.programs.main import FAILED, REFUSED, memory_named
from g2gnet.programs.sweep.grid import LOG, Grid, Run, arguments_of, runs_of
from g2gnet.programs.sweep.results import Sweep
from g2gnet.training import CheckpointError, Interrupted, SavedRun, TrainingError, read_run
from g2gnet.training.interruption import handled, leave_stopping_to_parent, stop_children
from g2gnet.training.run import tests_of

logger = logging.getLogger("g2gnet")

#: errors of a run that are shown without a traceback
EXPLAINED = (*REFUSED, *FAILED)
#: seconds of a wait; on Windows, Ctrl-C is only seen between two waits
INTERVAL = 0.5
#: held by the run that trains in this process: seeds and modes of PyTorch and standard output belong to the process
_training = threading.Lock()


def train_run(given: Mapping[str, Any], folder: str) -> None:
    """Trains or resumes one run, with flags of ``g2g-train`` by name, and redirects its output to ``log.txt``."""
    arguments, log = arguments_of({**given, "checkpoint_dir": folder}), Path(folder) / LOG
    try:
        make_directory(log.parent)
        file = open(log, "a", encoding="utf-8", opener=open_own)  # noqa: SIM115  (closed below)
    except OSError as error:
        remedy = "move it away, or give another folder"
        raise OutputError(f"cannot write {error.filename or folder} ({reason(error)}); {remedy}") from error
    with file, _training, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with memory_named(arguments):
                train.train(arguments)
        except Interrupted as stopped:  # the run is saved: the signal may now have its usual effect
            signal.raise_signal(stopped.signal)
        except OutputError as error:  # whose message names standard output
            why = reason(error.__cause__ or error)
            raise OutputError(f"cannot write {log} ({why}); free space, then do the same again to resume") from error
        except EXPLAINED:
            raise
        except Exception as error:  # as text: not every exception can be sent to another process
            with contextlib.suppress(OSError):
                traceback.print_exc()
            raise TrainingError(f"{type(error).__name__}: {reason(error)}; {log} has the traceback") from None


def outcome(run: Run, more: Callable[[SavedRun], dict[str, Any]] = lambda saved: {}) -> dict[str, Any] | None:
    """The results of a finished run: those of :func:`g2gnet.training.run_epochs`, wall-clock and processor seconds of
    training, number of weights, and ``more``. None if it is not finished. Raises CheckpointError for damaged files, or
    those of other settings."""
    last = run.files.load_marker(run.settings)
    if last is None:
        return None
    saved = read_run(run.files.checkpoint)
    seconds = {f"train_{name}": sum(record[name] for record in saved.history) for name in ("seconds", "cpu_seconds")}
    kernels = {name: math.prod(saved.state[f"{name}.values"].shape[3:]) for name in saved.masks()}
    weights = sum(mask.num_weights * kernels[name] for name, mask in saved.masks().items())
    return {**last, **seconds, "weights": weights, **more(saved)}


@contextlib.contextmanager
def processes(jobs: int, threads: int | None = None) -> Iterator[concurrent.futures.Executor]:
    """An executor with ``jobs`` processes of ``threads`` threads; None: they share the cores. After an exception, such
    as Ctrl-C, each run finishes and saves its step. If this process is killed, its processes end at once."""
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (threads,))
    try:
        yield pool
    except BaseException as error:
        stop_children({*multiprocessing.active_children()} - others, error)
        raise
    finally:
        with handled(signal.SIGINT, signal.SIG_IGN):  # until the last step is saved
            pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """Initialises a process of the pool."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # the usual lock is shared with other processes; a killed one would never free it
    leave_stopping_to_parent()
    threading.Thread(target=end_with_parent, daemon=True).start()


def train_runs(
    runs: Sequence[Run],
    executor: concurrent.futures.Executor,
    machine: Mapping[str, Any],
    name: str,
    on_end: Callable[[Run], str],
) -> dict[str, str]:
    """Trains unfinished runs on ``executor``, with a progress bar called ``name`` on a terminal and a line from
    ``on_end`` for each run that ends. Returns errors of failed runs by label. Raises TrainingError if a process of the
    executor was killed."""
    failed: dict[str, str] = {}
    # processes that start inherit this: Ctrl-C would show as a traceback while they import
    with handled(signal.SIGINT, signal.SIG_IGN):
        waiting = {executor.submit(train_run, {**run.given, **machine}, str(run.folder)): run for run in runs}
    with tqdm(total=len(runs), desc=name, unit=" runs", leave=False, disable=None, file=sys.stderr) as bar:
        try:
            while waiting:
                done, _ = concurrent.futures.wait(waiting, INTERVAL, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    run = waiting.pop(future)
                    try:
                        future.result()
                        bar.write(on_end(run), file=sys.stderr)
                    except concurrent.futures.BrokenExecutor as error:
                        what = "a process that trained was stopped, or killed, as by a system without memory"
                        remedy = "its saves are kept. Do the same again to resume; lower `jobs` if memory was short"
                        raise TrainingError(f"{what}; {remedy}") from error
                    except Interrupted:  # of this process, not of the run
                        raise
                    except Exception as error:
                        with bar.external_write_mode(file=sys.stderr):
                            failed[run.label] = _log_failure(run, error)
                    bar.update()
        finally:
            for future in waiting:
                future.cancel()
    return failed


def _log_failure(run: Run, error: Exception) -> str:
    text = str(error) if isinstance(error, EXPLAINED) else f"{type(error).__name__}: {reason(error)}"
    logger.error("%s: failed: %s", run.label, text)
    return text


def run(
    grid: Grid,
    folder: Path | str = "sweep",
    *,
    executor: concurrent.futures.Executor | None = None,
    jobs: int | None = None,
    data_dir: Path | str = "data",
    device: str = "auto",
    backend: str = "auto",
    finished: bool = False,
) -> Sweep:
    """Trains every combination of a grid's values; finished runs are skipped, stopped ones resume.

    Each run is one of ``g2g-train``, with the same result, in a folder of its own. Killed at any time, it loses at most
    the current epoch. A run that fails, or whose files are damaged, does not stop the others. A script that calls this
    without an executor needs ``if __name__ == "__main__":``, since its processes import it.

    Args:
        grid: settings of ``g2g-train`` by name, each with one value or an iterable of values; ``seed`` is one of them.
        folder: of the runs. Several machines must all see it, and ``data_dir``, under one name.
        executor: where to train; None: processes of this machine. In threads of one process, runs train one after
            another.
        jobs: number of processes, without an executor; None: one per core on a CPU, one in all on another device.
        data_dir, device, backend: as the flags of ``g2g-train``.
        finished: train nothing, and return the finished runs.

    Raises:
        SettingsError: for invalid settings, a device that this machine does not have, or ``jobs`` out of range, before
            anything is trained.
        TrainingError: if no run is finished, or a process was killed.
        MissingPackageError: without pandas or matplotlib (extra ``sweeps``), before anything is trained.
        DataError: if a file of data that the grid names cannot be read.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> small = {"hidden_dim": 32, "block_size": 8, "T": 3, "epochs": 1, "limit_train": 64}
        >>> grid = {"dataset": "fashionmnist-mini", "model": ["index", "mixer"], "seed": [1, 2], **small}
        >>> made = run(grid, "models", executor=ThreadPoolExecutor(1))
        >>> [(row.settings, row.seeds) for row in made.rows]
        [({'model': 'index'}, [1, 2]), ({'model': 'mixer'}, [1, 2])]
    """
    for package in ("pandas", "matplotlib"):
        optional_package(package, "sweeps")
    runs = runs_of(grid, folder)
    for line in dict.fromkeys(line for each in runs for line in each.settings.without_effect()):
        logger.warning("%s", line)
    machine = {"data_dir": str(data_dir), "device": device, "backend": backend}
    ends: dict[Path, dict[str, Any] | None] = {}
    failed: dict[str, str] = {}
    for each in runs:
        try:
            ends[each.folder] = outcome(each)
        except FAILED as error:  # noqa: PERF203  (of this run alone)
            failed[each.label] = _log_failure(each, error)
    missing = [each for each in runs if not finished and ends.get(each.folder, each) is None]

    def note(each: Run) -> str:
        end = ends[each.folder] = outcome(each)
        if end is None:
            raise CheckpointError(f"{each.files.marker} is missing; all machines must see {folder} under this name")
        return f"{each.label}: {tests_of(end)}"

    if missing:
        own = processes(_jobs(jobs, len(missing), machine)) if executor is None else contextlib.nullcontext(executor)
        with own as pool:
            failed |= train_runs(missing, pool, machine, "sweep", note)
    done = [(each, end) for each in runs if (end := ends.get(each.folder)) is not None]
    if not done:
        raise TrainingError("\n".join([f"no run is finished in {folder}", *dict.fromkeys(failed.values())]))
    return Sweep(done, {each.label: failed[each.label] for each in runs if each.label in failed})


def _jobs(jobs: int | None, runs: int, machine: Mapping[str, Any]) -> int:
    device = machine_from(arguments_of(machine)).device
    if jobs is None:
        jobs = (os.cpu_count() or 1) if device.type == "cpu" else 1
    if wanted := COUNT.refuses(jobs):
        raise SettingsError(f"jobs={jobs!r} must be {wanted}")
    return min(jobs, runs)
