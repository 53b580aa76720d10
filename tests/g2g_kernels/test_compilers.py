"""When the CPU kernels are compiled; those of clang: ``tests/clang.sh``; of another processor: test_packaging.py."""

import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT
from setuptools import Distribution
from setuptools.errors import CompileError, OptionError

import setup
from g2g_kernels.cpu import library
from setup import INSTRUCTION_SETS, PLAIN, SOURCES, TARGETS, build_library

#: "compiles" by copying and notes each call
COMPILER = """#!/bin/sh
case "$*" in -dumpmachine) echo any; exit ;; --version) cat version; exit ;; esac
echo "$*" >>calls
while [ $# -gt 0 ]; do
    case "$1" in -o) out=$2; shift ;; -c) from=$2; shift ;; *.o) from="$from $1" ;; esac
    shift
done
cat $from >"$out"
"""


@pytest.mark.skipif(os.name != "posix", reason="the compiler is a shell script")
def test_nothing_is_compiled_where_the_library_was_made_from_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    SOURCES.mkdir(parents=True)
    for name in (*PLAIN, "networks", "kernels"):
        (SOURCES / f"{name}.cpp").write_text(name)
    (SOURCES / "vec.h").write_text("1")
    compiler, version, calls, target = (tmp_path / name for name in ("compiler", "version", "calls", "made/lib.so"))
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    version.write_text("1")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("G2G_CXXFLAGS", raising=False)

    def compiles(force=False):
        calls.write_text("")
        build_library(target, tmp_path / "scratch", force)
        return len(calls.read_text().splitlines())

    every = len(PLAIN) + 3 * len({"baseline"} & set(INSTRUCTION_SETS)) + 2  # the note, and the link
    assert compiles() == every
    passes = [f"Compiling the CPU kernels, 1 to 4 minutes: pass {number} of {every}" for number in range(1, every + 1)]
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(passes)
    assert target.read_text().startswith(PLAIN[0])
    assert compiles() == 0
    assert compiles(force=True) == every
    for change in (
        lambda: (SOURCES / "vec.h").write_text("2"),
        lambda: version.write_text("2"),
        lambda: monkeypatch.setenv("G2G_CXXFLAGS", "-O0"),
        lambda: target.unlink(),
        lambda: target.write_text("another library"),
    ):
        change()
        assert compiles() == every
        assert compiles() == 0


ZIG = [sys.executable, "-m", "ziglang", "c++", "-target"]
WINDOWS, MAC, LINUX = ("win32", "AMD64"), ("darwin", "arm64"), ("linux", "x86_64")


