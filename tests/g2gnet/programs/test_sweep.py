"""Sweeps: which runs a grid consists of, that each is train.py's, that nothing is lost, and the statistics."""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from helpers import ROOT
from training_runs import SMALL, assert_equal, flags_of, load, run

from g2g_kernels import BackendError
from g2gnet.base.messages import OutputError
from g2gnet.base.tables import estimate
from g2gnet.network_settings import SettingsError
from g2gnet.programs import sweep
from g2gnet.programs.sweep import engine, program
from g2gnet.programs.sweep.grid import read_grid, runs_of
from g2gnet.training import TrainingError, interruption

QUICK = {**SMALL, "T": 3, "limit_train": 64, "limit_test": 32, "epochs": 1}


posix = pytest.mark.skipif(os.name != "posix", reason="links, FIFOs and devices are those of POSIX")
GRID = {**QUICK, "p_inter": [0.1, 0.3], "seed": [1, 2]}


@pytest.fixture(scope="module")
def thread():
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def made(tmp_path_factory, thread):
    folder = tmp_path_factory.mktemp("sweep")
    return sweep.run(GRID, folder, executor=thread), folder


def test_a_grid_is_every_combination_and_a_larger_one_keeps_its_folders(tmp_path):
    grid = {"p_inter": [0.1, 0.3], "model": ("index", "mixer"), "seed": range(3), "T": {4}}
    runs = runs_of(grid, tmp_path)
    found = [(run.settings.seed, run.settings.p_inter, run.settings.model, run.settings.T) for run in runs]
    assert found == list(itertools.product(range(3), (0.1, 0.3), ("index", "mixer"), [4]))
    assert runs[0].label == "p_inter=0.1, model=index, seed=0"
    folders = {run.folder for run in runs}
    assert len(folders) == 12
    for folder in folders:
        folder.mkdir()
    larger = runs_of({**grid, "T": [4, 5], "p_inter": [0.1, 0.3, 1]}, tmp_path)
    assert len(larger) == 36
    assert {run.folder for run in larger if run.folder.exists()} == folders


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"p_intr": 1}, "p_intr is not a setting; g2g-train --help lists them"),
        ({"seed": []}, "seed has no value"),
        ({3: 1}, "3 is not a setting"),
        ({"seed": [1, 2, 1]}, "seed=1 and seed=1 make the same run; leave one of them out"),
        ({"p_inter": [0.1, 0.3], "model": "dense"}, "p_inter has several values, but no effect with model=dense; give"),
        ({"threshold": [None, 1.0]}, "threshold=None and threshold=1.0 make the same run; leave one of them out"),
        ({"seed": "one"}, "seed='one' must be a whole number"),
        ({"average": "nil"}, "average='nil' must be a whole number of at least 2"),
        ({"lr": ["fast"]}, "lr='fast' must be a number above 0"),
        ({"standardize": "yes"}, "standardize='yes' must be"),
        ({"hidden_dim": ["64,"]}, "hidden_dim='64,' must be"),
        ({"model": ["index", "ring"], "T": 3}, "model='ring' is unknown; choose one of"),
        ({"model": ["index", "dense"], "sparsity_mode": "dynamic"}, "needs a sparse model"),
    ],
)
def test_a_mistake_in_a_grid_is_named_before_anything_is_trained(tmp_path, grid, message):
    with pytest.raises(SettingsError) as error:
        sweep.run({**QUICK, **grid}, tmp_path / "sweep")
    assert message in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_text_of_flags_and_values_of_files_make_the_same_grid(tmp_path):
    flags = "--hidden_dim 64,48 32,32,32 16 --recurrent true 2 1,2 --average none 5 --name none --p_inter 1 --lr 1e-3"
    grid = program.grid_from(program.build_parser().parse_args(flags.split()))
    told = {"hidden_dim": [[64, 48], [32, 32, 32], 16], "recurrent": [True, [2], [1, 2]], "average": ["none", 5]}
    (tmp_path / "grid.json").write_text(json.dumps({**told, "name": "none", "p_inter": 1, "lr": 0.001}))
    names = "hidden_dim", "recurrent", "average"
    for runs in (runs_of(grid, tmp_path), runs_of(read_grid(tmp_path / "grid.json"), tmp_path)):
        found = [tuple(getattr(run.settings, name) for name in names) for run in runs]
        assert found == [*itertools.product(((64, 48), (32, 32, 32), 16), (True, (2,), (1, 2)), (None, 5))]
        assert (runs[0].settings.name, runs[0].given["p_inter"], runs[0].settings.lr) == ("none", 1.0, 0.001)
        assert type(runs[0].given["p_inter"]) is float
    parse = program.build_parser().parse_args
    (switched,) = runs_of(program.grid_from(parse(["--standardize"])), tmp_path)
    both = runs_of(program.grid_from(parse(["--standardize", "True", "false"])), tmp_path)
    assert [run.settings.standardize for run in (switched, *both)] == [True, True, False]


