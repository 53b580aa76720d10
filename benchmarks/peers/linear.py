"""``nn.Linear``, plain and times a mask: the cost of the second layer's product without using its sparsity."""

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GLinear

from ..contender import LinearContender, dense_linear

PEERS = (
    ("masked", "Masked", ("linear", "linear-dense")),
    ("dense", "Dense", ("linear", "linear-dense")),
)


class Dense(LinearContender):
    """The dense layer: weights outside the mask are zero and receive gradients like the rest."""

    masked = False
    differs = "computes gradients of the absent weights too"
    layer: nn.Linear

    def build(self, connection: G2GLinear) -> nn.Module:
        return dense_linear(connection)

    def weight_gradient(self) -> torch.Tensor:
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad


class _MaskedLinear(nn.Linear):
    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Masked(LinearContender):
    """The dense layer, its weight times a mask at every call."""

    layer: _MaskedLinear

    def build(self, connection: G2GLinear) -> nn.Module:
        linear = dense_linear(connection, _MaskedLinear)
        linear.register_buffer("mask", connection.mask.to_dense().float())
        return linear

    def weight_gradient(self) -> torch.Tensor:
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad
