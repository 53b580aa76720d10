"""Machine code of the Triton kernels for GPUs, without one: ``python -m benchmarks.aot`` prints a table.

Every kernel that a training step launches is compiled at the tile sizes that the launch would choose, for NVIDIA's
sm_80, sm_89, sm_90 and sm_100 and AMD's gfx90a, gfx942 and gfx1100, and inspected: registers, stack, shared memory,
programs per multiprocessor, matrix instructions, and how far loads overlap products. Nothing is run: this checks the
code, not its speed.
"""

import collections
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

from g2g_kernels import Connection, Population
from g2g_kernels.ops.g2g_stack.call import StackCall
from g2g_kernels.ops.g2g_stack.population import ONE_STEP, Call
from g2g_kernels.ops.record import Backward
from g2g_kernels.triton import runtime
from g2g_kernels.triton.runtime import Launch
from g2gnet import G2GNet
from g2gnet.base.tables import markdown, markdown_row
from g2gnet.programs.flags import Parser


class Target(NamedTuple):
    """A kind of GPU."""

    name: str  # the compilers' name for it
    arch: int | str  # Triton's
    warp: int  # threads
    shared: int  # bytes of shared memory that one program may have
    shared_of_sm: int  # bytes that all programs on one multiprocessor share
    registers_of_sm: int  # of 32 bits, of a multiprocessor (AMD: of a compute unit)
    threads_of_sm: int
    matrix: str  # the instruction that matrix products should become

    @property
    def backend(self) -> str:
        return "cuda" if isinstance(self.arch, int) else "hip"


KIB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 80, 32, 163 * KIB, 164 * KIB, 65536, 2048, "mma.sync"),
        Target("sm_89", 89, 32, 99 * KIB, 100 * KIB, 65536, 1536, "mma.sync"),
        Target("sm_90", 90, 32, 227 * KIB, 228 * KIB, 65536, 2048, "wgmma.mma_async"),
        Target("sm_100", 100, 32, 227 * KIB, 228 * KIB, 65536, 2048, "tcgen05.mma"),
        Target("gfx90a", "gfx90a", 64, 64 * KIB, 64 * KIB, 4 * 512 * 64, 2048, "mfma"),
        Target("gfx942", "gfx942", 64, 64 * KIB, 64 * KIB, 4 * 512 * 64, 2048, "mfma"),
        Target("gfx1100", "gfx1100", 32, 64 * KIB, 128 * KIB, 4 * 1536 * 32, 2048, "wmma"),
    )
}


def training_step(net: G2GNet, batch: int, input_dim: int, dtype: torch.dtype) -> list[Launch]:
    """The Triton launches of the forward and backward pass of ``net``, in order, for a batch held over time.

    They are recorded on ``meta`` tensors, which have shapes but no memory; masks, tile sizes and the choice between
    kernels are those of a real step. ``net`` moves to that device; ``dtype`` is that of the matrix products (bfloat16
    under autocast, else float32).
    """
    from g2g_kernels.ops.g2g_stack import triton as stack  # imports Triton, which is optional

    populations: list[Population] = []
    for (feed, neurons), joined in zip(net.to("meta").layers(), net.recurrents(), strict=True):
        number = len(populations)
        connections = [Connection("linear", feed.values, feed.mask, number - 1, bias=feed.bias)]
        if joined is not None:
            connections.append(Connection("linear", joined.values, joined.mask, number, ONE_STEP))
        populations.append(Population(neurons.population, tuple(connections)))
    call = StackCall.of(Call(torch.empty(batch, input_dim, device="meta"), tuple(populations), net.T), dtype)
    with torch.no_grad(), runtime.recorded() as launches:
        counts, _, _, *made = stack._forward(call, True)
        given = Backward.of(call, made, [torch.empty_like(counts), *[None] * (2 * len(populations))])
        stack._backward(given._replace(needed=(False, *given.needed[1:])))
    return launches


