"""The programs' names: files of the checkout, console scripts, and the list that ``python -m g2gnet`` prints."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from g2g_kernels import available_backends
from g2gnet import __main__ as overview

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def module_of(program):
    """What runs when a console script or ``python -m MODULE`` is called."""
    name = SCRIPTS[program].removesuffix(":main") if program in SCRIPTS else program.removeprefix("python -m ")
    return importlib.import_module(name)


@pytest.mark.parametrize("program", overview.PROGRAMS)
def test_each_listed_program_explains_itself(program, capsys):
    with pytest.raises(SystemExit) as stop:
        module_of(program).main(["--help"])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: ")
    assert captured.err == ""


def test_the_list_names_every_script_and_backend(capsys):
    assert set(SCRIPTS) <= set(overview.PROGRAMS)
    assert overview.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for program, purpose in overview.PROGRAMS.items():
        assert any(line.split("  ")[1] == program and line.endswith(purpose) for line in lines if "  " in line), program
    for backend in available_backends():
        assert any(line.split() == [backend, "yes"] for line in lines), backend


@pytest.mark.parametrize("name", ["train", "crossval"])
def test_a_file_of_the_checkout_is_the_console_script(name):
    file, script = importlib.import_module(name), module_of(f"g2g-{name}")
    assert file.main is script.main
    result = subprocess.run(
        [sys.executable, f"{name}.py", "--epochs", "0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{name}.py: error: epochs=0 is out of range")
