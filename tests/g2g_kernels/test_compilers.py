"""When the CPU kernels are compiled; those of clang: ``tests/clang.sh``; of another processor: test_packaging.py."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from setup import INSTRUCTION_SETS, PLAIN, SOURCES, build_library

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
    for name in (*PLAIN, "kernels"):
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

    every = len(PLAIN) + len({"baseline"} & set(INSTRUCTION_SETS)) + 2  # the note, and the link
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


@pytest.mark.ci
@pytest.mark.parametrize("variable", ["CXX", "G2G_CXXFLAGS"])
def test_a_quotation_that_does_not_end_costs_the_kernels_and_not_the_installation(tmp_path, variable):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "scratch"]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, variable: '"x'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "were not built and will not be available (No closing quotation)" in done.stderr
