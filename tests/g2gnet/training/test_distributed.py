"""Several processes train one network as one process would, as ``torchrun`` starts them: by gloo, on the CPU."""

import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, rms
from processes import launch
from processes import run as run_program
from training_runs import SMALL, VARIANTS, assert_equal, flags_of, load, run

import train
from g2g_kernels import available_backends
from g2gnet import distributed
from g2gnet.data import as_samples, load_dataset
from g2gnet.distributed import ALONE, DistributedError, World, join
from g2gnet.training import Machine, SettingsError, Trainer, TrainSettings
from g2gnet.training.cross_validation import FoldSettings, cross_validate
from g2gnet.training.evaluation import autocast, build_network
from g2gnet.training.run_files import RunFiles

pytestmark = pytest.mark.skipif(not dist.is_gloo_available() or os.name != "posix", reason="needs gloo and signals")

#: no two steps of an epoch alike, two updates of the units, rate-coded input, penalised rates, images changed at random
EVERYTHING = {
    **VARIANTS["dynamic"],
    "enc": "rate",
    "enc_scale": 2.0,
    "enforce_sparsity": True,
    "warmup_epochs": 0,
    "augment": "crop-flip",
}


def environment(**variables):
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def torchrun(processes, program, *flags, launcher=("--standalone",)):
    """The command; ``program`` is a file or ``-m`` and a module."""
    launch = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc_per_node", str(processes)]
    return [*launch, program, *map(str, flags)]


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
    for name in ("epoch", "step", "dst", "settings", "progress"):
        assert one[name] == several[name]
    for name, tensor in one["model"].items():
        other = several["model"][name]
        if tensor.is_floating_point():
            # as a whole: Adam makes the rounding of a gradient that all but cancels out a step of full size
            assert rms(other - tensor) <= 1e-6 * rms(tensor), name
        else:
            assert torch.equal(other, tensor), name
    for alone, shared in zip(one["history"], several["history"], strict=True):
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-6)
        for layer, rate in alone["firing_rate"].items():
            assert shared["firing_rate"][layer] == pytest.approx(rate, rel=1e-6)
        for name in ("train_acc", "test_acc", "density", "units", "units_grown", "units_kept", "initial_units_kept"):
            assert shared[name] == alone[name]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "options"),
    # batches of 71: in others some membrane is so near to its threshold that the order of sums decides about a spike
    [
        (2, {}),
        (2, {"clip_grad_norm": 0.5}),
        (2, {"model": "dense", "batch_size": 71}),
        (3, EVERYTHING),
        (2, VARIANTS["all schedules"]),
        (2, VARIANTS["pruned from a dense start"]),
    ],
    ids=[
        "static",
        "clipped",
        "dense, uneven parts",
        "dynamic and all else, three",
        "schedules and gradient growth",
        "pruned",
    ],
)
def test_processes_train_as_one(tmp_path, processes, options):
    one = run(tmp_path / "one", **options)
    flags = train_flags(tmp_path / "several", **options)
    done = launch(processes, ROOT / "train.py", *flags, folder=tmp_path / "printed")
    assert done.statuses == [0] * processes, done.stderr
    several = RunFiles(tmp_path / "several", one.checkpoint.stem)
    assert_same_course(load(one), load(several))
    assert several.marker.exists()
    assert several.analysis.exists()
    # one of them prints
    assert f"processes={processes}" in done.stdout
    assert [line[:9] for line in done.stdout.splitlines() if "Epoch" in line] == ["Epoch 01 ", "Epoch 02 ", "Epoch 03 "]
    assert done.stdout.count("test images, 8 steps") == 1


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_in_bfloat16_shares_are_as_near_to_float32_as_the_whole_batch(backend):
    """The whole and the sum of its parts may differ by more than the order of sums; neither is the better one."""
    if backend not in available_backends():
        pytest.skip("needs the compiled kernels")
    data = load_dataset(SMALL["dataset"])

    def gradient(seed, parts, backend, precision):
        net = build_network(TrainSettings(**SMALL, seed=seed, precision=precision), 784, 10, backend)
        images = as_samples(data.train_images[64 * seed : 64 * seed + 64])
        for part in parts:
            with autocast(TrainSettings(precision=precision), torch.device("cpu")):
                counts = net.simulate(net.encode(images[part])).counts
            (counts * torch.linspace(-1, 1, 10)).sum().backward()
        return torch.cat([layer.values.grad.flatten() for layer in (net.fc1, net.fc2, net.fc3)])

    whole, shares = 0.0, 0.0
    for seed in range(8):
        exact = gradient(seed, [slice(None)], "torch", "fp32")
        one = gradient(seed, [slice(None)], backend, "bf16")
        three = gradient(seed, [slice(22), slice(22, 43), slice(43, 64)], backend, "bf16")
        whole += rms(one - exact) / rms(exact)
        shares += rms(three - exact) / rms(exact)
    assert 1e-4 < whole / 8 < 0.2  # it is rounded
    assert shares == pytest.approx(whole, rel=0.1)


