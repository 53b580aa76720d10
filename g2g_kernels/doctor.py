"""Which kernels this machine can use, and whether their results are correct: ``python -m g2g_kernels.doctor``.

Shows versions, devices and backends, then runs every operator of every available backend forward and backward and
compares it with backend ``torch`` in float64; on Triton with fused layers, too. It takes seconds; on a GPU the first
run also compiles the kernels, a minute or two. The exit status is 0 if everything checked is right, 1 if something is
wrong, 2 for a missing device.

A single wrong spike shows: inputs of neurons are multiples of powers of two, so currents (also in 16 bits) and float32
membranes are exact for any order of summation. Spikes and counts must therefore *equal* the reference; everything else
must be within rounding of it.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from g2g_kernels.device import select_device
from g2g_kernels.dispatch import ANY, BACKENDS, BackendError, available_backends, backend_status
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.groups import GroupLayout
from g2g_kernels.ops.g2g_linear import g2g_linear
from g2g_kernels.ops.g2g_stack import WAYS, Connection, Delay, Population, g2g_stack
from g2g_kernels.ops.neurons import MODELS, Neurons, neurons
from g2g_kernels.ops.neurons.models import RESETS
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.triton import runtime

#: the largest root-mean-square error relative to the reference, by precision
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
#: outputs that must be equal, since they are whole numbers
EXACT = ("spikes", "counts")

SIZE, GROUPS, BATCH, STEPS = 300, 4, 33, 10

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Check:
    """One case of one operator."""

    operator: str
    case: str
    leaves: Tensors  #: float64 on the CPU, whose gradients are compared
    run: Callable[[Tensors, str], Tensors]  #: calls the operator on such leaves and the backend of that name
    fused: bool = False  #: with one kernel for a layer's product and its neurons, which only Triton has

    @functools.cached_property
    def reference(self) -> Tensors:
        return self._results("torch", torch.device("cpu"), torch.float64)

    def errors(self, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """The relative error of every output and gradient; infinite for one that must be equal and is not."""
        errors = {}
        for name, actual in self._results(backend, device, dtype).items():
            difference, size = _rms(actual - self.reference[name]), _rms(self.reference[name])
            possible = math.isfinite(difference) and size and not (name in EXACT and difference)
            errors[name] = difference / size if possible else math.inf
        return errors

    def _results(self, backend: str, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Outputs, and gradients of a fixed weighted sum of them, in float64 on the CPU. For 16 bits the leaves are
        float32, and ``torch.autocast`` rounds them."""
        low = dtype.itemsize == 2
        leaves = {
            name: leaf.to(torch.float32 if low else dtype, copy=True).to(device).requires_grad_()
            for name, leaf in self.leaves.items()
        }
        draw = torch.Generator().manual_seed(1)
        with runtime.assuming(fused=self.fused, right=True):  # (the cost model does not fuse layers as small as these)
            with torch.autocast(device.type, dtype) if low else torch.enable_grad():
                results = self.run(leaves, backend)
            weights = [torch.randint(-8, 9, y.shape, generator=draw).to(y) / 8 for y in results.values()]
            torch.autograd.backward(list(results.values()), weights)
        missing = torch.full((1,), math.nan)
        found = {**results, **{f"∂{name}": leaf.grad for name, leaf in leaves.items()}}
        return {name: (missing if y is None else y).detach().cpu().double() for name, y in found.items()}


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


