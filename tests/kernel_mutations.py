"""Faults put into the Triton kernels, and which lane finds each: the table of ``g2g_kernels/triton/CHECKS.md``.

``python tests/kernel_mutations.py`` writes it, with the Python of the environment that ``tests/execute_kernels.sh``
makes. Every fault is put into a copy of the repository, whose tests then run in three lanes: executed from the IR, in
Triton's interpreter, and compiled ahead of time (``tests/benchmarks/test_aot.py``).
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "g2g_kernels/triton/CHECKS.md"
LINEAR, STACK, NEURONS = (f"g2g_kernels/ops/{name}/triton.py" for name in ("g2g_linear", "g2g_stack", "neurons"))
NEURON = "g2g_kernels/triton/neuron.py"
PRODUCTS = "g2g_kernels/triton/products.py"
TILES = "g2g_kernels/ops/g2g_linear/tiles.py"
TESTS = "tests/g2g_kernels/ops/test_triton_{}.py"
MISSED = "—"


class Mutation:
    """A fault: in which file of a kernel; a test file and an expression for its tests that launch the kernel; and, in
    turn, text that is there once and what takes its place."""

    def __init__(self, fault: str, file: str, tests: tuple[str, str], *edits: str) -> None:
        self.fault, self.file, self.tests, self.edits = fault, file, tests, edits

    def text(self, root: Path) -> str:
        """The file with the fault in it; raises ValueError for text that is not there once."""
        text = (root / self.file).read_text(encoding="utf-8")
        for before, after in zip(self.edits[::2], self.edits[1::2], strict=True):
            if text.count(before) != 1:
                raise ValueError(f"{self.fault}: {self.file} has {text.count(before)} times, not once: {before}")
            text = text.replace(before, after)
        return text


PADDING = "linear", "rows_and_columns or one_gradient_alone"
PARTS = "linear", "sums_over_many"
BY_LIF = "lif", "no_particular_strides or counts_rates or reproducible or one_step_by_hand"
BY_STACK = "g2g_stack", "test_numbers_of_steps"
BY_PARTS = "linear", "one_spike_gives or not_finite or long_sums"
ON_CHIP = "g2g_stack", "on_chip"
BY_RECURRENCE = "g2g_stack", "recurrent_layers"

MUTATIONS = (
    Mutation("a store without its mask of samples", LINEAR, PADDING,
             "element_ty), mask=m_ok[:, None] & n_ok[None, :])", "element_ty), mask=n_ok[None, :])"),
    Mutation("a store without its mask of time steps", NEURONS, BY_LIF,
             "spike.to(spikes.dtype.element_ty), mask=now)", "spike.to(spikes.dtype.element_ty), mask=inside)"),
    Mutation("a load without its mask of samples", LINEAR, BY_STACK,
             "mask=m_ok[:, None] & x_ok[None, :], other=0)", "mask=x_ok[None, :], other=0)"),
    Mutation("slots as far apart as whole tiles", LINEAR, PADDING,
             "(TILES * N * K) + k[:, None] + n[None, :] * K",
             "(TILES * BLOCK_N * BLOCK_K) + k[:, None] + n[None, :] * K"),
    Mutation("the transpose of the input gradient left out", LINEAR, PADDING,
             "(TILES * N * K) + k[:, None] * N + n[None, :]", "(TILES * N * K) + k[:, None] + n[None, :] * K"),
    Mutation("a checkpoint a segment too far", NEURONS, BY_LIF,
             "tl.store(checkpoints + ((segment - 1) * STATES", "tl.store(checkpoints + (segment * STATES"),
    Mutation("programs that add to one tile without atomics", NEURONS, BY_LIF,
             "here = partials + tl.program_id(0) * neurons + neuron", "here = partials + neuron",
             "DECAYS, PER_NEURON, False)", "DECAYS, PER_NEURON, True)",
             "current.new_empty(shape, dtype=torch.float32)", "current.new_zeros(shape, dtype=torch.float32)"),
    Mutation("programs that store to one tile", STACK, BY_RECURRENCE,
             "here = partials + row_of_partials * y_size + column", "here = partials + column"),
    Mutation("an accumulator in memory that nobody wrote", LINEAR, PADDING,
             "tl.store(address, total, mask=(r < R)[:, None] & c_ok[None, :])",
             "total += tl.load(address, mask=(r < R)[:, None] & c_ok[None, :], other=0.0)\n"
             "    tl.store(address, total, mask=(r < R)[:, None] & c_ok[None, :])"),
    Mutation("a sum in float16", LINEAR, PADDING,
             "total = plus_product(total, x_tile, weights, PRECISION)",
             "total = plus_product(total, x_tile, weights, PRECISION).to(tl.float16).to(tl.float32)"),
    Mutation("parts of a sum that overlap", LINEAR, PARTS,
             "tl.minimum((part + 1) * samples_of_part, samples), BLOCK_S)", "samples, BLOCK_S)"),
    Mutation("U ≥ θ instead of U > θ", NEURON, ("lif", "rounded_before"),
             "return membrane > theta", "return membrane >= theta"),
    Mutation("decay and current contracted to one rounding", NEURON, ("lif", "rounded_before"),
             'EXACT = {"enable_fp_fusion": False}', 'EXACT = {"enable_fp_fusion": True}'),
    Mutation("offsets in 32 bits", LINEAR, PADDING,
             "// (num_n * TILES_N)).to(tl.int64) * BLOCK_M", "// (num_n * TILES_N)) * BLOCK_M"),
    Mutation("more stages than shared memory holds", TILES, PADDING, "STAGES = 3", "STAGES = 12"),
    Mutation("the third part left out", PRODUCTS, BY_PARTS, "(rest - second).to(part_ty)", "(rest - rest).to(part_ty)"),
    Mutation("the third part read where the second is", PRODUCTS, BY_PARTS,
             "tl.load(address + 2 * apart, mask", "tl.load(address + apart, mask"),
    Mutation("0 · ∞ of a part kept as NaN", PRODUCTS, BY_PARTS,
             "small = tl.where(small == small, small, 0.0)", "small = small"),
    Mutation("one sum of parts over all tiles", PRODUCTS, BY_PARTS,
             "return total + tl.dot(a[0], b[0], tl.dot(a[0], b[1], tl.dot(a[0], b[2])))",
             "return tl.dot(a[0], b[0], tl.dot(a[0], b[1], tl.dot(a[0], b[2], total)))"),
    Mutation("a recurrent step that reads its own spikes", STACK, BY_RECURRENCE,
             "sent, before = spikes[t], after", "sent, before = spikes[min(t + 1, len(spikes) - 1)], after"),
    Mutation("a recurrent step backwards without the transpose", STACK, BY_RECURRENCE,
             "b, b < batch, n, n < N, K, N, False, PRECISION", "b, b < batch, n, n < N, K, N, True, PRECISION"),
    Mutation("on chip, a unit of the next row", STACK, ON_CHIP,
             "exists = first + j < end", "exists = first + j <= end"),
    Mutation("on chip, the inputs of the first unit for all", STACK, ON_CHIP,
             "columns_before[j] + x_offset", "columns_before[0] + x_offset"),
    Mutation("on chip, rows with more units than fit", STACK, ON_CHIP,
             "on_chip = end - first <= ON_CHIP", "on_chip = end - first <= ON_CHIP + 1"),
)  # fmt: skip


def run(copy: Path, *arguments: str) -> str:
    """What pytest prints in a copy of the repository."""
    environment = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment["TRITON_CACHE_DIR"] = str(copy / "triton-cache")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--tb=short", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return result.stdout + result.stderr + f"\nexit {result.returncode}"


def finding(output: str) -> str:
    """What a lane reports: the kernel's line where there is one, else the test that fails and what stores in it."""
    if output.rstrip().endswith("exit 0"):
        return MISSED
    fault = re.search(r"KernelFault: kernel `\w+`, launch \d+: `\w+\.py:\d+: .*?`:? (.{0,60})", output)
    if fault:
        what = next((word for word in ("writes", "reads") if fault[1].startswith(word)), "race")
        return f"{what}{'' if what == 'race' else ' out of bounds'} at the line it names"
    if "exit 1" not in output.splitlines()[-1]:
        return "the process dies, without a line"
    test = re.search(r"^FAILED \S+::(\w+)", output, re.MULTILINE)
    stores = re.findall(r"^(\w+): (\w+\.py:\d+(?:, \w+\.py:\d+)*)$", output, re.MULTILINE)
    failed = f"`{test[1]}` fails" if test else "fails"
    named = [f"`{kernel}` stores at the line{'s' if ',' in lines else ''} it names" for kernel, lines in stores]
    return "; ".join([failed, *named])


