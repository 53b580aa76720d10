"""A spiking layer as ``g2g_stack`` takes it."""

from typing import NamedTuple

import torch

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.ops.neurons.models import Neurons


class SpikingLayer(NamedTuple):
    """A connection and its neurons.

    Attributes:
        values: packed weights [num_units, unit_rows, unit_cols].
        mask: the units that exist.
        bias: [N], or None.
        neurons: the population; model, reset, surrogate and α are this layer's own.
    """

    values: torch.Tensor
    mask: BlockMask
    bias: torch.Tensor | None
    neurons: Neurons

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that a gradient may be asked for."""
        connection = [self.values] if self.bias is None else [self.values, self.bias]
        return [*connection, *self.neurons.parameters]
