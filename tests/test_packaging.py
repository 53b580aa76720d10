"""The source distribution and the wheel: what is in them, and that what they install works far from the repository. No
step asks the network: this environment's setuptools builds, and what g2g depends on is this environment's."""

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import setup
from g2g_kernels.cpu import library
from g2gnet import __version__

NAME = f"g2gnet-{__version__}"
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
SIZES = "--hidden_dim 16 --T 2 --batch_size 16 --dataset fashionmnist-mini"

if not (ROOT / ".git").exists():
    pytest.skip("packages are built from the repository", allow_module_level=True)


def test_every_dependency_names_the_oldest_version_that_is_tested():
    """tests/versions.sh installs these."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    from oldest import oldest

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ["events", "interop", "plots", "tensorboard"]
    listed = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    pinned = dict(line.split("==") for line in oldest(extras))
    assert pinned == dict(name.split(">=") for name in listed)
    assert {"filelock", "numpy", "scikit-learn", "scipy", "torch", "torchvision", "tqdm"} <= set(pinned)


def run(*command, cwd=None, **variables):
    """Standard output of a program that knows nothing of the paths and settings of this one."""
    foreign = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "G2G_BACKEND", "G2G_CASES")
    environment = {name: value for name, value in os.environ.items() if name not in foreign} | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, **variables):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **variables)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the files that git knows, for what is built leaves traces."""
    folder = tmp_path_factory.mktemp("repository")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def source(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=repository)
    return folder / f"{NAME}.tar.gz"


#: a compiler that has the true one find all that a source includes, and links this environment's library
COMPILER = """
import pathlib, shutil, subprocess, sys
arguments = sys.argv[1:]
if "-dumpmachine" in arguments:
    sys.exit(subprocess.call([{compiler!r}, *arguments]))
output = pathlib.Path(arguments.pop(arguments.index("-o") + 1))
arguments.remove("-o")
if "-c" in arguments:
    subprocess.run([{compiler!r}, "-M", *arguments], check=True, stdout=output.open("w"))
else:
    assert all(".cpp" in pathlib.Path(name).read_text() for name in arguments if name.endswith(".o"))
    shutil.copy({library!r}, output)
"""


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Built from the source distribution. What compiles is this environment's installation, not this test."""
    folder, variables = tmp_path_factory.mktemp("wheel"), {"G2G_CXXFLAGS": "-O0"}
    if library.unavailable() is None:
        script = tmp_path_factory.mktemp("compiler") / "compiler.py"
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        script.write_text(COMPILER.format(compiler=compiler, library=library.library()._name))
        variables["CXX"] = shlex.join([sys.executable, str(script)])
    pip("wheel", *OFFLINE, "--wheel-dir", folder, source, **variables)
    (file,) = folder.iterdir()
    return file


def install(folder, *what, **variables):
    """A virtual environment with g2g installed, beside all that this environment has; returns its programs' folder."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    Path(run(programs / "python", "-c", query).strip(), "others.pth").write_text("\n".join(site.getsitepackages()))
    pip("--python", programs / "python", "install", "--ignore-installed", *OFFLINE, *what, **variables)
    return programs


def where(programs, cwd):
    """In which folder each package is found, None where there is none."""
    query = """