def test_without_pandas_a_sweep_is_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert program.main([*flags_of(QUICK), "--folder", str(tmp_path / "sweep")]) == 2
    assert "this needs the package pandas; pip install 'g2gnet[sweeps]' installs it" in capsys.readouterr().err
    assert not [*tmp_path.glob("sweep/*")]


def test_a_grid_comes_from_a_file_and_flags_replace_what_it_says(tmp_path):
    path, told = tmp_path / "grid.json", {"seed": [1, 2], "p_inter": 1}
    path.write_text(json.dumps(told))
    assert read_grid(path) == told
    if sys.version_info >= (3, 11):
        (tmp_path / "grid.toml").write_text("seed = [1, 2]\np_inter = 1\n")
        assert read_grid(tmp_path / "grid.toml") == told
    flags = ["--grid", str(path), "--seed", "3", "4", "--T", "7"]
    grid = program.grid_from(program.build_parser().parse_args(flags))
    assert grid == {"seed": ["3", "4"], "p_inter": 1, "T": ["7"]}
    for content in ("[1]", '{"seed": ', "5", "[" * 100000):
        path.write_text(content)
        with pytest.raises(SettingsError, match=r"grid.json is not a table of settings \("):
            read_grid(path)
    with pytest.raises(SettingsError, match=r"none.json cannot be read \("):
        read_grid(tmp_path / "none.json")


def test_each_run_is_that_of_train_and_a_finished_one_is_not_trained_again(made, tmp_path):
    made, folder = made
    assert made.varied == ("p_inter",)
    assert made.common == QUICK | {"enc_scale": 3.0}
    for each, end in made.ends:
        of_sweep, alone = load(each.files), load(run(tmp_path / each.folder.name, **{**QUICK, **each.differs}))
        assert_equal(of_sweep["model"], alone["model"])
        assert end["test_acc"] == alone["history"][-1]["test_acc"]
        assert "Epoch 01 | train_acc=" in (each.folder / "log.txt").read_text()
    assert sweep.run(GRID, folder, executor=None).ends == made.ends  # which needs no processes


