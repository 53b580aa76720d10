"""``g2g-export``: a checkpoint as C."""

import json
import shutil

from tiny_checkpoints import train_tiny

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