#: train.py with a fault in rank 1, after step 5 (in the second epoch of three, at four steps an epoch)
FAULTY = """
import datetime, os, signal, sys, time
import train
from g2gnet import cli, distributed, dst
from g2gnet.data import DataError
from g2gnet.training import Trainer
fault, rank = sys.argv.pop(1), int(os.environ["RANK"])
train_step = Trainer._train_step
def step(self, index):
    if rank == 1 and self.step == 6 and fault == "sleep in step 7":
        time.sleep(4)
    result = train_step(self, index)
    if rank == 1 and self.step == 6:
        if fault == "drift":
            self.net.fc2.bias.data[3] += 1e-7
        elif fault in ("SIGKILL", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, fault))
        elif fault == "sleep at step 6":
            time.sleep(4)
    if rank == 1 and self.step == 8 and fault == "moments":
        next(iter(self.optimizer.state.values()))["exp_avg"][0] += 1e-9
    return result
Trainer._train_step = step
if "sleep" in fault:
    distributed.PATIENCE, distributed.FAREWELL = 0.5, datetime.timedelta(seconds=1)
if fault == "no data" and rank == 1:
    def load_data(*arguments):
        raise DataError("there are no images here")
    cli.load_data = load_data
if fault == "other draws" and rank == 1:
    stream = dst.stream
    dst.stream = lambda seed, *rest, **options: stream(seed + 1, *rest, **options)
if fault == f"other directory of rank {rank}":
    sys.argv[sys.argv.index("--checkpoint_dir") + 1] += "-of-its-own"
if fault == f"no directory of rank {rank}":
    sys.argv[sys.argv.index("--checkpoint_dir") + 1] = "/proc/none"
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def faulty(tmp_path):
    """Trains by two processes, the second of which has the fault; returns what is in the files, and the errors."""
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY)

    def run_faulty(fault, statuses=(1, 1), **options):
        flags = train_flags(tmp_path / "run", **options)
        done = launch(2, program, fault, *flags, folder=tmp_path / "printed")
        assert tuple(done.statuses) == statuses, done.stderr
        options.pop("peer_timeout", None)
        return RunFiles(tmp_path / "run", TrainSettings(**{**SMALL, **options}).stem), done.stderr

    return run_faulty


def test_a_signal_to_one_stops_all_after_the_same_step_and_more_go_on(tmp_path, faulty):
    whole = run(tmp_path / "whole", **VARIANTS["dynamic"])
    files, errors = faulty("SIGTERM", (128 + signal.SIGTERM,) * 2, **VARIANTS["dynamic"])
    message = "faulty.py: stopped by SIGTERM after step 6, with 1 of 3 epochs done; saved in"
    assert errors.count(message) == 1, errors
    assert load(files)["step"] == 6
    flags = train_flags(tmp_path / "run", **VARIANTS["dynamic"])
    done = launch(3, ROOT / "train.py", *flags, folder=tmp_path / "more")
    assert done.stdout.count("resuming") == 1
    assert "after epoch 1, step 6" in done.stdout
    assert files.marker.exists()
    assert_same_course(load(whole), load(files))


LOST = "faulty.py, rank 0: error: lost the connection to rank 1; run the same command again to resume"


def test_where_one_dies_the_other_ends_with_a_message_and_one_goes_on(tmp_path, faulty):
    files, errors = faulty("SIGKILL", (1, -signal.SIGKILL))
    assert LOST in errors
    assert load(files)["step"] == 4
    assert not files.marker.exists()
    whole = run(tmp_path / "whole")
    run(tmp_path / "run")
    assert_same_course(load(whole), load(files))


@pytest.mark.long
def test_where_one_dies_torchrun_ends_with_that_message(tmp_path):
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY)
    # torchrun looks every 0.1 s by default, and ends the other process, which may still have to say what happened
    patient = ("--standalone", "--monitor-interval", "1")
    command = torchrun(2, program, "SIGKILL", *train_flags(tmp_path / "run"), launcher=patient)
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert LOST in done.stderr
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9", done.stderr), done.stderr  # torchrun's own words


def test_other_decisions_are_noticed_at_once(faulty):
    _, errors = faulty("other draws", **VARIANTS["random rules, single weights"])
    assert "error: the wiring after step 2 of rank 1 differs from that of rank 0" in errors


def test_weights_that_drift_apart_are_noticed_before_they_are_saved(faulty):
    files, errors = faulty("drift")
    assert "error: the network after step 8 of rank 1 differs from that of rank 0" in errors
    assert load(files)["step"] == 4


def test_moments_that_drift_apart_are_noticed_before_they_are_saved(faulty):
    files, errors = faulty("moments")
    assert "error: the optimizer's state after step 8 of rank 1 differs from that of rank 0" in errors
    assert load(files)["step"] == 4


@pytest.mark.parametrize("fault", ["other directory of rank 1", "no directory of rank 1"])
def test_only_the_first_process_needs_the_files(tmp_path, faulty, fault):
    whole = run(tmp_path / "whole")
    faulty("SIGTERM", (128 + signal.SIGTERM,) * 2)
    files, _ = faulty(fault, (0, 0))
    assert_same_course(load(whole), load(files))
    assert files.marker.exists()
    assert not (tmp_path / "run-of-its-own").exists()


def test_all_say_why_the_first_cannot_use_its_files(faulty):
    _, errors = faulty("no directory of rank 0")
    assert "rank 0: error: cannot write to the checkpoint directory /proc/none" in errors
    assert "rank 1: error: rank 0 has ended: cannot write to the checkpoint directory /proc/none" in errors


def test_all_say_why_one_of_them_ended(faulty):
    _, errors = faulty("no data")
    assert "rank 1: error: there are no images here" in errors
    assert "rank 0: error: rank 1 has ended: there are no images here" in errors


@pytest.mark.parametrize("fault", ["sleep at step 6", "sleep in step 7"])
def test_where_one_does_not_answer_the_others_say_so_and_give_up(faulty, fault):
    files, errors = faulty(fault, peer_timeout=0.03)
    message = f"rank 0 of 2 has waited 0 seconds for another process, at {fault[9:]}; it gives up after 1.8 seconds"
    assert message in errors
    assert "rank 0: error: heard nothing from rank 1 for 1.8 seconds: look what became of it" in errors
    assert "--peer_timeout sets this limit" in errors
    assert load(files)["step"] == 4


#: train.py, and what still runs when the interpreter begins to end
THREADS = """
import atexit, pathlib, sys
import train
@atexit.register
def report():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("at the end:", ", ".join(name for name in names if "gloo" in name) or "no thread of gloo", file=sys.stderr)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_two_machines_train_as_one_and_end_the_threads_of_their_group(tmp_path):
    """Two calls of torchrun that find each other at a port; most other tests start their processes in a cheaper way."""
    program = tmp_path / "program.py"
    program.write_text(THREADS)
    port = free_port()
    machines = []
    for number in range(2):
        launcher = ("--nnodes=2", f"--node_rank={number}", "--master_addr=localhost", f"--master_port={port}")
        command = torchrun(1, program, *train_flags(tmp_path / "several"), launcher=launcher)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        machines.append(subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes))
    printed = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert "processes=2" in printed[0][0]
    assert "Epoch 03" in printed[0][0]
    assert "Epoch" not in "".join(printed[1])
    # one that asks for the interpreter's lock while it is torn down aborts the process
    assert [errors.count("at the end: no thread of gloo") for _, errors in printed] == [1, 1], printed
    one = run(tmp_path / "one")
    assert_same_course(load(one), load(RunFiles(tmp_path / "several", one.checkpoint.stem)))


