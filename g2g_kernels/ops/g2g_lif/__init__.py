"""``g2g_lif``: a stack of g2g linear layers, each followed by LIF neurons, over all time steps in one call.

One operator over the whole stack leaves a backend free to choose what travels between the layers (packed spikes, its
own order of neurons) and what lives how long.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.dispatch import Operator
from g2g_kernels.ops.checks import check_connection, check_tensor
from g2g_kernels.ops.g2g_lif import cpu, reference
from g2g_kernels.ops.lif import check_options, check_parameter


def _triton() -> ModuleType:
    from g2g_kernels.ops.g2g_lif import triton  # imports Triton, which not everyone has

    return triton


operator = Operator("g2g_lif")


class LIFLayer(NamedTuple):
    """The tensors of one layer: packed weights, their mask, the bias [N] or None, β and θ (scalars or [N])."""

    values: torch.Tensor
    mask: BlockMask
    bias: torch.Tensor | None
    beta: torch.Tensor
    threshold: torch.Tensor


class Spikes(Protocol):
    """Spikes of one layer, in whatever form a backend keeps them."""

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        ...


class DenseSpikes:
    """Spikes of one layer kept as the float tensor that the backend computed."""

    def __init__(self, spikes: torch.Tensor) -> None:
        self._spikes = spikes.detach()

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        return self._spikes


class Activity(NamedTuple):
    """What a stack of spiking layers did.

    Attributes:
        counts: [B, N] of the last layer, spikes per neuron over all steps; differentiable.
        rates: one [N] a layer, spikes per neuron, step and sample (0 to 1); differentiable.
        spikes: one object a layer, whose ``dense()`` gives the spikes [T, B, N] without gradient.
    """

    counts: torch.Tensor
    rates: tuple[torch.Tensor, ...]
    spikes: tuple[Spikes, ...]


def _torch(x: torch.Tensor, layers: Sequence[LIFLayer], *options: Any) -> Activity:
    spikes = reference.g2g_lif(x, layers, *options)
    return Activity(
        counts=spikes[-1].float().sum(0) if spikes[-1].dtype.itemsize < 4 else spikes[-1].sum(0),
        rates=tuple(s.mean((0, 1), dtype=torch.promote_types(s.dtype, torch.float32)) for s in spikes),
        spikes=tuple(DenseSpikes(s) for s in spikes),
    )


operator.register_module("triton", _triton)
operator.register("cpu", cpu.g2g_lif, cpu.refuses)
operator.register("torch", _torch)


def g2g_lif(
    x: torch.Tensor,
    layers: Sequence[LIFLayer],
    steps: int | None = None,
    reset: str = "subtract",
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: str | None = None,
) -> Activity:
    """Runs ``lif(g2g_linear(·))`` for each layer in turn; differentiable in x and in every tensor of the layers.

    Args:
        x: [T, B, in], or with ``steps`` given [B, in], held for that many steps (the first product is then
            computed once).
        layers: the layers, the outputs of one being the inputs of the next.
        steps, reset, surrogate, alpha, backend: as for :func:`g2g_kernels.lif`.

    Raises:
        ValueError: for options out of range, or tensors that do not fit one another.
        BackendError: if the forced backend cannot serve the call.
    """
    check_options(steps, reset, surrogate, alpha)
    check_tensor("x", x)
    if not layers:
        raise ValueError("layers is empty; give at least one LIFLayer")
    expected = 2 if steps is not None else 3
    if x.dim() != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [T, B, in], or [B, in] with steps")
    if steps is None and len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there must be at least one time step")
    size = x.shape[-1]
    checked = []
    for number, layer in enumerate(layers):
        check_connection(f" of layer {number}", layer.values, layer.mask, layer.bias)
        out_size, in_size = layer.mask.shape
        if in_size != size:
            raise ValueError(f"layer {number} has {in_size} inputs but receives {size}")
        beta, threshold = (
            check_parameter(f"{name} of layer {number}", value, out_size, x)
            for name, value in (("beta", layer.beta), ("threshold", layer.threshold))
        )
        checked.append(LIFLayer(layer.values, layer.mask, layer.bias, beta, threshold))
        size = out_size
    return operator(x, checked, steps, reset, surrogate, alpha, backend=backend)
