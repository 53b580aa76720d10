"""What would fail late, or without a word of its cause: refused before the first step, by name."""

import re
import shlex
from unittest.mock import Mock

import pytest
from small_data import write_own
from tiny_checkpoints import TINY, train_tiny

import crossval
import train
from g2gnet.base import memory
from g2gnet.programs import analyze, pretrain
from g2gnet.programs.flags import settings_from
from g2gnet.programs.report import program as report
from g2gnet.training import Trainer, TrainSettings
from g2gnet.training.cross_validation import FoldSettings
from g2gnet.training.evaluation import build_network
from g2gnet.training.machine import least_bytes

MANY = 10**26
FILES = ("log_dir", "json", "checkpoint_dir", "data_dir", "resnet_weights")
BOTH = train, crossval
READERS = analyze, report


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(Trainer, "_train_step", lambda self, index: pytest.fail("a step was made"))


def refused(program, capsys, *arguments, status=2):
    try:
        code = program.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == status
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize(
    ("programs", "flags", "message", "status"),
    [(*row, 2) if len(row) == 3 else row for row in [
        (BOTH, f"--epochs {MANY}", f"epochs={MANY} must be a whole number of at least 1, at most"),
        (BOTH, "--peer_timeout 1e-300", "peer_timeout=1e-300 must be a number from 0.01 to 525600"),
        *((BOTH, f"--{flag} ''", f"argument --{flag}: the name is empty") for flag in FILES),
        (BOTH, "--device cuda:99", "cuda"),
        (BOTH, "--device directml", "torch-directml"),
        (BOTH, "--backend triton", "backend 'triton' is unavailable here"),
        ([crossval], "--k_folds 1", "k_folds=1 must be a whole number of at least 2"),
        ([crossval], f"--seed {2**63 - 1}", "seed=9223372036854775807 leaves none to the last of k_folds=5"),
        ([pretrain], "--momentum 0", "momentum=0.0 must be a number above 0 and at most 1"),
        (READERS, "''", "the name is empty"),
        (READERS, "CHECKPOINT --samples -3", "samples=-3 must be"),
        ([train, analyze], "CHECKPOINT --device tpu", "device='tpu' is unknown"),
        ([report], "x.pth --output ''", "argument --output: the name is empty"),
        (READERS, "nowhere.pth", "error: nowhere.pth cannot be read (No such file or directory)", 1),
        ([report], "CHECKPOINT nowhere.pth", "nowhere.pth cannot be read", 1),
        ([report], "CHECKPOINT --output .", "cannot write . (Is a directory); give another file", 1),
        ([report], "CHECKPOINT --output no/r.html", "cannot write no/r.html (No such file or directory)", 1),
        ([analyze], "CHECKPOINT --json no/a.json", "cannot write no/a.json (No such file or directory)", 1),
    ]],
)  # fmt: skip
def test_flags_and_files_that_cannot_be_are_refused(
    trained, tmp_path, capsys, no_step, monkeypatch, programs, flags, message, status
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it Triton could be used, and a run would begin
    monkeypatch.chdir(tmp_path)
    for program in programs:
        given = shlex.split(flags.replace("CHECKPOINT", "" if program is train else str(trained)))
        assert message in refused(program, capsys, *(TINY if program in BOTH else []), *given, status=status)
    assert not list(tmp_path.iterdir())


def test_a_backend_that_the_environment_names_is_checked(capsys, no_step, monkeypatch):
    monkeypatch.setenv("G2G_BACKEND", "jax")
    assert "G2G_BACKEND='jax' is not a backend" in refused(train, capsys, *TINY)


@pytest.mark.parametrize("text", ["-1e-3", "-.5E+2", "-7.", "-12"])
def test_a_negative_number_is_a_value_and_no_flag(text):
    assert train.build_parser().parse_args(["--enc_bias", text, "--T", "3"]).enc_bias == float(text)


@pytest.mark.parametrize(
    ("shape", "flags", "message"),
    [
        ((20,), "--augment shift-flip", "augment=shift-flip needs images … are vectors of 20 values; leave --augment"),
        ((20,), "--erase 0.5", "erase=0.5 needs images, but those of mine- … are vectors of 20 values; leave --erase"),
        ((3, 20), "--sequence own --augment flip", "augment=flip needs images … are sequences of vectors of 20 values"),
        (
            (6, 5),
            "--erase 0.5",
            "erase=0.5 are of images … of shape 6 × 5 are sequences; give --sequence none if",
        ),
        ((6, 5), "--unit_shift 5", "unit_shift=5 needs sequences of vectors with more places … is of shape [5]; lower"),
        ((6, 5), "--T 6", "T=6 cannot be chosen: with sequence=own the samples of mine-"),
        ((6, 5), "--T 3", "have 6 steps; leave --T out, or give --sequence none if they are images of 6 × 5"),
        ((6, 5), "--T 6 --sequence rows", "have 6 steps; leave --T out\n"),
        ((6, 5), "--sequence pixels --sequence_step 4", "sequence_step=4 does not divide the 30 pixels of an image"),
        ((60, 2), "--input_taps 61", "input_taps=61 is more than the T=60 steps of a sequence; lower it"),
        ((20,), "--sequence rows", "sequence=rows needs images [N, height, width] or [N, channels, height, width]"),
        ((20,), "--sequence own", "sequence=own needs sequences [N, T, ...], but samples are [20]"),
        ((6, 2, 3, 4), "--sequence rows", "but samples are [6, 2, 3, 4]; leave it out"),
        ((2,) * 5, "", "train_images is float32 [40, 2, 2, 2, 2, 2]; give uint8, float32 or float64: [N, D], images"),
    ],
)
def test_what_samples_of_ones_own_cannot_be_is_refused(tmp_path, capsys, no_step, shape, flags, message):
    data = write_own(tmp_path / "mine.npz", *shape)
    for program in BOTH:
        given = "--dataset", data, *flags.split(), "--checkpoint_dir", tmp_path / "c"
        printed = refused(program, capsys, *given, status=1 if len(shape) > 4 else 2)
        assert all(part in printed for part in message.split(" … ")), printed
    assert not list(tmp_path.glob("c/[!.]*"))


def test_results_that_cannot_be_written_are_found_before_training(tmp_path, capsys, no_step, monkeypatch):
    (tmp_path / "file").touch()
    printed = refused(train, capsys, *TINY, "--checkpoint_dir", tmp_path / "file", status=1)
    assert "file (Not a directory); give another --checkpoint_dir" in printed
    summary = settings_from(crossval.build_parser().parse_args([*TINY]), FoldSettings).summary_stem
    (tmp_path / "c" / f"{summary}.json").mkdir(parents=True)
    assert "Is a directory" in refused(crossval, capsys, *TINY, "--checkpoint_dir", tmp_path / "c", status=1)
    (tmp_path / "p" / "resnet32_cifar10.pt").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "load_dataset", lambda *arguments: pytest.fail("data were read"))
        assert "Is a directory" in refused(pretrain, capsys, "--checkpoint_dir", tmp_path / "p", status=1)
    long = write_own(tmp_path / f"{'n' * 200}.npz", 20)  # the name of the checkpoint fits, that of the analysis not
    for program in BOTH:
        printed = refused(program, capsys, "--dataset", long, "--T", 3, "--checkpoint_dir", tmp_path / "c", status=1)
        assert "File name too long" in printed
        assert "give the data a file of a shorter name" in printed