@dataclasses.dataclass(frozen=True)
class Case:
    """A network's training step on samples held over time: T = 50, hidden sizes 2048."""

    dtype: torch.dtype = torch.bfloat16
    precision: str = "highest"  # of float32 products
    model: str = "index"
    block_size: int = 64
    batch: int = 256
    neuron: str = "lif"
    recurrent: bool = False

    def launches(self, target: Target) -> list[Launch]:
        """The launches of the step on such a card, with layers fused and as pairs, whichever is chosen there.

        Single weights run as they are chosen, dense; neurons out of order as pairs.
        """

        before, launches = torch.get_float32_matmul_precision(), []
        torch.set_float32_matmul_precision(self.precision)
        try:
            draw, steps = torch.Generator().manual_seed(0), 3 if self.recurrent else 50
            options: dict[str, Any] = {"neuron": self.neuron, "recurrent": self.recurrent, "T": steps}
            net = G2GNet(784, 2048, 10, self.model, block_size=self.block_size, **options, generator=draw)
            for fused in (True, False) if self.model == "index" else (False,):
                with runtime.assuming(architecture=target.name, fused=fused, dense=self.block_size == 1):
                    launches += training_step(net, self.batch, 784, self.dtype)
        finally:
            torch.set_float32_matmul_precision(before)
        return launches


CASES = {
    "default step, bf16": Case(),
    "random groups, bf16": Case(model="random"),
    "units of 32, bf16": Case(block_size=32),
    "units of 16, bf16": Case(block_size=16),
    "single weights, bf16": Case(block_size=1),
    "batch of 32, bf16": Case(batch=32),
    "float32, tf32 products": Case(torch.float32, "high"),
    "float32": Case(torch.float32),
    "random groups, float32": Case(torch.float32, model="random"),
    "adaptive neurons, bf16": Case(neuron="adlif"),
    "recurrent, bf16": Case(recurrent=True),
    "recurrent, float32": Case(torch.float32, recurrent=True),
}
PRODUCTS = ("product", "place", "parts", "weight_gradient", "fused_forward", "recurrent_backward")
KERNELS = [f"{name}_kernel" for name in (*PRODUCTS, "neurons_forward", "neurons_backward")]
HEADINGS = ["step", "kernel", "tile", "factors", "target", "registers", "stack", "shared", "programs/SM", "matrix",
            "buffers", "in flight"]  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What a launch hands to Triton's compiler; one object for launches that share machine code."""

    ast: Any
    target: Any
    options: dict[str, Any]

    def compiled(self) -> Any:
        """The compiled kernel."""
        import triton

        return triton.compile(self.ast, target=self.target, options=self.options)


class Driver:
    """Answers what Triton asks of the driver of a GPU that is not there, to compile for it."""

    def __init__(self, target: Target) -> None:
        self.target, self.utils = target, self

    def get_current_device(self) -> str:
        return self.target.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        limits = {"max_shared_mem": self.target.shared, "max_num_regs": self.target.registers_of_sm}
        return {**limits, "multiprocessor_count": 132, "warpSize": self.target.warp}


def source_of(launch: Launch, target: Target) -> Source:
    """What a launch on ``target`` compiles, prepared by the rules of this version of Triton. From then on this process
    can compile for ``target``, and launch nothing."""
    from triton.runtime import driver

    kernel = launch.kernel
    driver.set_active(Driver(target))
    kernel.device_caches[target.name]  # asked for once, it sets the compiler
    with mock.patch.object(kernel, "compile", Source):
        return kernel.warmup(grid=launch.grid, **launch.arguments)


def tile_of(launch: Launch, source: Source) -> str:
    sides = [f"{name[6:]}{value}" for name, value in launch.arguments.items() if name.startswith("BLOCK_")]
    return " ".join([*sides, f"w{source.options['num_warps']}", f"s{source.options['num_stages']}"])


def factors_of(launch: Launch) -> str:
    names = {torch.uint8: "u8", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
    read = map(launch.arguments.get, ("x", "grad_y", "values", "current", "margins", "grad_spikes"))
    return " × ".join(names[tensor.dtype] for tensor in read if isinstance(tensor, torch.Tensor))


def resources(compiled: Any, target: Target) -> tuple[int, int]:
    """Registers and bytes of stack (AMD: scratch) per thread."""
    if target.backend == "hip":
        text, names = compiled.asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size")
        registers, stack = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in names)
    else:
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            command = [str(cuobjdump), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", text)[0])
    return registers, stack


def matrix_instructions(compiled: Any, target: Target) -> str:
    """The number of the target's matrix instructions, or of those for smaller tiles; – for none."""
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    for name in (target.matrix, "mma.sync"):
        number = len(re.findall(rf"^\s+(?:@%p\d+ )?(?:v_)?{re.escape(name)}", text, re.MULTILINE))
        if number:
            return f"{number} {name}"
    return "–"


#: tiles in shared memory for the loads in flight, in the TTGIR
BUFFERS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+x\d+)x(\w+),")
#: the loop that multiplies, up to its end at the same indentation
LOOP = re.compile(r"^( *)[^\n]*scf\.for [^\n]*\n(.*?)^\1}", re.MULTILINE | re.DOTALL)