def test_means_have_standard_errors_and_held_out_images_decide_where_there_are_some(made, tmp_path, thread):
    assert estimate([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3)))
    assert estimate([4.0]) == (4.0, None)
    far, near = estimate([9.0, 9.5, 10.0]), estimate([3.0, 6.0])
    assert near.level(estimate([1.0, 2.0, 6.0]))
    assert not near.level(far)
    assert not near.level(estimate([4.0]))
    for row in made[0].rows:
        ends = [end for each, end in made[0].ends if each.settings.p_inter == row.settings["p_inter"]]
        one, other = (100 * end["test_acc"] for end in ends)
        mean, error = (one + other) / 2, abs(one - other) / 2  # √(2·(difference/2)²/1/2)
        assert f"| {row.settings['p_inter']} | 2 | {mean:.2f} ± {error:.2f} |" in made[0].table()
    grid = {**GRID, "epochs": 3, "validation": 0.25, "patience": 1}  # one run ends before its last epoch
    held_out, means = sweep.run(grid, tmp_path, executor=thread), {}
    table = held_out.table()
    for row in held_out.rows:
        ends = [end for each, end in held_out.ends if each.settings.p_inter == row.settings["p_inter"]]
        shown = [statistics.mean(end["best"][name] for end in ends) for name in ("val_acc", "test_acc")]
        assert row.estimate("best/val_acc").mean == pytest.approx(shown[0])
        assert re.search(rf"\| 2 \| {100 * shown[0]:.2f} ± [\d.]+ \| {100 * shown[1]:.2f} ± ", table)
        means[row.label] = shown[0]
    best, told = max(means, key=means.__getitem__), held_out.as_dict()["best"]
    assert f"was tested.\nBest: {best}, chosen on held-out images." in table
    first, other = (row.estimate("best/val_acc") for row in held_out.rows)
    assert table.endswith(
        f"No certain difference (two standard errors) from {min(means, key=means.__getitem__)}."
    ) == first.level(other)
    assert (told["by"], f"p_inter={told['settings']['p_inter']}") == ("best/val_acc", best)
    assert "validation accuracy" not in made[0].table()
    assert ", chosen on test images, so its accuracy is too high; give `validation=0.1`." in made[0].table()


def test_values_are_evenly_spaced_and_numbers_in_their_order(tmp_path):
    for values in ([64.0, 16.0, 32.0], [0.05, 0.15, 0.3], [1e-3, 1.0], ["mixer", "index"]):
        runs = runs_of({"model" if "mixer" in values else "lr": values, "seed": 1}, tmp_path)
        ends = [(each, {"test_acc": accuracy}) for accuracy, each in enumerate(runs)]
        axis = sweep.Sweep(ends, {}).picture().axes[0]
        shown = values if "mixer" in values else sorted(values)
        assert [label.get_text() for label in axis.get_xticklabels()] == [str(value) for value in shown]
        assert list(axis.get_xticks()) == list(axis.lines[0].get_xdata()) == list(range(len(values)))
        assert list(axis.lines[0].get_ydata()) == [values.index(value) for value in shown]


@posix
def test_a_run_with_files_that_cannot_be_used_fails_by_itself_and_the_others_go_on(tmp_path, thread):
    victim = tmp_path / "victim"
    victim.write_text("")
    runs = runs_of({**QUICK, "seed": range(6)}, tmp_path / "sweep")
    sweep.run({**QUICK, "seed": [0, 1]}, tmp_path / "sweep", executor=thread)
    runs[0].files.checkpoint.unlink()
    runs[1].files.checkpoint.write_bytes(b"")
    for each in runs[3:5]:
        each.folder.mkdir()
    (runs[3].folder / "log.txt").symlink_to(victim)
    os.mkfifo(runs[4].folder / "log.txt")
    made = sweep.run({**QUICK, "seed": range(6)}, tmp_path / "sweep", executor=thread)
    assert [each.settings.seed for each, _ in made.ends] == [2, 5]
    expected = {
        "seed=0": "pth cannot be read (",
        "seed=1": "restore that file, or delete ",
        "seed=3": "log.txt (it is a symbolic link); move it away",
        "seed=4": "log.txt (it is not a regular file); move it away",
    }
    assert list(made.failed) == list(expected)
    assert all(message in made.failed[label] for label, message in expected.items()), made.failed
    assert victim.read_text() == ""
    with pytest.raises(TrainingError, match=r"no run is finished in .*\n.*pth cannot be read"):
        sweep.run({**QUICK, "seed": 0}, tmp_path / "sweep", executor=thread)


