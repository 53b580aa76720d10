"""g2g itself: the network on one backend, and its neurons alone."""

import torch
from torch import nn

from benchmarks.contender import NetworkContender, NeuronContender
from benchmarks.reference import Results
from benchmarks.workload import Prepared
from g2g_kernels import lif
from g2gnet import G2GNet


class Network(NetworkContender):
    """:class:`g2gnet.G2GNet` as ``train.py`` runs it, on the backend called ``backend``."""

    net: G2GNet

    def __init__(self, prepared: Prepared, device: torch.device, precision: str, backend: str) -> None:
        self.backend = backend
        super().__init__(prepared, device, precision)

    def build(self, prepared: Prepared) -> nn.Module:
        return prepared.network(self.backend)

    def gradients(self) -> Results:
        gradients: Results = {}
        for number, (connection, neurons) in enumerate(self.net.layers(), 1):
            for name, gradient in {
                f"fc{number}.weight": connection.values.grad,
                f"fc{number}.bias": connection.bias.grad if connection.bias is not None else None,
                f"lif{number}.beta": neurons.beta.grad,
                f"lif{number}.threshold": neurons.threshold.grad,
            }.items():
                if gradient is not None:
                    gradients[name] = connection.mask.unpack(gradient) if name.endswith("weight") else gradient
        return gradients

    @torch.no_grad()
    def firing_rates(self) -> list[float]:
        with self.autocast():
            rates = self.net.simulate(self.net.encode(self.images)).rates
        return [float(layer.float().mean()) for layer in rates]


class Neurons(NeuronContender):
    """:func:`g2g_kernels.lif` on the backend called ``backend``."""

    def __init__(self, prepared: Prepared, device: torch.device, precision: str, backend: str) -> None:
        super().__init__(prepared, device, precision)
        self.backend = backend

    def run(self) -> torch.Tensor:
        spikes = lif(self.current, self.beta, self.threshold, backend=self.backend)
        spikes.backward(self.grad_spikes)
        return spikes
