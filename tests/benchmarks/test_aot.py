"""Machine code of the Triton kernels of a training step, compiled ahead of time in a process of its own."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks.aot import HEADINGS, KERNELS, TARGETS

pytest.importorskip("triton", minversion="3.3")
RECORD = (ROOT / "benchmarks/results/aot.md").read_text()
PRODUCTS = {"product_kernel", "fused_forward_kernel", "weight_gradient_kernel"}
#: their loops carry the next tile's slot and columns
CARRYING = {"product_kernel", "fused_forward_kernel"}


def printed_by(program: str) -> str:
    """The output of a program in whose process kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compiled(case: str, kernels, targets) -> list[dict[str, str]]:
    """The rows printed for these, which for the same version of Triton are in the record."""
    call = ["--cases", case, "--kernels", *kernels, "--targets", *targets]
    _, _, version, _, _, _, *lines = printed_by(f"from benchmarks import aot; aot.main({call!r})").splitlines()
    if f"\n{version.partition(',')[0]}," in RECORD:  # another version of Triton makes other code
        assert not [line for line in lines if line not in RECORD.splitlines()]
    return rows_of(lines)


def rows_of(lines) -> list[dict[str, str]]:
    """Lines of a table, by its headings."""
    rows = [dict(zip(HEADINGS, line.strip("| ").split(" | "), strict=True)) for line in lines]
    return [{**row, "kernel": row["kernel"].strip("`")} for row in rows]


def check(row: dict[str, str], programs: int = 1) -> None:
    """What holds for every kernel on every card: nothing on the stack, and it can be launched; loads are in flight
    while the loop of a product multiplies."""
    assert row["stack"] == "0", row
    assert int(row["shared"]) <= TARGETS[row["target"]].shared, row
    assert int(row["programs/SM"]) >= programs, row
    if row["kernel"] not in CARRYING:
        return
    if TARGETS[row["target"]].backend == "hip":
        # tiles 16 deep have too few bytes for each of CDNA's threads; a loop inside of that over steps overlaps nothing
        shallow = "K16" in row["tile"] or row["kernel"] == "fused_forward_kernel"
        assert re.fullmatch(r"[1-4] in registers", row["in flight"]) or shallow, row
        return
    # a loop does not wait for its own loads; after it, a wait for all
    *loops, end = re.split(r" ?\b0\b ?", row["in flight"])
    assert end == "", row
    assert loops, row
    assert all(re.fullmatch(r"[1-9]\d*( [1-9]\d*)*", waits) for waits in loops), row
    assert re.fullmatch(r"((\d+ × )?[23] of \d+x\d+ \w+(, )?)+", row["buffers"]), row


def check_products(row: dict[str, str]) -> None:
    """Nothing is multiplied twice: as many ``wgmma`` as tiles of 64 rows for each four warps, 16 deep."""
    side = {name: int(number) for name, number in re.findall(r"([A-Zw])(\d+)", row["tile"])}
    spikes, parts = row["factors"].startswith("u8"), row["step"].endswith("float32")  # on cards of data centers
    products, rows, depth = (3 if spikes else 6) if parts else 1, side.get("M"), side.get("K")
    if row["kernel"] == "weight_gradient_kernel":
        lanes = 64 if "fp32" in row["factors"] and not (parts and spikes) else 128
        rows, depth = lanes if side["R"] < 64 or parts else 64, side["S"]
    once = products * rows // (16 * side["w"]) * depth // 16
    if row["kernel"] == "fused_forward_kernel" and "recurrent" not in row["step"]:  # nine units on chip, and the loop
        once *= 10
    assert row["matrix"] == f"{once} wgmma.mma_async", row


@pytest.mark.long
def test_the_products_of_the_default_step_for_sm_90():
    rows = compiled("default step, bf16", PRODUCTS, ["sm_90"])
    assert {row["kernel"] for row in rows} == PRODUCTS
    # forward, input gradient and weight gradient, of units of 64 and of fc3's 2 × 64
    assert len(rows) >= 6
    for row in rows:
        check(row)
        check_products(row)


BY_TILES = ("product_kernel", "weight_gradient_kernel")
#: what takes longer: the case, its kernels, their targets, and how many programs fit a multiprocessor of each at least
LONGER = {
    "float32 by parts": ("float32", BY_TILES, ["sm_90"], {"product_kernel": 2}),
    "recurrent": ("recurrent, bf16", ("fused_forward_kernel", "recurrent_backward_kernel"), ["sm_90"], {}),
    "two states": ("adaptive neurons, bf16", ["neurons_backward_kernel"], ["sm_90"], {"neurons_backward_kernel": 2}),
    "others": ("default step, bf16", [name for name in KERNELS if name not in PRODUCTS], ["sm_90"], {}),
    "other GPUs": ("default step, bf16", BY_TILES, [name for name in TARGETS if name != "sm_90"], {}),
}


