"""Builds the compiled CPU kernels and the wheels that hold them, and says which packages there are (everything else is
in pyproject.toml).

One shared library with a C interface, loaded by ctypes: it needs neither PyTorch nor Python headers. The kernels are
compiled once for each instruction set and chosen at run time. The compiler is ``CXX``, else the system's ``c++``, else
zig, which PyPI has as ``ziglang`` and which pip brings where there is no other. zig compiles for other platforms, too:
``python setup.py wheels`` makes the wheels of all :data:`TARGETS`. Without a compiler, or with ``G2G_BUILD_CPU=0``, the
package installs without the kernels and runs on its other backends.

A library says what it was made from: the SHA-256 of the sources, the commands and the compiler's version. Where the
target already says the same, nothing is compiled; ``build_ext --force`` compiles in any case.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

SOURCES = Path("g2g_kernels/csrc")
LIBRARY = Path("g2g_kernels/cpu/libg2g_cpu")  # with the ending of its platform
ENDINGS = {"win": ".dll", "macosx": ".dylib"}
#: the platforms that have wheels, and what zig calls them: the oldest glibc is that of PyTorch's wheels
TARGETS = {
    "manylinux_2_28_x86_64": "x86_64-linux-gnu.2.28",
    "manylinux_2_28_aarch64": "aarch64-linux-gnu.2.28",
    "win_amd64": "x86_64-windows-gnu",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "macosx_11_0_x86_64": "x86_64-macos.11.0",
}
PLAIN = ("api", "lists", "plan", "pool")  # compiled once, for any CPU
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi2"],
}


class BuildKernels(build_ext):
    """Compiles ``csrc`` into one shared library. A failure is a note, with ``G2G_TARGET`` an error."""

    def run(self) -> None:
        target = library() if self.inplace else Path(self.build_lib) / library()
        if not self.inplace:
            target.unlink(missing_ok=True)  # left by an earlier build
        if not kernels_wanted():
            print("g2g: G2G_BUILD_CPU=0, installing without the compiled CPU kernels", file=sys.stderr)
            return
        try:
            build_library(target, Path(self.build_temp), self.force)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            what = f"the compiled CPU kernels were not built and will not be available: {error}"
            if output := getattr(error, "stderr", None):
                what += f"\n{output}g2g: if you did not change the sources, set CXX to a C++17 compiler that takes "
                what += "GCC's options, or `pip install ziglang`"
            if os.environ.get("G2G_TARGET"):
                raise CompileError(what) from error
            print(f"g2g: NOTE: {what}; then reinstall g2g.", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / library()
        return [str(target)] if target.exists() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of its platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = os.environ.get("G2G_TARGET") or super().get_tag()[2]
        if platform_tag == f"linux_{platform.machine()}" and kernels_wanted():
            with contextlib.suppress(OSError, ValueError):  # no compiler, no library
                machine = _machine(compiler()).partition("-")[0]
                if machine in ("x86_64", "aarch64"):  # a cross compiler's
                    platform_tag = f"linux_{machine}"
        return "py3", "none", platform_tag


class Wheels(Command):
    """Builds the wheels of other platforms and of this one, each in a process and a folder of its own."""

    description = "build the wheels of all platforms (needs ziglang, from the extra `wheels`)"
    user_options: ClassVar = [
        ("dist-dir=", "d", "folder of the wheels [default: dist]"),
        ("targets=", "t", "some platforms, separated by commas [default: all five]"),
    ]

    def initialize_options(self) -> None:
        self.dist_dir, self.targets = "dist", ",".join(TARGETS)

    def finalize_options(self) -> None:
        self.targets = self.targets.replace(" ", "").split(",")
        try:
            for target in self.targets:
                zig(target)
        except ValueError as error:
            raise OptionError(str(error)) from error

    def run(self) -> None:
        try:
            os.makedirs(self.dist_dir, exist_ok=True)
            # there, so that a wheel is complete when it gets its place
            scratch_folder = tempfile.TemporaryDirectory(prefix=".", dir=self.dist_dir)
        except OSError as error:
            raise OptionError(f"cannot write to {self.dist_dir} ({error.strerror}); give another --dist-dir") from error
        with scratch_folder as scratch:
            for target in self.targets:
                print(f"g2g: making the wheel of {target}", file=sys.stderr)
                began = time.monotonic()
                folder = Path(scratch, target)
                wheel = ["bdist_wheel", "--bdist-dir", f"{folder}/files", "--dist-dir", f"{folder}/wheel"]
                build = [sys.executable, "-W", "ignore", "setup.py", "-q", "build", "--build-base", folder, *wheel]
                if subprocess.run(build, env={**os.environ, "G2G_TARGET": target, "G2G_BUILD_CPU": "1"}).returncode:
                    raise CompileError(f"there is no wheel of {target}, for the reason above")
                (made,) = Path(folder, "wheel").iterdir()
                place = Path(self.dist_dir, made.name)
                os.replace(made, place)
                what = f"{place}: {place.stat().st_size / 1e6:.2f} MB"
                print(f"g2g: {what} in {time.monotonic() - began:.0f} s", file=sys.stderr)
                shutil.rmtree(folder)


def kernels_wanted() -> bool:
    """Whether the CPU kernels are to be built at all."""
    return os.environ.get("G2G_BUILD_CPU", "1") != "0"


def library() -> Path:
    """Where the library is put, under the name that it has on its platform."""
    name = os.environ.get("G2G_TARGET") or sysconfig.get_platform()
    ending = next((ending for system, ending in ENDINGS.items() if name.startswith(system)), ".so")
    return LIBRARY.with_suffix(ending)


def compiler() -> list[str]:
    """The command that compiles. Raises ValueError if there is none, for a quotation in ``CXX`` that does not end, and
    for compilers that cannot compile the kernels: Microsoft's, and GCC for Windows."""
    if target := os.environ.get("G2G_TARGET"):
        return zig(target)
    found = own_compiler()
    if found is None:
        platform_name = this_platform()
        if platform_name and importlib.util.find_spec("ziglang"):
            return zig(platform_name)
        install = "`pip install ziglang`, or " if platform_name else ""
        raise ValueError(f"no C++ compiler was found; {install}set CXX to one that takes GCC's options")
    remedy = "unset CXX and `pip install ziglang`"
    if found and PureWindowsPath(found[0]).stem.lower() in ("cl", "clang-cl"):
        raise ValueError(f"CXX={shlex.join(found)} is MSVC, which lacks the vector types of GCC and clang; {remedy}")
    if "mingw" in _machine(found):
        raise ValueError(f"{shlex.join(found)} is GCC for Windows, which misplaces vectors on the stack; {remedy}")
    return found


