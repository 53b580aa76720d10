"""Nobody let in: crafted files are refused within bounds of memory, and arbitrary masks never crash the process."""

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
from helpers import MASK_CASES, backends_of, row_with, with_one
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import replaced
from training_runs import SMALL, load, run

from g2g_kernels import BackendError, BlockMask, g2g_linear, g2g_stack, lif
from g2g_kernels.ops import g2g_linear as g2g_linear_module
from g2gnet.base.tensor_files import with_digest
from g2gnet.data import load_dataset
from g2gnet.layers import G2GLinear
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


LAYER = dict(G2GLinear(MASK_CASES["ten outputs"].mask()).state_dict())
indices = st.lists(st.integers(-2, 12), max_size=12).map(torch.tensor).map(torch.Tensor.long)


def with_part(name, first, rest):
    """The layer's state whose wiring has other numbers at one place, behind checksums that are right."""
    change = (lambda size: first) if name == "block_size" else lambda part: torch.cat([rest, part[len(rest) :]])
    return {**LAYER, "mask.wiring": row_with(MASK_CASES["ten outputs"].mask(), **{name: change})}


PARTS = ["block_size", "out_group_of", "in_group_of", "unit_row", "unit_col"]
spoiled_parts = st.builds(with_part, st.sampled_from(PARTS), st.integers(-2, 2**40), indices)


@settings(max_examples=100)
@given(st.data())
def test_arbitrary_masks_are_loaded_right_or_refused(data):
    state = data.draw(spoiled_parts)
    other = G2GLinear(MASK_CASES["ten outputs"].mask(seed=1), backend="torch")
    try:
        other.load_state_dict(state)
    except RuntimeError as refusal:
        assert re.search(r"mask|values|bias", str(refusal)), refusal  # noqa: PT017  (it may as well be taken)
        return
    mask = other.mask
    for mine, theirs in zip((mask.unit_row, mask.unit_col), helpers.units_of(state["mask.wiring"]), strict=True):
        assert torch.equal(mine.long(), theirs)
    values = other.values.detach()
    assert torch.equal(other.dense_weight().detach(), helpers.dense_by_loop(mask, values))
    x = torch.ones(2, mask.shape[1])
    for backend in backends_of(g2g_linear_module.operator):
        y = g2g_linear(x, values, mask, other.bias, backend=backend)
        torch.testing.assert_close(y, other(x), equal_nan=True, rtol=1e-4, atol=1e-4)


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
        ("model/input_deviation", torch.zeros(()), "model/input_deviation is not that of the data"),
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


WRONG = (
    torch.zeros(3, 3, 3, 13), torch.zeros(0), torch.zeros(2, 11), torch.zeros(4).long(), torch.zeros(4).cfloat(),
    torch.zeros(4).to_sparse(), torch.zeros(1).expand(10**12), None, "text", [1.0, 2.0],
)  # fmt: skip


@pytest.mark.parametrize("backend", backends_of(g2g_linear_module.operator))
@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_an_argument_of_a_wrong_kind_is_named(wrong, backend):
    mask, own = MASK_CASES["ten outputs"].mask(), {"beta": torch.tensor(0.9), "threshold": torch.tensor(1.0)}
    layer, x = helpers.lif_layer(helpers.packed_randn(mask, 0), mask, torch.zeros(10), **own), torch.ones(4, 43)
    (feed,) = layer.connections
    linear = {"x": x, "values": feed.values, "mask": mask, "bias": feed.bias}
    neurons = {"current": torch.zeros(3, 5), **own}
    calls = [
        *((name, lambda name=name: g2g_linear(**{**linear, name: wrong}, backend=backend)) for name in linear),
        *((name, lambda name=name: lif(**{**neurons, name: wrong}, backend=backend)) for name in neurons),
        ("x|receives", lambda: g2g_stack(wrong, [layer], 3, backend=backend)),
    ]
    for name in ("values", "mask", "bias", *own):
        spoiled = helpers.changed(layer, **{name: wrong})
        calls.append((name, lambda spoiled=spoiled: g2g_stack(x, [spoiled], 3, backend=backend)))
    fits = {"bias": wrong is None, "current": isinstance(wrong, torch.Tensor) and wrong.dim() > 1}
    for name, call in calls:
        if not fits.get(name):
            with pytest.raises((ValueError, BackendError), match=rf"\b({name})\b"):
                call()