import json, importlib.util, pathlib
found = {name: importlib.util.find_spec(name) for name in "g2gnet g2g_kernels g2g_benchmarks benchmarks tests".split()}
print(json.dumps({name: spec and str(pathlib.Path(spec.origin).parent) for name, spec in found.items()}))
"""
    return json.loads(run(programs / "python", "-c", query, cwd=cwd))


@pytest.mark.long
def test_the_source_distribution_is_the_repository(repository, source):
    with tarfile.open(source) as archive:
        held = {name.removeprefix(f"{NAME}/") for name in archive.getnames() if archive.getmember(name).isfile()}
    files = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    made = {name for name in held if name.startswith("g2gnet.egg-info/") or name in ("PKG-INFO", "setup.cfg")}
    assert held - made == {name for name in files if not name.startswith((".", "g2gnet.egg-info/"))}
    assert "g2g_kernels/csrc/kernels.cpp" in held
    assert "tests/test_packaging.py" in held


@pytest.mark.long
def test_the_wheel_holds_the_packages_and_serves_every_python(repository, wheel):
    assert wheel.name.startswith(f"{NAME}-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    packages = ("g2gnet", "g2g_kernels", "benchmarks")
    assert {name.split("/")[0] for name in held} == {*packages[:2], "g2g_benchmarks", f"{NAME}.dist-info"}
    modules = [path.relative_to(repository).as_posix() for of in packages for path in (repository / of).rglob("*.py")]
    named = {name.replace("benchmarks/", "g2g_benchmarks/") for name in modules}
    assert {name for name in held if name.endswith(".py")} == named
    data = {"g2gnet/py.typed", "g2g_kernels/py.typed", "g2gnet/data/fashion_mnist_mini.npz"}
    licences = {f"{NAME}.dist-info/licenses/{name}" for name in ("LICENSE", "g2gnet/data/LICENSE-fashion-mnist")}
    assert data | licences <= held
    assert (f"g2g_kernels/cpu/{library.FILE}" in held) == (shutil.which(os.environ.get("CXX", "c++")) is not None)


@pytest.mark.long
def test_the_installed_wheel_works_far_from_the_repository(wheel, tmp_path):
    programs = install(tmp_path / "environment", wheel)
    packages = where(programs, tmp_path)
    assert packages.pop("benchmarks") is packages.pop("tests") is None, "these names are other people's"
    assert all(folder.startswith(str(tmp_path / "environment")) for folder in packages.values())
    small = shlex.split(f"{SIZES} --model mixer --block_size 4 --limit_train 60 --limit_test 20 --epochs 1 --json")
    told = json.loads(run(programs / "g2g-train", *small, cwd=tmp_path))
    assert told["g2g"] == __version__
    assert told["result"]["epoch"] == 1
    assert (tmp_path / told["files"]["marker"]).is_file()
    flags = shlex.split(f"{SIZES} --block_size 4 --train_steps 1 --kernel forward --contenders g2g-torch --repeats 2")
    record = json.loads(run(programs / "g2g-bench", *flags, "--json", cwd=tmp_path, TMPDIR=str(tmp_path)))
    assert [row["status"] for row in record["contenders"]] == ["timed"]
    assert record["machine"]["commit"] is None


#: what runs programs of other platforms: Debian's qemu-user with libc6-arm64-cross, and wine
EMULATORS = {
    "manylinux_2_28_aarch64": ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    "win_amd64": ("wine",),
}
#: tests that call kernels alone: they compare with float64 or with PyTorch's very bits, or refuse options
OF_KERNELS = {
    "test_cpu_backend.py": "errors_are linear_alone lif_alone_has one_neuron denormal gigabytes bfloat16 bits_do_not",
    "test_cpu_library.py": "no_option_has",
    "test_lists.py": "of_float64 any_number whole_run in_place",
    "test_graphs.py": "any_kind no_bit",
}
#: fewer for qemu, which is fifty times slower
FEWER = {
    "test_cpu_backend.py": "linear_alone one_neuron",
    "test_cpu_library.py": "no_option_has",
    "test_lists.py": "in_place",
}


@pytest.fixture(scope="module")
def of_platform(repository, tmp_path_factory):
    """The library in the wheel of a platform: of those in the folder ``$G2G_WHEELS``, or built for the tests."""

    @functools.cache
    def of_platform(target):
        folder = tmp_path_factory.mktemp(target)
        made = Path(os.environ.get("G2G_WHEELS", folder))
        if made == folder:
            if importlib.util.find_spec("ziglang") is None:
                pytest.skip("needs zig: pip install ziglang")
            flags = {} if target in EMULATORS else {"G2G_CXXFLAGS": "-O1"}  # what does not run is only read
            run(sys.executable, "setup.py", "wheels", "-t", target, "-d", made, cwd=repository, **flags)
        with zipfile.ZipFile(made / f"{NAME}-py3-none-{target}.whl") as archive:
            (name,) = (name for name in archive.namelist() if re.match(r"g2g_kernels/cpu/[^.]+\.(?!py)", name))
            return Path(archive.extract(name, folder))

    return of_platform


@pytest.mark.long
@pytest.mark.parametrize("target", EMULATORS)
def test_kernels_of_another_platform_compute_the_same_bits(of_platform, tmp_path, target):
    """Every call of a kernel in these tests also goes to a process that is emulated (``remote_kernels.py``)."""
    emulator = EMULATORS[target]
    if not shutil.which(emulator[0]):
        pytest.skip(f"{emulator[0]} is missing")
    kernels = of_platform(target)
    server = tmp_path / "server.exe"
    options = ["-O1", "-std=c++17", "-o", server, ROOT / "tests/remote_kernels.cpp"]
    run(*setup.zig(target), *options, *(["-ldl"] if "linux" in target else []), cwd=tmp_path)
    best = library.instruction_set()
    sets = library.ISAS[: library.ISAS.index(best) + 1] if target == "win_amd64" else ("baseline",)
    variables = {
        # where TMPDIR is set, wine 10 crashes
        "G2G_REMOTE": shlex.join(map(str, ("env", "-u", "TMPDIR", *emulator, server, kernels))),
        "G2G_CPU_POOL": "0",  # memory of a tensor is then no larger than the tensor
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "WINEDEBUG": "-all",
        "WINEPREFIX": str(tmp_path / "wine"),
    }
    for name in sets:
        tests = OF_KERNELS if target == "win_amd64" else FEWER
        chosen = " or ".join(f"({file} and ({' or '.join(parts.split())}))" for file, parts in tests.items())
        lane = "not long" if name == best else "not long and not ci"
        command = [
            "-m",
            "pytest",
            "-n",
            "0",
            "-m",
            lane,
            "-k",
            chosen,
            "-p",
            "remote_kernels",
            "-p",
            "no:cacheprovider",
        ]
        files = [next((ROOT / "tests/g2g_kernels").rglob(file)) for file in tests]
        told = run(sys.executable, *command, *files, cwd=ROOT, **variables, G2G_CPU_ISA=name if name != best else "")
        print(name, *re.findall(r"\d+ passed.*|calls of kernels: .*", told))
        called = {name for name, count in json.loads(told.rpartition("calls of kernels: ")[2]).items() if count > 1}
        assert {"g2g_stack", "g2g_linear", "g2g_neurons", "g2g_lists_new"} <= called


#: all that a library may need of its system
OF_SYSTEMS = {
    "ELF": r"lib(c|m|dl|pthread)\.so\.\d|ld-linux-.*",
    "PE": r"kernel32\.dll|api-ms-win-crt-.*\.dll",
    "MACHO": r"/usr/lib/libSystem\.B\.dylib",
}
#: what a static C++ library exports of itself: its operators new and delete
OF_CXX = r"_*(Z[nd][wal]\w+|mh_dylib_header|dso_handle)"


@pytest.mark.long
@pytest.mark.parametrize("target", setup.TARGETS)
def test_the_library_of_a_wheel_needs_nothing_but_its_system(of_platform, target):
    """No Mac has run its library: this is known of it, and what the instruction sets compute on other systems."""
    lief = pytest.importorskip("lief")
    file = of_platform(target)
    binary = lief.parse(str(file))
    needs = {getattr(each, "name", each) for each in binary.libraries} - {f"@rpath/{file.name}"}
    assert needs
    assert all(re.fullmatch(OF_SYSTEMS[binary.format.name], name.lower(), re.IGNORECASE) for name in needs), needs
    exported = {function.name for function in binary.exported_functions}
    functions = {name.removeprefix("_") for name in exported if "g2g_" in name} - {"g2g_made_from"}
    api = (ROOT / "g2g_kernels/csrc/api.cpp").read_text(encoding="utf-8")
    assert functions == set(re.findall(r"^G2G_EXPORT .*?(g2g_\w+)\(", api, re.MULTILINE))
    assert all("g2g_" in name or re.fullmatch(OF_CXX, name) for name in exported), exported
    print(file.name, "of", target, "needs", *sorted(needs), "and has", *sorted(functions))
    content = file.read_bytes()
    assert b"made from " in content
    assert (b"avx512_bf16" in content) == ("arm64" not in target and "aarch64" not in target)
    if binary.format.name == "MACHO":
        print("minimal version", binary.build_version.minos)
        assert binary.build_version.minos == [11, 0, 0]
        assert binary.has_code_signature or "arm64" not in target  # without one, Macs with arm64 load nothing
    if binary.format.name == "ELF":
        needed = (version.name for of in binary.symbols_version_requirement for version in of.get_auxiliary_symbols())
        assert all(tuple(map(int, re.findall(r"\d+", name))) <= (2, 28) for name in needed)


@pytest.mark.long
def test_the_source_distribution_installs_without_a_compiler(source, tmp_path):
    programs = install(tmp_path / "environment", source, G2G_BUILD_CPU="0")
    small = shlex.split(f"{SIZES} --model index --block_size 4 --limit_train 60 --limit_test 20 --epochs 1 --json")
    told = json.loads(run(programs / "g2g-crossval", *small, "--k_folds", "2", cwd=tmp_path))
    assert [fold["fold"] for fold in told["folds"]] == [1, 2]
    query = "from g2g_kernels import available_backends; print(available_backends())"
    assert "cpu" not in run(programs / "python", "-c", query, cwd=tmp_path)


@pytest.mark.long
def test_an_editable_installation_is_the_repository(repository, tmp_path):
    programs = install(tmp_path / "environment", "--editable", repository, G2G_BUILD_CPU="0")
    expected = {"g2gnet": "g2gnet", "g2g_kernels": "g2g_kernels", "g2g_benchmarks": "benchmarks"}
    expected = {name: str(repository / folder) for name, folder in expected.items()} | {"benchmarks": None}
    assert expected.items() <= where(programs, tmp_path).items()
    assert run(programs / "g2g-bench", "--help", cwd=tmp_path).startswith("usage: g2g-bench ")
