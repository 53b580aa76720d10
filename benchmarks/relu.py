"""A conventional network of the sizes, masks, initial weights and recipe of a spiking one: what does spiking cost?

ReLU stands in place of spiking neurons, and there is no time. All else is that of :class:`g2gnet.training.Trainer`:
images and their changes, order, dropout, optimizer, schedule, checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch

from g2g_kernels import Activity
from g2g_kernels.ops.g2g_stack.layer import Connection
from g2g_kernels.ops.g2g_stack.synapses import Synapses, SynapticOperations
from g2gnet import G2GNet
from g2gnet.base.seeding import stream
from g2gnet.training import Trainer


class ReLUNet(G2GNet):
    """Connections of a :class:`G2GNet` with ReLU between them: [B, D] → logits [B, C].

    A "rate" is the share of the samples for which a neuron is not zero (of the last layer: above zero).
    """

    def simulate(
        self,
        inputs: torch.Tensor,
        state: Any = None,
        chunk: int | None = None,
        *,
        dropped: Sequence[torch.Tensor] | None = None,
        spikes: bool = False,
        membranes: bool = False,
    ) -> Activity:
        layers = [connection for connection, _ in self.layers()]
        drops = dropped if self.training and dropped is not None else [None] * (len(layers) - 1)
        x, rates = inputs, []
        for layer, of_layer in zip(layers, [*drops, None], strict=True):
            logits = layer(x)
            x = logits.relu()
            if of_layer is not None:
                x = x.masked_fill(of_layer, 0) * self._scale
            rates.append((x > 0).float().mean(0))
        return Activity(logits, tuple(rates), (), _Synapses(inputs, layers))


class _Synapses(Synapses):
    """Every input that is not zero costs a multiplication, where a spike costs an addition."""

    def __init__(self, inputs: torch.Tensor, layers: Sequence[Any]) -> None:
        connections = [[Connection(each.values, each.mask, number - 1)] for number, each in enumerate(layers)]
        super().__init__(inputs, 1, connections, [None] * (len(layers) + 1))

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        found = super().operations(rates)
        return tuple(SynapticOperations(0, each.accumulates + each.multiplies, each.dense) for each in found)


class ReLUTrainer(Trainer):
    """Trains a :class:`ReLUNet`, whose neurons have nothing to learn."""

    def _build_network(self, input_dim: int, num_classes: int) -> G2GNet:
        net = ReLUNet.from_settings(
            self.settings, input_dim, num_classes, generator=stream(self.settings.seed, "network")
        )
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith("lif"))
        return net
