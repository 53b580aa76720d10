"""What a stack of spiking layers did: counts, rates, and spikes in whatever form a backend keeps them."""

from typing import NamedTuple, Protocol

import torch


class Spikes(Protocol):
    """Spikes of one layer, in whatever form a backend keeps them."""

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order; without gradient unless it was asked for."""
        ...


class DenseSpikes:
    """Spikes of one layer kept as the float tensor that the backend computed."""

    def __init__(self, spikes: torch.Tensor) -> None:
        self._spikes = spikes

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order."""
        return self._spikes


class Activity(NamedTuple):
    """What a stack of spiking layers did.

    Attributes:
        counts: [B, N] of the last layer, spikes per neuron over all steps; differentiable.
        rates: one [N] a layer, spikes per neuron, step and sample (0 to 1); differentiable.
        spikes: one object a layer, whose ``dense()`` gives the spikes [T, B, N], with a gradient only if the call asked
            for ``spikes``.
    """

    counts: torch.Tensor
    rates: tuple[torch.Tensor, ...]
    spikes: tuple[Spikes, ...]
