"""The faults of ``kernel_mutations.py`` can be put in, and docs/kernel-checks.md says of each who finds it."""

import pytest
from kernel_mutations import MUTATIONS, PAGE, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_the_fault_fits_the_kernels_and_is_in_the_table(mutation):
    """Where it does not: change its text, run ``python tests/kernel_mutations.py`` with a word of it."""
    compile(mutation.text(ROOT), mutation.file, "exec")
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {mutation.fault} |")]
    assert len(rows) == 1
    assert "| ? |" not in rows[0]
