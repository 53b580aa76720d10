"""Checks Triton kernels where they are first used: they are the default on GPUs, and nobody has run them on most cards.

Before the first call of an operator on a kind of card, with these versions and sources, the doctor's comparison with
plain PyTorch runs. What it finds is kept in the user's cache folder (``$XDG_CACHE_HOME/g2g/checks``); processes that
start together each check, and each finding replaces the file as a whole. An operator whose kernels fail is refused, as
any call that a backend cannot serve, and a warning says what to report. ``G2G_CHECK=0`` skips all this; ``G2G_CHECK=1``
checks in Triton's interpreter, too.

While calls are traced, or captured into a CUDA graph, no check runs, since its own launches would be recorded and its
copies to the host would end the capture: kernels that nothing is known of are used, and the next call outside checks
them. A finding that is known counts there, too.
"""

import functools
import hashlib
import importlib
import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from g2g_kernels.tracing import constant_when_traced, is_traced
from g2g_kernels.triton import runtime

logger = logging.getLogger("g2g_kernels")

#: by operator and kind of card: what is wrong with its kernels, "" if nothing
_found: dict[tuple[str, str], str] = {}


@constant_when_traced
def refuses(operator: str, index: int | None) -> str | None:
    """Why the kernels of an operator are not used on the GPU of that number (None: in the interpreter), or None."""
    wanted = os.environ.get("G2G_CHECK", "" if index is None else "1")
    if wanted in ("", "0"):
        return None
    key = operator, card(index)
    found = _found.get(key)
    if found is None:
        found = _read(key)
        if found is None:
            if _is_recorded(index):
                return None
            found = _check(key, index)
        elif found:
            _warn(key, found)
        _found[key] = found
    return f"its kernels failed the check at their first use ({found}); G2G_CHECK=0 skips it" if found else None


def _is_recorded(index: int | None) -> bool:
    """Whether calls are traced, on fake tensors, or captured: nothing else may run on the device."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or torch._guards.TracingContext.try_get() is not None
    captured = index is not None and torch.cuda.is_current_stream_capturing()
    return modes or captured or is_traced()


@functools.cache
def card(index: int | None) -> str:
    """The kind of card, with the versions of what compiles for it and runs there."""
    versions = f"PyTorch {torch.__version__}, Triton {importlib.import_module('triton').__version__}"
    if index is None:
        return f"Triton's interpreter, {versions}"
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name(index)} ({capability}), driver {driver}, {toolkit}, {versions}"


@functools.cache
def sources() -> str:
    """A hash of the library's Python, kernels and check included."""
    every = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        every.update(file.read_bytes())
    return every.hexdigest()


def _kept(key: tuple[str, str]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "g2g", "checks")
    return cache / f"{hashlib.sha256('|'.join((*key, sources())).encode()).hexdigest()[:24]}.json"


def _read(key: tuple[str, str]) -> str | None:
    """What an earlier process found, or None."""
    try:
        kept: Any = json.loads(_kept(key).read_text(encoding="utf-8"))
        if kept["operator"] == key[0] and isinstance(kept["found"], str):
            return kept["found"]
        raise ValueError("it says something else")
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:  # RuntimeError: there is no home
        logger.info("What an earlier check of the Triton kernels found cannot be read (%s)", error)
        return None


def _keep(key: tuple[str, str], found: str) -> str:
    """Writes what was found for later processes, whole or not at all; returns where, in words."""
    try:
        path = _kept(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump({"operator": key[0], "card": key[1], "sources": sources(), "found": found}, file)
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:
        return f"this cannot be kept for the next process: {error}"
    return f"kept in {path}"


def _check(key: tuple[str, str], index: int | None) -> str:
    began, found = time.perf_counter(), []

    def compare() -> None:
        from g2g_kernels import doctor  # not before: it takes time

        found.append(doctor.first_finding(key[0], torch.device("cpu" if index is None else f"cuda:{index}")))

    # in a thread of its own, which no mode of the caller reaches: autocast, inference, a default device
    thread = threading.Thread(target=compare, daemon=True)
    thread.start()
    thread.join()
    finding = found[0] if found else "the check itself failed"
    seconds, kept = time.perf_counter() - began, _keep(key, finding)
    logger.info("Triton kernels of %s compared with plain PyTorch on %s in %.1f s; %s", *key, seconds, kept)
    if finding:
        _warn(key, finding)
    return finding


def _warn(key: tuple[str, str], found: str) -> None:
    logger.warning(
        "Triton kernels of %s are not used, because they are wrong on %s: %s. Slower operations take their place. "
        "Please report this line with the output of `python -m g2g_kernels.doctor`",
        *key,
        found,
    )


runtime.first_use = refuses
