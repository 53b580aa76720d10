"""``g2g-export``: a checkpoint as C."""

import json
import shlex
import shutil
from pathlib import Path

import torch
from tiny_checkpoints import TINY, train_tiny

import train
from g2gnet import load
from g2gnet.base.files import replace_file
from g2gnet.interop import c_code
from g2gnet.programs import export


def test_a_checkpoint_becomes_c_and_its_accuracy_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = train_tiny(tmp_path, "--model mixer --standardize")
    for bits in ("8", "32"):
        flags = [str(checkpoint), "--samples", "100", "--bits", bits, "--json", "said.json", "--output", f"of{bits}.c"]
        assert export.main(flags) == 0
        said = json.loads((tmp_path / "said.json").read_text())
        assert (tmp_path / f"of{bits}.h").exists()
        assert said["samples"] == 100
        assert abs(said["accuracy"] - said["accuracy_in_c"]) <= (0.1 if bits == "8" else 0)
        assert f"{said['constant_bytes']:,} bytes of constants" in capsys.readouterr().out


def test_training_goes_on_in_few_bits_from_another_run_and_is_written_in_these(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_tiny(tmp_path, "--model mixer --standardize --lr 3e-3").rename("first.pth")
    flags = [*TINY, *shlex.split("--model mixer --standardize --quantize 4 --start first.pth --epochs 1")]
    assert train.main([*flags, "--checkpoint_dir", "none", "--hidden_dim", "32"]) == 2
    assert "start=first.pth cannot be trained on: its network is another:\n  hidden_dim: 64 there" in (
        said := capsys.readouterr().err
    )
    assert "give a checkpoint of a run with the same model flags" in said
    # steps that hardly change a weight leave the first network, which now computes in four bits
    assert train.main([*flags, "--checkpoint_dir", "few", "--lr", "1e-12", "--weight_decay", "0"]) == 0
    (second,) = Path("few").glob("*.pth")
    torch.testing.assert_close(load(second).state_dict(), load("first.pth").state_dict(), rtol=0, atol=1e-9)
    assert load(second).quantize == 4
    assert export.main([str(second), "--samples", "100", "--json", "said.json"]) == 0
    said = json.loads(Path("said.json").read_text())
    assert said["bits"] == 4
    assert abs(said["accuracy"] - said["accuracy_in_c"]) <= 0.01  # floats of four bits and these in integers
    assert train.main([*flags, "--checkpoint_dir", "few", "--json", "first.pth"]) == 1
    assert "will not replace first.pth: it is a file that this program reads" in capsys.readouterr().err


def test_what_cannot_be_written_is_named_with_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = train_tiny(tmp_path, "--model mixer")
    shutil.copy(checkpoint, "run.c")
    for flags, status, message in (
        (["--output", "network.txt"], 2, "give a name that ends with .c"),
        (["--prefix", "2"], 2, "prefix='2' cannot begin names in C"),
        (["--output", "none/network.c"], 1, "cannot write none/network.c (No such file or directory); give another"),
        (["--output", "run.c"], 1, "will not replace run.c: it is a file that this program reads"),
        (["--output", "n.c", "--json", "n.h"], 1, "will not replace n.h: it is one of the run's own files"),
    ):
        assert export.main(["run.c", "--samples", "10", *flags]) == status
        assert message in capsys.readouterr().err
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint.read_bytes()[:-7])
    assert export.main([str(damaged)]) == 1
    assert "damaged.pth cannot be read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.[ch]")] == ["run.c"]


def test_ctrl_c_between_the_files_says_how_to_get_both(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = train_tiny(tmp_path, "--model mixer")
    replaced = []

    def interrupted(path, write):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(path.name)
        replace_file(path, write)

    monkeypatch.setattr(c_code, "replace_file", interrupted)
    assert export.main([str(checkpoint), "--samples", "10"]) == 130
    assert replaced == ["network.h"]
    assert "interrupted; run the same command again, so that both files are of this network" in capsys.readouterr().err
