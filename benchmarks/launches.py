"""The launches of a training step, or a part of one, on the Triton backend, recorded without a GPU.

The stack's own Python runs on ``meta`` tensors, which have shapes but no memory. Triton launches are recorded instead
of executed, and so is every PyTorch operation between them. Masks, tile sizes and the choice between kernels are those
of a real step; none of them depends on data.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from g2g_kernels import SpikingLayer
from g2g_kernels.ops.g2g_linear.call import LinearCall
from g2g_kernels.ops.g2g_stack.call import StackCall
from g2g_kernels.ops.g2g_stack.layer import Recurrent
from g2g_kernels.ops.record import Backward
from g2g_kernels.triton import products
from g2g_kernels.triton.runtime import Launch, assuming, recorded
from g2gnet import G2GLinear, G2GNet

from . import costs


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kernel."""

    phase: str  # "forward" or "backward"
    name: str  # the Triton kernel's or the PyTorch operation's
    tensors: dict[str, torch.Tensor]  # that it reads and writes, by the name of the argument; none is listed twice
    #: multiplications and additions of matrix products, over the weights that exist (of dense products over all)
    flop: int
    launch: Launch | None = None  # kernel, grid and arguments, for Triton kernels

    @functools.cached_property
    def factors(self) -> tuple[str, int]:
        """The format of the factors, a key of a card's rates, and how many of its products one product takes."""
        a: dict[str, Any] = {"values": next(iter(self.tensors.values())), "PRECISION": "ieee"}
        a = self.launch.arguments if self.launch else a
        if a["PRECISION"] == "parts":
            return "bf16", 3 if a["x" if "x" in a else "grad_after"].dtype == torch.uint8 else 6
        if a["grad_y" if "grad_y" in a else "values"].dtype != torch.float32:
            return "bf16", 1
        return ("tf32" if a["PRECISION"] == "tf32" else "fp32"), 1

    @functools.cached_property
    def bytes(self) -> int:
        """The least memory traffic: every tensor read or written once."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    @functools.cached_property
    def work(self) -> costs.Work:
        """What the model of :mod:`benchmarks.costs` needs; without products a kernel reads nothing but memory."""
        if self.launch is None:
            return costs.Work(self.flop, self.factors[0] if self.flop else "bf16", self.bytes, self.bytes)
        a, programs = self.launch.arguments, math.prod(self.launch.grid)
        warps = a.get("num_warps", 4)
        if not self.flop:
            return costs.Work(bytes=self.bytes, l2_bytes=self.bytes, programs=programs, warps=warps)
        if self.name == "weight_gradient_kernel":
            m, n, k = a["BLOCK_R"], a["GROUP"] * a["BLOCK_C"], a["samples"]
            # the last group of a row is half full on average
            groups = a["num_units"] / a["GROUP"] + a["num_rows"] * (a["GROUP"] - 1) / (2 * a["GROUP"])
            pairs, left, right = self.launch.grid[2] * groups, a["grad_y"].itemsize, a["x"].itemsize
        else:
            samples, on_chip = a["samples" if "samples" in a else "batch"], a.get("ON_CHIP", 0)
            m, n, k = a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"]
            units = a["num_n"] * on_chip if on_chip else len(a["values"])
            pairs = units * -(-a["N"] // n) * -(-a["K"] // k) * a.get("steps", 1) * -(-samples // m)
            parts = products.PARTS if a["PRECISION"] == "parts" else 1
            left, right = a["x" if "x" in a else "grad_after"].itemsize, 0 if on_chip else a["values"].itemsize * parts
        kind, times = self.factors
        # of so many pairs of tiles [m, k] and [k, n], padding included
        return costs.Work(
            times * 2 * pairs * m * n * k, kind, self.bytes, pairs * k * (m * left + n * right), programs, warps
        )


def _operation_of(launch: Launch, phase: str) -> Operation:
    arguments, name = dict(launch.arguments), launch.kernel.fn.__name__
    for key, value in launch.arguments.items():
        if isinstance(value, tuple):
            arguments |= {f"{key}[{i}]": each for i, each in enumerate(value)}
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    return Operation(phase, name, _distinct(tensors), _flop(name, arguments), launch)


def _flop(name: str, a: dict[str, Any]) -> int:
    """Multiply-adds, counted as two, of a Triton kernel's matrix products."""
    if name == "weight_gradient_kernel":
        return 2 * a["samples"] * a["num_units"] * a["R"] * a["C"]
    if name == "recurrent_backward_kernel" and a["grad_after"] is None:
        return 0
    columns = {"product_kernel": ("samples",), "fused_forward_kernel": ("steps", "batch")}
    columns |= {"recurrent_backward_kernel": ("batch",)}
    if name not in columns:
        return 0
    # the weights of its units, whether they are in memory as they are or by parts
    return 2 * math.prod(a[each] for each in columns[name]) * len(a["values"]) * a["N"] * a["K"]


