"""Conventional networks in the place of spiking ones, as yardsticks of the studies.

With ReLU in place of spiking neurons and without time, a network has the sizes, masks, initial weights and recipe of
the spiking one: what does spiking cost? All else is that of :class:`g2gnet.training.Trainer`: images and their changes,
order, dropout, optimizer, schedule, checkpoints.

On sequences it is PyTorch's GRU with as many weights. One layer, whose last state a linear layer reads; sequences,
standardising, batches, epochs, learning rate and its schedule are those of the run's settings, which also name the
network whose weights are counted.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from g2g_kernels import Activity, Connection, Population
from g2g_kernels.ops.g2g_stack import Call
from g2g_kernels.ops.g2g_stack.activity import Synapses, SynapticOperations
from g2g_kernels.ops.g2g_stack.images import through
from g2gnet import G2GLinear, G2GNet
from g2gnet.base.seeding import stream
from g2gnet.data import ImageData, as_samples
from g2gnet.dst.gradual_pruning import unit_sizes
from g2gnet.images import Shape, images_of
from g2gnet.sequences import unfold
from g2gnet.training import Machine, Trainer, TrainSettings
from g2gnet.training.checks import order_of
from g2gnet.training.epochs import EpochTrainer
from g2gnet.training.saved_state import load_model


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
        **options: Any,
    ) -> Activity:
        layers = [connection for connection, _ in self.layers()]
        products = [self._product(number, layer) for number, layer in enumerate(layers)]
        drops = dropped if self.training and dropped is not None else [None] * (len(layers) - 1)
        x, rates = inputs, []
        for product, of_layer in zip(products, [*drops, None], strict=True):
            logits = product(x)
            x = logits.relu()
            if of_layer is not None:
                x = x.masked_fill(of_layer, 0) * self._scale
            rates.append((x > 0).float().mean(0))
        images = len(self.shapes["input"]) == 3
        return Activity(logits, tuple(rates), (), _EveryWeight(self) if images else _Synapses(inputs, layers))

    def _product(self, number: int, layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """A layer of flattened images or neurons [B, N], with the pools before it."""
        (name,) = [each.name for each in self.projections() if each.target == number]
        images = images_of(self._paths[name], layer, [*self.shapes.values()][number])
        if images is None:
            return layer
        return lambda x: through(images, x, layer, flat=isinstance(layer, G2GLinear))


class _EveryWeight(Synapses):
    """Every weight of a network of images costs a multiplication at each of its pixels, as they are computed."""

    def __init__(self, net: G2GNet) -> None:
        self._net = net

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        counted = []
        for (layer, _), shape in zip(self._net.layers(), [*self._net.shapes.values()][1:], strict=True):
            done = int(unit_sizes(layer).sum()) * math.prod(shape[1:])
            counted.append(SynapticOperations(0, done, math.prod(layer.mask.shape) * layer.weights_of_place))
        return tuple(counted)


class _Synapses(Synapses):
    """Every input that is not zero costs a multiplication, where a spike costs an addition."""

    def __init__(self, inputs: torch.Tensor, layers: Sequence[Any]) -> None:
        joins = [Connection("linear", each.values, each.mask, number - 1) for number, each in enumerate(layers)]
        neurons: Any = None
        super().__init__(Call(inputs, tuple([Population(neurons, (each,)) for each in joins]), 1), ())

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        found = super().operations(rates)
        return tuple(SynapticOperations(0, each.accumulates + each.multiplies, each.dense) for each in found)


class ReLUTrainer(Trainer):
    """Trains a :class:`ReLUNet`, whose neurons have nothing to learn."""

    def _build_network(self, input_shape: Shape, num_classes: int) -> G2GNet:
        net = ReLUNet.from_settings(
            self.settings, input_shape, num_classes, generator=stream(self.settings.seed, "network")
        )
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith("lif"))
        return net


class GRU(nn.Module):
    """Sequences [T, B, D] → logits [B, C]."""

    def __init__(self, input_dim: int, hidden_dim: int, num_classes: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(input_dim, hidden_dim)
        self.read_out = nn.Linear(hidden_dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, last = self.recurrent(x)
        return self.read_out(last[-1])


def width_of(weights: int, input_dim: int, num_classes: int) -> int:
    """The hidden size at which a GRU has ``weights`` parameters: 3·h·(D + h + 2) + C·(h + 1)."""
    linear = 3 * (input_dim + 2) + num_classes
    return max(1, round((math.sqrt(linear**2 + 12 * max(0, weights - num_classes)) - linear) / 6))


def build_gru(settings: TrainSettings, input_dim: int, num_classes: int) -> GRU:
    """A GRU of as many weights as the network of ``settings``, with initial weights from its seed."""
    net = G2GNet.from_settings(settings, input_dim, num_classes, generator=torch.Generator().manual_seed(settings.seed))
    weights = sum(connection.mask.num_weights for connection in net.connections().values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return GRU(input_dim, width_of(weights, input_dim, num_classes), num_classes)


class GRUTrainer(EpochTrainer):
    """Trains the GRU of :func:`build_gru`."""

    optimizer_state = ("step", "exp_avg", "exp_avg_sq")
    net: GRU

    def __init__(self, settings: TrainSettings, data: ImageData, machine: Machine) -> None:
        super().__init__(settings, data, machine.device)
        self.lr_schedule, self._clip = settings.lr_schedule, settings.clip_grad_norm
        self._order = order_of(settings, data)
        self._mean, self._deviation = self.data.moments() if settings.standardize else (0.0, 1.0)
        self.net = build_gru(settings, self._order.shape[1], data.num_classes)
        self.optimizer = torch.optim.Adam(self.net.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self._watch(settings.lr)

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(unfold((as_samples(images) - self._mean) / self._deviation, self._order))

    def _train_step(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = self.data.train_labels[index].long()
        logits = self._logits(self.data.train_images[index])
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self._finite.note(loss.detach())
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self._clip)
        self.optimizer.step()
        self._stepped()
        return {"loss": loss.detach() * len(index), "correct": (logits.argmax(1) == labels).sum()}

    def _measures(self, progress: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        weights = sum(parameter.numel() for parameter in self.net.parameters())
        about = {"weights": weights, "hidden_dim": self.net.recurrent.hidden_size}
        return {f"{part}_acc": self._accuracy(part) for part in self.judges}, about

    def test(self, state: dict[str, Any]) -> float:
        load_model(self.net, state["model"])
        return self._accuracy("test")

    @torch.no_grad()
    def _accuracy(self, part: str) -> float:
        images, labels = self.data.part(part)
        batches = zip(images.split(1000), labels.split(1000), strict=True)
        return sum(int((self._logits(some).argmax(1) == of).sum()) for some, of in batches) / len(labels)