def test_whatever_a_run_raises_it_fails_by_itself_and_says_it_in_words(tmp_path, thread, monkeypatch):
    class UnsendableError(Exception):
        def __init__(self, one, other):
            super().__init__(one)

    errors = [
        (MemoryError("all of it"), "out of memory: all of it; lower --batch_size (now 64)"),
        (BackendError("no such kernels"), "no such kernels"),
        (OSError(errno.EIO, "broken"), "OSError: broken; {log} has the traceback"),
        (UnsendableError("strange", 2), "UnsendableError: strange; {log} has the traceback"),
    ]

    def failing(arguments, train=engine.train.train):
        if arguments.seed < len(errors):
            raise errors[arguments.seed][0]
        return train(arguments)

    monkeypatch.setattr(engine.train, "train", failing)
    made = sweep.run({**QUICK, "seed": range(5)}, tmp_path, executor=thread)
    assert [each.settings.seed for each, _ in made.ends] == [4]
    logs = [run.folder / "log.txt" for run in runs_of({**QUICK, "seed": range(4)}, tmp_path)]
    for said, (_, message), log in zip(made.failed.values(), errors, logs, strict=True):
        assert said.startswith(message.format(log=log))
    assert "raise errors[" in logs[3].read_text()


@posix
def test_a_full_disk_names_the_log_and_not_standard_output(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "open_own", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}/log.txt \(No space left on device\); free space"):
        engine.train_run(QUICK, str(tmp_path))


def test_a_second_ctrl_c_does_not_leave_processes_that_still_import(monkeypatch):
    ended = []
    shutdown = lambda cancel_futures: (signal.raise_signal(signal.SIGINT), ended.append(True))  # noqa: E731
    pool = SimpleNamespace(shutdown=shutdown)
    monkeypatch.setattr(engine.concurrent.futures, "ProcessPoolExecutor", lambda *arguments: pool)
    with pytest.raises(KeyboardInterrupt, match="the first"), engine.processes(1):
        raise KeyboardInterrupt("the first")
    assert ended


@pytest.mark.parametrize(("platform", "usual"), [("win32", signal.SIG_DFL), ("linux", signal.SIG_IGN)])
def test_ctrl_c_of_windows_stops_the_processes_itself(monkeypatch, platform, usual):
    """There nothing can be sent to them, and ending one loses its step."""
    monkeypatch.setattr(sys, "platform", platform)
    with interruption.handled(signal.SIGINT, signal.default_int_handler):
        interruption.leave_stopping_to_parent()
        assert signal.getsignal(signal.SIGINT) == usual
    ended = {}
    for error in (KeyboardInterrupt(), TrainingError("failed")):
        process = Mock()
        interruption.stop_children([process], error)
        ended[type(error)] = process.terminate.call_count
    assert ended == {KeyboardInterrupt: platform == "linux", TrainingError: 1}
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)  # which one program may send another there
    with runpy.run_path(interruption.__file__)["stop_signals"]() as received:
        signal.raise_signal(signal.SIGBREAK)
    assert received == [signal.SIGUSR1]


@pytest.mark.long
def test_a_sweep_that_is_killed_and_interrupted_resumes_and_ends_as_if_it_had_not_been(tmp_path, thread):
    once, folder = {**SMALL, "limit_train": 2000, "epochs": 8}, tmp_path / "killed"
    program = "import sys; from g2gnet.programs.sweep.program import main; sys.exit(main())"  # as g2g-sweep does
    command = [sys.executable, "-c", program, *flags_of(once), "--seed", "1", "2", "3", "--jobs", "2"]

    def epochs():
        return sum(path.read_text().count("\n") for path in folder.glob("*/*.jsonl"))

    def until(number, ended=lambda: None):
        while epochs() < number and ended() is None:
            time.sleep(0.01)

    for number in (signal.SIGKILL, signal.SIGINT):
        before, pipes = epochs(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, "--folder", str(folder)], cwd=ROOT, **pipes)
        until(before + 2, process.poll)
        process.send_signal(number)
        _, said = process.communicate()  # which ends when its processes have ended
        assert process.returncode == (130 if number == signal.SIGINT else -number), said
    assert "run the same command again to resume" in said
    assert "Traceback" not in said
    assert len(list(folder.glob("*/*.DONE"))) < 3
    grid = {**once, "seed": [1, 2, 3]}
    with engine.processes(1) as pool:
        before, worker = epochs(), pool.submit(os.getpid).result()
        killer = threading.Thread(target=lambda: until(before + 2) or os.kill(worker, signal.SIGKILL), daemon=True)
        killer.start()
        with pytest.raises(TrainingError, match="a process that trained was stopped, or killed"):
            engine.train_runs(runs_of(grid, folder), pool, {}, "sweep", lambda run: run.label)
    assert epochs() < 24
    resumed, whole = (sweep.run(grid, place, executor=thread) for place in (folder, tmp_path / "whole"))
    assert any("resuming" in path.read_text() for path in folder.glob("*/log.txt"))
    for (one, _), (other, _) in zip(resumed.ends, whole.ends, strict=True):
        assert_equal(load(one.files), load(other.files))


