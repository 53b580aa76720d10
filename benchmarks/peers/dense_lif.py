"""Dense ``nn.Linear`` over all time steps with g2g's LIF: the gain of layer-by-layer evaluation alone.

The LIF runs on the best available backend; ``fc1`` is computed once, as its input is the same at every step.
"""

import torch
from torch import nn

from g2gnet import LIF

from ..contender import Kept, NetworkContender, dense_linear, keep
from ..workload import Prepared

PEERS = (("dense-lif", "DenseLIF", ("step", "forward")),)


class _Network(nn.Module):
    fc1: nn.Linear
    fc2: nn.Linear
    fc3: nn.Linear
    lif1: LIF
    lif2: LIF
    lif3: LIF

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        self.steps = prepared.workload.T
        for number, (connection, neurons) in enumerate(prepared.network().layers(), 1):
            self.add_module(f"fc{number}", dense_linear(connection))
            self.add_module(f"lif{number}", neurons)

    def forward(self, images: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
        x = keep(self.lif1(self.fc1(images), steps=self.steps), kept, 0)
        x = keep(self.lif2(self.fc2(x)), kept, 1)
        return keep(self.lif3(self.fc3(x)), kept, 2).sum(0, dtype=torch.float32)


class DenseLIF(NetworkContender):
    """The network with dense weights: those outside the mask start at zero and are trained like the rest."""

    masked = False
    differs = "computes and trains the absent weights too"

    def build(self, prepared: Prepared) -> nn.Module:
        return _Network(prepared)
