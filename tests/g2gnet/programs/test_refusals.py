"""What would fail late, or without a word of its cause: refused before the first step, by name."""

import errno
import os
import re
import resource
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
from small_data import write_own
from tiny_checkpoints import TINY, train_tiny

import crossval
import train
from g2gnet.base import memory
from g2gnet.base.files import check_writable
from g2gnet.programs import analyze, pretrain
from g2gnet.programs.flags import settings_from
from g2gnet.programs.report import program as report
from g2gnet.training import Trainer, TrainSettings, least_memory
from g2gnet.training.cross_validation import FoldSettings
from g2gnet.training.evaluation import build_network

MANY = 10**26
FILES = ("log_dir", "json", "checkpoint_dir", "data_dir", "resnet_weights")
SMALL = "--hidden_dim 16 --T 3 --batch_size 20 --block_size 4 --epochs 2"


@pytest.fixture
def no_step(monkeypatch):
    """No training step may be made."""
    monkeypatch.setattr(Trainer, "_train_step", lambda self, index: pytest.fail("a step was made"))


def refused(program, capsys, *arguments, status=2):
    """What the program prints to standard error when it refuses the arguments."""
    try:
        code = program.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == status
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"--epochs {MANY}", f"epochs={MANY} must be a whole number of at least 1, at most"),
        (f"--model index --num_groups {MANY}", "num_groups=1"),
        (f"--hidden_dim {10**12}", "hidden_dim=1000000000000 must be .* to 2147483647"),
        (f"--model index --sparsity_mode dynamic --dst_interval {MANY}", "dst_interval=1"),
        ("--alpha 1e-310", "alpha=1e-310 must be a number above 0 .* that a float32 holds"),
        ("--model index --sparsity_mode dynamic --dst_fraction 1e-310", "dst_fraction=1e-310"),
        ("--lr 1e308", r"lr=1e\+308 must be"),
        ("--enc_scale 1e300", r"enc_scale=1e\+300 must be a finite number that a float32 holds"),
        ("--lr -1e-3", "lr=-0.001 must be"),
        ("--peer_timeout 1e-300", "peer_timeout=1e-300 must be a number from 0.01 to 525600"),
        *((f"--{flag} ''", f"argument --{flag}: the name is empty") for flag in FILES),
    ],
)
def test_values_that_would_fail_later_are_refused_by_their_flags(
    tmp_path, capsys, no_step, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    for program in (train, crossval):
        assert re.search(message, refused(program, capsys, *TINY, *shlex.split(flags)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["-1e-3", "-.5E+2", "-7.", "-12"])
def test_a_negative_number_is_a_value_and_no_flag(text):
    assert train.build_parser().parse_args(["--enc_bias", text, "--T", "3"]).enc_bias == float(text)


def test_the_last_fold_has_a_seed_too(capsys, no_step, tmp_path):
    flags = ["--seed", 2**63 - 1, "--checkpoint_dir", tmp_path]
    assert "seed=9223372036854775807 leaves none to the last of k_folds=5" in refused(crossval, capsys, *TINY, *flags)


@pytest.mark.parametrize(
    ("program", "shape", "change", "what"),
    [
        (train, (20,), "augment=shift-flip", "vectors"),
        (crossval, (20,), "erase=0.5", "vectors"),
        (train, (3, 20), "augment=flip", "sequences of vectors"),
    ],
)
def test_vectors_cannot_be_mirrored(tmp_path, capsys, no_step, program, shape, change, what):
    data = write_own(tmp_path / "vectors.npz", *shape)
    flag, value = change.split("=")
    small = SMALL if len(shape) == 1 else SMALL.replace("--T 3", "--sequence own")
    flags = [*small.split(), "--dataset", data, f"--{flag}", value, "--checkpoint_dir", tmp_path / "c"]
    printed = refused(program, capsys, *flags)
    assert f"{change} needs images, but those of vectors-" in printed
    assert f"are {what} of 20 values; leave --{flag} out" in printed


@pytest.mark.parametrize(
    ("shape", "flags", "message"),
    [
        ((6, 5), "--T 6", "T=6 cannot be chosen: with sequence=own the samples of mine-"),
        ((6, 5), "--T 3", "have 6 steps; leave --T out, or give --sequence none if they are images of 6 × 5"),
        ((6, 5), "--T 6 --sequence rows", "have 6 steps; leave --T out\n"),
        ((6, 5), "--sequence pixels --sequence_step 4", "sequence_step=4 does not divide the 30 pixels of an image"),
        ((60, 2), "--input_taps 61", "input_taps=61 is more than the T=60 steps of a sequence; lower it"),
        ((20,), "--sequence rows", "sequence=rows needs images [N, height, width] or [N, channels, height, width]"),
        ((20,), "--sequence own", "sequence=own needs sequences [N, T, ...], but samples are [20]"),
        ((6, 2, 3, 4), "--sequence rows", "but samples are [6, 2, 3, 4]; leave it out"),
        ((28, 28), "--sequence rows --T 28", "T=28 cannot be chosen: with sequence=rows the samples of mine-"),
        ((2,) * 5, "", "train_images is [40, 2, 2, 2, 2, 2], of 6 dimensions; give vectors [N, D], images [N, ch"),
    ],
)
def test_the_length_of_sequences_is_not_chosen(tmp_path, capsys, no_step, shape, flags, message):
    data = write_own(tmp_path / "mine.npz", *shape)
    for program in (train, crossval):
        given = "--dataset", data, *shlex.split(flags), "--checkpoint_dir", tmp_path / "c"
        assert message in refused(program, capsys, *given, status=1 if len(shape) > 4 else 2)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("program", [train, crossval], ids=["train", "crossval"])
def test_a_name_too_long_for_the_runs_files_is_refused_before_the_first_step(tmp_path, capsys, no_step, program):
    """The checkpoint's name fitted, that of the analysis did not."""
    data = write_own(tmp_path / f"{'n' * 200}.npz", 20)
    flags = [*SMALL.split(), "--dataset", data, "--checkpoint_dir", tmp_path / "c"]
    printed = refused(program, capsys, *flags, status=1)
    assert "File name too long" in printed
    assert "give the data a file of a shorter name" in printed


def test_results_that_cannot_be_written_are_found_before_training(tmp_path, capsys, no_step, monkeypatch):
    settings = crossval.build_parser().parse_args([*TINY])
    stem = settings_from(settings, FoldSettings).summary_stem
    (tmp_path / "c" / f"{stem}.json").mkdir(parents=True)
    assert "Is a directory" in refused(crossval, capsys, *TINY, "--checkpoint_dir", tmp_path / "c", status=1)
    (tmp_path / "p" / "resnet32_cifar10.pt").mkdir(parents=True)
    monkeypatch.setattr(pretrain, "load_dataset", lambda *arguments: pytest.fail("data were read"))
    assert "Is a directory" in refused(pretrain, capsys, "--checkpoint_dir", tmp_path / "p", status=1)


@pytest.mark.skipif(os.name != "posix", reason="the sticky bit is that of POSIX")
def test_a_file_that_only_its_owner_can_replace_is_found_beforehand(tmp_path, monkeypatch):
    file = tmp_path / "other's"
    file.write_text("")
    tmp_path.chmod(0o1777)
    check_writable(file)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(PermissionError, match="belongs to another user") as error:
        check_writable(file)
    assert error.value.errno == errno.EPERM
    check_writable(tmp_path / "new")


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--hidden_dim 400000",
        "--model index --hidden_dim 300000 --block_size 1 --p_inter 0",
        "--T 65536 --hidden_dim 100000 --model index --p_inter 0 --num_groups 1000",
    ],
)
def test_a_network_larger_than_memory_is_refused_with_what_it_takes(tmp_path, capsys, no_step, monkeypatch, flags):
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}[name])
    printed = refused(train, capsys, *TINY, *flags.split(), "--checkpoint_dir", tmp_path)
    assert re.search(r"training takes at least [\d,.]+ GB of memory with hidden_dim=.* 16\.0 GB", printed)


