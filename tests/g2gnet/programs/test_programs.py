"""The programs as their users meet them: names, help, flags, what is printed, ``--json``, exit statuses."""

import ast
import importlib
import io
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import processes
import pytest
import torch
from helpers import ROOT
from training_runs import DEFAULTS, DERIVED, MACHINE_FLAGS

from g2g_kernels import available_backends
from g2gnet import __main__ as overview
from g2gnet import __version__
from g2gnet.programs import crossval, train
from g2gnet.programs.flags import Parser, add_settings_flags, settings_from
from g2gnet.programs.main import memory_named
from g2gnet.programs.sweep.program import build_parser
from g2gnet.training import Interrupted, TrainingError, TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def module_of(program):
    """What runs when a console script or ``python -m MODULE`` is called."""
    name = SCRIPTS[program].removesuffix(":main") if program in SCRIPTS else program.removeprefix("python -m ")
    return importlib.import_module(name.replace("g2g_benchmarks", "benchmarks"))  # installed it has another name


def printed_at_its_end(capsys, main, *flags, status=0):
    """Standard output and error of a program that ends while it reads its flags."""
    with pytest.raises(SystemExit) as stop:
        main([*flags])
    assert stop.value.code == status
    return capsys.readouterr()


@pytest.mark.parametrize("program", overview.PROGRAMS)
def test_each_listed_program_explains_itself(program, capsys):
    out, err = printed_at_its_end(capsys, module_of(program).main, "--help")
    assert out.startswith("usage: ")
    assert err == ""
    if program == "g2g-train":
        for heading in ("data", "model", "training", "dynamic sparse training", "machine and files", "examples"):
            assert f"\n{heading}:\n" in out
        assert all(action.help for action in train.build_parser()._actions)
        assert printed_at_its_end(capsys, train.main, "--version").out == f"g2g {__version__}\n"


def test_the_flags_and_their_defaults_are_the_documented_ones():
    of_train = {**DEFAULTS, **DERIVED, **MACHINE_FLAGS}
    assert vars(train.build_parser().parse_args([])) == of_train
    others = {"epochs": 5, "warmup_epochs": 2, "k_folds": 5}
    assert vars(crossval.build_parser().parse_args([])) == {**of_train, **others}


def test_a_parser_may_have_a_per_cent_sign_in_its_texts_and_makes_flags_of_settings_in_a_message(capsys):
    parser = Parser()
    parser.add_argument_group("all").add_argument("--share", help="5 % of (all)")
    parser.print_help()
    assert "5 % of (all)" in capsys.readouterr().out
    add_settings_flags(parser)
    assert parser.in_flags("lower `lr`, or give `neuron=synaptic`") == "lower --lr, or give --neuron synaptic"
    assert parser.in_flags("`weights_only` is PyTorch's; lr stays") == "`weights_only` is PyTorch's; lr stays"


def test_no_module_below_the_programs_names_a_flag():
    package, found = ROOT / "g2gnet", []
    names = "analyze", "crossval", "export", "flags", "main", "output", "pretrain", "train", "*/program"
    programs = {path for name in names for path in package.glob(f"programs/{name}.py")} | {package / "__main__.py"}
    for path in {*package.rglob("*.py")} - programs:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(r"(python -m |g2g-|train\.py ).*", "", node.value)  # a whole command is one in any case
                flags = {*re.findall(r"(?<![\w-])--[A-Za-z]\w*", text)} - {"--logdir"}  # which is TensorBoard's own
                found += [f"{path.name}:{node.lineno}: {flag}" for flag in flags]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--hidden 12", "unknown flag --hidden; did you mean --hidden_dim?"),
        ("--hidden-dim=12", "unknown flag --hidden-dim; did you mean --hidden_dim?"),
        ("--dst_s cosine", "unknown flag --dst_s; did you mean --dst_schedule or --dst_stop?"),
        (
            "--neuron synapic",
            "--neuron='synapic' is unknown; choose one of lif, synaptic, adlif, cubalif; did you mean synaptic?",
        ),
        ("-T 3", "unknown flag -T; did you mean --T?"),
        ("--colour red", "unknown flag --colour; --help lists the flags"),
        ("--epochs ten", "--epochs 'ten' is not a whole number; see --help"),
        ("index", "unknown arguments index; --help lists what this program takes"),
        ("--T 48 --hidden_dim 64 48", "--hidden_dim 64 48 is not one list; give --hidden_dim 64,48"),
        ("--recurrent 1 2 --T 3", "--recurrent 1 2 is not one list; give --recurrent 1,2"),
    ],
)
def test_an_unknown_flag_is_refused_in_one_line_with_the_one_that_was_meant(capsys, flag, answer):
    said = printed_at_its_end(capsys, train.main, *SMALL, *flag.split(), status=2).err
    assert said == f"{train.build_parser().prog}: error: {answer}\n"


def test_the_list_names_every_script_and_backend(capsys):
    assert set(SCRIPTS) <= set(overview.PROGRAMS)
    assert overview.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for program, purpose in overview.PROGRAMS.items():
        assert any(line.split("  ")[1] == program and line.endswith(purpose) for line in lines if "  " in line), program
    for backend in available_backends():
        assert any(line.split() == [backend, "yes"] for line in lines), backend