class Multiples:
    """Random multiples of a unit, from ``least`` to ``most`` times it, of a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)

    def __call__(self, unit: float, least: int, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, most + 1, shape, generator=self.draw).double() * unit


def checks() -> Iterator[Check]:
    """Units of side 1, 16, 32 and 64, some of them shorter, with all kinds of groups, resets and surrogates."""
    # in these draws no gradient is a small difference of large numbers, which bfloat16 would not hold
    multiples = Multiples(6)
    for block_size, kind in ((1, "interleaved"), (16, "index"), (32, "interleaved"), (64, "index"), (64, "random")):
        layouts = GroupLayout(SIZE, GROUPS, kind, multiples.draw), GroupLayout(SIZE, GROUPS, "index")
        mask = BlockMask.sample(*layouts, 1.0, 0.2, block_size, multiples.draw)
        values, bias = multiples(0.25, -1, 1, mask.num_units, *mask.unit_shape), multiples(0.25, -1, 2, SIZE)
        case = f"units of {block_size}, {kind} groups"
        weights = {"values": values * mask.valid(), "bias": bias}
        x = torch.randn(BATCH, SIZE, generator=multiples.draw, dtype=torch.float64)
        yield Check("g2g_linear", case, {"x": x, **weights}, functools.partial(_linear, [mask]))
        parameters = {"beta": multiples(0.5, 1, 1, 1), "threshold": multiples(0.25, 3, 5, SIZE)}
        held = {"x": multiples(0.5, 0, 2, BATCH, SIZE), **weights, **parameters}
        yield from _pair_and_fused(case, held, [mask, mask], True)  # of the same weights
        # few units, so that gradients and their rounding do not grow from step to step
        few = Multiples(block_size)
        own = BlockMask.sample(layouts[0], layouts[0], 0.2, 0.05, block_size, few.draw)
        joined = few(0.25, -1, 1, own.num_units, *own.unit_shape) * own.valid()
        yield Check("recurrent", case, {"joined": joined, **held}, functools.partial(_stack, [mask], own, True))
    for model in MODELS.values():
        for number, (reset, surrogate) in enumerate(zip(itertools.cycle(RESETS), SURROGATES, strict=False)):
            multiples = Multiples(number + 50)  # its own: an added surrogate changes no other check
            sizes = (SIZE, 1) if number % 2 else (1, SIZE)
            unit = 0.5 if model.fixed else 0.25 / len(model.states)
            current = multiples(unit, -4, 10, STEPS, BATCH, SIZE)
            names = [name for name in model.parameters[:-1] if name not in model.fixed]
            halves = {name: multiples(0.5, 1, 1, sizes[0]) for name in names}
            threshold = multiples(0.25, 3, 4, sizes[1])
            leaves = {"current": current, **halves, "threshold": threshold}
            case = f"reset {reset}, surrogate {surrogate}"
            yield Check(model.name, case, leaves, functools.partial(_neurons, model.name, reset, surrogate))
    yield from _default_step()


#: parameters without a gradient
FIXED = {"refractory": 2.0, "reset_current": 0.0}
#: the sizes of the default network, for which its kernels are compiled
DEFAULT_SIZES = (784, 2048, 2048, 10)


def _default_step() -> Iterator[Check]:
    multiples = Multiples(6)
    samples = 4 * BATCH  # more than 1,024 rows, whose products have other tiles
    leaves = {"x": multiples(0.5, 0, 2, samples, DEFAULT_SIZES[0])}
    masks = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(DEFAULT_SIZES)):
        mask = BlockMask.sample(GroupLayout(outputs), GroupLayout(inputs), 1.0, 0.15, 64, multiples.draw)
        masks.append(mask)
        leaves[f"values {number}"] = multiples(0.25, -1, 1, mask.num_units, *mask.unit_shape) * mask.valid()
        leaves[f"bias {number}"] = multiples(0.25, -1, 2, outputs)
        leaves[f"beta {number}"] = multiples(0.5, 1, 1, 1)
        leaves[f"threshold {number}"] = multiples(0.25, 3, 5, 1)
    yield from _pair_and_fused("a default step", leaves, masks, False)  # the default loss depends on counts alone


def _pair_and_fused(case: str, leaves: Tensors, masks: Sequence[BlockMask], with_rates: bool) -> Iterator[Check]:
    run = functools.partial(_stack, masks, None, with_rates)
    yield Check("g2g_stack", case, leaves, run)
    yield Check("fused stack", case, leaves, run, fused=True)


def _on_device(mask: BlockMask, like: torch.Tensor) -> BlockMask:
    return copy.deepcopy(mask).to(like.device)


def _linear(masks: Sequence[BlockMask], leaves: Tensors, backend: str) -> Tensors:
    x, values, bias = leaves.values()
    return {"y": g2g_linear(x, values, _on_device(masks[0], x), bias, backend)}


def _neurons(model: str, reset: str, surrogate: str, leaves: Tensors, backend: str) -> Tensors:
    current, own = leaves["current"], {**FIXED, **leaves}
    parameters = tuple([own[name] for name in MODELS[model].parameters])
    if torch.is_autocast_enabled(current.device.type):
        current = current.to(torch.get_autocast_dtype(current.device.type))
    return {"spikes": neurons(current, Neurons(model, parameters, reset, surrogate), backend=backend)}


def _stack(
    masks: Sequence[BlockMask], own: BlockMask | None, with_rates: bool, leaves: Tensors, backend: str
) -> Tensors:
    """A chain of these masks, each with weights of its own if there are as many; ``own``: of recurrent connections."""
    rest = list(leaves.values())
    joined = None if own is None else rest.pop(0)
    x = rest.pop(0)
    weights = itertools.cycle(zip(*[iter(rest)] * 4, strict=True))
    populations = []
    for number, (mask, (values, bias, beta, threshold)) in enumerate(zip(masks, weights, strict=False)):
        connections = [Connection("linear", values, _on_device(mask, x), number - 1, bias=bias)]
        if own is not None and joined is not None:
            connections.append(Connection("linear", joined, _on_device(own, x), number, Delay(1, 1)))
        populations.append(Population(Neurons("lif", (beta, threshold)), tuple(connections)))
    activity = g2g_stack(x, populations, STEPS, backend=backend)
    rates = {f"rates {i}": rates for i, rates in enumerate(activity.rates, 1)}
    return {"counts": activity.counts, **(rates if with_rates else {})}


def devices() -> dict[str, str]:
    """The devices of this machine by name, as :func:`g2g_kernels.select_device` takes it, with descriptions."""
    found = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        version = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{properties.name}, compute capability {capability}, {memory}, {version}"
    for name in ("directml", "mps", "xpu"):
        with contextlib.suppress(ValueError):
            found[name] = str(select_device(name))
    return found


def version(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """Versions, devices, and every backend with the reason why it is unavailable."""
    names = ["g2gnet", "torch", *(backend.package for backend in BACKENDS.values() if backend.package)]
    lines = [f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names)]
    lines += ["", "devices"] + [f"  {name:<9} {what}" for name, what in devices().items()]
    lines += ["", "backends"]
    for name, reason in backend_status().items():
        detail = None if reason else BACKENDS[name].detail()
        lines.append(f"  {name:<9} {f'no: {reason}' if reason else f'yes ({detail})' if detail else 'yes'}")
    lines += ["", "ways to run a network (table in g2g_kernels/ops/g2g_stack/README.md); net.explain(x) says which"]
    for backend in WAYS.in_order():
        reason = None if backend == ANY else backend_status()[backend]
        lines += [f"  {way.name:<18} {f'no: {reason}' if reason else 'yes'}" for way in WAYS.ways.get(backend, ())]
    forced = os.environ.get("G2G_BACKEND")
    return "\n".join([*lines, *([f"  G2G_BACKEND={forced} forces one"] if forced else []), ""])


def examine(device: torch.device) -> Iterator[tuple[str, list[str]]]:
    """Runs every check on ``device``: a line of the table and its findings per backend, operator and precision."""
    by_operator: dict[str, list[Check]] = {}
    for check in checks():
        by_operator.setdefault(check.operator, []).append(check)
    precisions = [torch.float32, *([torch.bfloat16] if device.type in ("cpu", "cuda") else [])]  # those have autocast
    for backend in available_backends():
        if BACKENDS[backend].device_type in (None, device.type) and not BACKENDS[backend].only_by_name():
            for cases, dtype in itertools.product(by_operator.values(), precisions):
                if backend == "triton" or not cases[0].fused:
                    yield _line(cases, backend, device, dtype)


#: the checks of operators whose checks have other names
CHECKED = {"neurons": tuple(MODELS), "g2g_stack": ("g2g_stack", "fused stack", "recurrent")}


def first_finding(operator: str, device: torch.device) -> str:
    """The first thing that is wrong with the Triton kernels of an operator, or ""."""
    # the interpreter's products of bfloat16 are wrong; layers are fused in 16 bits alone
    precisions = torch.float32, torch.bfloat16 if device.type == "cuda" else torch.float16
    for check in checks():
        if check.operator in CHECKED.get(operator, (operator,)):
            for dtype in precisions:
                _, wrong = _line([check], "triton", device, dtype)
                if wrong:
                    return f"{check.operator}, {str(dtype).removeprefix('torch.')}, {wrong[0]}"
    return ""


def _line(cases: list[Check], backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, list[str]]:
    precision = str(dtype).removeprefix("torch.")
    start = f"{device!s:<9}{backend:<9}{cases[0].operator:<20}{precision:<10}"
    wrong, largest = [], 0.0
    for check in cases:
        try:
            errors = check.errors(backend, device, dtype)
        except BackendError as refusal:
            return f"{start}not served: {str(refusal).rsplit(f'{backend}: ', 1)[-1]}", []
        except Exception as error:  # any exception of a kernel is a finding; the other kernels come next
            wrong.append(f"{check.case}: {type(error).__name__}: {error}")
            largest = math.inf
            continue
        largest = max(largest, *errors.values())
        worse = [
            f"{name} differs" if name in EXACT else f"{name} by {error:.1e}"
            for name, error in errors.items()
            if error > ALLOWED[dtype]
        ]
        if worse:
            wrong.append(f"{check.case}: {', '.join(worse)}")
    verdict = "WRONG" if wrong else "right"
    return f"{start}{len(cases):>5}{largest:>15.1e}{ALLOWED[dtype]:>10.0e}  {verdict}", wrong


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m g2g_kernels.doctor", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--device", default="all", help="where to check, such as cpu (default: on every device)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    names = list(devices()) if arguments.device == "all" else [arguments.device]
    try:
        chosen = [select_device(name) for name in names]
    except ValueError as error:
        print(f"python -m g2g_kernels.doctor: error: {error}", file=sys.stderr)
        return 2
    print(describe())
    began = time.perf_counter()
    print(
        f"{'device':<9}{'backend':<9}{'operator':<20}{'precision':<10}{'cases':>5}{'largest error':>15}{'allowed':>10}"
    )
    lines = findings = 0
    for device in chosen:
        for line, wrong in examine(device):
            print(line, flush=True)
            for finding in wrong:
                print(f"    {finding}")
            lines += 1
            findings += len(wrong)
    for backend in available_backends():
        if reason := BACKENDS[backend].only_by_name():
            print(f"{backend}: not checked, {reason}")
    seconds = time.perf_counter() - began
    print(f"\n{f'{findings} cases are WRONG' if findings else 'All checks passed'} ({seconds:.1f} s)")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
