"""The faults of ``kernel_mutations.py`` can be put in, and g2g_kernels/triton/CHECKS.md says of each who finds it."""

import pytest
from kernel_mutations import MUTATIONS, PAGE, ROOT, finding


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_the_fault_fits_the_kernels_and_is_in_the_table(mutation):
    """Where it does not: change its text, run ``python tests/kernel_mutations.py`` with a word of it."""
    compile(mutation.text(ROOT), mutation.file, "exec")
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {mutation.fault} |")]
    assert len(rows) == 1
    assert "| ? |" not in rows[0]


def test_what_a_lane_reports_in_words():
    fault = "E  ttsem.sanitize.KernelFault: kernel `product_kernel`, launch 3: `triton.py:220: tl.store(y, x)`: writes"
    section = "stores of this test's kernels\nproduct_kernel: triton.py:220\nlif: triton.py:9, triton.py:12\n"
    failed = "FAILED tests/test_triton_linear.py::test_padding[x] - AssertionError\n1 failed\n"
    assert finding("1 passed\n\nexit 0") == "—"
    assert finding(f"{fault}\n{failed}\nexit 1") == "writes out of bounds at the line it names"
    assert finding("Fatal Python error\n\nexit -11") == "the process dies, without a line"
    assert finding(f"{failed}\nexit 1") == "`test_padding` fails"
    assert finding(f"{section}{failed}\nexit 1") == (
        "`test_padding` fails; `product_kernel` stores at the line it names; `lif` stores at the lines it names"
    )
