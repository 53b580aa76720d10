"""``train.py`` as its users meet it: help, flags, messages and exit statuses."""

import shlex

import pytest
from training_runs import DEFAULTS, DERIVED, MACHINE_FLAGS

from g2gnet.programs import train
from g2gnet.programs.flags import Parser

TINY = shlex.split(
    "--dataset fashionmnist-mini --model mixer --hidden_dim 64 --block_size 8 --T 3 --limit_train 100 --limit_test 50 "
    "--epochs 1"
)


def test_the_flags_and_their_defaults_are_the_documented_ones():
    arguments = vars(train.build_parser().parse_args([]))
    assert arguments == {**DEFAULTS, **DERIVED, **MACHINE_FLAGS}


def test_help_groups_the_flags_and_explains_each(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for heading in ("data:", "model:", "training:", "dynamic sparse training:", "machine and files:", "examples:"):
        assert f"\n{heading}\n" in text
    for action in train.build_parser()._actions:
        assert action.help, action.dest


def test_a_flags_text_may_have_a_per_cent_sign(capsys):
    parser = Parser()
    parser.add_argument_group("all").add_argument("--share", help="5 % of (all)")
    parser.print_help()
    assert "5 % of (all)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--hidden 12", "unknown flag --hidden; did you mean --hidden_dim?"),
        ("--hidden-dim=12", "unknown flag --hidden-dim; did you mean --hidden_dim?"),
        ("--dst_s cosine", "unknown flag --dst_s; did you mean --dst_schedule or --dst_stop?"),
        ("-T 3", "unknown flag -T; did you mean --T?"),
        ("--colour red", "unknown flag --colour; --help lists the flags"),
        ("--epochs ten", "--epochs 'ten' is not a whole number; --help says what it takes"),
        ("index", "unknown arguments index; --help lists what this program takes"),
    ],
)
def test_an_unknown_flag_is_refused_in_one_line_with_the_one_that_was_meant(capsys, flag, answer):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *shlex.split(flag)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"{train.build_parser().prog}: error: {answer}\n"


def test_a_run_from_the_command_line(tmp_path, capsys):
    assert train.main([*TINY, "--checkpoint_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("g2g ")
    assert "model=mixer" in lines[0]
    assert lines[1].startswith("Epoch 01 | train_acc=")
    stem = "fashionmnist-mini_mixer_p0.15_T3_current"
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        f"{stem}{ending}" for ending in (".DONE", ".analysis.json", ".csv", ".jsonl", ".pth")
    ]
    assert train.main([*TINY, "--checkpoint_dir", str(tmp_path)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert train.main([*TINY, "--lr", "0.1", "--checkpoint_dir", str(tmp_path)]) == 1
    assert "lr: 0.001 there, 0.1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--p_inter 1.5", "p_inter=1.5 must be"),
        ("--device cuda:99", "cuda"),
        ("--device tpu", "device='tpu' is unknown"),
        ("--device directml", "torch-directml"),
        ("--backend triton", "backend 'triton' is unavailable here"),
        ("--T 4", "G2G_BACKEND='jax' is not a backend"),
    ],
)
def test_bad_flags_end_with_status_two_and_a_message_before_any_work(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it Triton could be used, and a run would begin
    directory = tmp_path / "checkpoints"
    if flags == "--T 4":
        monkeypatch.setenv("G2G_BACKEND", "jax")
    assert train.main([*flags.split(), "--checkpoint_dir", str(directory)]) == 2
    assert message in capsys.readouterr().err
    assert not directory.exists()


def test_a_regulariser_that_never_begins_is_warned_about(tmp_path, capsys):
    assert train.main([*TINY, "--enforce_sparsity", "--checkpoint_dir", str(tmp_path)]) == 0
    assert "--enforce_sparsity never begins: warmup_epochs=10" in capsys.readouterr().err
