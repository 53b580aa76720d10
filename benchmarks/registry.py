"""The contenders by name, and which of them this machine can run."""

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

from g2g_kernels import available_backends, backend_status

#: what ``--kernel`` takes: the method of a contender that is timed
KERNELS = {"step": "step", "forward": "forward", "lif": "step"}

#: the contender whose time is divided by everyone's
BASELINE = {"step": "snntorch-masked", "forward": "snntorch-masked", "lif": "snntorch"}


@dataclass(frozen=True)
class Entry:
    """A contender that has not been built.

    Attributes:
        label: its name, with ``-bf16`` at the end if that is its precision.
        target: ``"module:Class"``.
        options: further arguments of the class.
        unavailable: why it cannot run here, or None.
    """

    label: str
    target: str
    precision: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None


def entries(kernel: str) -> dict[str, Entry]:
    """Every contender for ``kernel``, available or not, by its label."""
    ours = "Neurons" if kernel == "lif" else "Network"
    found = [
        Entry(f"g2g-{backend}", f"benchmarks.ours:{ours}", options={"backend": backend}, unavailable=reason)
        for backend, reason in backend_status().items()
    ]
    if kernel == "lif":
        found += [
            _peer("snntorch", "snntorch_loop:Neurons", "snntorch"),
            _peer("spikingjelly", "spikingjelly_multistep:Neurons", "spikingjelly"),
        ]
        return {entry.label: entry for entry in found}
    found += [
        _peer("snntorch-masked", "snntorch_loop:MaskedLoop", "snntorch"),
        _peer("snntorch-dense", "snntorch_loop:DenseLoop", "snntorch"),
        _peer("spikingjelly-dense", "spikingjelly_multistep:MultiStep", "spikingjelly"),
        _peer("dense-lif", "dense_lif:DenseLIF"),
    ]
    found += [replace(entry, label=f"{entry.label}-bf16", precision="bf16") for entry in found]
    return {entry.label: entry for entry in found}


def _peer(label: str, target: str, package: str | None = None) -> Entry:
    absent = package is not None and importlib.util.find_spec(package) is None
    reason = f"{package} is not installed (pip install {package})" if absent else None
    return Entry(label, f"benchmarks.peers.{target}", unavailable=reason)


def choose(kernel: str, labels: str | None) -> list[Entry]:
    """The contenders named in a comma-separated list; by default everyone in float32, our kernels in bfloat16 too.

    Raises:
        ValueError: for a name that is none.
    """
    known = entries(kernel)
    if labels is None:
        native = [f"g2g-{backend}-bf16" for backend in available_backends() if backend != "torch"]
        return [entry for entry in known.values() if entry.precision == "fp32" or entry.label in native]
    names = [name.strip() for name in labels.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"contender {name!r} is unknown; --kernel {kernel} has {', '.join(known)}")
    return [known[name] for name in names]
