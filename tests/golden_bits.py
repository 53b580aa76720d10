"""Compares two commits bit by bit: what about forty networks compute, learn, rewire and resume, and a run.

Usage: ``python tests/golden_bits.py OLD [NEW] [-k WORDS]``; without NEW the working tree, with its compiled library as
it is. ``-k "cpu adlif"``: only the networks whose options contain each of these words. It prints a line for each, and
exits with 1 if any differ. Both commits run this script, so it uses public names alone.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from covering import covering

ROOT = Path(__file__).parents[1]

Options = dict[str, Any]

#: every pair of these that is possible occurs in a network; what an old commit lacks cannot be compared with it
OPTIONS: dict[str, tuple[Any, ...]] = {
    "backend": ("cpu", "torch"),
    "threads": (1, 2),
    "model": ("dense", "index", "random", "mixer", "small_world"),
    "block_size": (1, 16, 64),
    "neuron": ("lif", "synaptic", "adlif"),
    "per_neuron": (False, True),
    "reset": ("subtract", "zero", "none"),
    "surrogate": ("atan", "fast_sigmoid", "sigmoid", "triangle", "boxcar"),
    "recurrent": (False, True),
    "dropout": (0.0, 0.3),
    "chunk": (None, 3),
    "enc": ("current", "rate"),
    "readout": ("counts", "last", "mean", "max"),
    "batch": (1, 5, 64),
    "precision": ("fp32", "bf16"),
    "prune": ("set", "random", "hebb"),
    "grow": ("hebb", "random", "gradient"),
    "optimizer": ("Adam", "AdamW", "SGD", "Adagrad", "Rprop"),
    "final_density": (None, 0.2),
}
OF_OPTIMIZERS: dict[str, Options] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adagrad": {"initial_accumulator_value": 0.1}}
OF_THE_NETWORK = (
    "backend", "model", "block_size", "neuron", "per_neuron", "reset", "surrogate", "recurrent", "dropout", "enc",
    "readout",
)  # fmt: skip
#: of ``train.py``, for one epoch and then for two
RUN = (
    "--dataset fashionmnist-mini --model mixer --hidden_dim 64 --block_size 8 --T 8 --enc_scale 3 --batch_size 64 "
    "--limit_train 200 --limit_test 100 --sparsity_mode dynamic --dst_interval 2 --cp hebb --cg gradient --average 3"
)


def possible(of: Options) -> bool:
    """Whether these options go together, as far as they are given."""
    spikes, rules = of.get("readout", "counts") == "counts", {of.get("prune"), of.get("grow")}
    if of.get("model") == "dense" and of.get("final_density", 1) is None:  # nothing can grow
        return False
    return (spikes or "hebb" not in rules) and not (of.get("chunk") and of.get("readout") in ("mean", "max"))


def networks() -> dict[str, Options]:
    """The networks by name, the same on every machine and day."""
    return covering(OPTIONS, random.Random(0), possible)


class Training:
    """A network, its average, its optimizer and its scheduler, from the start or from their states."""

    def __init__(self, of: Options, states: tuple[Any, ...] | None = None) -> None:
        from g2gnet import DSTScheduler, G2GNet, tie_wiring

        draw = torch.Generator().manual_seed(0 if states is None else 1)
        options = {name: of[name] for name in OF_THE_NETWORK}
        self.net = G2GNet(96, 256, 10, num_groups=4, p_inter=0.3, T=7, enc_scale=2.0, generator=draw, **options)
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.average = torch.optim.swa_utils.AveragedModel(self.net, multi_avg_fn=ema)
        if states is not None:
            self.net.load_state_dict(states[0])
            self.average.load_state_dict(states[1])
        tie_wiring(self.net, self.average.module)
        name = of["optimizer"]
        self.optimizer = getattr(torch.optim, name)(self.net.parameters(), **OF_OPTIMIZERS.get(name, {}))
        rules = {"prune": of["prune"], "grow": of["grow"], "final_density": of["final_density"], "total_steps": 8}
        self.dst = DSTScheduler(self.net, self.optimizer, interval=2, fraction=0.3, **rules)
        if states is not None:
            self.optimizer.load_state_dict(states[2])
            self.dst.load_state_dict(states[3])

    def states(self) -> tuple[Any, ...]:
        return tuple(each.state_dict() for each in (self.net, self.average, self.optimizer, self.dst))


def outcomes(of: Options) -> Iterator[tuple[str, Any]]:
    """What a network computes, and what becomes of it in six steps, three updates, and two more steps that resume."""
    from g2gnet import G2GLinear

    torch.set_num_threads(of["threads"])
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.rand(of["batch"], 96, generator=draw), torch.arange(of["batch"]) % 10
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=of["precision"] == "bf16")
    training = Training(of)
    for step in range(8):
        if step == 6:
            training = Training(of, training.states())
        torch.manual_seed(step)
        with autocast:
            activity = training.net.simulate(x, chunk=of["chunk"])
        logits = activity.counts if activity.readout is None else activity.readout
        training.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        yield f"step {step}/logits", logits
        yield f"step {step}/rates", activity.rates
        yield f"step {step}/gradients", {name: each.grad for name, each in training.net.named_parameters()}
        training.optimizer.step()
        training.average.update_parameters(training.net)
        if training.dst.step():
            modules = training.net.named_modules()
            masks = {name: each.mask.to_dense() for name, each in modules if isinstance(each, G2GLinear)}
            yield f"step {step}/masks", masks
    yield "states", dict(zip(("net", "average", "optimizer", "dst"), training.states(), strict=True))
    for name, net in (("net", training.net.eval()), ("average", training.average.module.eval())):
        torch.manual_seed(0)
        with torch.no_grad(), autocast:
            first = net.simulate(x, spikes=True, membranes=True)
            second = net.simulate(x, first.state)
        yield f"{name}/run", [first.counts, first.readout, first.membranes, first.state]
        yield f"{name}/spikes", [each.dense() for each in first.spikes if each is not None]
        yield f"{name}/continued run", [second.counts, second.readout, second.state]


def checkpoints(flags: str) -> Iterator[tuple[str, Any]]:
    """Those of a run after one epoch, and after another that resumes it."""
    import g2gnet

    program = Path(g2gnet.__file__).parents[1] / "train.py"
    with tempfile.TemporaryDirectory() as folder:
        for epochs in ("1", "2"):
            command = [sys.executable, str(program), *flags.split(), "--epochs", epochs, "--checkpoint_dir", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            (file,) = Path(folder).glob("*.pth")
            checkpoint = torch.load(file, weights_only=True)
            yield f"{epochs} epochs", {name: checkpoint.get(name) for name in ("model", "average", "optimizer", "dst")}


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values in nested containers, by path."""
    if isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(f"{name}/{key}", each)
    else:
        yield name, value.detach().clone() if isinstance(value, torch.Tensor) else value


