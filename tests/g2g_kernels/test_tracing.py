"""The compiler is told about our functions, and is not imported for it."""

import subprocess
import sys

import torch
from helpers import ROOT

from g2g_kernels.tracing import constant_when_traced


def test_the_mark_is_pytorchs_own():
    def ours():
        return None

    def theirs():
        return None

    assert constant_when_traced(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_the_packages_import_no_compiler():
    program = (
        "import sys, torch; before = set(sys.modules); import g2g_kernels, g2gnet; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "g2gnet.network" in imported
    assert not [name for name in imported if name.startswith(("torch._dynamo", "torch._inductor", "triton", "sympy"))]
