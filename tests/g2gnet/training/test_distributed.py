"""Several processes train one network as one process would, as ``torchrun`` starts them: by gloo, on the CPU."""

import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, rms
from processes import LIMIT, launch
from training_runs import SMALL, VARIANTS, assert_equal, flags_of, load, run

import train
from g2g_kernels import available_backends
from g2gnet.base.distributed import DistributedError, World, join
from g2gnet.data import load_dataset
from g2gnet.training import Machine, SettingsError, Trainer, TrainSettings
from g2gnet.training.checkpoints import RunFiles
from g2gnet.training.cross_validation import FoldSettings, cross_validate
from g2gnet.training.saved_state import JUDGED

pytestmark = pytest.mark.skipif(not dist.is_gloo_available() or os.name != "posix", reason="needs gloo and signals")

#: no two steps of an epoch alike, two updates of the units, rate-coded input, penalised rates, images changed at random
EVERYTHING = VARIANTS["dynamic"] | {"enc": "rate", "enc_scale": 2.0, "augment": "crop-flip"}
EVERYTHING |= {"enforce_sparsity": True, "warmup_epochs": 0}
UNEVEN = VARIANTS["pruned from a dense start"] | {"batch_size": 71, "clip_grad_norm": 0.5}

#: a program of the project; each process has its own fault and flags, as in "train --seed 7|train:drift"
PROGRAM = """
import atexit, importlib, os, platform, signal, sys, threading, time
if ":nowhere" in sys.argv[1]:
    os.environ["GLOO_SOCKET_IFNAME"] = "none9"
from pathlib import Path
from g2gnet.programs import flags as program_flags
from g2gnet.base import distributed
from g2gnet.dst import scheduler
from g2gnet.data import DataError
from g2gnet.training import Trainer
name, *flags = sys.argv.pop(1).split("|")[int(os.environ["RANK"])].split()
name, _, fault = name.partition(":")
distributed.PATIENCE = 1
train_step, stream, number = Trainer._train_step, scheduler.stream, Path(sys.argv[0] + ".id")
def wait_until_the_first_says(text):
    while text not in sorted(number.parent.glob("printed */0.err"))[-1].read_text():
        time.sleep(0.02)
def step(self, index):  # of four in each of three epochs
    at = self.step, fault
    if at == (0, "slow"):
        wait_until_the_first_says("still waits")
        time.sleep(1.3)  # for longer than the time limit
    result = train_step(self, index)
    if at == (5, "asleep"):
        wait_until_the_first_says("error: lost")
    elif at == (5, "drift"):
        self.net.fc2.bias.data[3] += 1e-7
    elif at == (7, "moments"):
        next(iter(self.optimizer.state.values()))["exp_avg"][0] += 1e-9
    elif at in ((5, "SIGKILL"), (5, "SIGTERM")):
        os.kill(os.getpid(), getattr(signal, fault))
    return result
def no_data(*arguments):
    raise DataError("there are no images here")
def watch(*arguments):  # ends when the first process has ended
    for _ in range(600):
        time.sleep(0.05)
        try:
            os.kill(int(number.read_text()), 0)
        except ProcessLookupError:
            os._exit(0)
    os._exit(3)
def report():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print("at the end:", ", ".join(name for name in names if "gloo" in name) or "no thread of gloo", file=sys.stderr)
Trainer._train_step = step
if fault in ("no-data", "watches"):
    program_flags.load_data = no_data if fault == "no-data" else watch
elif fault == "other-draws":
    scheduler.stream = lambda seed, *rest, **options: stream(seed + 1, *rest, **options)
elif fault == "other-python":
    platform.python_version = lambda: "2.7.18"
elif fault == "interrupted":  # by Ctrl-C, while it waits
    number.write_text(str(os.getpid()))
    distributed.logger.warning = lambda *_: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
elif fault == "reports":
    atexit.register(report)
sys.exit(importlib.import_module(name).main([*sys.argv[1:], *flags]))
"""