def _distinct(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without empty ones and those that share the memory of an earlier one."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            seen.setdefault(tensor.untyped_storage()._cdata, name)
    return {name: tensors[name] for name in seen.values()}


class _Recorder(TorchDispatchMode):
    """Records PyTorch's operations among the launches, except those that only create views or allocate memory."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.phase = "forward"
        self.operations: list[Operation] = []
        self._taken = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, made = (
            [leaf for leaf in tree_leaves(of) if isinstance(leaf, torch.Tensor)] for of in ((args, kwargs), result)
        )
        name = function.overloadpacket.__name__
        views = {tensor.untyped_storage()._cdata for tensor in given}
        if "empty" in name or all(tensor.untyped_storage()._cdata in views for tensor in made):
            return result
        self.take_launches()
        count = flop_registry.get(function.overloadpacket)
        tensors = {f"{way} {i}": each for way, of in (("input", given), ("output", made)) for i, each in enumerate(of)}
        flop = count(*args, **kwargs, out_val=result) if count else 0
        self.operations.append(Operation(self.phase, name, _distinct(tensors), flop))
        return result

    def begin(self, phase: str) -> None:
        """Assigns everything from now on to ``phase``."""
        self.take_launches()
        self.phase = phase

    def take_launches(self) -> None:
        """Appends the launches since the last call to the operations."""
        self.operations += [_operation_of(launch, self.phase) for launch in self.launches[self._taken :]]
        self._taken = len(self.launches)


@contextlib.contextmanager
def _recording() -> Iterator[_Recorder]:
    """Records everything that is launched inside."""
    with torch.no_grad(), recorded() as launches, _Recorder(launches) as recorder:
        yield recorder
        recorder.take_launches()


def _stack_step(call: StackCall, inputs: bool = False) -> list[Operation]:
    """The forward and the backward pass of a stack, to its ``inputs`` or its weights alone."""
    from g2g_kernels.ops.g2g_stack import triton as stack

    with _recording() as recorder:
        counts, _, _, *made = stack._forward(call, True)
        recorder.begin("backward")
        given = Backward.of(call, made, [torch.empty_like(counts), *[None] * (2 * len(call.layers))])
        stack._backward(given if inputs else given._replace(needed=(False, *given.needed[1:])))
    return recorder.operations


def training_step(net: G2GNet, batch: int, input_dim: int, dtype: torch.dtype) -> list[Operation]:
    """Everything that the forward and backward pass of ``net`` launch, in order, for a batch held over time.

    Loss and optimizer are not included. ``net``, whose masks are read, moves to the ``meta`` device; ``dtype`` is that
    of the matrix products (bfloat16 under autocast, else float32).
    """
    layers = []
    for (connection, neurons), joined in zip(net.to("meta").layers(), net.recurrents(), strict=True):
        recurrent = None if joined is None else Recurrent(joined.values, joined.mask)
        layer = connection.values, connection.mask, connection.bias, neurons.population
        layers.append(SpikingLayer(*layer, recurrent=recurrent))
    return _stack_step(StackCall.of(torch.empty(batch, input_dim, device="meta"), layers, net.T, dtype))


def layer_step(layer: SpikingLayer, steps: int, batch: int, dtype: torch.dtype, fused: bool) -> list[Operation]:
    """One layer, forward and backward, fused or as a pair; its inputs are the spikes of a layer before it, as bytes."""

    x = torch.empty(steps, batch, layer.mask.shape[1], dtype=torch.uint8, device="meta")
    with assuming(fused=fused):
        return _stack_step(StackCall.of(x, [layer], None, dtype), inputs=True)


def product_step(
    connection: G2GLinear, samples: int, dtype: torch.dtype, wanted: tuple[bool, bool, bool]
) -> list[Operation]:
    """A product alone, with an input of ``dtype``, and the gradients of input, weights and bias that are wanted."""
    from g2g_kernels.ops.g2g_linear import triton as linear

    connection = connection.to("meta")
    x = torch.empty(samples, connection.in_features, dtype=dtype, device="meta")
    call = LinearCall(x, connection.values, connection.mask.tensors(), connection.bias, dtype)
    with _recording() as recorder:
        y = linear._forward(call, True)
        recorder.begin("backward")
        want_x, want_values, want_bias = wanted
        needed = want_x, want_values, False, *([] if call.bias is None else [want_bias])
        linear._backward(Backward.of(call, (), [torch.empty_like(y)], needed))
    return recorder.operations
