"""PyTorch's GRU on the data of a training run, with as many weights: the yardstick of the study of sequences.

One layer, whose last state a linear layer reads; sequences, standardising, batches, epochs, learning rate and its
schedule are those of the run's settings, which also name the network whose weights are counted.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.data import ImageData, as_samples
from g2gnet.sequences import unfold
from g2gnet.training import Machine, TrainSettings
from g2gnet.training.epochs import EpochTrainer
from g2gnet.training.samples import order_of
from g2gnet.training.saved_state import load_model


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


def build(settings: TrainSettings, input_dim: int, num_classes: int) -> GRU:
    """A GRU of as many weights as the network of ``settings``, with initial weights from its seed."""
    net = G2GNet.from_settings(settings, input_dim, num_classes, generator=torch.Generator().manual_seed(settings.seed))
    weights = sum(connection.mask.num_weights for connection in net.connections().values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return GRU(input_dim, width_of(weights, input_dim, num_classes), num_classes)


class GRUTrainer(EpochTrainer):
    """Trains the GRU of :func:`build`."""

    optimizer_state = ("step", "exp_avg", "exp_avg_sq")
    net: GRU

    def __init__(self, settings: TrainSettings, data: ImageData, machine: Machine) -> None:
        super().__init__(settings, data, machine.device)
        self.lr_schedule, self._clip = settings.lr_schedule, settings.clip_grad_norm
        self._order = order_of(settings, data)
        self._mean, self._deviation = self.data.moments() if settings.standardize else (0.0, 1.0)
        self.net = build(settings, self._order.shape[1], data.num_classes)
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