# --- how they meet ------------------------------------------------------------------------------------------------

#: the program and further flags of each rank; of rank 1 also another Python, if it is told so
DIFFERENT = """
import importlib, os, platform, sys
ranks = [each.split() for each in sys.argv.pop(1).split("|")]
name, *flags = ranks[int(os.environ["RANK"])]
if "other-python" in flags:
    flags.remove("other-python")
    platform.python_version = lambda: "2.7.18"
sys.exit(importlib.import_module(name).main([*sys.argv[1:], *flags]))
"""


@pytest.mark.parametrize(
    ("ranks", "lines"),
    [
        (
            "train --seed 7|train --dropout 0.5 --epochs 4",
            ["epochs: 3 in rank 0, 4 in rank 1", "dropout: 0.0 in rank 0, 0.5 in rank 1", "seed: 7 in rank 0, 42 in"],
        ),
        ("train|train|train --augment flip", ["augment: auto in ranks 0, 1, flip in rank 2"]),
        ("train|train --enforce_sparsity", ["enforce_sparsity: False in rank 0, True in rank 1"]),
        ("crossval|crossval --enc_scale 2", ["enc_scale: 3.0 in rank 0, 2.0 in rank 1"]),
        ("train|crossval", ["program: train in rank 0, crossval in rank 1"]),
        ("crossval|crossval other-python", [f"python: {platform.python_version()} in rank 0, 2.7.18 in rank 1"]),
        ("train|train --backend torch", ["backend: cpu in rank 0, torch in rank 1"]),
    ],
    ids=["settings", "of three", "switch", "folds", "program", "version", "backend"],
)
def test_processes_that_do_not_match_name_what_differs_before_any_work(tmp_path, ranks, lines):
    if "backend" in ranks and "cpu" not in available_backends():
        pytest.skip("needs the compiled kernels")
    program = tmp_path / "different.py"
    program.write_text(DIFFERENT)
    count = ranks.count("|") + 1
    done = launch(count, program, ranks, *train_flags(tmp_path / "run"), folder=tmp_path / "printed")
    assert done.statuses == [1] * count, done.stderr
    for rank in range(count):
        errors = (tmp_path / "printed" / f"{rank}.err").read_text()
        assert f", rank {rank}: error: the processes do not match:\n" in errors
        for line in lines:
            assert f"\n  {line}" in errors
        assert errors.count("\n  ") == len(lines) + ("backend" in ranks), errors  # which implies the instruction set
    assert not (tmp_path / "run").exists()


