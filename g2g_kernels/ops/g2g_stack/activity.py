"""The activity of a stack of spiking layers: counts, rates, and spikes in a backend's own form."""

from typing import NamedTuple, Protocol

import torch


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
    """

    counts: torch.Tensor
    rates: tuple[torch.Tensor, ...]
    spikes: tuple[Spikes, ...]