@pytest.mark.parametrize("model", ["dense", "index"])
def test_the_least_memory_is_that_of_the_tensors_it_counts(model):
    """A bound from below, and no worse than a third of what the tensors of a trained network take."""
    settings = TrainSettings(model=model, hidden_dim=256, block_size=16, T=4, batch_size=32)
    net = build_network(settings, 20, 10)
    weights = 4 * 4 * sum(parameter.numel() for parameter in net.parameters())
    masks = sum(b.numel() * b.element_size() for name, b in net.state_dict().items() if "unit_" in name)
    bits_and_states = 32 * 4 * ((256 + 256 + 64) // 8 + 4 * (256 + 10))
    least = least_memory.least_bytes(settings, 20, 10, 32)
    drawn = 0 if model == "dense" else least_memory.DRAWN_UNIT * 16 * 16
    assert least - drawn <= (weights + 2 * masks + bits_and_states) * 1.05
    assert least >= weights * 0.85


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what a process has taken is told by Linux")
def test_what_the_shell_allows_counts_as_memory(monkeypatch):
    whole = memory.available()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (taken + 2**30, -1))
    assert whole > 2**30
    assert 0.5 * 2**30 < memory.available() <= 2**30


def test_memory_that_runs_out_is_said_in_a_line_and_another_failure_is_none(tmp_path, capsys, monkeypatch):
    def fail(self, index):
        raise errors[-1]

    monkeypatch.setattr(Trainer, "_train_step", fail)
    of_pytorch = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes"
    errors = [RuntimeError("a defect"), RuntimeError(of_pytorch), MemoryError()]
    for _ in range(2):
        assert "error: out of memory: " in refused(train, capsys, *TINY, "--checkpoint_dir", tmp_path, status=1)
        errors.pop()
    with pytest.raises(RuntimeError, match="a defect"):
        train.main([*TINY, "--checkpoint_dir", str(tmp_path)])


# --- other programs -------------------------------------------------------------------------------------------------


