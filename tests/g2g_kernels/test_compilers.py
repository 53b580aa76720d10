"""The CPU kernels as other compilers make them: clang's, and those of another processor's.

Unoptimised, as that compiles in a fifth of the time.
"""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT


def build(library, compiler):
    program = (
        "import sys; from pathlib import Path; import setup; setup.build_library(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    environment = {**os.environ, "CXX": compiler, "G2G_CXXFLAGS": "-O0"}
    command = [sys.executable, "-c", program, library, library.parent]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_the_parity_tests_pass_on_what_clang_makes(tmp_path):
    library = build(tmp_path / "libg2g_cpu.so", "clang++")
    environment = {**os.environ, "G2G_CPU_LIBRARY": str(library)}
    # opcheck and the compiler test PyTorch's side of the operators
    chosen = ("tests/g2g_kernels/test_cpu_backend.py", "-k", "not opcheck and not full_graph")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="aarch64-linux-gnu-g++ is not installed")
def test_the_library_of_another_processor_links(tmp_path):
    library = build(tmp_path / "libg2g_cpu.so", "aarch64-linux-gnu-g++")
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
