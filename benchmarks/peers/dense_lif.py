"""Dense ``nn.Linear`` over all time steps with g2g's LIF: the gain of layer-by-layer evaluation alone.

The LIF runs on the best available backend; ``fc1`` is computed once, as its input is the same at every step.
"""

from torch import nn

from ..contender import LayerByLayer, NetworkContender, dense_linear
from ..workload import Prepared

PEERS = (("dense-lif", "DenseLIF", ("step", "forward")),)


class DenseLIF(NetworkContender):
    """The network with dense weights: those outside the mask start at zero and are trained like the rest."""

    masked = False
    differs = "computes and trains the absent weights too"

    def build(self, prepared: Prepared) -> nn.Module:
        return LayerByLayer(prepared, dense_linear)
