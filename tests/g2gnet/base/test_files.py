"""What a program opens: links, FIFOs, devices, streams that are closed or full, names and texts that mean harm."""

import errno
import functools
import json
import os
import shutil
import stat
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import filelock
import processes
import pytest
from training_runs import SMALL, flags_of, load, run

from g2gnet.base import files
from g2gnet.base.files import expanded, locked, one_at_a_time, open_file, remove_file, replace_file
from g2gnet.base.messages import OutputError, printable, quoted, say
from g2gnet.base.tensor_files import TensorFileError, read_tensors, write_tensors
from g2gnet.programs import output, train
from g2gnet.training import CheckpointError, TrainSettings
from g2gnet.training.checkpoints import RunFiles, read_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, FIFOs and devices are those of POSIX")


def program(first, *arguments, output):
    """``train.py`` that does something with its streams at its start."""
    text = f"import os, sys\nfrom g2gnet.programs import train\n{first}\nsys.exit(train.main())"
    output.with_suffix(".py").write_text(text)
    return processes.run(output.with_suffix(".py"), *arguments, output=output)


def test_a_fifo_and_a_device_are_written_into_and_stay_what_they_are(tmp_path):
    fifo, link, read = tmp_path / "fifo", tmp_path / "null", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    output.check_output(fifo)
    output.write_json(str(fifo), {"a": 1})
    reader.join(300)
    assert json.loads(read[0])["a"] == 1
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    link.symlink_to("/dev/null")
    for path in (link, "/dev/null"):
        output.check_output(path)
        output.write_output(path, "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert link.is_symlink()
    with pytest.raises(output.OutputError, match=r"full \(No space left on device\)"):
        output.write_output("/dev/full", "text")


def test_of_a_symbolic_link_the_target_is_replaced_and_others_may_read_it_as_the_umask_says(tmp_path, request):
    request.addfinalizer(functools.partial(os.umask, os.umask(0o027)))
    target, link = tmp_path / "there" / "target.json", tmp_path / "link.json"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("first", "second"):
        output.check_output(link)
        output.write_output(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [(path.name, path.stat().st_mode & 0o777) for path in target.parent.iterdir()] == [("target.json", 0o640)]


@pytest.mark.parametrize("links", [True, False])
def test_a_reader_always_finds_a_whole_checkpoint(tmp_path, monkeypatch, links):
    path, previous, seen = tmp_path / "c.pth", tmp_path / "c.previous.pth", []
    write_tensors(path, {"number": 0})
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no hard links here")))

    def watched(source, target, replace=os.replace):
        seen.append(read_tensors(path)["number"])
        replace(source, target)
        seen.append(read_tensors(path)["number"])

    monkeypatch.setattr(os, "replace", watched)
    write_tensors(path, {"number": 1}, keep=previous)
    assert seen == [0, 0, 0, 1]
    assert read_tensors(previous)["number"] == 0
    assert sorted(tmp_path.iterdir()) == [previous, path]


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("{}.pth", r"\.pth cannot be one of the run's own files \(it is {}"),
        ("{}.jsonl", r"\.jsonl cannot be one of the run's own files \(it is {}"),
        (".{}.lock", r"cannot lock .*\.lock \(it is {}"),
    ],
)
def test_a_run_takes_no_file_of_its_own_for_another(tmp_path, name, refusal):
    victim, path = tmp_path / "victim", tmp_path / "runs" / name.format(TrainSettings(**SMALL).stem)
    victim.write_text("content")
    path.parent.mkdir()
    path.symlink_to(victim)
    for what in ("a symbolic link", "not a regular file"):
        with pytest.raises(CheckpointError, match=refusal.format(what)):
            run(path.parent)
        path.unlink()
        os.mkfifo(path)
    assert victim.read_text() == "content"
    for other in (path, "/dev/zero"):
        with pytest.raises(OSError, match="it is not a regular file"):
            open_file(other)
    with pytest.raises(CheckpointError, match=r"cannot be read \(it is not a regular file\)"):
        read_checkpoint(path)


