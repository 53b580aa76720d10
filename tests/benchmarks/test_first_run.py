"""A GPU's first hour: its stages, their outcomes, and the page; the programs themselves are tested elsewhere."""

import importlib
import importlib.util

import pytest
import torch

from benchmarks import first_run, records
from benchmarks.first_run import Stage, stages
from benchmarks.registry import choose

pytest.importorskip("triton", minversion="3.3")

#: a stage that notes that it ran, does what it is told, and writes a record
PROGRAM = """
import json, os, pathlib, signal, sys, time
what, json_flag, record = sys.argv[1:]
with open("log", "a") as log:
    log.write(what + " ")
if what == "stopped" and pathlib.Path("log").read_text().count("stopped") == 1:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
print("one line", flush=True)
if what == "failing":
    sys.exit("a reason | in words")
pathlib.Path(record).write_text("{}\\n" + json.dumps({"contender": what, "median": 0.002}))
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_is_a_program_that_takes_its_flags(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for stage in stages(device):
        package, _, name = stage.command[0].rpartition(".")
        assert importlib.util.find_spec(stage.command[0])
        assert stage.measures == (package == "benchmarks")
        if stage.measures:
            arguments = importlib.import_module(stage.command[0]).build_parser().parse_args(stage.command[1:])
            assert name != "throughput" or choose(arguments.kernel, arguments.contenders)
    few = {"doctor", "step", "kernels", "lif", "dst", "step-units-1", "scaling-B-bf16", "processes"}
    assert few <= {stage.name for stage in stages(device)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "processes" not in {stage.name for stage in stages("cuda")}


def test_everything_that_is_predicted_is_measured_by_a_stage():
    commands = {stage.name: " ".join(stage.command).replace(" ", ",") for stage in stages("cuda")}
    record = records.read(first_run.RECORD)
    for row in record["runs"]:
        label = "benchmarks.kernel_times" if row["stage"] == "kernels" else row["what"].partition(",")[0]
        assert f"{label}," in commands[row["stage"]], row
        assert 0 < row["floor"] < row["predicted"] < 1
        assert row["decides"] in record["next"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the program above as these stages."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run_stages(**stages: str) -> tuple[int, str, str]:
        made = [Stage(name, ("program", of)) for name, of in stages.items()]
        monkeypatch.setattr(first_run, "stages", lambda _: made)
        status = first_run.main(["--device", "cpu", "--folder", "run"])
        written = capsys.readouterr()
        return status, written.out + written.err, (tmp_path / "run/first-run.md").read_text()

    return run_stages


def test_a_run_is_interrupted_and_resumed(tmp_path, run):
    all_ = {name: name for name in ("first", "failing", "stopped", "last")}
    status, said, page = run(**all_)
    assert status == 130
    assert "interrupted; run the same command again to resume with the remaining stages" in said
    assert not (tmp_path / "run/stopped.json").exists()
    for row in ("first | done", "failing | failed", "stopped | to come", "first | first | – | – | 2 ms | –"):
        assert f"| {row} |" in page
    assert "a reason \\| in words |" in page
    status, said, page = run(**all_)
    assert status == 0
    assert "first: already done" in said
    assert "| stopped | done |" in page
    # done once; failed twice; stopped, then done; done once
    assert (tmp_path / "log").read_text().split() == ["first", "failing", "stopped", "failing", "stopped", "last"]
    run(first="other")  # another command is another stage
    assert (tmp_path / "log").read_text().split()[-1] == "other"


def test_unusable_flags_are_refused(capsys, tmp_path):
    for flags, message in (
        (["--device", "cpu", "--stages", "speed"], "stage 'speed' is unknown; choose from doctor, tests-linear"),
        (["--device", "xpu"], "device='xpu': no such GPU was found; --device cpu runs a rehearsal"),
    ):
        assert first_run.main([*flags, "--folder", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
