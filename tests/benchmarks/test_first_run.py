"""A GPU's first hour: its stages, their outcomes, and the page; the programs themselves are tested elsewhere."""

import importlib
import importlib.util

import pytest
import torch

from benchmarks import first_run, records
from benchmarks.first_run import Stage, stages
from benchmarks.registry import choose

pytest.importorskip("triton", minversion="3.3")
RECORD = records.read(first_run.RECORD)

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
            if name == "throughput":
                assert choose(getattr(arguments, "kernel", "step"), arguments.contenders)
    few = {"doctor", "step", "kernels", "lif", "dst", "step-units-1", "scaling-B-bf16", "processes"}
    assert few <= {stage.name for stage in stages(device)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "processes" not in {stage.name for stage in stages("cuda")}


def test_everything_that_is_predicted_is_measured_by_a_stage():
    contenders: dict[str, str] = {stage.name: " ".join(stage.command) for stage in stages("cuda")}
    for row in RECORD["runs"]:
        label = row["what"].partition(",")[0]
        if row["stage"] == "kernels":
            assert row["stage"] in contenders
        else:
            assert f"{label}," in contenders[row["stage"]].replace(" ", ",") + ",", row
        assert 0 < row["floor"] < row["predicted"] < 1
        assert row["decides"] in RECORD["next"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs stages of the program above."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run_stages(*flags: str) -> tuple[int, str]:
        status = first_run.main(["--device", "cpu", "--folder", "run", *flags])
        written = capsys.readouterr()
        return status, written.out + written.err

    return run_stages


def _stages_are(monkeypatch, **stages: str) -> None:
    monkeypatch.setattr(first_run, "stages", lambda _: (Stage(name, ("program", of)) for name, of in stages.items()))


def test_a_run_is_interrupted_and_resumed(tmp_path, monkeypatch, run):
    _stages_are(monkeypatch, first="first", failing="failing", stopped="stopped", last="last")
    status, said = run()
    assert status == 130
    assert "interrupted; run the same command again to resume with the remaining stages" in said
    assert not (tmp_path / "run/stopped.json").exists()
    page = (tmp_path / "run/first-run.md").read_text()
    assert "| first | done |" in page
    assert "| failing | failed |" in page
    assert "a reason \\| in words |" in page
    assert "| stopped | to come |" in page
    assert "| first | first | – | – | 2 ms | – |" in page
    status, said = run()
    assert status == 0
    assert "first: already done" in said
    # done once; failed twice; stopped, then done; done once
    assert (tmp_path / "log").read_text().split() == ["first", "failing", "stopped", "failing", "stopped", "last"]
    assert "| stopped | done |" in (tmp_path / "run/first-run.md").read_text()
    _stages_are(monkeypatch, first="other")
    run()  # another command is another stage
    assert (tmp_path / "log").read_text().split()[-1] == "other"


def test_unusable_flags_are_refused(capsys, tmp_path):
    for flags, message in (
        (["--device", "cpu", "--stages", "speed"], "stage 'speed' is unknown; choose from doctor, tests-linear"),
        (["--device", "xpu"], "device='xpu': no such GPU was found; --device cpu runs a rehearsal"),
    ):
        assert first_run.main([*flags, "--folder", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
