"""Where Triton kernels can run, and what users are told where they cannot."""

import importlib.util
import sys
import types

import pytest
import torch

from g2g_kernels import BackendError, dispatch, lif
from g2g_kernels.triton import runtime


@pytest.fixture
def machine(monkeypatch):
    """Describes a machine: a GPU at hand, Triton installed, a CUDA build of PyTorch, unless changed."""

    def describe(
        installed=True, platform="linux", cuda="12.8", hip=None, capabilities=((9, 0),), triton="3.3.1"
    ) -> None:
        monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])

    runtime._unavailable.cache_clear()
    yield describe
    runtime._unavailable.cache_clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"installed": False}, "the package triton is not installed (pip install triton)"),
        ({"installed": False, "platform": "win32"}, "the package triton is not installed (it exists for Linux)"),
        ({"cuda": None, "capabilities": ()}, "is built for the CPU only (install a CUDA or ROCm build: pytorch.org)"),
        ({"capabilities": ()}, "finds no CUDA or ROCm device (see nvidia-smi or rocm-smi for the driver)"),
        ({"capabilities": ((7, 5),)}, "need a GPU of compute capability 8.0 or more, this one has 7.5"),
        (
            {"triton": "3.2.0"},
            "the kernels need Triton 3.3 or newer, not 3.2.0 (it comes with PyTorch 2.7 and newer)",
        ),
        ({"triton": "3.10.0+git1234"}, None),
        ({}, None),
        ({"capabilities": ((7, 5), (8, 6))}, None),
        ({"cuda": None, "hip": "6.2", "capabilities": ((9, 4),)}, None),
    ],
    ids=str,
)
def test_the_reason_says_what_to_do(machine, change, reason):
    machine(**change)
    answer = runtime._unavailable(interpreter=False)
    assert answer is None if reason is None else answer.endswith(reason)


def test_the_interpreter_needs_no_gpu(machine):
    machine(cuda=None, capabilities=())
    assert runtime._unavailable(interpreter=True) is None


def test_the_interpreter_needs_the_same_version(machine):
    machine(triton="3.0.0")
    assert runtime._unavailable(interpreter=True).startswith("the kernels need Triton 3.3 or newer, not 3.0.0")


def test_the_reason_reaches_whoever_asks_for_triton(machine, monkeypatch):
    machine(capabilities=())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"backend 'triton' is unavailable here: PyTorch .* finds no CUDA or ROCm"):
        dispatch.require_backend("triton")
    with pytest.raises(BackendError, match=r"cannot serve this call of neurons: triton: PyTorch .* finds no CUDA or"):
        lif(torch.zeros(3, 2), 0.9, 1.0, backend="triton")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_interpreter_is_asked_for_by_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert runtime.interpreted() is expected
    assert (runtime.only_by_name() is not None) is expected