def own_compiler() -> list[str] | None:
    """The compiler that ``CXX`` names, or the system's if it answers; None if there is none but zig."""
    if given := _words(os.environ.get("CXX", "")):
        return given
    with contextlib.suppress(OSError):
        if sys.platform != "win32" and _answer(
            ["c++"], "-dumpmachine"
        ):  # Apple's only names a remedy until it is installed
            return ["c++"]
    return None


def this_platform() -> str | None:
    """The name in :data:`TARGETS` of the machine that builds; None for others."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    system = {"win32": "windows", "darwin": "macos"}.get(sys.platform, sys.platform)
    return next((name for name, zigs in TARGETS.items() if zigs.startswith(f"{machine}-{system}")), None)


def zig(target: str) -> list[str]:
    """The command of zig's compiler for a platform. Raises ValueError if it is not one of :data:`TARGETS`, or without
    zig."""
    if target not in TARGETS:
        raise ValueError(f"there are no wheels of {target!r}; choose from {', '.join(TARGETS)}")
    if importlib.util.find_spec("ziglang") is None:
        raise ValueError("zig is missing; `pip install ziglang`")
    return [sys.executable, "-m", "ziglang", "c++", "-target", TARGETS[target]]


def build_library(target: Path, scratch: Path, force: bool | None = False) -> None:
    """Compiles and links the library, unless the target was made from the same and ``force`` is not given.

    Raises OSError if the compiler cannot be started, ValueError as :func:`compiler` does and for a quotation in
    ``G2G_CXXFLAGS`` that does not end, and CalledProcessError if the compiler fails.
    """
    command = compiler()
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
    flags += _words(os.environ.get("G2G_CXXFLAGS", ""))
    x86 = _machine(command).startswith(("x86_64", "amd64"))
    objects = {source: (SOURCES / f"{source}.cpp", ["-DG2G_X86"] if x86 else []) for source in PLAIN}
    for name, options in INSTRUCTION_SETS.items():
        if x86 or name == "baseline":
            of_doubles = ["-DG2G_DOUBLE", f"-DG2G_ISA={name}_doubles"]
            objects[f"doubles-{name}"] = (SOURCES / "networks.cpp", [*of_doubles, *options])
            for source in ("networks", "kernels"):
                objects[f"{source}-{name}"] = (SOURCES / f"{source}.cpp", [f"-DG2G_ISA={name}", *options])

    made_from = hashlib.sha256(repr((command, flags, objects, _version(command))).encode())
    for file in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        made_from.update(file.name.encode() + file.read_bytes())
    note = f"made from {made_from.hexdigest()}"
    if not force and target.exists() and note.encode() in target.read_bytes():
        print(f"g2g: {target} is up to date", file=sys.stderr)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    objects["note"] = (scratch / "note.cpp", [f"-I{SOURCES}"])
    objects["note"][0].write_text(
        f'#include "interface.h"\nG2G_EXPORT char g2g_made_from[];\nchar g2g_made_from[] = "{note}";\n'
    )

    def run(command: list[str], number: int) -> None:
        text = f"Compiling the CPU kernels, 1 to 4 minutes: pass {number} of {len(commands) + 1}\n"
        sys.stderr.write(text)  # whole lines, from several threads
        subprocess.run(command, check=True, capture_output=True, text=True)

    commands = [
        [*command, *flags, *options, "-c", str(source), "-o", str(scratch / f"{name}.o")]
        for name, (source, options) in objects.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        # those that take longest first; raises what a job has raised
        list(workers.map(run, reversed(commands), itertools.count(1)))
    linked = scratch / target.name  # beside it, linkers for Windows put files that nobody needs
    link = [*command, *flags, "-shared", "-o", str(linked)]
    if "ziglang" in command:
        link.append("-s")  # zig compiles with debug information
        if "macos" in command[-1]:
            link.append(f"-Wl,-install_name,@rpath/{target.name}")
    run([*link, *(str(scratch / f"{name}.o") for name in objects)], len(commands) + 1)
    fresh = shutil.copy2(linked, target.with_suffix(".new"))
    os.replace(fresh, target)  # a new file: processes that have loaded the old one keep it


def _words(text: str) -> list[str]:
    """The words of a command; on Windows a backslash is part of a path. Raises ValueError for an unclosed quotation."""
    return shlex.split(text.replace("\\", "/") if sys.platform == "win32" else text)


def _machine(command: list[str]) -> str:
    """The machine that a compiler makes code for, which a cross compiler does not run on."""
    if "ziglang" in command:
        return command[-1]
    return (_answer(command, "-dumpmachine") or platform.machine()).lower()


def _version(command: list[str]) -> str:
    """The version of a compiler; zig answers only without a platform."""
    return importlib.metadata.version("ziglang") if "ziglang" in command else _answer(command, "--version")


def _answer(command: list[str], question: str) -> str:
    """What a compiler says of itself."""
    answer = subprocess.run([*command, question], capture_output=True, text=True)
    return answer.stdout if answer.returncode == 0 else ""


def zig_to_install() -> list[str]:
    """What pip brings for the build: zig, where there is no compiler. A direct call of this file installs nothing."""
    if "setuptools.build_meta" not in sys.modules or not kernels_wanted():
        return []
    with contextlib.suppress(ValueError):  # of CXX: the build says so
        if os.environ.get("G2G_TARGET") or (own_compiler() is None and this_platform()):
            return ["ziglang>=0.17"]
    return []


if __name__ == "__main__":
    setup(
        # under the name benchmarks they would be in everyone's way
        packages=[*find_packages(include=["g2g_kernels*", "g2gnet*"]), "g2g_benchmarks", "g2g_benchmarks.peers"],
        package_dir={"g2g_benchmarks": "benchmarks"},
        ext_modules=[Extension("g2g_kernels.cpu.libg2g_cpu", sources=[])],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel, "wheels": Wheels},
        setup_requires=zig_to_install(),
    )