@pytest.fixture
def several(tmp_path):
    """Runs a program, a file or its text, in several processes, which end with these statuses, or all with 0."""
    numbers = itertools.count(1)

    def run_several(program, *arguments, statuses=(0, 0), **options):
        if isinstance(program, str):
            (tmp_path / "program.py").write_text(program)
            program = tmp_path / "program.py"
        done = launch(len(statuses), program, *arguments, folder=tmp_path / f"printed {next(numbers)}", **options)
        assert done.statuses == list(statuses), done.stderr
        return done

    return run_several


def free_port():
    """A port that nobody has, below those that systems give to whoever asks for any."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def train_flags(directory, **options):
    flags = flags_of({name: value for name, value in {**SMALL, **options}.items() if value is not True})
    return [*flags, *(f"--{name}" for name, value in options.items() if value is True), "--checkpoint_dir", directory]


def assert_same_course(one, several):
    """Equal wiring, position and number of hits; weights and losses equal but for the order of sums in float32."""
    assert one.keys() == several.keys()
    for name in ("epoch", "step", "dst", "settings", "progress", "tested"):
        assert one.get(name) == several.get(name)
    for name, tensor in one["model"].items():
        other = several["model"][name]
        if tensor.is_floating_point():
            # as a whole: Adam makes the rounding of a gradient that all but cancels out a step of full size
            assert rms(other - tensor) <= 1e-6 * rms(tensor), name
        else:
            assert torch.equal(other, tensor), name
    same = "train_acc", "density", "units", "units_grown", "units_kept", "initial_units_kept", *JUDGED
    for alone, shared in zip(one["history"], several["history"], strict=True):
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-6)
        assert shared["firing_rate"] == pytest.approx(alone["firing_rate"], rel=1e-6)
        assert [shared.get(name) for name in same] == [alone.get(name) for name in same]


@pytest.mark.parametrize(
    ("processes", "options"),
    # batches of 71: in others some membrane is so near to its threshold that the order of sums decides about a spike
    [
        pytest.param(3, EVERYTHING, marks=pytest.mark.long, id="dynamic and all else, three"),
        pytest.param(2, VARIANTS["all schedules"], marks=pytest.mark.ci, id="schedules and gradient growth"),
        pytest.param(2, UNEVEN, marks=pytest.mark.long, id="dense, uneven parts, clipped, pruned"),
    ],
)
def test_processes_train_as_one(tmp_path, several, processes, options):
    one = run(tmp_path / "one", **options)
    done = several(ROOT / "train.py", *train_flags(tmp_path / "several", **options), statuses=[0] * processes)
    files = RunFiles(tmp_path / "several", one.checkpoint.stem)
    assert_same_course(load(one), load(files))
    assert files.marker.exists()
    assert files.analysis.exists()
    # one of them prints
    assert f"processes={processes}" in done.stdout
    assert [line[:9] for line in done.stdout.splitlines() if "Epoch" in line] == ["Epoch 01 ", "Epoch 02 ", "Epoch 03 "]
    assert done.stdout.count("test images, 8 steps") == 1


LOST = "program.py, rank 0: error: lost the connection to rank 1, at "


@pytest.mark.ci
def test_after_a_death_and_a_signal_any_number_goes_on_and_only_the_first_needs_the_files(tmp_path, several):
    dynamic = VARIANTS["dynamic"]
    whole, flags = run(tmp_path / "whole", **dynamic), train_flags(tmp_path / "run", **dynamic)
    files = RunFiles(tmp_path / "run", whole.checkpoint.stem)
    assert LOST in several(PROGRAM, "train|train:SIGKILL", *flags, statuses=[1, -signal.SIGKILL]).stderr
    assert load(files)["step"] == 4
    programs = f"train|train:SIGTERM --checkpoint_dir {tmp_path / 'own'}"
    done = several(PROGRAM, programs, *flags, statuses=[128 + signal.SIGTERM] * 2)
    assert done.stderr.count("program.py: stopped by SIGTERM after step 6, with 1 of 3 epochs done; saved in") == 1
    assert load(files)["step"] == 6
    assert not files.marker.exists()
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert_same_course(load(whole), load(run(tmp_path / "alone", **dynamic)))
    done = several(PROGRAM, "train" + 2 * "|train --checkpoint_dir /proc/none", *flags, statuses=[0] * 3)
    assert done.stdout.count("resuming") == done.stdout.count("after epoch 1, step 6") == 1
    assert files.marker.exists()
    assert not (tmp_path / "own").exists()
    assert_same_course(load(whole), load(files))


LATE = ["error: lost the connection to rank 1, at step 6; run the same command again", "Timed out waiting 1200ms"]
ALONE = "rank 0: error: lost the connection to rank 1, at "
UNUSABLE = "cannot write to the checkpoint directory /proc/none"
NO_INTERFACE = "train:nowhere|train:nowhere"
RANDOM, SOON = VARIANTS["random rules, single weights"], {"peer_timeout": 0.02}
#: what the two run, further settings, the step of the last checkpoint, and what they say
FAULTS = [
    ("train|train:other-draws", RANDOM, 0, ["error: the wiring after step 2 of rank 1 differs from that of rank 0"]),
    ("train|train:drift", {}, 4, ["error: the network after step 8 of rank 1 differs from that of rank 0"]),
    ("train|train:moments", {}, 4, ["error: the optimizer's state after step 8 of rank 1 differs from that of"]),
    ("train|train:no-data", {}, 0, ["rank 1: error: there are no", ALONE]),
    ("train --checkpoint_dir /proc/none|train", {}, 0, [f"0: error: {UNUSABLE}", "rank 1: error: lost the"]),
    (NO_INTERFACE, {}, 0, ["GLOO_SOCKET_IFNAME names the network interface to use. PyTorch says: ", "none9"]),
    ("train|train:asleep", SOON, 4, ["rank 0 of 2 still waits for another process, at step 6\n", *LATE]),
]


@pytest.mark.ci
@pytest.mark.parametrize(("ranks", "options", "step", "said"), FAULTS, ids=[ranks for ranks, *_ in FAULTS])
def test_a_fault_in_one_is_named_and_the_checkpoint_is_that_before(tmp_path, several, ranks, options, step, said):
    done = several(PROGRAM, ranks, *train_flags(tmp_path / "run", **options), statuses=[1, 1])
    assert [text for text in said if text not in done.stderr] == [], done.stderr
    checkpoints = list((tmp_path / "run").glob("*.pth"))
    assert [torch.load(each, weights_only=True)["step"] for each in checkpoints] == [step] * (step > 0)
    assert not list((tmp_path / "run").glob("*.DONE"))


@pytest.mark.long
def test_two_machines_train_as_one_and_end_the_threads_of_their_group(tmp_path):
    """Two calls of torchrun that find each other at a port; other tests start their processes in a cheaper way."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    meeting = ("--nnodes=2", "--master_addr=localhost", f"--master_port={free_port()}", "--nproc_per_node=1")
    program = [str(tmp_path / "program.py"), "train:reports|train:reports", *map(str, train_flags(tmp_path / "two"))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting]
    started = [subprocess.Popen([*torchrun, f"--node_rank={rank}", *program], **options) for rank in range(2)]
    try:
        outputs, errors = zip(*(each.communicate(timeout=LIMIT) for each in started), strict=True)
    finally:
        for each in started:
            each.terminate()  # which it passes on
    assert [each.returncode for each in started] == [0, 0], errors
    assert "processes=2" in outputs[0]
    assert ["Epoch 03" in output for output in outputs] == [True, False]
    # one that asks for the interpreter's lock while it is torn down aborts the process
    assert [error.count("at the end: no thread of gloo") for error in errors] == [1, 1], errors
    assert_same_course(load(run(tmp_path / "one")), load(RunFiles(tmp_path / "two", TrainSettings(**SMALL).stem)))


