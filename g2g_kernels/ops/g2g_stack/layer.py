"""A spiking layer as ``g2g_stack`` takes it."""

from typing import NamedTuple

import torch

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.ops.neurons.models import Neurons

#: the current, at every step, of a neuron that is dropped: it never fires, every surrogate's derivative is 0 there, and
#: sums over 2^16 steps of two states stay finite
DROPPED = -1e25


class SpikingLayer(NamedTuple):
    """A connection and its neurons.

    Attributes:
        values: packed weights [num_units, unit_rows, unit_cols].
        mask: the units that exist.
        bias: [N], or None.
        neurons: the population, with this layer's own model, reset, surrogate and α.
        dropped: bool [B, N], or None: neurons that stay silent in a sample (their current is −1e25 at every
            step), so that nothing comes from them and no gradient goes through them.
    """

    values: torch.Tensor
    mask: BlockMask
    bias: torch.Tensor | None
    neurons: Neurons
    dropped: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that may need a gradient."""
        connection = [self.values] if self.bias is None else [self.values, self.bias]
        return [*connection, *self.neurons.parameters]
