"""The compiler is told about our functions; that it is not imported for it, ``test_imports.py`` tests."""

import torch

from g2g_kernels.tracing import constant_when_traced


def test_the_mark_is_pytorchs_own():
    def ours():
        return None

    def theirs():
        return None

    assert constant_when_traced(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