#: the first of three processes, which nobody joins
ALONE_OF_THREE = {
    "WORLD_SIZE": "3",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize("name", ["train", "crossval"])
def test_a_process_that_stays_alone_says_whom_it_waits_for_and_gives_up(tmp_path, name):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    program = tmp_path / "alone.py"
    text = "import sys, {0}\nfrom g2gnet import distributed\ndistributed.PATIENCE = 0.5\nsys.exit({0}.main())\n"
    program.write_text(text.format(name))
    flags = [*train_flags(tmp_path / "run"), "--peer_timeout", "0.02"]
    done = run_program(program, *flags, output=tmp_path / "printed", **ALONE_OF_THREE, MASTER_PORT=str(store.port))
    assert done.statuses == [1]
    assert re.search(
        r"rank 0 of 3 has heard nothing from ranks 1, 2 for \S+ seconds; it gives up after 1.2", done.stderr
    )
    assert "rank 0: error: heard nothing from ranks 1, 2 for 1.2 seconds: look what became of it" in done.stderr
    assert not (tmp_path / "run").exists()


#: train.py, whose first process gets Ctrl-C while it waits; the second one is late and sees whether the first has ended
INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
import train
from g2gnet import cli, distributed
number = Path(sys.argv.pop(1))
distributed.PATIENCE = 0.5

def interrupt(*message):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

def load_data(*arguments):
    for _ in range(600):
        status = Path(f"/proc/{number.read_text()}/stat")
        if not status.exists() or ") Z " in status.read_text():
            os._exit(0)
        time.sleep(0.05)
    os._exit(3)

if os.environ["RANK"] == "0":
    number.write_text(str(os.getpid()))
    distributed.logger.warning = interrupt
else:
    cli.load_data = load_data
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("others", ["never come", "are late"])
def test_ctrl_c_ends_a_process_that_waits(tmp_path, others):
    program = tmp_path / "interrupted.py"
    program.write_text(INTERRUPTED)
    arguments = [program, tmp_path / "number", *train_flags(tmp_path / "run")]
    if others == "are late":
        done = launch(2, *arguments, folder=tmp_path / "printed")
        assert done.statuses == [130, 0], done.stderr
    else:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        variables = {**ALONE_OF_THREE, "MASTER_PORT": str(store.port)}
        done = run_program(*arguments, output=tmp_path / "printed", **variables)
        assert done.statuses == [130], done.stderr
    assert "interrupted.py: interrupted; run the same command again to resume" in done.stderr


#: three processes that wait in different places, or the last of which does not answer
PLACES = """
import datetime, os, sys, time
import torch
from g2gnet import distributed
distributed.FAREWELL = datetime.timedelta(seconds=2)
try:
    with distributed.join(torch.device("cpu"), {}, datetime.timedelta(seconds=1)) as world:
        if sys.argv[1] == "silent" and world.rank == 2:
            time.sleep(5)
        world.stage = f"place {world.rank}"
        world.largest(0) if world.rank == 0 else world.gather(0)
except distributed.DistributedError as error:
    print(f"{os.environ['RANK']}: {error}", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("elsewhere", "waited for one another: rank 0 at place 0, rank 1 at place 1, rank 2 at place 2; run the same"),
        ("silent", "heard nothing from rank 2 for 1 seconds: look what became of it"),
    ],
)
def test_those_who_do_not_come_are_named(tmp_path, how, message):
    program = tmp_path / "places.py"
    program.write_text(PLACES)
    done = launch(3, program, how, folder=tmp_path / "printed")
    said = done.stdout.splitlines()
    assert len(said) == 3, done.stderr
    # with the first that gives up all lose their connections, which is what the others may say
    assert any(line[3:].startswith(message) for line in said), said


@pytest.fixture
def used_port():
    """A port at which another program listens."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": ""}, r"MASTER_ADDR is not set; give the address of rank 0"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, r"MASTER_ADDR=no\.such\.host\.invalid, .* \(.+\): give the address"),
        ({"MASTER_PORT": "abc"}, r"MASTER_PORT is 'abc', where torchrun sets a number"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT=99999 is no port; give a number from 1 to 65535"),
        ({"MASTER_PORT": "1"}, r"cannot meet the other processes at .*MASTER_PORT=1 \(Connection refused\)"),
        ({"MASTER_PORT": "used", "RANK": "0"}, r"cannot meet the other processes at .*(EADDRINUSE|in use)"),
        ({"GLOO_SOCKET_IFNAME": "none9", "RANK": "0"}, r"GLOO_SOCKET_IFNAME names the network interface .* none9"),
    ],
    ids=["no address", "address", "no number", "no port", "closed port", "used port", "interface"],
)
def test_a_meeting_point_that_is_none_is_named(monkeypatch, as_rank_1_of_2, used_port, variables, message):
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), **variables}.items():
        monkeypatch.setenv(name, value.replace("used", str(used_port)))
    monkeypatch.setattr(distributed.Meeting, "agree", lambda self, about: None)  # there is no other process
    limit = datetime.timedelta(seconds=0.5)
    with pytest.raises(DistributedError, match=message), join(torch.device("cpu"), {}, limit):
        pass


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def as_rank_1_of_2(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def cuda(monkeypatch, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)


@pytest.mark.parametrize(
    ("flags", "devices", "message"),
    [
        (["--device", "cuda:0"], 2, "device=cuda:0 would serve all processes; give cuda, so that each takes its own"),
        (["--device", "cuda"], 1, "device='cuda:1': this machine has CUDA devices 0 … 0"),
        (["--device", "cuda", "--cuda_graph"], 2, "--cuda_graph is of one process; leave it out, or start one without"),
    ],
)
def test_flags_of_one_process_are_refused_before_anything_is_sent(
    tmp_path, monkeypatch, capsys, as_rank_1_of_2, flags, devices, message
):
    cuda(monkeypatch, devices)
    assert train.main([*flags, "--checkpoint_dir", str(tmp_path / "none")]) == 2
    assert f"rank 1: error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_directml_is_refused(as_rank_1_of_2):
    message = r"several processes need CPUs or CUDA devices, not privateuseone:0; start one, without torchrun"
    with pytest.raises(DistributedError, match=message), join(torch.device("privateuseone:0")):
        pass


class Two(World):
    """Two processes without the other one."""

    size = 2

    def __init__(self):
        self.group, self.rank = None, 0


def test_too_many_processes_are_refused_before_any_work():
    settings = TrainSettings(**{**SMALL, "batch_size": 199})
    message = "batch_size=199 leaves 1 of 200 images to the last batch of an epoch, fewer than one for each of 2"
    with pytest.raises(SettingsError, match=message):
        Trainer(settings, load_dataset(settings.dataset), Machine(torch.device("cpu"), world=Two()))
    three = Two()
    three.size = 3
    with pytest.raises(SettingsError, match="k_folds=2 leaves some of 3 processes without one; start fewer"):
        cross_validate(FoldSettings(k_folds=2), None, "", Machine(torch.device("cpu"), world=three))


def test_shares_are_contiguous_and_nearly_equal():
    world = Two()
    for size, count in ((1, 5), (2, 5), (3, 7), (4, 4), (5, 256)):
        parts = []
        for rank in range(size):
            world.size, world.rank = size, rank
            parts.append(list(range(count))[world.part(count)])
        assert list(itertools.chain(*parts)) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(parts)
    assert ALONE.part(5) == slice(0, 5)


# --- cross-validation ---------------------------------------------------------------------------------------------


def test_folds_are_dealt_out(tmp_path):
    """Each fold is trained by one process: its files are those of a cross-validation by one, to the last bit."""
    options = {**SMALL, "k_folds": 3, "epochs": 1}
    settings = FoldSettings(**options)
    expected = cross_validate(
        settings, lambda: load_dataset(settings.dataset), tmp_path / "one", Machine(torch.device("cpu"))
    )
    flags = [*flags_of(options), "--checkpoint_dir", tmp_path / "two"]
    for again in (False, True):
        done = launch(2, ROOT / "crossval.py", *flags, folder=tmp_path / f"again {again}")
        assert done.statuses == [0, 0], done.stderr
        results = json.loads((tmp_path / "two" / f"{settings.summary_stem}.json").read_text())
        for name in ("folds", "mean", "std"):
            assert results[name] == expected[name]
        assert done.stdout.count("| mean |") == 1
        for fold in (1, 2, 3):
            line = rf"^Fold {fold}/3, seed {41 + fold} \| Epoch 01 "
            assert len(re.findall(line, done.stdout, re.M)) == (0 if again else 1), done.stdout
    stems = [path.name for path in (tmp_path / "one").glob("*.pth")]
    assert len(stems) == 3
    for stem in stems:
        assert_equal(*(torch.load(tmp_path / place / stem, weights_only=True) for place in ("one", "two")))


#: crossval.py, whose second process takes longer than the time limit, or is killed
SLOW_FOLD = """
import os, signal, sys, time
import crossval
from g2gnet import distributed
from g2gnet.training import Trainer
distributed.PATIENCE = 0.5
if os.environ["RANK"] == "1":
    train_epoch = Trainer.train_epoch
    def slow(self, *rest):
        time.sleep(4)
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return train_epoch(self, *rest)
    Trainer.train_epoch = slow
sys.exit(crossval.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["alive", "killed"])
def test_who_has_done_its_folds_waits_for_those_that_are_alive(tmp_path, how):
    program = tmp_path / "slow.py"
    program.write_text(SLOW_FOLD)
    flags = [*flags_of({**SMALL, "k_folds": 2, "epochs": 1, "peer_timeout": 0.03}), "--checkpoint_dir", tmp_path]
    done = launch(2, program, how, *flags, folder=tmp_path / "printed")
    assert re.search(r"rank 0 of 2 has waited \S+ seconds for another process, at the end of its folds\n", done.stderr)
    if how == "alive":
        assert done.statuses == [0, 0], done.stderr
        assert done.stdout.count("| mean |") == 1
    else:
        assert done.statuses == [1, -signal.SIGKILL]
        assert "rank 0: error: lost the connection to rank 1; run the same command again" in done.stderr


# --- in one's own loop --------------------------------------------------------------------------------------------

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


def test_the_scheduler_in_ones_own_loop(tmp_path):
    (shown,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.S)
    assert shown.replace("interval=1000", 'interval=2, fraction=0.3, prune="hebb"') in OWN_LOOP
    program = tmp_path / "own_loop.py"
    program.write_text(OWN_LOOP)
    for processes in (1, 2):
        done = launch(processes, program, tmp_path, folder=tmp_path / f"{processes} printed")
        assert done.statuses == [0] * processes, done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert (one["fc2.values"] == 0).flatten(1).all(1).any()  # a unit has just grown
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        if tensor.is_floating_point():
            torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)  # another order of sums
        else:
            assert torch.equal(first[name], tensor), name


PARTING = """
import torch
import torch.distributed as dist
from g2gnet import DSTScheduler, G2GNet
from g2gnet.distributed import DistributedError

def network(seed):
    return G2GNet(16, 32, 4, block_size=4, T=6, num_groups=4, generator=torch.Generator().manual_seed(seed))

def unaveraged(net, rank):  # as if nobody had averaged the gradients
    net.fc2.values *= torch.rand(net.fc2.values.shape, generator=torch.Generator().manual_seed(rank))

def loaded(net, rank):
    if rank == 1:
        net.load_state_dict(network(2).state_dict())

def bias(net, rank):
    net.fc1.bias[3] += 1e-7 * rank

def decay(net, rank):
    net.lif2.beta += 1e-7 * rank

dist.init_process_group("gloo")
messages = []
for change in (unaveraged, loaded, bias, decay, None):
    net = network(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    group = "world" if change else None
    dst = DSTScheduler(net, optimizer, interval=1, fraction=0.3, grow="random", process_group=group)
    before = [parameter.clone() for parameter in net.parameters()]
    with torch.no_grad():
        (change or unaveraged)(net, dist.get_rank())
    wiring = net.fc2.mask.flat_unit().clone()
    try:
        dst.step()
        messages.append("rewired")
    except DistributedError as error:
        assert torch.equal(net.fc2.mask.flat_unit(), wiring), "nothing is rewired"
        messages.append(str(error))
print(*messages, sep="\\n", flush=True)
dist.destroy_process_group()
"""


def test_processes_that_part_are_told_and_one_that_says_so_is_alone(tmp_path):
    program = tmp_path / "parting.py"
    program.write_text(PARTING)
    done = launch(2, program, folder=tmp_path / "printed")
    assert done.statuses == [0, 0], done.stderr
    told = "the network after step 1 of rank 1 differs from that of rank 0\n"
    assert done.stdout == 2 * (4 * told + "rewired\n")


UNFIT = """
import datetime
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from g2gnet import DSTScheduler, G2GNet

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
rank = dist.get_rank()

def scheduler(wrap):
    net = G2GNet(16, 32, 4, block_size=4, T=6, num_groups=4, generator=torch.Generator().manual_seed(1))
    model = wrap(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, DSTScheduler(model, optimizer, interval=2, prune="set", grow="random")

def fsdp2(net):
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    return net

def fsdp1(net):
    return FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))

def say(function):
    try:
        function()
    except Exception as error:
        print(f"{rank}: {error}", flush=True)

for wrap in (fsdp2, fsdp1):
    say(lambda: scheduler(wrap))

model, optimizer, dst = scheduler(DistributedDataParallel)

def train(steps, skipped=()):
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.rand(8, 16)).square().sum().backward()
        optimizer.step()
        if step not in skipped:
            dst.step()