@pytest.mark.parametrize("where", ["wait", "Future.result"])
def test_sigterm_ends_a_sweep_as_ctrl_c_does(tmp_path, capsys, monkeypatch, thread, where):
    monkeypatch.setattr(engine, "processes", lambda jobs: contextlib.nullcontext(thread))
    monkeypatch.setattr(engine, "train_run", lambda given, folder: None)
    monkeypatch.setattr(f"concurrent.futures.{where}", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert program.main([*flags_of(QUICK), "--folder", str(tmp_path)]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == f"g2g-sweep: interrupted by SIGTERM; {program.RESUME}\n"


def test_a_failure_is_logged_so_that_the_program_names_its_flags(tmp_path, capsys, caplog, monkeypatch, thread):
    monkeypatch.setattr(engine, "processes", lambda jobs: contextlib.nullcontext(thread))
    flags = [*flags_of({**QUICK, "lr": 1e30, "epochs": 3}), "--folder", str(tmp_path / "sweep")]
    assert program.main(flags) == 1
    (failure,) = [message for message in caplog.messages if message.startswith("the run: failed: ")]
    assert "lower `lr`" in failure
    said = capsys.readouterr().err
    assert "lower --lr" in said
    assert "`" not in said


def test_the_program_writes_a_table_csv_json_and_a_picture(made, tmp_path, capsys):
    made, folder = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    flags = [*flags_of(QUICK), "--p_inter", "0.1", "0.3", "--seed", "1", "2", "--folder", str(tmp_path)]
    assert program.main([*flags, "--json", str(tmp_path / "more.json")]) == 0
    printed = capsys.readouterr().out
    assert "4 runs: 2 p_inter × 2 seed | 4 finished" in printed.splitlines()[0]
    assert "| p_inter | runs | test accuracy, % |" in printed
    assert printed.endswith(f"with pictures: g2g-report {tmp_path}/*/*.pth\n")
    told, more = (json.loads((tmp_path / name).read_text()) for name in ("sweep.json", "more.json"))
    assert told == more
    assert [row["settings"] for row in told["rows"]] == [{"p_inter": 0.1}, {"p_inter": 0.3}]
    header, *lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert header.startswith("p_inter,seed,epoch,train_loss,")
    assert [line.split(",")[:2] for line in lines] == [["0.1", "1"], ["0.3", "1"], ["0.1", "2"], ["0.3", "2"]]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert program.main([*flags, "--finished"]) == 0
    assert made.table().replace("`validation=0.1`", "--validation 0.1") in capsys.readouterr().out
    for name in ("sweep.csv", f"{made.ends[0][0].folder.name}/log.txt"):
        assert program.main([*flags, "--finished", "--json", str(tmp_path / name)]) == 1
        assert f"will not replace {tmp_path / name}: it is one of the run's own files" in capsys.readouterr().err
    assert program.main([*flags[:-1], str(tmp_path / "nowhere"), "--finished"]) == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_sweep_of_nothing_or_by_no_number_of_jobs_is_refused(tmp_path, capsys):
    assert program.main(["--folder", str(tmp_path / "sweep")]) == 2
    assert "a sweep needs a setting; give one several values, as in --seed 1 2 3" in capsys.readouterr().err
    for jobs in (-1, 0, 1.5, "2"):
        with pytest.raises(SettingsError, match=f"jobs={jobs!r} must be a whole number of at least 1"):
            sweep.run(QUICK, tmp_path / "sweep", jobs=jobs)
    assert not (tmp_path / "sweep").exists()