MISMATCHES = {
    "train --seed 7|train:other-python --dropout 0.5 --backend torch|train --epochs 4 --enforce_sparsity": [
        "seed: 7 in rank 0, 42 in ranks 1, 2",
        f"python: {platform.python_version()} in ranks 0, 2, 2.7.18 in rank 1",
        "dropout: 0.0 in ranks 0, 2, 0.5 in rank 1",
        "epochs: 3 in ranks 0, 1, 4 in rank 2",
        "enforce_sparsity: False in ranks 0, 1, True in rank 2",
        *(["backend: cpu in ranks 0, 2, torch in rank 1"] if "cpu" in available_backends() else []),
    ],
    "train|crossval": ["program: train in rank 0, crossval in rank 1", "warmup_epochs: 10 in rank 0, 2 in"],
}


@pytest.mark.ci
@pytest.mark.parametrize(("ranks", "lines"), MISMATCHES.items())
def test_processes_that_do_not_match_name_what_differs_before_any_work(tmp_path, several, ranks, lines):
    count = ranks.count("|") + 1
    several(PROGRAM, ranks, *train_flags(tmp_path / "run"), statuses=[1] * count)
    for rank in range(count):
        errors = (tmp_path / "printed 1" / f"{rank}.err").read_text()
        assert f", rank {rank}: error: the processes do not match:\n" in errors
        assert [line for line in lines if f"\n  {line}" not in errors] == [], errors
        backends = any(line.startswith("backend") for line in lines)
        assert errors.count("\n  ") == len(lines) + backends, errors  # a backend implies the instruction set
    assert not (tmp_path / "run").exists()


