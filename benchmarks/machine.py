"""The machine that a number was measured on: its name and versions, the memory in use, its own rates."""

import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from g2gnet.base.memory import available

PACKAGES = ("torch", "numpy", "snntorch", "spikingjelly", "jax", "sparselab", "triton")


@contextlib.contextmanager
def pytorch_threads(number: int) -> Iterator[None]:
    """Inside, PyTorch computes on ``number`` threads, and so does a backend that follows it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(device: torch.device) -> dict[str, Any]:
    """The description of the machine in a record, so that others can judge or repeat it."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round((available() or 0) / 1e9, 1),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit that this file is of, marked ``+changes`` where the working tree differs from it.

    None without git, and if this package is installed: a repository around it is a different one.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", *arguments), cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _line_of(file: str, begin: str) -> str:
    """What follows in the line of a file that begins so; raises OSError or StopIteration without it."""
    lines = Path(file).read_text().splitlines()
    return next(line.removeprefix(begin).strip() for line in lines if line.startswith(begin))


def _cpu_name() -> str:
    try:
        return _line_of("/proc/cpuinfo", "model name").removeprefix(":").strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class PeakMemory:
    """The most memory this process (or its CUDA device) held at once, above what it held when this was made.

    On Linux the kernel's high-water mark is first reset to the current resident size, so neither imports nor the parent
    process count (``ru_maxrss`` is inherited through fork and exec). Elsewhere ``ru_maxrss`` is used; on Windows
    nothing is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()
        self.before = self._mark()

    def above(self) -> int:
        """Bytes."""
        return self._mark() - self.before

    def restart(self) -> None:
        """Resets the peak; memory held now still counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # where it fails the mark stays, and less is counted
                Path("/proc/self/clear_refs").write_text("5")

    def _mark(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            return int(_line_of("/proc/self/status", "VmHWM:").split()[0]) * 1024
        except (OSError, StopIteration):
            if sys.platform == "win32":
                return 0
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_lazy_parts(device: torch.device) -> None:
    """Runs a tiny training step, so that what PyTorch loads on first use counts as imports."""
    layer = torch.nn.Linear(64, 64).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(64, 64, device=device)).sum().backward()
    optimizer.step()
    synchronize(device)


def synchronize(device: torch.device) -> None:
    """Waits until ``device`` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that ``work`` takes on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def busy_cores(seconds: float = 0.2) -> float:
    """The number of busy cores during the next ``seconds``, while the caller sleeps; NaN if unknown."""

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, iowait, irq, softirq, steal, *_ = map(int, _line_of("/proc/stat", "cpu ").split())
        return user + nice + system + irq + softirq + steal, idle + iowait

    try:
        busy, idle = ticks()
        time.sleep(seconds)
        busy, idle = (after - before for after, before in zip(ticks(), (busy, idle), strict=True))
    except (OSError, StopIteration, ValueError):
        return math.nan
    return (os.cpu_count() or 1) * busy / max(1, busy + idle)


class Limits:
    """The machine's own rates, measured along with everything else: call :meth:`measure` now and then.

    ``matrix_flop_per_s``: of a 2048 × 2048 × 2048 product in float32 (TF32 off, as PyTorch has it);
    ``copy_bytes_per_s``: read and written by a copy of 256 MiB into existing memory. Both estimate what the machine can
    do, so the best sample counts. Also measured: the number of cores that other programs kept busy while ours waited.
    """

    #: of the factors, and of the copied memory in float32 numbers
    side, size = 2048, 64 << 20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        factors = torch.rand(2, self.side, self.side, device=device)
        product, (source, target) = torch.empty_like(factors[0]), torch.ones(2, self.size, device=device)
        self._works = {
            "matrix_flop_per_s": (2 * self.side**3, lambda: torch.mm(*factors, out=product)),
            "copy_bytes_per_s": (2 * 4 * self.size, lambda: target.copy_(source)),
        }
        self._seconds: dict[str, list[float]] = {name: [] for name in self._works}
        self._busy: list[float] = []
        self.measure()

    def measure(self) -> None:
        """Adds one sample of each."""
        self._busy.append(busy_cores())
        for name, (_, work) in self._works.items():
            self._seconds[name].append(timed(work, self.device))

    def rates(self) -> dict[str, float]:
        """``matrix_flop_per_s``, ``copy_bytes_per_s`` and, if known, ``others_busy_cores``."""
        busy = statistics.mean(self._busy)
        rates = {name: work / min(self._seconds[name]) for name, (work, _) in self._works.items()}
        return rates if math.isnan(busy) else {**rates, "others_busy_cores": busy}