def uneven():
    with model.join():
        train(1 + rank)

say(uneven)
model, optimizer, dst = scheduler(DistributedDataParallel)
say(lambda: train(4, skipped=[1] if rank == 1 else []))
"""


def test_what_the_scheduler_cannot_work_with_is_refused_or_named(tmp_path):
    program = tmp_path / "unfit.py"
    program.write_text(UNFIT)
    done = launch(2, program, folder=tmp_path / "printed")
    first = done.stdout.splitlines()[:4]
    assert "0: the weights of layer 0 are a DTensor of shape" in first[0]
    assert "needs whole layers, as with DistributedDataParallel" in first[0]
    assert re.search(r"0: the weights of layer 0 are a Tensor of shape \(\d+,\), .* they are sharded", first[1])
    assert "0: DSTScheduler does not work inside model.join()" in first[2]
    assert (
        "0: rank 1 did not come to the update of the units after step 2: all processes must make the same" in first[3]
    )


# --- files that several processes need ----------------------------------------------------------------------------

MAKER = """
import sys, time
from pathlib import Path
from g2gnet.files import one_at_a_time
file = Path(sys.argv[1])
with one_at_a_time(file):
    if not file.exists():
        time.sleep(0.5)
        with file.open("x") as new:  # an error if another process has made it since
            new.write("made")
        print("made")
"""


def test_processes_that_need_the_same_file_make_it_once(tmp_path):
    (tmp_path / "made").mkdir()
    program = tmp_path / "maker.py"
    program.write_text(MAKER)
    done = launch(3, program, tmp_path / "made" / "file", folder=tmp_path / "printed")
    assert done.statuses == [0, 0, 0], done.stderr
    assert done.stdout == "made\n"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]