def loads(compiled: Any, target: Target) -> tuple[str, str]:
    """The buffers of each tile that the loop of a product loads, and the loads in flight, from the TTGIR.

    NVIDIA: those that each wait leaves in flight; after the loop, the last one waits for all. 0 at a wait before it
    means that no load overlaps a product. AMD: those that travel in registers while the loop multiplies, since they
    are stored to shared memory after its product.
    """
    text = compiled.asm["ttgir"]
    found = collections.Counter(f"{count} of {shape} {kind}" for count, shape, kind in BUFFERS.findall(text))
    buffers = ", ".join(f"{n} × {each}" if n > 1 else each for each, n in found.items()) or "–"
    if target.backend == "cuda":
        return buffers, " ".join(re.findall(r"ttg\.async_wait .*num = (\d+)", text)) or "–"
    loops = [body for _, body in LOOP.findall(text) if "tt.dot" in body]
    behind = sum(body[body.rindex("tt.dot") :].count("ttg.local_store") for body in loops)
    return buffers, f"{behind} in registers" if behind else "–"


def programs_of_sm(registers: int, shared: int, num_warps: int, target: Target) -> int:
    """The number of programs that one multiprocessor holds at a time.

    Registers are allocated to warps in steps of 8 per thread, shared memory in steps of 1 KiB with 1 KiB for the system
    (NVIDIA).
    """
    threads = num_warps * target.warp
    by_registers = target.registers_of_sm // (-(-registers // 8) * 8 * threads)
    taken = -(-shared // KIB) * KIB + (KIB if target.backend == "cuda" else 0)
    by_shared = target.shared_of_sm // taken if taken else 32
    return min(32, target.threads_of_sm // threads, by_registers, by_shared)


def rows(cases: Sequence[str], targets: Sequence[str], kernels: Sequence[str]) -> Iterator[list[str]]:
    """The cells of each of these kernels of these steps on each target, once."""
    jobs: dict[Source, tuple[str, Launch, Target]] = {}
    for name, target in itertools.product(cases, [TARGETS[target] for target in targets]):
        if CASES[name].precision == "high" and target.backend == "hip":
            continue  # tf32 is NVIDIA's; on AMD's cards nothing asks for it
        for launch in CASES[name].launches(target):
            if launch.kernel.__name__ in kernels:
                jobs.setdefault(source_of(launch, target), (name, launch, target))
    bar = tqdm(jobs.items(), desc="compiling", unit=" kernels", leave=False, disable=None)
    for source, (case_name, launch, target) in bar:
        compiled = source.compiled()
        registers, stack = resources(compiled, target)
        shared = compiled.metadata.shared
        programs = programs_of_sm(registers, shared, compiled.metadata.num_warps, target)
        about = case_name, f"`{launch.kernel.__name__}`", tile_of(launch, source), factors_of(launch), target.name
        counted = map(str, (registers, stack, shared, programs))
        yield [*about, *counted, matrix_instructions(compiled, target), *loads(compiled, target)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="kinds of GPU")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="training steps")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="kernels")
    arguments = parser.parse_args(argv)
    if runtime.interpreted():
        parser.error("TRITON_INTERPRET is set; unset it to compile kernels")
    try:
        import triton
    except ImportError:
        parser.error("the package triton is not installed (pip install triton)")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # never use results of an earlier run
        print("# Machine code of the Triton kernels\n")
        print(f"Triton {triton.__version__}, `python -m benchmarks.aot`. Compiled, not run on a GPU.\n")
        print(markdown(HEADINGS, []))
        printed = set()
        for row in rows(arguments.cases, arguments.targets, arguments.kernels):
            if (cells := tuple(row[1:])) not in printed:  # steps differ in arguments that change nothing of these
                tqdm.write(markdown_row(row))
                sys.stdout.flush()
            printed.add(cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