def test_replacing_that_fails_leaves_nothing_behind_and_promises_no_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        replace_file(path, Mock(side_effect=OSError(errno.ENOSPC, "full")), keep=tmp_path / "kept")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(CheckpointError, match=r"\(No space left on device\)\. There is no checkpoint of this run"):
        RunFiles(tmp_path, "name").save_checkpoint({"settings": {}})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_windows_is_asked_again_while_another_program_has_a_file_open(tmp_path, monkeypatch, platform):
    """Elsewhere a refusal is of the folder, and final."""
    path, refused = tmp_path / "file", []
    path.write_text("old")

    def refusing(change):
        def changed(*arguments, **options):
            if len(refused) % 3 < 2:
                refused.append(change)
                raise PermissionError(errno.EACCES, "The process cannot access the file")
            refused.append(change)
            return change(*arguments, **options)

        return changed

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "replace", refusing(os.replace))
    if platform == "linux":
        with pytest.raises(PermissionError):
            replace_file(path, lambda file: file.write(b"new"))
        assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
        return
    replace_file(path, lambda file: file.write(b"new"), keep=tmp_path / "kept")
    assert (path.read_text(), (tmp_path / "kept").read_text()) == ("new", "old")
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "unlink", refusing(type(path).unlink))
        remove_file(path)
    assert not path.exists()
    assert len(refused) == 9
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError(errno.EACCES, "for good")))
    with pytest.raises(CheckpointError, match=r"name.pth \(for good\)"):
        RunFiles(tmp_path, "name").save_checkpoint({"settings": {}})


def test_macos_is_asked_to_write_to_the_disk_itself(tmp_path, monkeypatch):
    flush, usual = Mock(side_effect=[0, OSError(errno.ENOTSUP, "not of this file system"), 0, 0]), Mock()
    monkeypatch.setattr("fcntl.F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("fcntl.fcntl", flush)
    monkeypatch.setattr(os, "fsync", usual)
    replace_file(tmp_path / "file", lambda file: file.write(b"1"))
    assert [call.args[1] for call in flush.call_args_list] == [51, 51]
    assert usual.call_count == 1


def test_what_shells_and_pipes_of_windows_do(tmp_path, monkeypatch):
    for name in ("b.pth", "a.pth", "c.txt"):
        (tmp_path / name).touch()
    pattern, path = str(tmp_path / "*.pth"), r"C:\my runs\a.pth"
    printed = Mock(side_effect=OSError(errno.EINVAL, "Invalid argument"))
    monkeypatch.setattr("builtins.print", printed)
    assert (quoted(path), quoted("a.pth"), expanded([pattern])) == (f"'{path}'", "a.pth", [tmp_path / "*.pth"])
    with pytest.raises(OutputError):
        say("text")
    monkeypatch.setattr(sys, "platform", "win32")
    assert (quoted(path), quoted("a.pth")) == (f'"{path}"', "a.pth")
    assert expanded([pattern, "none.*"]) == [tmp_path / "a.pth", tmp_path / "b.pth", Path("none.*")]
    with pytest.raises(BrokenPipeError):  # what closed pipes say there
        say("text")


def test_a_run_clears_away_what_a_killed_one_was_writing_and_goes_on_without_locks(tmp_path, monkeypatch, capsys):
    (tmp_path / ".name.pth.folder").mkdir()
    for name in ("name", "other"):
        (tmp_path / f".{name}.pth.abcdefgh").write_text("half a checkpoint")
    with RunFiles(tmp_path, "name").locked():
        left = [".name.lock", ".name.pth.folder", ".other.pth.abcdefgh"]
        assert sorted(file.name for file in tmp_path.iterdir()) == left
    for number in (errno.ENOLCK, errno.EOPNOTSUPP):  # of a file system that has none
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
        with RunFiles(tmp_path, "name").locked():
            pass
        assert f".name.lock cannot be locked ({os.strerror(number)})" in capsys.readouterr().err


def test_locks_lie_in_a_directory_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with one_at_a_time(tmp_path / "data"):
        (lock,) = (tmp_path / "cache/g2g/locks").iterdir()
        assert lock.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(filelock.Timeout), locked(lock, wait=False):
            pass
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with one_at_a_time(tmp_path / "data"):
        assert "warning: no lock in /proc/nowhere/g2g/locks (No such file" in capsys.readouterr().err


#: an epoch; and what is done first
TRAIN = flags_of({**SMALL, "epochs": 1})
CLOSED = "[os.close(1), os.close(2)]; sys.stdout = sys.stderr = None"
FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {})"