@pytest.mark.parametrize(
    ("system", "given", "found"),
    [
        (LINUX, {}, ["c++"]),
        (LINUX, {"CXX": "ccache 'my g++'"}, ["ccache", "my g++"]),
        (LINUX, {"G2G_TARGET": "win_amd64", "CXX": "g++"}, [*ZIG, "x86_64-windows-gnu"]),
        (("linux", "riscv64"), {"c++": ""}, "^no C\\+\\+ compiler was found; set CXX to"),
        (LINUX, {"c++": "", "ziglang": None}, "compiler was found; `pip install ziglang`, or set CXX to"),
        (LINUX, {"G2G_TARGET": "win_amd64", "ziglang": None}, "^zig is missing; `pip install ziglang`$"),
        (LINUX, {"G2G_TARGET": "win32"}, "^there are no wheels of 'win32'; choose from manylinux_2_28_x86_64, "),
        (MAC, {"c++": ""}, [*ZIG, "aarch64-macos.11.0"]),  # until Apple's tools are installed
        (WINDOWS, {}, [*ZIG, "x86_64-windows-gnu"]),  # c++ may be GCC
        (WINDOWS, {"CXX": r'"C:\my tools\clang++.exe" -m64'}, ["C:/my tools/clang++.exe", "-m64"]),
        (WINDOWS, {"CXX": "cl"}, "^CXX=cl is MSVC, .* unset CXX and `pip install ziglang`"),
        (WINDOWS, {"CXX": r"C:\MSVC\clang-cl.exe /O2"}, "is MSVC, which lacks"),
        (
            WINDOWS,
            {"CXX": "g++", "machine": "x86_64-w64-mingw32"},
            "^g\\+\\+ is GCC for Windows, which misplaces vectors",
        ),
    ],
)
def test_the_compiler_is_the_one_given_the_systems_or_zig(monkeypatch, system, given, found):
    for name in ("CXX", "G2G_TARGET"):
        monkeypatch.delenv(name, raising=False)
        if name in given:
            monkeypatch.setenv(name, given[name])
    monkeypatch.setattr(sys, "platform", system[0])
    monkeypatch.setattr(platform, "machine", lambda: system[1])
    monkeypatch.setattr(setup, "_answer", lambda command, question: given.get(command[0], given.get("machine", "some")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: given.get(name, name))
    monkeypatch.setitem(sys.modules, "setuptools.build_meta", None)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            setup.compiler()
    else:
        assert setup.compiler() == found
    zig = isinstance(found, list) and found[:-1] == ZIG
    assert setup.zig_to_install() == (["ziglang>=0.17"] if zig or "ziglang" in given or "G2G_TARGET" in given else [])
    monkeypatch.setenv("G2G_BUILD_CPU", "0")
    assert setup.zig_to_install() == []


def test_a_wheel_is_complete_or_absent_and_what_cannot_be_made_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    folder, built = tmp_path / "dist", []

    def build(command, env):
        wheel = Path(command[-1], env["G2G_TARGET"])
        wheel.parent.mkdir(parents=True)
        wheel.write_text("half a wheel")
        built.append(wheel.name)
        if wheel.name == "macosx_11_0_arm64":
            raise KeyboardInterrupt
        wheel.write_text("a wheel")
        return SimpleNamespace(returncode=wheel.name == "macosx_11_0_x86_64")

    monkeypatch.setattr(setup.subprocess, "run", build)

    def wheels(targets):
        command = setup.Wheels(Distribution())
        command.targets, command.dist_dir = targets, str(folder)
        command.finalize_options()
        command.run()

    for other, ends in (("macosx_11_0_arm64", KeyboardInterrupt), ("macosx_11_0_x86_64", CompileError)):
        with pytest.raises(ends):
            wheels(f"win_amd64, {other}")
        assert {path.name: path.read_text() for path in folder.iterdir()} == {"win_amd64": "a wheel"}
    del built[:]
    folder = tmp_path / "dist" / "win_amd64"
    for targets, problem in (
        ("win_amd64", r"cannot write to .*win_amd64 \(.*\); give another --dist-dir"),
        ("win_amd64,windows", "there are no wheels of 'windows'; choose from manylinux_2_28_x86_64, "),
        ("", "there are no wheels of ''"),
    ):
        with pytest.raises(OptionError, match=problem):
            wheels(targets)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"^zig is missing; `pip install ziglang`$"):
        wheels("win_amd64")
    assert not built


def test_each_platform_has_its_own_name_of_the_library(monkeypatch):
    """The one under which it is loaded there."""
    endings = [setup.library().suffix for name in TARGETS if not monkeypatch.setenv("G2G_TARGET", name)]
    assert endings == [".so", ".so", ".dll", ".dylib", ".dylib"]
    monkeypatch.delenv("G2G_TARGET")
    for system, name in {"win32": "win-amd64", "darwin": "macosx-11.0-arm64", "linux": "linux-riscv64"}.items():
        monkeypatch.setattr(sysconfig, "get_platform", lambda name=name: name)
        monkeypatch.setattr(sys, "platform", system)
        assert setup.library().name == runpy.run_path(library.__file__)["FILE"]


@pytest.mark.ci
@pytest.mark.parametrize("variable", ["CXX", "G2G_CXXFLAGS"])
def test_a_quotation_that_does_not_end_costs_the_kernels_and_not_the_installation(tmp_path, variable):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "scratch"]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, variable: '"x'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "were not built and will not be available: No closing quotation" in done.stderr
