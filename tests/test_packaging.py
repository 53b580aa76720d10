"""The source distribution and the wheel: what is in them, and that what they install works far from the repository. No
step asks the network: this environment's setuptools builds, and what g2g depends on is this environment's."""

import json
import os
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
    foreign = ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "G2G_BACKEND")
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
    assert ("g2g_kernels/cpu/libg2g_cpu.so" in held) == (shutil.which(os.environ.get("CXX", "c++")) is not None)


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


#: of another processor: its compiler, and what runs its programs; Debian's g++-aarch64-linux-gnu and qemu-user
CROSS, EMULATOR = "aarch64-linux-gnu-g++", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
#: tests of kernels that compare with float64, or with PyTorch's very bits
OF_KERNELS = ("errors_are and (chosen or matrix)", "linear_alone", "lif_alone_has", "one_neuron")


@pytest.mark.long
@pytest.mark.skipif(not shutil.which(CROSS), reason=f"{CROSS} is missing: apt-get install g++-aarch64-linux-gnu")
@pytest.mark.skipif(not shutil.which(EMULATOR[0]), reason=f"{EMULATOR[0]} is missing: apt-get install qemu-user")
def test_the_wheel_of_a_cross_compiler_is_of_its_processor_and_computes_the_same(source, tmp_path):
    """Every call of a kernel in these tests goes to a process that is emulated (``remote_kernels.py``)."""
    pip("wheel", *OFFLINE, "--wheel-dir", tmp_path, source, CXX=CROSS)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"{NAME}-py3-none-linux_aarch64.whl"
    with zipfile.ZipFile(wheel) as archive:
        kernels = archive.extract("g2g_kernels/cpu/libg2g_cpu.so", tmp_path)
    server = tmp_path / "server"
    run(CROSS, "-O1", "-std=c++17", "-o", server, ROOT / "tests/remote_kernels.cpp", "-ldl")
    variables = {
        "G2G_REMOTE": shlex.join(map(str, (*EMULATOR, server, kernels))),
        "G2G_CPU_POOL": "0",  # memory of a tensor is then no larger than the tensor
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    chosen = " or ".join(f"({name})" for name in OF_KERNELS)
    command = shlex.split(f"-m pytest -n 0 -p remote_kernels -p no:cacheprovider -k '{chosen}'")
    told = run(sys.executable, *command, "tests/g2g_kernels/test_cpu_backend.py", cwd=ROOT, **variables)
    assert "skipped" not in told
    calls = json.loads(told.rpartition("calls of kernels: ")[2])
    assert {"g2g_stack", "g2g_linear", "g2g_neurons"} <= {name for name, count in calls.items() if count > 1}


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