def test_empty_names_are_refused_by_the_programs_that_read_checkpoints(capsys):
    assert "the name is empty" in refused(analyze, capsys, "")
    assert "argument --output: the name is empty" in refused(report, capsys, "x.pth", "--output", "")
    assert "samples" in refused(analyze, capsys, "x.pth", "--samples", "many")


# --- files that output would destroy --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("trained"))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(("program", "flag"), [(report, "--output"), (analyze, "--json")], ids=["report", "analyze"])
def test_no_file_of_a_run_is_replaced_by_what_is_read_from_it(trained, capsys, monkeypatch, program, flag):
    monkeypatch.setattr(program, "read_run", lambda path: pytest.fail("the checkpoint was read"))
    before = contents(trained.parent)
    for target in ("{}.pth", "{}.previous.pth", "{}.DONE", "{}.analysis.json", "{}.jsonl", "{}.csv", ".{}.lock"):
        file = trained.parent / ".." / trained.parent.name / target.format(trained.stem)
        assert f"will not replace {file}: it is" in refused(program, capsys, trained, flag, file, status=1)
    assert contents(trained.parent) == before


@pytest.mark.parametrize(
    ("program", "flag", "name"),
    [(report, "--output", "other.pth"), (analyze, "--json", "other.PTH"), (train, "--json", "other"),
     (report, "--output", "data.npz")],
)  # fmt: skip
def test_no_other_checkpoint_nor_data_is_replaced(trained, tmp_path, capsys, no_step, program, flag, name):
    """As by ``--output *.pth``, of which the first becomes the output; known by its ending or by its content."""
    other = tmp_path / name
    other.write_bytes(trained.read_bytes() if name == "other" else b"of an older version")
    before = other.read_bytes()
    given = [*TINY, "--checkpoint_dir", tmp_path / "c"] if program is train else [trained]
    printed = refused(program, capsys, *given, flag, other, status=1)
    assert f"will not replace {other}: it is a checkpoint or a file of data" in printed
    assert other.read_bytes() == before
    assert not (tmp_path / "c").exists()


def test_a_run_does_not_replace_its_own_files_by_its_json(tmp_path, capsys, no_step, monkeypatch):
    monkeypatch.setattr(pretrain, "load_dataset", lambda *arguments: pytest.fail("data were read"))
    stem = settings_from(train.build_parser().parse_args([*TINY]), TrainSettings).stem
    summary = settings_from(crossval.build_parser().parse_args([*TINY]), FoldSettings).summary_stem
    endings = "{}.pth", "{}.previous.pth", "{}.DONE", "{}.jsonl", "{}.analysis.json", ".{}.lock"
    for program, given, names in (
        (train, TINY, [each.format(stem) for each in endings]),
        (crossval, TINY, [f"{summary}.json", f"{stem}_fold2of5.pth", f".{stem}_fold5of5.lock"]),
        (pretrain, [], ["resnet32_cifar10.pt", "resnet32_cifar10.DONE", ".resnet32_cifar10.lock"]),
    ):
        for target in (tmp_path / name for name in names):
            printed = refused(program, capsys, *given, "--checkpoint_dir", tmp_path, "--json", target, status=1)
            assert f"will not replace {target}: it is one of the run's own files" in printed
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_read_is_not_written(tmp_path, capsys, no_step):
    data = write_own(tmp_path / "data.npz", 20)
    (tmp_path / "link.npz").symlink_to(data.rename(tmp_path / "real"))
    flags = [*SMALL.split(), "--dataset", tmp_path / "link.npz", "--checkpoint_dir", tmp_path / "c"]
    printed = refused(train, capsys, *flags, "--json", tmp_path / "real", status=1)
    assert "it is a file that this program reads" in printed


def test_what_is_no_checkpoint_is_replaced(trained, tmp_path):
    for name in ("old.json", "empty", "archive.zip"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"PK\3\4 and so on" * 9)
        assert analyze.main([str(trained), "--samples", "20", "--json", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(b"{")


# --- messages -------------------------------------------------------------------------------------------------------


def test_the_data_set_without_files_is_named_only_where_it_is_offered(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("g2gnet.data.cifar.download", Mock(side_effect=OSError("no network")))
    flags = ["--data_dir", tmp_path / "none", "--checkpoint_dir", tmp_path / "c"]
    hint = "--dataset fashionmnist-mini needs no files at all."
    printed = refused(pretrain, capsys, *flags, status=1)
    assert "could not be put there (no network)" in printed
    assert hint not in printed
    printed = refused(train, capsys, "--dataset", "cifar10", *flags, status=1)
    assert f"as --data_dir.\n{hint}\n" in printed
    printed = refused(train, capsys, "--dataset", "cifar10", "--use_resnet", *flags, status=1)
    assert hint not in printed
    assert not (tmp_path / "none").exists()  # nor is an empty one left behind


def test_what_is_no_directory_is_called_so(tmp_path, capsys, no_step):
    (tmp_path / "file").touch()
    printed = refused(train, capsys, *TINY, "--checkpoint_dir", tmp_path / "file", status=1)
    assert "file (Not a directory); give another --checkpoint_dir" in printed