def compute_all(file: Path, words: list[str]) -> None:
    """Writes what the networks compute with the packages on the path, or the error that one raises."""
    results: dict[str, dict[str, Any]] = {}
    work: dict[str, Any] = {name: (outcomes, of) for name, of in networks().items()} | {"train.py": (checkpoints, RUN)}
    for name, (compute, of) in work.items():
        if all(word in name for word in words):
            results[name] = {}
            try:
                for part, value in compute(of):
                    results[name] |= leaves(part, value)
            except Exception as error:
                results[name]["error"] = f"{type(error).__name__}: {error}"
    torch.save(results, file)


def difference(old: Any, new: Any) -> str | None:
    """How much two results differ, or None."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return None if type(old) is type(new) and old == new else f"{old} and {new}"
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{old.dtype} {list(old.shape)} and {new.dtype} {list(new.shape)}"
    if torch.equal(old.contiguous().flatten().view(torch.uint8), new.contiguous().flatten().view(torch.uint8)):
        return None
    return f"{int((old != new).sum())} of {old.numel()}, by up to {(old.double() - new.double()).abs().max():.3g}"


def git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def sources(commit: str) -> str:
    """What the compiled library of a commit is made of."""
    return git("ls-tree", commit, "g2g_kernels/csrc", "setup.py")


def check_out(commit: str, tree: Path) -> Path:
    """The files of a commit, with a library: a copy of the working tree's if its sources are the same."""
    git("archive", "--format=tar", f"--output={tree}.tar", commit)
    shutil.unpack_archive(f"{tree}.tar", tree)
    built = ROOT / "g2g_kernels/cpu/libg2g_cpu.so"
    if built.exists() and sources(commit) == sources("HEAD") and not git("status", "--short", "g2g_kernels/csrc"):
        shutil.copy(built, tree / "g2g_kernels/cpu")
    else:
        print(f"building the CPU kernels of {commit}", flush=True)
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True, capture_output=True)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW", nargs="?", help="default: the working tree")
    parser.add_argument("-k", default="", metavar="WORDS", help="only networks with these options")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # of a worker: only compute, into a file
    options = parser.parse_args()
    if options.into:
        compute_all(options.into, options.k.split())
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for side, commit in (("old", options.old), ("new", options.new)):
            tree = ROOT if commit is None else check_out(commit, Path(scratch, side))
            environment = os.environ | {"PYTHONPATH": f"{tree}:{ROOT / 'tests'}", "PYTHONSAFEPATH": "1"}
            # on a busy machine, threads that spin while they wait take minutes from one another
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
            file = Path(scratch, f"{side}.pt")
            command = [sys.executable, __file__, options.old, "-k", options.k, "--into", str(file)]
            subprocess.run(command, env=environment, cwd=scratch, check=True)
            results.append(torch.load(file))
    differ = 0
    for name, old in results[0].items():
        new = results[1][name]
        found = [(part, difference(each, new.get(part))) for part, each in old.items()]  # a state may come to hold more
        lines = [f"    {part}: {what}" for part, what in found if what is not None]
        lines += [f"    both raise {old['error']}"] if "error" in old and not lines else []
        differ += bool(lines)
        print(f"{'DIFFERS' if lines else 'equal'}  {name} ({len(old)} results)", *lines[:20], sep="\n")
    print(f"{differ} of {len(results[0])} differ")
    return int(differ > 0 or not results[0])


if __name__ == "__main__":
    sys.exit(main())
