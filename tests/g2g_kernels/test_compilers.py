"""The CPU kernels as the cross compiler of another processor makes them; those of clang: ``tests/clang.sh``."""

import os
import shutil
import subprocess
import sys

import pytest
from compiled_kernels import build
from helpers import ROOT

pytestmark = pytest.mark.ci


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="aarch64-linux-gnu-g++ is not installed")
def test_the_library_of_another_processor_links(tmp_path):
    library = build(tmp_path / "libg2g_cpu.so", "aarch64-linux-gnu-g++")
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.parametrize("variable", ["CXX", "G2G_CXXFLAGS"])
def test_a_quotation_that_does_not_end_costs_the_kernels_and_not_the_installation(tmp_path, variable):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "scratch"]
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, variable: '"x'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "were not built and will not be available (No closing quotation)" in done.stderr
