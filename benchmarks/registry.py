"""What can be timed, the contenders by name, and which of them are available on this machine."""

import ast
import importlib.util
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from g2g_kernels import available_backends, backend_status
from g2g_kernels.dispatch import BACKENDS

from . import peers
from .workload import Workload

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Entry:
    """A contender that has not been built."""

    label: str  # with -bf16 at the end if that is its precision
    target: str  # "module:Class"
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the class
    unavailable: str | None = None  # why it cannot run here
    compiles: bool = False  # for a minute or so, in its first turn
    backend: str | None = None  # of g2g, None for a peer
    workload: dict[str, Any] = field(default_factory=dict)  # what it changes: it is trained and judged with that
    by_name: bool = False  # takes part only when named

    def own(self, base: Workload) -> Workload:
        """What this contender computes where others compute ``base``."""
        return replace(base, **self.workload)


@dataclass(frozen=True)
class Kernel:
    """What ``--kernel`` names."""

    about: str  # what one turn is, in words
    baseline: str  # the contender to which the others' times are compared
    ours: str  # the class in :mod:`benchmarks.ours`
    method: str = "step"  # of a contender, that is timed
    bf16: bool = True  # whether it exists in bfloat16 too
    inputs: str = ""  # of a part alone, their name in :class:`~benchmarks.workload.Prepared`
    workload: dict[str, Any] = field(default_factory=dict)  # of all contenders, whatever the flags say
    usual: dict[str, Any] = field(default_factory=dict)  # of the workload, unless the flags say it


COMPILER = "a C++ compiler"

#: hidden layers whose surrogate has compact support, so that few neurons pass a gradient on
COMPACT = {"surrogate": "triangle", "alpha": 4.0}

KERNELS = {
    "step": Kernel("training step (forward, cross-entropy, backward, fused Adam)", "snntorch-masked", "Network"),
    "recurrent": Kernel(
        "training step of a recurrent network", "snntorch-masked", "Network", bf16=False, workload={"recurrent": True},
        usual={"train_steps": 20, "batch_size": 64},  # whose float64 reference takes a minute, not five
    ),
    "forward": Kernel("forward pass without gradients", "snntorch-masked", "Network", method="forward"),
    "lif": Kernel("LIF neurons alone, forward and backward", "snntorch", "Neurons", bf16=False, inputs="lif_inputs"),
    "synaptic": Kernel(
        "synaptic neurons alone, forward and backward", "snntorch", "Neurons", bf16=False, inputs="synaptic_inputs"
    ),
    "linear": Kernel(
        "the product of fc2 alone with all three gradients, at the spikes it receives", "masked", "Linear",
        inputs="spike_inputs",
    ),
    "linear-dense": Kernel(
        "the product of fc2 alone with all three gradients, at inputs without a zero", "masked", "Linear",
        inputs="dense_inputs",
    ),
    "dst": Kernel(
        "one update of dynamic sparse training: scores, prune by weight, grow by correlation, relabel",
        "dense-correlation", "Update", bf16=False,
    ),
}  # fmt: skip


def declared_peers() -> list[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]]:
    """The peers: module, name, class, the kernels it is timed in, and what it needs.

    Each module of :mod:`benchmarks.peers` declares its own, as literals ``PEERS`` and ``NEEDS``. They are read without
    an import, which would need the peer's library.
    """
    found = []
    for path in sorted(path for folder in peers.__path__ for path in Path(folder).glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        declared = {
            target.id: ast.literal_eval(node.value)
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id in ("PEERS", "NEEDS")
        }
        found += [(path.stem, *peer, declared.get("NEEDS", ())) for peer in declared.get("PEERS", ())]
    return found


def entries(kernel: str) -> dict[str, Entry]:
    """Every contender for ``kernel``, available or not, by its label."""
    about = KERNELS[kernel]
    found = [
        Entry(
            f"g2g-{backend}", f"{__package__}.ours:{about.ours}", options={"backend": backend, "inputs": about.inputs},
            unavailable=reason, backend=backend, by_name=kernel == "recurrent" and backend == "torch",  # takes seconds
        )
        for backend, reason in backend_status().items()
    ]  # fmt: skip
    if kernel == "step":
        found += [
            *(replace(entry, label=f"{entry.label}-triangle", workload=COMPACT) for entry in found),
            *(_variant(entry, "compiled", "Compiled", _missing((COMPILER,))) for entry in found),
            *(_variant(entry, "pair", "Pair", None) for entry in found if entry.backend == "triton"),
        ]
    found_peers = [
        Entry(
            label, f"{__package__}.peers.{module}:{name}", options={"inputs": about.inputs},
            unavailable=_missing(needs), compiles=COMPILER in needs,
        )
        for module, label, name, kernels, needs in declared_peers()
        if kernel in kernels
    ]  # fmt: skip
    found += sorted(found_peers, key=lambda entry: entry.label != about.baseline)  # the baseline first
    if about.bf16:
        found += [replace(entry, label=f"{entry.label}-bf16", precision="bf16") for entry in found]
    return {entry.label: entry for entry in found}


def _variant(entry: Entry, name: str, ours: str, lacks: str | None) -> Entry:
    """Our own network, run in another way, if it is named."""
    label, target, unavailable = f"{entry.label}-{name}", f"{__package__}.ours:{ours}", entry.unavailable or lacks
    compiles = name == "compiled"
    return replace(entry, label=label, target=target, unavailable=unavailable, compiles=compiles, by_name=True)


def _missing(needs: tuple[str, ...]) -> str | None:
    """What a peer needs and this machine lacks, in words; None if it lacks nothing."""
    for need in needs:
        if need == COMPILER:
            if not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "cl"))):
                return f"torch.compile needs {COMPILER}, and none is on PATH"
        elif importlib.util.find_spec(need) is None:
            return f"{need} is not installed (pip install {need})"
    return None


def choose(
    kernel: str, labels: str | None = None, backends: str | None = None, precision: str | None = None
) -> list[Entry]:
    """The contenders to run: by default all in float32, our kernels in bfloat16 too.

    ``labels`` are their names, ``backends`` g2g's, each with commas between them; ``precision`` is that of all. Raises
    ValueError for an unknown name, or if no contender is left.
    """
    known = entries(kernel)
    if labels is not None:
        if backends is not None or precision is not None:
            raise ValueError(f"contenders={labels!r} already names backend and precision; leave out the other flags")
        return [known[name] for name in _names("contender", labels, known, f"--kernel {kernel} has")]
    ours = BACKENDS if backends is None else _names("backend", backends, BACKENDS, "g2g has")
    everyone = [
        entry for entry in known.values() if not entry.by_name and (entry.backend is None or entry.backend in ours)
    ]
    if precision is not None:
        everyone = [entry for entry in everyone if entry.precision == precision]
        if not everyone:
            raise ValueError(f"precision={precision!r}: --kernel {kernel} is measured in fp32 only")
        return everyone
    native = [name for name in available_backends() if name != "torch"]
    return [entry for entry in everyone if entry.precision == "fp32" or entry.backend in native]


def _names(what: str, text: str, known: Collection[str], who: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is unknown; {who} {', '.join(known)}")
    return names
