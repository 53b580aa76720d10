"""The CPU kernels as the cross compiler of another processor makes them; those of clang are in test_cpu_backend."""

import shutil

import pytest
from compiled_kernels import build


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="aarch64-linux-gnu-g++ is not installed")
def test_the_library_of_another_processor_links(tmp_path):
    library = build(tmp_path / "libg2g_cpu.so", "aarch64-linux-gnu-g++")
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64