@pytest.mark.ci
def test_a_process_that_stays_alone_gives_up(tmp_path, several):
    flags = train_flags(tmp_path / "run", peer_timeout=0.01)
    done = several(PROGRAM, "crossval", *flags, statuses=[1], size=3)
    assert "rank 0: error: cannot meet the other processes at MASTER_ADDR=localhost, MASTER_PORT=" in done.stderr
    assert "start all within --peer_timeout" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.ci
def test_ctrl_c_ends_a_process_that_waits(tmp_path, several):
    flags = train_flags(tmp_path / "run")
    done = several(PROGRAM, "train:interrupted|train:watches", *flags, statuses=[130, 0])
    assert "program.py: interrupted; run the same command again to resume" in done.stderr


@pytest.fixture
def as_rank_1_of_2(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "no.such.host.invalid"}, r"MASTER_ADDR=no\.such\.host\.invalid, .*give the addr.*timed out"),
        ({"MASTER_PORT": "abc"}, r"MASTER_PORT is 'abc', where torchrun sets a number"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT=99999: .*port must have value from 0 to 65535"),
        ({"MASTER_PORT": "1"}, r"cannot meet the other processes at .*MASTER_PORT=1: start all within `peer_timeout`"),
        ({"MASTER_PORT": "used", "RANK": "0"}, r"cannot meet the other processes at .*(EADDRINUSE|in use)"),
        ({"RANK": "0"}, r"PyTorch says: Timed out after 1 seconds waiting for clients\. 1/2 clients joined"),
    ],
)
def test_a_meeting_point_that_is_none_is_named(monkeypatch, as_rank_1_of_2, variables, message):
    with socket.create_server(("localhost", 0)) as other:
        for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), **variables}.items():
            monkeypatch.setenv(name, value.replace("used", str(other.getsockname()[1])))
        limit = datetime.timedelta(seconds=0.1)
        with pytest.raises(DistributedError, match=message), join(torch.device("cpu"), {}, limit):
            pass


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        ("--device cuda:0", 2, "device=cuda:0 would serve all processes; give cuda, so that each takes its own"),
        ("--device cuda", 1, "device='cuda:1': this machine has CUDA devices 0 … 0"),
    ],
)
def test_flags_of_one_process_are_refused(tmp_path, monkeypatch, capsys, as_rank_1_of_2, flags, devices, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert train.main([*flags.split(), "--checkpoint_dir", str(tmp_path / "none")]) == 2
    assert f"rank 1: error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_too_many_processes_and_directml_are_refused_before_any_work(as_rank_1_of_2):
    world = World()  # as if there were others
    settings, machine = TrainSettings(**{**SMALL, "batch_size": 199}), Machine(torch.device("cpu"), world=world)
    world.size = 2
    message = "batch_size=199 leaves 1 of 200 images to the last batch of an epoch, fewer than one for each of 2"
    with pytest.raises(SettingsError, match=message):
        Trainer(settings, load_dataset(settings.dataset), machine)
    world.size = 3
    with pytest.raises(SettingsError, match="k_folds=2 leaves some of 3 processes without one; start fewer"):
        cross_validate(FoldSettings(k_folds=2), None, "", machine)
    message = r"several processes need CPUs or CUDA, not privateuseone:0; start one, without torchrun"
    with pytest.raises(DistributedError, match=message), join(torch.device("privateuseone:0")):
        pass


def test_shares_are_contiguous_and_nearly_equal():
    world = World()
    for size, count in ((1, 5), (2, 5), (3, 7), (4, 4), (5, 256)):
        world.size, parts = size, []
        for rank in range(size):
            world.rank = rank
            parts.append(list(range(count))[world.part(count)])
        assert list(itertools.chain(*parts)) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(parts)


@pytest.mark.ci
def test_folds_are_dealt_out(tmp_path, several):
    """One process trains a fold, bitwise as without others, and waits for those longer than the time limit."""
    options = {**SMALL, "k_folds": 3, "epochs": 1}
    settings, machine = FoldSettings(**options), Machine(torch.device("cpu"))
    expected = cross_validate(settings, lambda: load_dataset(settings.dataset), tmp_path / "one", machine)
    flags = train_flags(tmp_path / "two", **options, peer_timeout=0.02)
    for again in (False, True):
        done = several(PROGRAM, "crossval|crossval:slow", *flags)
        results = json.loads((tmp_path / "two" / f"{settings.summary_stem}.json").read_text())
        assert results.items() >= expected.items()
        assert done.stdout.count("| mean |") == 1
        waits = "after 1 seconds, rank 0 of 2 still waits for another process, at the end of its folds\n"
        assert (waits in done.stderr) is not again
        trained = re.findall(r"^Fold (\d)/3, seed (\d+) \| Epoch 01 ", done.stdout, re.M)
        assert sorted(trained) == ([] if again else [("1", "42"), ("2", "43"), ("3", "44")])
    files = list((tmp_path / "one").glob("*.pth"))
    assert len(files) == 3
    for file in files:
        assert_equal(*(torch.load(each, weights_only=True) for each in (file, tmp_path / "two" / file.name)))


@pytest.mark.ci
def test_who_has_done_its_folds_does_not_wait_for_one_that_died(tmp_path, several):
    flags = train_flags(tmp_path, k_folds=2)
    assert LOST in several(PROGRAM, "crossval|crossval:SIGKILL", *flags, statuses=[1, -signal.SIGKILL]).stderr


OWN_LOOP = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from g2gnet import DSTScheduler, G2GNet

dist.init_process_group("gloo")
# each process draws its own network, of as many units; DistributedDataParallel gives all that of rank 0
draw = torch.Generator().manual_seed(1 + dist.get_rank())
net = G2GNet(16, 32, 4, "random", p_inter=1 / 3, block_size=4, T=6, num_groups=4, generator=draw)
model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
dst = DSTScheduler(model, optimizer, interval=2, fraction=0.3, prune="hebb")
data = torch.Generator().manual_seed(2)
for _ in range(4):
    x, labels = 3 * torch.rand(8, 16, generator=data), torch.randint(4, (8,), generator=data)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[part]), labels[part]).backward()
    optimizer.step()
    dst.step()
