"""The activity of a stack of spiking layers: counts, rates, spikes in a backend's own form, synaptic operations."""

from typing import NamedTuple, Protocol

import torch

from g2g_kernels.ops.g2g_stack.synapses import Synapses, SynapticOperations


class Spikes(Protocol):
    """Spikes of one layer, in a backend's own form."""

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order; without gradient unless requested."""
        ...


class DenseSpikes:
    """Spikes of one layer kept as the float tensor that the backend computed."""

    def __init__(self, spikes: torch.Tensor) -> None:
        self._spikes = spikes

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order."""
        return self._spikes


class Activity(NamedTuple):
    """The activity of a stack of spiking layers.

    Attributes:
        counts: [B, N] of the last layer, spikes per neuron over all steps; differentiable.
        rates: one [N] per layer, spikes per neuron, step and sample (0 to 1); differentiable.
        spikes: one object per layer, whose ``dense()`` gives the spikes [T, B, N], with a gradient only if the call
            requested ``spikes``.
        synapses: what :meth:`synaptic_operations` counts; None if they are unknown.
    """

    counts: torch.Tensor
    rates: tuple[torch.Tensor, ...]
    spikes: tuple[Spikes, ...]
    synapses: Synapses | None = None

    def synaptic_operations(self) -> tuple[SynapticOperations, ...]:
        """The additions and multiplications that spikes (and inputs) caused in each layer, over all steps and samples.

        For one sample, divide by the size of the batch. Waits for the device.

        Raises:
            RuntimeError: if inputs, weights or masks have changed since the run, or if the run was compiled.
        """
        if self.synapses is None:
            raise RuntimeError(
                "this run does not keep what its synaptic operations are counted from: it was compiled or traced, or a "
                "connection is no G2GLinear; run it uncompiled"
            )
        return self.synapses.operations(self.rates[:-1])
