"""``g2g_stack``: a stack of g2g linear layers, each followed by neurons, over all time steps in one call.

One operator for the whole stack lets a backend choose what passes between the layers (packed spikes, its own order of
neurons) and how long each tensor lives.
"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch

from g2g_kernels.dispatch import Operator
from g2g_kernels.ops.checks import check_connection, check_tensor
from g2g_kernels.ops.derivatives import refuse_forward_mode
from g2g_kernels.ops.g2g_linear import g2g_linear
from g2g_kernels.ops.g2g_stack import cpu, reference
from g2g_kernels.ops.g2g_stack.activity import Activity, Spikes
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.g2g_stack.reference import activity_of, silenced
from g2g_kernels.ops.g2g_stack.synapses import Synapses, SynapticOperations
from g2g_kernels.ops.neurons import neurons
from g2g_kernels.ops.neurons.checks import check_neurons, check_steps
from g2g_kernels.tracing import is_transformed

__all__ = [
    "Activity", "Spikes", "SpikingLayer", "Synapses", "SynapticOperations", "activity_of", "check_dropped", "g2g_stack",
    "silenced",
]  # fmt: skip


def _triton() -> ModuleType:
    from g2g_kernels.ops.g2g_stack import triton  # imports Triton, which is optional

    return triton


operator = Operator("g2g_stack")
operator.register_module("triton", _triton)
operator.register("cpu", cpu.g2g_stack, cpu.refuses)
operator.register("torch", reference.g2g_stack, reference.refuses)


def g2g_stack(
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None = None,
    backend: str | None = None,
    spikes: bool = False,
) -> Activity:
    """Runs ``neurons(g2g_linear(·))`` for each layer in turn; differentiable in x and in every tensor of the layers.

    Args:
        x: [T, B, in], or with ``steps`` given [B, in], held for that many steps (the first product is then
            computed once).
        layers: the layers, each one's outputs the next one's inputs. Each layer has its own model, reset, surrogate and
            α.
        steps, backend: as for :func:`g2g_kernels.lif`.
        spikes: whether spikes over time need a gradient, for a loss on when neurons fire. The operators then run one
            after the other, and spikes and currents of all layers are in memory.

    Raises:
        ValueError: for options out of range, or tensors that do not match.
        BackendError: if the forced backend cannot serve the call.
        NotImplementedError: for a second derivative, or one in forward mode.
    """
    steps = check_steps(steps)
    check_tensor("x", x)
    if not layers:
        raise ValueError("layers is empty; give at least one SpikingLayer")
    expected = 2 if steps is not None else 3
    if x.dim() != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [T, B, in], or [B, in] with steps")
    if steps is None and len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there must be at least one time step")
    size = x.shape[-1]
    checked = []
    for number, layer in enumerate(layers):
        suffix = f" of layer {number}"
        check_connection(suffix, layer.values, layer.mask, layer.bias)
        out_size, in_size = layer.mask.shape
        if in_size != size:
            raise ValueError(f"layer {number} has {in_size} inputs but receives {size}")
        if layer.dropped is not None:
            check_dropped(suffix, layer.dropped, (x.shape[-2], out_size))
        checked.append(layer._replace(neurons=check_neurons(suffix, layer.neurons, out_size, x)))
        size = out_size
    refuse_forward_mode(x, *(tensor for layer in checked for tensor in layer.tensors()))
    if spikes or is_transformed():
        linear, population = partial(g2g_linear, backend=backend), partial(neurons, backend=backend)
        activity = activity_of(reference.in_turn(x, checked, steps, linear, population), differentiable=spikes)
    else:
        activity = operator(x, checked, steps, backend=backend)
    if torch.compiler.is_compiling():
        return activity
    return activity._replace(synapses=Synapses(x, steps, [(layer.values, layer.mask) for layer in checked]))


def check_dropped(suffix: str, dropped: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``dropped`` is bool [B, N], which is ``shape``."""
    if not isinstance(dropped, torch.Tensor) or dropped.dtype != torch.bool or tuple(dropped.shape) != shape:
        what = f"{dropped.dtype} {tuple(dropped.shape)}" if isinstance(dropped, torch.Tensor) else repr(dropped)
        raise ValueError(f"dropped{suffix} must be bool {shape}, one entry per sample and neuron, not {what}")