torch.save(net.state_dict(), f"{sys.argv[1]}/{dist.get_world_size()}-{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.ci
def test_the_scheduler_in_ones_own_loop(tmp_path, several):
    (shown,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.S)
    assert shown.replace("interval=1000", 'interval=2, fraction=0.3, prune="hebb"') in OWN_LOOP
    for processes in (1, 2):
        several(OWN_LOOP, tmp_path, statuses=[0] * processes)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert (one["fc2.values"] == 0).flatten(1).all(1).any()  # a unit has just grown
    assert_equal(dict(first), dict(second))
    assert torch.equal(one["fc2.mask.wiring"], first["fc2.mask.wiring"])
    torch.testing.assert_close(first, one, rtol=1e-5, atol=1e-6)  # another order of sums


UNFIT = """
import datetime
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from g2gnet import DSTScheduler, G2GNet
dist.init_process_group("gloo")
rank = dist.get_rank()
def network(seed=1):
    return G2GNet(16, 32, 4, block_size=4, T=6, num_groups=4, generator=torch.Generator().manual_seed(seed))
def scheduler(model, interval=2, group=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, DSTScheduler(model, optimizer, interval=interval, grow="random", process_group=group)
def say(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        print(error, flush=True)

# networks that have parted: by gradients that nobody averaged, a checkpoint, a bias, a decay; one that is alone
for change, group in enumerate(["world", "world", "world", "world", None]):
    net = network(1 + rank * (change == 1))
    _, dst = scheduler(net, 1, group)
    with torch.no_grad():
        if change in (0, 4):
            net.fc2.values *= torch.rand(net.fc2.values.shape, generator=torch.Generator().manual_seed(rank))
        net.fc1.bias[3] += 1e-7 * rank * (change == 2)
        net.lif2.beta += 1e-7 * rank * (change == 3)
    wiring = net.fc2.mask.flat_unit().clone()
    say(dst.step)
    print("as before" if torch.equal(net.fc2.mask.flat_unit(), wiring) else "rewired", flush=True)

# layers of which each process has a part
net = network()
fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
say(scheduler, net)
say(scheduler, FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu")))

# calls that are not the same in all
def train(updates, group="world", join=False):
    model = DistributedDataParallel(network())
    optimizer, dst = scheduler(model, 2, group)
    with model.join(enable=join):
        for update in updates:
            optimizer.zero_grad()
            model(torch.rand(8, 16)).square().sum().backward()
            optimizer.step()
            if update:
                dst.step()
say(train, (1 + rank) * [True], "world", True)
say(train, [True, rank == 0, True, True], dist.new_group(timeout=datetime.timedelta(seconds=1)))
"""


@pytest.mark.ci
def test_what_the_scheduler_cannot_work_with_is_refused_or_named(several):
    said = several(UNFIT).stdout.splitlines()
    patterns = [
        *4 * [r"the network after step 1 of rank 1 differs from that of rank 0", "as before"],
        r"rewired",  # one that says that it is alone
        r"the weights of layer 0 are a DTensor .*: they are sharded, as FSDP does; use DistributedDataParallel",
        r"the weights of layer 0 are a Tensor \[\d+\], .* they are sharded.*",
        r"DSTScheduler does not work inside model\.join\(\).*",
        r"some processes did not come to the update of the units after step 2: .* Timed out waiting 1000ms.*",
    ]
    of_first = said[: len(patterns)]  # what the other says comes behind it
    assert all(re.fullmatch(*each) for each in zip(patterns, of_first, strict=True)), said


MAKER = """
import sys, time
from pathlib import Path
from g2gnet.base.files import one_at_a_time
file = Path(sys.argv[1])
with one_at_a_time(file):
    if not file.exists():
        time.sleep(0.5)
        file.touch(exist_ok=False)  # an error if another process has made it since
        print("made")
"""


@pytest.mark.ci
def test_processes_that_need_the_same_file_make_it_once(tmp_path, several):
    (tmp_path / "made").mkdir()
    assert several(MAKER, tmp_path / "made" / "file", statuses=[0] * 3).stdout == "made\n"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]
