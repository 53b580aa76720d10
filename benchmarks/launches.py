"""What a training step launches on the Triton backend, found out without a GPU.

The stack's own Python runs on ``meta`` tensors, which have shapes and no memory: Triton launches are noted instead of
done, and so is every PyTorch operation between them. Masks, tile sizes and the choice between kernels are those of a
real step; what is data-dependent is none of this.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from g2g_kernels import SpikingLayer
from g2g_kernels.ops.g2g_stack.call import StackBackward, StackCall
from g2g_kernels.triton.runtime import Launch, recorded
from g2gnet import G2GNet


@dataclasses.dataclass(frozen=True)
class Operation:
    """One kernel.

    Attributes:
        phase: ``"forward"`` or ``"backward"``.
        name: the Triton kernel's or the PyTorch operation's.
        tensors: what it reads and writes, by the name of its argument. None is listed twice.
        flop: multiplications and additions of matrix products, over the weights that exist (over all of them where the
            dense product serves); 0 for everything else.
        launch: kernel, grid and arguments, for Triton kernels.
    """

    phase: str
    name: str
    tensors: dict[str, torch.Tensor]
    flop: int
    launch: Launch | None = None

    @functools.cached_property
    def bytes(self) -> int:
        """The least memory traffic: every tensor read or written once."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())


def _flop(name: str, arguments: dict[str, Any]) -> int:
    """Multiply-adds, counted as two, of a Triton kernel's matrix products."""
    match name:
        case "product_kernel":
            return 2 * arguments["samples"] * arguments["values"].numel()
        case "fused_forward_kernel":
            return 2 * arguments["steps"] * arguments["batch"] * arguments["values"].numel()
        case "weight_gradient_kernel":
            return 2 * arguments["samples"] * arguments["num_units"] * arguments["R"] * arguments["C"]
    return 0


def _operation_of(launch: Launch, phase: str) -> Operation:
    arguments = dict(launch.arguments)
    for name, value in launch.arguments.items():
        if isinstance(value, tuple):
            arguments |= {f"{name}[{i}]": each for i, each in enumerate(value)}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    name = launch.kernel.fn.__name__
    return Operation(phase, name, _distinct(tensors), _flop(name, arguments), launch)


def _distinct(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the empty ones, and those that share the memory of an earlier one."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            seen.setdefault(tensor.untyped_storage()._cdata, name)
    return {name: tensors[name] for name in seen.values()}


class _Recorder(TorchDispatchMode):
    """Notes PyTorch's operations in their places among the launches, but none that only name or allocate memory."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches
        self.phase = "forward"
        self.operations: list[Operation] = []
        self._taken = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = function.overloadpacket.__name__
        views = {tensor.untyped_storage()._cdata for tensor in given}
        if "empty" in name or all(tensor.untyped_storage()._cdata in views for tensor in made):
            return result
        self.take_launches()
        count = flop_registry.get(function.overloadpacket)
        tensors = {f"input {i}": tensor for i, tensor in enumerate(given)} | {
            f"output {i}": tensor for i, tensor in enumerate(made)
        }
        flop = count(*args, **kwargs, out_val=result) if count else 0
        self.operations.append(Operation(self.phase, name, _distinct(tensors), flop))
        return result

    def take_launches(self) -> None:
        """Puts the launches since the last call behind the operations so far."""
        self.operations += [_operation_of(launch, self.phase) for launch in self.launches[self._taken :]]
        self._taken = len(self.launches)


@torch.no_grad()
def training_step(net: G2GNet, batch: int, input_dim: int, dtype: torch.dtype) -> list[Operation]:
    """Everything that forward and backward pass of ``net`` launch for a batch of samples held over time, in order.

    Loss and optimizer are not part of it.

    Args:
        net: the network, whose masks are read; it moves to the ``meta`` device.
        batch, input_dim: the shape of the samples.
        dtype: of the matrix products (bfloat16 under autocast, else float32).
    """
    from g2g_kernels.ops.g2g_stack import triton as stack

    layers = [
        SpikingLayer(connection.values, connection.mask, connection.bias, neurons.population)
        for connection, neurons in net.to("meta").layers()
    ]
    call = StackCall.of(torch.empty(batch, input_dim, device="meta"), layers, net.T, dtype)
    with recorded() as launches, _Recorder(launches) as recorder:
        counts, _, spikes, kept = stack._forward(call._replace(keep=True))
        recorder.take_launches()
        recorder.phase = "backward"
        stack._backward(StackBackward(call, tuple(spikes), tuple(kept), torch.empty_like(counts), None, False))
        recorder.take_launches()
    return recorder.operations
