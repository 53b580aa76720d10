"""Machine code of the Triton kernels of a training step, compiled ahead of time in a process of its own."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks.aot import HEADINGS, TARGETS, programs_of_sm

pytest.importorskip("triton", minversion="3.3")
RECORD = (ROOT / "benchmarks/results/aot.md").read_text()
PRODUCTS = {"product_kernel", "fused_forward_kernel", "weight_gradient_kernel"}


#: what is compiled for these tests: flags of ``python -m benchmarks.aot``
EVERY_KERNEL = ("--targets", "sm_90")
OTHER_GPUS = ("--kernels", "weight_gradient_kernel", "--targets", "sm_80", "sm_100", "gfx942", "gfx1100")


@pytest.fixture(scope="module")
def tables() -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The rows printed for each of these flags, which for the same version of Triton are in the record."""
    calls = [["--cases", "default step, bf16", *flags] for flags in (EVERY_KERNEL, OTHER_GPUS)]
    program = f"from benchmarks import aot\nfor flags in {calls!r}: aot.main(flags); print('end')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tables = {}
    for flags, text in zip((EVERY_KERNEL, OTHER_GPUS), result.stdout.split("end\n"), strict=False):
        _, _, version, _, _, _, *lines = text.splitlines()
        if f"\n{version.partition(',')[0]}," in RECORD:  # another version of Triton makes other code
            assert not [line for line in lines if line not in RECORD.splitlines()]
        tables[flags] = [dict(zip(HEADINGS, line.strip("| ").split(" | "), strict=True)) for line in lines]
    return tables


def check(row: dict[str, str]) -> None:
    """What holds for every kernel on every card: nothing on the stack, and it can be launched."""
    assert row["stack"] == "0", row
    assert int(row["shared"]) <= TARGETS[row["target"]].shared, row
    assert int(row["programs/SM"]) >= 1, row


def test_every_kernel_of_the_default_step_for_sm_90(tables):
    rows = tables[EVERY_KERNEL]
    products = [row for row in rows if row["kernel"].strip("`") in PRODUCTS]
    assert {row["kernel"].strip("`") for row in products} == PRODUCTS
    for row in rows:
        check(row)
    # forward, input gradient and weight gradient, of units of 64 and of fc3's 2 × 64
    assert len(products) >= 6
    for row in products:
        assert re.fullmatch(r"[1-9]\d* wgmma\.mma_async", row["matrix"]), row


def test_the_weight_gradient_for_other_gpus(tables):
    rows = tables[OTHER_GPUS]
    assert {row["target"] for row in rows} == {"sm_80", "sm_100", "gfx942", "gfx1100"}
    for row in rows:
        check(row)
        assert re.fullmatch(rf"[1-9]\d* {re.escape(TARGETS[row['target']].matrix)}", row["matrix"]), row


def test_the_record_is_of_every_target_and_has_nothing_on_the_stack():
    lines = [line for line in RECORD.splitlines() if line.startswith("| ") and not line.startswith("| step")]
    rows = [dict(zip(HEADINGS, line.strip("| ").split(" | "), strict=True)) for line in lines if "---" not in line]
    assert {row["target"] for row in rows} == set(TARGETS)
    assert len(rows) > 100
    for row in rows:
        check(row)


def test_programs_of_a_multiprocessor_by_hand():
    sm_90 = TARGETS["sm_90"]
    assert programs_of_sm(128, 0, 4, sm_90) == 4  # 65536 / (128 registers · 128 threads)
    assert programs_of_sm(121, 0, 4, sm_90) == 4  # registers come in eights
    assert programs_of_sm(32, 72 * 1024, 4, sm_90) == 3  # 228 KiB / (72 + 1)
    assert programs_of_sm(16, 0, 4, sm_90) == 16  # 2048 threads
    assert programs_of_sm(16, 0, 1, sm_90) == 32  # as many as there may be
