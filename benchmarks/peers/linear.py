"""``nn.Linear``, plain and times a mask: the cost of the second layer's product without using its sparsity."""

from torch import nn

from g2gnet import G2GLinear

from ..contender import LinearContender, dense_linear, masked_linear

PEERS = (("masked", "Masked", ("linear", "linear-dense")), ("dense", "Dense", ("linear", "linear-dense")))


class Masked(LinearContender):
    """The dense layer, its weight times a mask at every call."""

    def build(self, connection: G2GLinear) -> nn.Module:
        return masked_linear(connection)


class Dense(LinearContender):
    """The dense layer: weights outside the mask are zero and receive gradients like the rest."""

    masked = False
    differs = "computes gradients of the absent weights too"

    def build(self, connection: G2GLinear) -> nn.Module:
        return dense_linear(connection)
