"""Where Triton kernels can run, and what users are told where they cannot."""

import ast
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
import types

import pytest
import torch
from helpers import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from g2g_kernels import BackendError, dispatch, lif
from g2g_kernels.triton import runtime


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Describes a machine: a GPU at hand, Triton installed, a CUDA build of PyTorch, unless changed."""

    def describe(
        installed=True, platform="linux", cuda="12.8", hip=None, capabilities=((9, 0),), triton="3.3.1",
        compilers=("gcc",), named=None, include=tmp_path, cache=tmp_path / "new" / "cache",
    ) -> None:  # fmt: skip
        monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=triton))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(include))
        (tmp_path / "Python.h").touch()
        monkeypatch.setattr(os, "access", lambda path, mode: "proc" not in str(path))  # the tests may run as root
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
        monkeypatch.delenv("CC", raising=False)
        if named:
            monkeypatch.setenv("CC", named)

    def forget() -> None:
        runtime._unavailable.cache_clear()
        runtime._old_device.cache_clear()

    forget()
    yield describe
    forget()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"installed": False}, "the package triton is not installed (pip install triton)"),
        ({"installed": False, "platform": "win32"}, "the package triton is not installed (it exists for Linux)"),
        ({"cuda": None, "capabilities": ()}, "is built for the CPU only (install a CUDA or ROCm build: pytorch.org)"),
        ({"capabilities": ()}, "finds no CUDA or ROCm device (see nvidia-smi or rocm-smi for the driver)"),
        ({"capabilities": ((7, 5),)}, "need a GPU of compute capability 8.0 or more, cuda:0 has 7.5"),
        ({"triton": "3.2.0"}, "the kernels need Triton 3.3 or newer, not 3.2.0 (it comes with PyTorch 2.7 and newer)"),
        ({"triton": "3.10.0+git1234"}, None),
        ({}, None),
        ({"capabilities": ((7, 5), (8, 6))}, None),
        ({"compilers": ()}, "a C compiler for its launcher, and there is none (apt install gcc, or name one by CC=…)"),
        ({"compilers": ("clang",)}, None),
        ({"compilers": (), "named": "/opt/cc"}, None),
        ({"include": "/nowhere"}, "for its launcher, and there is no /nowhere/Python.h (apt install python3-dev)"),
        ({"cache": "/proc/of/triton"}, "what it compiles to /proc/of/triton (name a folder by TRITON_CACHE_DIR=…)"),
        ({"cuda": None, "hip": "6.2", "capabilities": ((9, 4),)}, None),
    ],
    ids=str,
)
def test_the_reason_says_what_to_do(machine, change, reason):
    machine(**change)
    answer = runtime._unavailable(interpreter=False)
    assert answer is None if reason is None else answer.endswith(reason)


def test_the_interpreter_needs_the_same_version_and_no_gpu(machine):
    machine(cuda=None, capabilities=())
    assert runtime._unavailable(interpreter=True) is None
    runtime._unavailable.cache_clear()
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


def test_tensors_on_a_gpu_that_is_too_old_are_refused_beside_a_newer_one(machine, monkeypatch):
    machine(capabilities=((7, 5), (8, 6)))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("G2G_CHECK", "0")  # the mocked machine has no driver to name its card
    # PyTorch 2.8 asks for the driver there
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None, raising=False)
    assert runtime._unavailable(interpreter=False) is None
    with FakeTensorMode():
        older, newer = (torch.empty(3, device=f"cuda:{index}") for index in range(2))
    assert runtime.refuses("neurons", newer) is None
    reason = "the kernels need a GPU of compute capability 8.0 or more, cuda:0 has 7.5"
    assert runtime.refuses("neurons", older) == runtime.refuses("neurons", newer, None, older) == reason


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older PyTorch")
@pytest.mark.parametrize(
    ("old", "parent", "own", "expected"),
    [
        (None, "none", "none", "ieee"),
        (None, "none", "tf32", "tf32"),
        (None, "tf32", "none", "tf32"),
        (None, "tf32", "ieee", "ieee"),
        (None, "ieee", "tf32", "tf32"),
        *(("highest", None, None, "ieee"), ("high", None, None, "tf32"), ("medium", None, None, "tf32")),
    ],
)
def test_products_follow_the_settings_of_cuda_s_products_new_and_old(old, parent, own, expected):
    def give(parent, own):
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = parent, own

    give("none", "none")  # as at the start of a process, and again at the end
    try:
        torch.set_float32_matmul_precision(old) if old else give(parent, own)
        assert runtime.input_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
        give("none", "none")


def test_one_line_says_that_kernels_are_compiled(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="g2g_kernels")
    runtime._say_what_takes_long.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    launched = []
    for size in (1, 2):
        runtime.launch({(1,): lambda x, size, **_: launched.append(size)}, (1,), x=x, size=size)
    assert launched == [1, 2]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Triton compiles each kernel")


def test_no_function_of_a_kernel_returns_none():
    """Triton 3.3 to 3.6 cannot compile one; .ci/run compiles the default step with the oldest."""
    kernels = 0
    for path in (ROOT / "g2g_kernels").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = map(ast.unparse, getattr(function, "decorator_list", ()))
            if any(each.startswith("triton.jit") for each in decorators):
                kernels += 1
                returns = [ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Return)]
                assert "return None" not in returns, (path, function.name)
    assert kernels > 30