@contextlib.contextmanager
def copy_with(mutations: Sequence[Mutation]) -> Iterator[Path]:
    """A copy of the repository with faults in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "g2g"
        for name in ("g2g_kernels", "g2gnet", "benchmarks", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutation in mutations:
            (copy / mutation.file).write_text(mutation.text(copy), encoding="utf-8")
        yield copy


def tested(mutation: Mutation, executed: bool) -> str:
    file, tests = mutation.tests
    options = ("-p", "kernel_execution", "-m", "not driver and not passes") if executed else ()
    with copy_with([mutation]) as copy:
        return finding(run(copy, *options, TESTS.format(file), "-k", tests))


def compiled(mutations: Sequence[Mutation]) -> Iterator[tuple[Mutation, str]]:
    """Faults are compiled together, and by halves where something is found."""
    with copy_with(mutations) as copy:
        found = finding(run(copy, "-m", "long or not long", "tests/benchmarks/test_aot.py", "-k", "default_step"))
    if found == MISSED or len(mutations) == 1:
        yield from ((mutation, found) for mutation in mutations)
    else:
        for half in (mutations[: len(mutations) // 2], mutations[len(mutations) // 2 :]):
            yield from compiled(half)


def write(mutation: Mutation, lane: int, found: str) -> None:
    """Puts a finding into the row of the table."""
    print(f"{LANES[lane]}: {mutation.fault}: {found}", flush=True)
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    (at,) = (number for number, line in enumerate(lines) if line.startswith(f"| {mutation.fault} |"))
    cells = lines[at].strip("| \n").split(" | ")
    cells[1] = f"`{mutation.file.removeprefix('g2g_kernels/').removeprefix('ops/')}`"
    cells[2 + lane] = found
    lines[at] = f"| {' | '.join(cells)} |\n"
    PAGE.write_text("".join(lines), encoding="utf-8")


LANES = "executed", "interpreted", "compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="faults that have one of these words (default: all)")
    parser.add_argument("--lanes", nargs="+", default=LANES, choices=LANES)
    arguments = parser.parse_args()
    words = arguments.words or [""]
    chosen = [mutation for mutation in MUTATIONS if any(word in mutation.fault for word in words)]
    for lane in (0, 1):
        for mutation in chosen if LANES[lane] in arguments.lanes else ():
            write(mutation, lane, tested(mutation, executed=lane == 0))
    if "compiled" in arguments.lanes:
        for mutation, found in compiled(chosen):
            write(mutation, 2, found)


if __name__ == "__main__":
    main()
