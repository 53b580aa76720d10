"""g2g on one backend: the network, and its neurons, its product and its DST update alone."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from g2g_kernels import lif, synaptic
from g2g_kernels.triton import runtime
from g2gnet import DSTScheduler, G2GLinear, G2GNet
from g2gnet.dst.rules import unit_correlation

from .contender import (
    CompiledContender,
    Kept,
    LinearContender,
    NetworkContender,
    NeuronContender,
    UpdateContender,
    keep,
)
from .reference import UPDATE_FRACTION
from .workload import Prepared


class Network(NetworkContender):
    """:class:`g2gnet.G2GNet` as ``train.py`` runs it, on the backend called ``backend``."""

    net: G2GNet

    def make(self, prepared: Prepared) -> None:
        super().make(prepared)
        w = prepared.workload
        if w.surrogate != "atan":
            self.differs = (
                f"surrogate {w.surrogate}, alpha {w.alpha:g}, in the hidden layers, all others ATan; trained so, to a "
                f"test accuracy of {prepared.test_accuracy:.2f}"
            )

    def build(self, prepared: Prepared) -> nn.Module:
        return prepared.network(self.backend)

    def counts(self, kept: Kept | None = None) -> torch.Tensor:
        if kept is None:
            return self.net(self.images)
        activity = self.net.simulate(self.net.encode(self.images))  # what the network does when it is called
        for layer, spikes in enumerate(activity.spikes):
            keep(spikes.dense(), kept, layer)
        return activity.counts


class Compiled(CompiledContender, Network):
    """:class:`Network` through ``torch.compile``."""


class Pair(Network):
    """:class:`Network`, each layer by a pair of kernels, where a fused one would be chosen, too."""

    def make(self, prepared: Prepared) -> None:
        self._choice = runtime.assuming(fused=False)
        self._choice.__enter__()  # as long as its process lives, which has no other contender
        super().make(prepared)


class Neurons(NeuronContender):
    """:func:`g2g_kernels.lif` or :func:`g2g_kernels.synaptic` on the backend called ``backend``."""

    functions: ClassVar[dict[str, Callable[..., torch.Tensor]]] = {"lif_inputs": lif, "synaptic_inputs": synaptic}

    def run(self) -> torch.Tensor:
        spikes = self.functions[self.inputs](self.current, **self.parameters, backend=self.backend)
        spikes.backward(self.grad_spikes)
        return spikes


class Linear(LinearContender):
    """:func:`g2g_kernels.g2g_linear` on the backend called ``backend``."""

    def build(self, connection: G2GLinear) -> nn.Module:
        connection.backend = self.backend
        return connection


class Update(UpdateContender):
    """:class:`g2gnet.DSTScheduler` on spikes as the backend called ``backend`` keeps them."""

    def make(self, prepared: Prepared) -> None:
        super().make(prepared)
        self.net = prepared.network(self.backend).to(self.device)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.0, fused=True)
        self.activity = self.net.simulate(self.images)
        self.activity.counts.sum().backward()
        optimizer.step()  # moments, which an update resets
        self.connections = [connection for connection, _ in self.net.layers()]
        self.scheduler = DSTScheduler(self.connections, optimizer, interval=1, fraction=UPDATE_FRACTION)
        self.start = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}

    def before_turn(self) -> None:
        self.net.load_state_dict(self.start)
        self.scheduler.steps = 0

    def step(self) -> None:
        self.scheduler.step(self.images, self.activity)

    def spikes(self) -> list[torch.Tensor]:
        return [layer.dense() for layer in self.activity.spikes]

    def correlations(self) -> list[torch.Tensor]:
        spikes = [self.images, *self.spikes()]
        return [
            unit_correlation(pre, post, connection.mask)
            for pre, post, connection in zip(spikes, spikes[1:], self.connections, strict=False)
        ]

    def units(self) -> list[torch.Tensor]:
        return [connection.mask.present() for connection in self.connections]
