"""Builds the compiled CPU kernels, and says which packages there are (everything else is in pyproject.toml).

One shared library with a C interface, loaded by ctypes: it needs neither PyTorch nor Python headers. The kernels are
compiled once for each instruction set and chosen at run time. Without a C++ compiler, or with ``G2G_BUILD_CPU=0``, the
package installs without them and runs on its other backends.

A library says what it was made from: the SHA-256 of the sources, the commands and the compiler's version. Where the
target already says the same, nothing is compiled; ``build_ext --force`` compiles in any case.
"""

import contextlib
import hashlib
import itertools
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("g2g_kernels/csrc")
LIBRARY = Path("g2g_kernels/cpu/libg2g_cpu.so")
PLAIN = ("api", "lists", "plan", "pool")  # compiled once, for any CPU
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi2"],
}


class BuildKernels(build_ext):
    """Compiles ``csrc`` into one shared library; a failure is a note, not an error."""

    def run(self) -> None:
        target = LIBRARY if self.inplace else Path(self.build_lib) / LIBRARY
        if not self.inplace:
            target.unlink(missing_ok=True)  # left by an earlier build
        if os.environ.get("G2G_BUILD_CPU", "1") == "0":
            print("g2g: G2G_BUILD_CPU=0, installing without the compiled CPU kernels", file=sys.stderr)
            return
        try:
            build_library(target, Path(self.build_temp), self.force)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", None) or ""
            print(
                f"g2g: NOTE: the compiled CPU kernels were not built and will not be available ({error}).\n{output}"
                "g2g: install a C++17 compiler (or set CXX) and reinstall to get them.",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / LIBRARY
        return [str(target)] if target.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of its platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        if platform_tag == f"linux_{platform.machine()}" and os.environ.get("G2G_BUILD_CPU", "1") != "0":
            with contextlib.suppress(OSError, ValueError):  # no compiler, no library
                machine = _machine(shlex.split(os.environ.get("CXX", "c++"))).partition("-")[0]
                if machine in ("x86_64", "aarch64"):  # a cross compiler's
                    platform_tag = f"linux_{machine}"
        return "py3", "none", platform_tag


def build_library(target: Path, scratch: Path, force: bool | None = False) -> None:
    """Compiles and links the library, unless the target was made from the same and ``force`` is not given.

    Raises OSError without a compiler, ValueError for a quotation in ``CXX`` or ``G2G_CXXFLAGS`` that does not end, and
    CalledProcessError if the compiler fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
    flags += shlex.split(os.environ.get("G2G_CXXFLAGS", ""))
    x86 = _machine(compiler).startswith(("x86_64", "amd64"))
    objects = {source: (SOURCES / f"{source}.cpp", ["-DG2G_X86"] if x86 else []) for source in PLAIN}
    for name, options in INSTRUCTION_SETS.items():
        if x86 or name == "baseline":
            objects[f"kernels-{name}"] = (SOURCES / "kernels.cpp", [f"-DG2G_ISA={name}", *options])

    made_from = hashlib.sha256(repr((compiler, flags, objects, _answer(compiler, "--version"))).encode())
    for file in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        made_from.update(file.name.encode() + file.read_bytes())
    note = f"made from {made_from.hexdigest()}"
    if not force and target.exists() and note.encode() in target.read_bytes():
        print(f"g2g: {target} is up to date", file=sys.stderr)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    objects["note"] = (scratch / "note.cpp", [])
    objects["note"][0].write_text(
        f'extern "C" __attribute__((visibility("default"))) char g2g_made_from[];\nchar g2g_made_from[] = "{note}";\n'
    )

    def run(command: list[str], number: int) -> None:
        text = f"Compiling the CPU kernels, 1 to 4 minutes: pass {number} of {len(commands) + 1}\n"
        sys.stderr.write(text)  # whole lines, from several threads
        subprocess.run(command, check=True, capture_output=True, text=True)

    commands = [
        [*compiler, *flags, *options, "-c", str(source), "-o", str(scratch / f"{name}.o")]
        for name, (source, options) in objects.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        # those that take longest first; raises what a job has raised
        list(workers.map(run, reversed(commands), itertools.count(1)))
    link = [*compiler, *flags, "-shared", "-o", str(target), *(str(scratch / f"{name}.o") for name in objects)]
    run(link, len(commands) + 1)


def _machine(compiler: list[str]) -> str:
    """The machine that ``compiler`` makes code for, which a cross compiler does not run on."""
    return (_answer(compiler, "-dumpmachine") or platform.machine()).lower()


def _answer(compiler: list[str], question: str) -> str:
    """What ``compiler`` says of itself."""
    answer = subprocess.run([*compiler, question], capture_output=True, text=True)
    return answer.stdout if answer.returncode == 0 else ""


if __name__ == "__main__":
    setup(
        # under the name benchmarks they would be in everyone's way
        packages=[*find_packages(include=["g2g_kernels*", "g2gnet*"]), "g2g_benchmarks", "g2g_benchmarks.peers"],
        package_dir={"g2g_benchmarks": "benchmarks"},
        ext_modules=[Extension("g2g_kernels.cpu.libg2g_cpu", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