def test_a_network_larger_than_memory_is_refused_with_what_it_takes(tmp_path, capsys, no_step, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}[name])
    for flags in (
        "--hidden_dim 400000",
        "--model index --hidden_dim 300000 --block_size 1 --p_inter 0",
        "--T 65536 --hidden_dim 100000 --model index --p_inter 0 --num_groups 1000",
    ):
        printed = refused(train, capsys, *TINY, *flags.split(), "--checkpoint_dir", tmp_path)
        assert re.search(r"training takes at least [\d,.]+ GB of memory with hidden_dim=.* 16\.0 GB", printed)


@pytest.mark.parametrize(
    "options",
    [{"model": "dense", "hidden_dim": 256}, {"model": "index", "hidden_dim": 256}, {"layers": "128C5-P2-256C5-P2"}],
)
def test_the_least_memory_is_that_of_the_tensors_it_counts(options):
    """A bound from below, and no worse than a third of what the tensors of a trained network take."""
    inputs, sizes = 20, (256, 256, 10)
    if "layers" in options:
        inputs, sizes = (2, 8, 8), (128 * 64, 256 * 16, 10)
    settings = TrainSettings(**{"model": "conv", "block_size": 16, "T": 4} | options)
    net, least = build_network(settings, inputs, 10), least_bytes(settings, inputs, 10, 32)
    assert net.sizes[:-1] == sizes
    weights = 4 * 4 * sum(parameter.numel() for parameter in net.parameters())
    bits_and_states = 32 * 4 * (sum(-(-size // 64) * 8 for size in sizes) + 4 * sum(sizes[1:]))
    assert weights * 0.85 <= least <= (weights + bits_and_states) * 1.05


def test_memory_that_runs_out_is_said_in_a_line_and_another_failure_is_none(tmp_path, capsys, monkeypatch):
    of_pytorch = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes"
    errors = [MemoryError(), RuntimeError(of_pytorch), RuntimeError("a defect")]
    monkeypatch.setattr(Trainer, "_train_step", Mock(side_effect=errors))
    for _ in range(2):
        assert "error: out of memory: " in refused(train, capsys, *TINY, "--checkpoint_dir", tmp_path, status=1)
    with pytest.raises(RuntimeError, match="a defect"):
        train.main([*TINY, "--checkpoint_dir", str(tmp_path)])


@pytest.mark.parametrize(("program", "flag"), [(report, "--output"), (analyze, "--json")], ids=["report", "analyze"])
def test_no_file_of_a_run_is_replaced_by_what_is_read_from_it(trained, capsys, monkeypatch, program, flag):
    monkeypatch.setattr(program, "read_run", lambda path: pytest.fail("the checkpoint was read"))
    before = {file: file.read_bytes() for file in trained.parent.iterdir()}
    for target in ("{}.pth", "{}.previous.pth", "{}.DONE", "{}.analysis.json", "{}.jsonl", "{}.csv", ".{}.lock"):
        file = trained.parent / ".." / trained.parent.name / target.format(trained.stem)
        assert f"will not replace {file}: it is" in refused(program, capsys, trained, flag, file, status=1)
    assert {file: file.read_bytes() for file in trained.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("program", "flag", "name"),
    [(report, "--output", "other.pth"), (analyze, "--json", "other.PTH"), (train, "--json", "other"),
     (report, "--output", "data.npz")],
)  # fmt: skip
def test_no_other_checkpoint_nor_data_is_replaced(trained, tmp_path, capsys, no_step, program, flag, name):
    """As by ``--output *.pth``, of which the first becomes the output; known by its ending or by its content."""
    other, before = tmp_path / name, trained.read_bytes() if name == "other" else b"of an older version"
    other.write_bytes(before)
    given = [*TINY, "--checkpoint_dir", tmp_path / "c"] if program is train else [trained]
    printed = refused(program, capsys, *given, flag, other, status=1)
    assert f"will not replace {other}: it is a checkpoint or a file of data" in printed
    assert other.read_bytes() == before
    assert not (tmp_path / "c").exists()


def test_a_run_does_not_replace_its_own_files_by_its_json_nor_what_it_reads(tmp_path, capsys, no_step, monkeypatch):
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
    write_own(tmp_path / "data.npz", 20).rename(tmp_path / "real")
    (tmp_path / "link.npz").symlink_to(tmp_path / "real")
    flags = ["--dataset", tmp_path / "link.npz", "--checkpoint_dir", tmp_path / "c", "--json", tmp_path / "real"]
    assert "it is a file that this program reads" in refused(train, capsys, *flags, status=1)


def test_what_is_no_checkpoint_is_replaced(trained, tmp_path):
    for name in ("old.json", "empty", "archive.zip"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"PK\3\4 and so on" * 9)
        assert analyze.main([str(trained), "--samples", "20", "--json", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(b"{")


def test_the_data_set_without_files_is_named_only_where_it_is_offered(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", Mock(side_effect=OSError("no network")))
    flags = ["--data_dir", tmp_path / "none", "--checkpoint_dir", tmp_path / "c"]
    printed = refused(train, capsys, "--dataset", "cifar10", *flags, status=1)
    assert "could not be put there (no network)" in printed
    hint = "--dataset fashionmnist-mini needs no files at all."
    assert f"as --data_dir.\n{hint}\n" in printed
    assert hint not in refused(pretrain, capsys, *flags, status=1)
    assert hint not in refused(train, capsys, "--dataset", "cifar10", "--use_resnet", *flags, status=1)