@pytest.mark.parametrize("name", ["train", "crossval"])
def test_a_file_of_the_checkout_is_the_console_script(name, tmp_path):
    assert importlib.import_module(name).main is module_of(f"g2g-{name}").main
    result = processes.run(ROOT / f"{name}.py", "--epochs", "0", output=tmp_path / "printed")
    assert (result.statuses, result.stdout) == ([2], "")
    assert result.stderr.startswith(f"{name}.py: error: epochs=0 must be")


SMALL = shlex.split(
    "--dataset fashionmnist-mini --model mixer --hidden_dim 32 --block_size 4 --T 3 --limit_train 60 --limit_test 20 "
    "--epochs 2"
)
STEM = "fashionmnist-mini_mixer_p0.15_T3_current"


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_from_the_command_line(at_work, capsys):
    flags = [*SMALL, "--epochs", "1", "--neuron", "adlif", "--enforce_sparsity"]
    assert train.main(flags) == 0
    (first, second, *_), warned = (text.splitlines() for text in capsys.readouterr())
    assert first.startswith("g2g ")
    different = "dataset=fashionmnist-mini", "model=mixer", "hidden_dim=32", "block_size=4", "epochs=1", "neuron=adlif"
    assert all(f" {name}" in first for name in (*different, "seed=42"))
    assert not any(name in first for name in ("p_inter", "alpha", "adapt_decay")), "no more than differs is named"
    assert second.startswith("Epoch 01 | train_acc=")
    assert any("--enforce_sparsity never begins: warmup_epochs=10" in line for line in warned)
    endings = ".DONE", ".analysis.json", ".csv", ".jsonl", ".pth"
    written = sorted(path.name for path in at_work.glob("checkpoints/[!.]*"))
    assert written == [f"{STEM}_adlif{ending}" for ending in endings]
    assert train.main([*flags, "--lr", "0.1"]) == 1
    assert "lr: 0.001 there, 0.1 now" in capsys.readouterr().err


def test_json_is_all_that_stands_on_standard_output(at_work, capsys, monkeypatch):
    def stop(record, trainer):
        raise Interrupted("stopped", signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("g2gnet.programs.flags.log_from", lambda arguments: [stop])
        assert train.main([*SMALL, "--json"]) == 128 + signal.SIGTERM
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stopped" in captured.err
    assert train.main([*SMALL, "--json"]) == 0
    told, text = capsys.readouterr()
    told = json.loads(told)
    # what people read is on standard error, all of it
    assert text.startswith("g2g ")
    for part in ("resuming", "Epoch 02 | train_acc=", "all groups (docs/analysis.md): ", "g2g-report checkpoints/"):
        assert part in text
    assert told["g2g"] == __version__
    assert told["settings"] == settings_from(train.build_parser().parse_args(SMALL), TrainSettings).flag_values()
    history = [json.loads(line) for line in (at_work / f"checkpoints/{STEM}.jsonl").read_text().splitlines()]
    assert told["result"] == history[-1]
    endings = {"checkpoint": "pth", "history": "jsonl", "table": "csv", "analysis": "analysis.json", "marker": "DONE"}
    assert told["files"] == {name: f"checkpoints/{STEM}.{ending}" for name, ending in endings.items()}
    assert all(Path(name).is_file() for name in told["files"].values())
    # a finished run says the same again, here into a file; then the text stays
    assert train.main([*SMALL, "--json", "a.json"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert json.loads((at_work / "a.json").read_text()) == told


def test_a_full_gpu_is_told_in_pytorchs_words_and_the_flags_that_save_memory(at_work, capsys, monkeypatch):
    words = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB"
    kind = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    monkeypatch.setattr(train, "run_training", Mock(side_effect=kind(f"{words} of which 512.00 MiB is free.")))
    assert train.main(SMALL) == 1
    said = capsys.readouterr().err
    lower = "lower --batch_size (now 256) or --T (now 3) or --hidden_dim (now 32)"
    for part in (f"out of memory: {words}", lower, "--precision bf16"):
        assert part in said
    # lists of a sweep are no numbers that could be lowered
    arguments = build_parser().parse_args(["--T", "10", "20", "--sequence", "rows", "--hidden_dim", "32"])
    message = r"^out of memory: full; lower --batch_size \(now 256\); give --chunk"
    with pytest.raises(TrainingError, match=message), memory_named(arguments):
        raise MemoryError("full")


def test_what_a_code_page_lacks_is_replaced(at_work, monkeypatch):
    """As in a pipe on Windows: the rules of tables are not in its code page."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert train.main(SMALL) == 0
    stream.seek(0)
    assert "\nlif1  " in stream.read()
    assert (at_work / f"checkpoints/{STEM}.DONE").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals from pipes")
def test_a_reader_that_leaves_ends_the_program_without_a_traceback(tmp_path):
    """As ``train.py … | head -1`` does."""
    os.mkfifo(tmp_path / "printed.out")
    flags = [*SMALL, "--epochs", "1000", "--checkpoint_dir", tmp_path]
    process = processes.start(ROOT / "train.py", *flags, output=tmp_path / "printed")
    with open(tmp_path / "printed.out") as reader:
        assert reader.readline().startswith("g2g ")
    process.join()
    assert process.exitcode == 141
    assert "Error" not in (tmp_path / "printed.err").read_text()
    assert (tmp_path / f"{STEM}.pth").exists()
