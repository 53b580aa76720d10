"""Nobody let in: crafted files are refused within bounds of memory, and what a resume counts with is checked."""

import functools
import io
import pickle
import re
import struct
import zipfile
from pathlib import Path

import helpers
import processes
import pytest
import torch
from helpers import row_with, with_one
from tiny_checkpoints import replaced
from training_runs import SMALL, load, run

from g2g_kernels import BlockMask
from g2gnet.base.tensor_files import with_digest
from g2gnet.data import load_dataset
from g2gnet.training import CheckpointError, Machine, Trainer, TrainSettings, read_run


def saved(content):
    """As PyTorch saves it, with the digest of a file of ours."""
    file = io.BytesIO()
    torch.save(content, file)
    return with_digest(file.getvalue())


class Command:
    """Unpickled, it would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def put(name, value):
    """Replaces an entry of a state by ``value``, or by what that makes of the entry."""

    def change(state):
        entry = state
        for part in name.split("/"):
            entry = entry[int(part) if part.isdigit() else part]
        return replaced(state, name, value(entry) if callable(value) else value)

    return change


def wired(**changes):
    """Replaces parts of the wiring of fc2, behind the right checksums."""
    return put("model/fc2.mask.wiring", lambda row: row_with(BlockMask.from_state({"wiring": row}), **changes))


def repacked(archive, change, compression=zipfile.ZIP_STORED):
    """The archive with its pickle changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return with_digest(file.getvalue())


def claiming_a_terabyte():
    """A tensor of 77,777 values whose pickle says that it has 10^12."""
    small, large = b"J" + struct.pack("<i", 77777), b"\x8a\x06" + (10**12).to_bytes(6, "little")
    return repacked(saved({"values": torch.zeros(77777)}), lambda pickled: pickled.replace(small, large))


huge = torch.zeros(1).expand(10**6, 10**3, 10**3)
VALUES, WIRING, MOMENTS = "model/fc2.values", "model/fc2.mask.wiring", "optimizer/state/0"
#: what is made of a state (bytes: the file itself), and what is said of it
CRAFTED = {
    "a command": (lambda state: {**state, "settings": Command()}, "cannot be read"),
    "a bare pickle": (lambda state: with_digest(pickle.dumps(Command())), "cannot be read"),
    "a compressed archive": (
        lambda state: repacked(saved({**state, "zeros": torch.zeros(10**7)}), bytes, zipfile.ZIP_DEFLATED),
        "its records are compressed",
    ),
    "a terabyte claimed": (lambda state: claiming_a_terabyte(), "cannot be read"),
    "weights of 10^12": (put(VALUES, huge), r"values has shape \(1000000, 1000, 1000\), but not as many values"),
    "an index out of range": (wired(unit_row=with_one(0, 10**6)),
     r"fc2\.mask: unit_row must lie in 0 … 7, not 0 … 1000000"),
    "an index below 0": (wired(unit_col=with_one(0, -1)), r"fc2\.mask: unit_col must lie in 0 … 7, not -1 … 7"),
    "a group out of range": (wired(in_group_of=with_one(0, 10**6)), r"fc2\.mask: group_of must hold group numbers"),
    "units of 2^40 weights": (wired(block_size=lambda size: 2**40), r"fc2\.mask: block_size=1099511627776 must be"),
    "units that overlap": (wired(unit_row=torch.zeros_like, unit_col=torch.zeros_like),
     "fc2.mask: the mask names a unit twice"),
    "a number of the wiring changed": (put(WIRING, with_one(100, 3.0)), "wiring and its checksum do not match"),
    "NaN weights": (put(VALUES, with_one((0, 0, 0), torch.nan)), r"fc2\.values holds values that are not finite"),
    "too few weights": (put(VALUES, lambda values: values[1:].clone()), r"size mismatch for fc2\.values"),
    "whole weights": (put(VALUES, torch.Tensor.long), r"fc2\.values is torch\.int64, not torch\.float32"),
    "None for a setting's name": (put("settings", lambda settings: {**settings, None: 1}),
     "settings has a key that is a NoneType"),
    "a loss beyond float32": (
        put("history", lambda history: [{**old, "train_loss": 1.7e308} for old in history]),
        r"train_loss=1\.7e\+308 is not a number of at least 0",
    ),
    "moments of another shape": (put(f"{MOMENTS}/exp_avg", torch.zeros(3)),
     r"optimizer state 0/exp_avg is torch.float32 \(3,\)"),
    "moments below 0": (put(f"{MOMENTS}/exp_avg_sq", with_one((0, 0, 0), -0.5)),
     r"state 0/exp_avg_sq has -0\.5, which is below 0"),
    "moments of a step below 0": (put(f"{MOMENTS}/step", torch.tensor(-5.0)),
     "optimizer state 0/step is -5, after 12 steps"),
    "moments of another network": (put("optimizer/state", {}), "the optimizer's state is of other parameters"),
    "a step from nowhere": (put("step", 10**12), "epoch=3 and step=1000000000000 are at odds"),
    "a history that is too short": (put("history", []), "history does not hold one record"),
    "another format": (put("format", 99), "not a checkpoint of this version"),
    "no network": (lambda state: {k: v for k, v in state.items() if k != "model"}, "does not fit"),
}  # fmt: skip