@pytest.mark.long
@pytest.mark.parametrize(("case", "kernels", "targets", "programs"), LONGER.values(), ids=LONGER)
def test_other_kernels_cases_and_gpus(case, kernels, targets, programs):
    rows = compiled(case, kernels, targets)
    assert {row["target"] for row in rows} == set(targets)
    assert {row["kernel"] for row in rows} <= set(kernels)
    for row in rows:
        check(row, programs.get(row["kernel"], 1))
        if row["target"] != "sm_90":
            assert re.fullmatch(rf"[1-9]\d* {re.escape(TARGETS[row['target']].matrix)}", row["matrix"]), row
        elif row["matrix"] != "–":  # neurons multiply nothing, nor does a last step that receives no gradient
            check_products(row)


def test_the_record_is_of_every_target_and_has_nothing_on_the_stack():
    """On NVIDIA's cards two loads of each tile of 64 are in flight in the default step; beside them nine of a step's
    spikes, where the fused kernel keeps the weights on chip."""
    rows = rows_of(re.findall(r"(?m)^\| (?!step|---).*$", RECORD))
    assert {row["target"] for row in rows} == set(TARGETS)
    assert len(rows) > 100
    list(map(check, rows))
    rows = [row for row in rows if row["step"] == "default step, bf16" and "bf16 × bf16" in row["factors"]]
    large = [row for row in rows if row["kernel"] in CARRYING and "N64" in row["tile"] and "K16" not in row["tile"]]
    assert len(large) == len(TARGETS) + 2  # two GPUs have both kernels
    for row in large:
        assert row["buffers"].count(" of ") == 2, row
        on_chip = {"9", "0"} if row["kernel"] == "fused_forward_kernel" else set()
        on_card = TARGETS[row["target"]].backend == "cuda"
        assert not on_card or set(row["in flight"].split()[:-1]) == {"2"} | on_chip, row


COMPILED = """
import dataclasses, torch
from benchmarks.aot import CASES, TARGETS, resources, source_of, training_step
from g2g_kernels import doctor
from g2g_kernels.ops.g2g_linear import tiles
from g2g_kernels.ops.g2g_stack import triton as stack
from g2g_kernels.triton import products, runtime
from g2gnet import G2GNet

def fused(hidden, side, card):
    net = G2GNet(784, hidden, 10, "dense", block_size=side, T=50)
    with runtime.assuming(architecture=card, fused=True, dense=False):
        launches = training_step(net, 256, 784, torch.bfloat16)
    return [each for each in launches if each.kernel.__name__ == "fused_forward_kernel"]

print(*[launch.arguments["ON_CHIP"] for units in (13, 14) for launch in fused(64 * units, 64, "sm_90")])
(launch,) = [each for each in fused(512, 32, "sm_90") if each.arguments["BLOCK_N"] == 32][-1:]
sm_90 = TARGETS["sm_90"]
kernel = source_of(launch, sm_90).compiled()
on_stack = resources(kernel, sm_90)[1]
print(launch.arguments["ON_CHIP"], kernel.metadata.shared, stack.on_chip_bytes(16, 32, 32), on_stack)

def of(launches):
    return {source_of(launch, sm_90) for launch in launches}

step = CASES["default step, bf16"]
known = of(step.launches(sm_90))
for batch in (250, 240):
    print(len(of(dataclasses.replace(step, batch=batch).launches(sm_90)) - known))

runtime.interpreted = lambda: True  # so that tensors on the CPU are served; launches are only recorded
products._as_floats = lambda device: False  # parts as on a card
checks = [check for check in doctor.checks() if check.case == "a default step"]
for dtype in (torch.bfloat16, torch.float32):
    checked = set()
    for check in checks:
        with runtime.recorded() as launches:
            check._results("triton", torch.device("cpu"), dtype)
        checked |= of(launches)
    for fused in (True, False):
        with runtime.assuming(fused=fused):
            step = of(dataclasses.replace(CASES["default step, bf16"], dtype=dtype).launches(sm_90))
        print(len(step), *sorted(source.ast.name for source in step - checked))
"""


@pytest.mark.long
def test_the_doctor_checks_every_kernel_of_a_default_step_and_weights_stay_on_chip_only_where_the_kernel_fits():
    """To ask for more shared memory than the card has is an error there. Other batches need no new kernel."""
    on_chip, of_kernel, *batches_and_ways = printed_by(COMPILED).splitlines()
    assert on_chip == "13 13 14"  # fc2 and fc3, whose units are 64 and 10 high
    number, shared, expected, on_stack = map(int, of_kernel.split())
    assert (number, on_stack) == (16, 0)
    assert expected - 1024 <= shared <= expected
    assert batches_and_ways[:2] == ["0", "0"]  # no multiple of 16, and one
    for number, *unchecked in map(str.split, batches_and_ways[2:]):
        assert int(number) > 10
        assert unchecked == []