@pytest.mark.ci
@pytest.mark.parametrize("first", [CLOSED, FULL.format(2)], ids=["closed", "full"])
def test_training_needs_nobody_to_listen(tmp_path, first):
    done = program(first, *TRAIN, "--checkpoint_dir", tmp_path, output=tmp_path / "printed")
    assert done.statuses == [0], done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*.DONE"))


def test_a_full_standard_output_is_named_before_any_work(tmp_path):
    done = program(FULL.format(1), *TRAIN, "--checkpoint_dir", tmp_path / "runs", output=tmp_path / "printed")
    assert done.statuses == [1]
    reason = "cannot write to standard output (No space left on device); redirect it to another file"
    assert done.stderr.splitlines()[-1].endswith(f"error: {reason}")
    assert not (tmp_path / "runs").exists()


def test_variables_that_are_not_torchruns_are_named(tmp_path, monkeypatch, capsys):
    for variables in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "x"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert train.main([*TRAIN, "--checkpoint_dir", str(tmp_path)]) == 1
        message = "where torchrun sets a number; start several processes by torchrun, or unset WORLD_SIZE"
        assert message in capsys.readouterr().err


def test_a_marker_that_is_none_is_named(tmp_path):
    for content in ("{}", '{"settings": 5}', '{"settings": {"T": NaN}}', "[" * 100000):
        (tmp_path / f"{TrainSettings(**SMALL).stem}.DONE").write_text(content)
        with pytest.raises(CheckpointError, match="delete it, and the run makes it again"):
            run(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), epochs=1)


@pytest.fixture
def finished(tmp_path, checkpoint):
    shutil.copytree(checkpoint.directory, tmp_path / "run")
    return RunFiles(tmp_path / "run", checkpoint.marker.stem)


def test_the_result_of_a_finished_run_is_that_of_its_checkpoint(finished):
    text, settings = finished.marker.read_text(), TrainSettings(**{**SMALL, "epochs": 1})
    finished.marker.write_text(text.replace('"test_acc": 0.', '"test_acc": 0.9'))
    assert finished.load_marker(settings) == load(finished)["history"][0] == json.loads(text)["result"]
    finished.marker.write_text(text.replace('"seed": 42', '"seed": 43'))
    with pytest.raises(CheckpointError, match=r"DONE belongs to a run with different settings:\n  seed: 43 there, 42"):
        finished.load_marker(settings)
    finished.marker.write_text(text)
    finished.checkpoint.write_bytes(finished.checkpoint.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"checksum is wrong.*restore that file, or delete .*\.pth.*\.DONE"):
        run(finished.directory, epochs=1)


def test_markers_of_fewer_epochs_and_of_several_layers_are_understood(finished):
    of_one = finished.marker.read_text()
    run(finished.directory, epochs=2)
    of_two = finished.marker.read_text()
    finished.marker.write_text(of_one)
    run(finished.directory, epochs=2)
    assert finished.marker.read_text() == of_two
    for _ in range(2):  # JSON has lists in the place of their sizes
        run(finished.directory, epochs=1, model="dense", hidden_dim=(16, 8))
    with pytest.raises(CheckpointError, match=r"hidden_dim: \[16, 8\] there, \[16, 4\] now"):
        run(finished.directory, epochs=1, model="dense", hidden_dim=(16, 4))


def test_what_files_say_cannot_move_the_cursor(finished, capsys):
    state = load(finished)
    write_tensors(finished.checkpoint, {**state, "settings": {**state["settings"], "model": "\x1b[2J\x9b\u202e"}})
    assert train.main([*flags_of(SMALL), "--checkpoint_dir", str(finished.directory)]) == 1
    message = capsys.readouterr().err
    assert r"\x1b[2J\x9b\x202e" in message
    assert not set("\x1b\x9b\u202e") & set(message)
    with pytest.raises(TensorFileError, match="T is a whole number of 1329 bits, where 63 are the most"):
        write_tensors(finished.checkpoint, {"T": 10**400})
    name, out = os.fsdecode(b"caf\xe9.pth"), finished.directory / "out.json"
    output.write_json(str(out), {"file": name})  # which is no UTF-8
    assert json.loads(out.read_bytes())["file"] == name
    assert printable(name) == r"caf\udce9.pth"