PROGRAM = """
import resource, sys, torch
from pathlib import Path
from g2gnet.data import load_dataset
from g2gnet.training import CheckpointError, Machine, TrainSettings, read_run, run_training
settings = TrainSettings(**{small!r})
data = load_dataset(settings.dataset)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for directory in sorted(Path(sys.argv[1]).iterdir()):
    for read in (
        lambda: run_training(settings, lambda: data, directory, Machine(torch.device("cpu"))),
        lambda: read_run(directory / (settings.stem + ".pth")),
    ):
        try:
            read()
            print(directory.name, "was taken")
        except CheckpointError as error:
            print(directory.name, "refused:", " ".join(str(error).split()))
"""


@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit on memory is Linux's")
def test_crafted_checkpoints_are_refused_for_a_reason_within_a_gigabyte(tmp_path):
    files = run(tmp_path / "run")
    state = load(files)
    for name, (craft, _) in CRAFTED.items():
        (tmp_path / "crafted" / name).mkdir(parents=True)
        content = craft(state)
        content = content if isinstance(content, bytes) else saved(content)
        (tmp_path / "crafted" / name / files.checkpoint.name).write_bytes(content)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(small=SMALL))
    done = processes.run(program, tmp_path / "crafted", output=tmp_path / "printed")
    assert done.statuses == [0], done.stderr
    assert not (helpers.ROOT / "ran").exists()
    for name, (_, message) in CRAFTED.items():
        training, analysis = (line for line in done.stdout.splitlines() if line.startswith(f"{name} "))
        assert re.search(rf"refused: .*{message}", training), training
        # what only training needs is not looked at by those who read the network alone
        if not any(word in name for word in ("moments", "step", "history")):
            assert re.search(r"refused: .*", analysis), analysis
    files.checkpoint.write_bytes(saved(replaced(state, "settings/hidden_dim", 10**9)))
    with pytest.raises(CheckpointError, match="hidden_dim is 1000000000, the network has 64"):
        read_run(files.checkpoint)
    settings = state["settings"] | {"model": "conv", "hidden_dim": 2048, "layers": "64C999999"}
    files.checkpoint.write_bytes(saved({**state, "settings": settings}))
    with pytest.raises(CheckpointError, match="layers is 64C999999, the network has 64, 64"):
        read_run(files.checkpoint)


TRAINER = TrainSettings(
    **{**SMALL, "limit_train": 64, "limit_test": 8, "T": 2}, sparsity_mode="dynamic", dst_interval=1, standardize=True
)


@pytest.fixture(scope="module")
def trained():
    """What makes a trainer, and the state of one after an epoch."""
    data = load_dataset(TRAINER.dataset)
    new = functools.partial(Trainer, TRAINER, data, Machine(torch.device("cpu")))
    trainer = new()
    trainer.train_epoch()
    return new, torch.load(io.BytesIO(saved(trainer.state_dict())), weights_only=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dst/pruned", -7, "dst/pruned=-7 is not a whole number"),
        ("dst/grown", "x", "dst/grown='x' is not a whole number"),
        ("model/input_deviation", torch.tensor(0.9), "input_deviation is not that of the data"),
        ("progress/correct", torch.tensor(-1.0), "progress/correct has -1, which is below 0"),
        ("progress/seconds", -1.0, "progress/seconds=-1.0 is not a number of at least 0"),
        ("progress/units/fc1", torch.ones(2, 2).long(), r"progress/units/fc1 is torch.int64 \(2, 2\), not"),
    ],
)
def test_a_resume_believes_no_count_and_no_scale_of_a_file(trained, name, value, message):
    new, state = trained
    trainer = new()
    inside = {**state, "epoch": 0, "progress": trainer._no_progress()}  # after the only step of the first epoch
    rounded = state["model"]["input_deviation"].nextafter(torch.tensor(9.0))  # by other threads
    trainer.load_state_dict(replaced(inside, "model/input_deviation", rounded))
    assert torch.equal(trainer.net.input_deviation, rounded)
    with pytest.raises(ValueError, match=message):
        trainer.load_state_dict(replaced(inside, name, value))
