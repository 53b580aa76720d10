"""Style and types: what ruff and mypy find is a failure."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    "arguments", ["ruff check .", "ruff format --check .", pytest.param("mypy", marks=pytest.mark.ci)]
)
def test_nothing_is_found(arguments):
    result = subprocess.run([sys.executable, "-m", *arguments.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
