"""PyTorch's GRU on the data of a training run, with as many weights: the yardstick of the study of sequences.

One layer, whose last state a linear layer reads; sequences, standardising, batches, epochs, learning rate and its
schedule are those of the run's settings, which also name the network whose weights are counted. It takes minutes, and
begins anew where it was stopped.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.base.files import make_directory, replace_file
from g2gnet.base.schedules import SCHEDULES
from g2gnet.base.seeding import stream
from g2gnet.data import ImageData, as_samples, load_dataset
from g2gnet.sequences import unfold
from g2gnet.training import TrainingError, TrainSettings
from g2gnet.training.checkpoints import compared
from g2gnet.training.samples import order_of

from .machine import flushed_denormals


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


@flushed_denormals()  # over 196 steps its gradients fall from 1e-3 to 1e-42
def train(settings: TrainSettings, folder: Path) -> None:
    """Trains the GRU; :func:`finished` gives its last epoch."""
    data = load_dataset(settings.dataset, "data").limited(settings.limit_train, settings.limit_test)
    order = order_of(settings, data)
    mean, deviation = data.moments() if settings.standardize else (0.0, 1.0)

    def sequences(images: torch.Tensor) -> torch.Tensor:
        return unfold((as_samples(images) - mean) / deviation, order)

    net = build(settings, order.shape[1], data.num_classes)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr, weight_decay=settings.weight_decay)
    count, seconds, right = len(data.train_labels), 0.0, 0
    steps = settings.epochs * -(-count // settings.batch_size)
    rates = (settings.lr * SCHEDULES[settings.lr_schedule](step / steps) for step in range(steps))
    for epoch in range(settings.epochs):
        began, right = time.perf_counter(), 0
        for chosen in torch.randperm(count, generator=stream(settings.seed, "order", epoch)).split(settings.batch_size):
            optimizer.param_groups[0]["lr"] = next(rates)
            labels = data.train_labels[chosen].long()
            logits = net(sequences(data.train_images[chosen]))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            if settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip_grad_norm)
            optimizer.step()
            right += int((logits.argmax(1) == labels).sum())
        seconds += time.perf_counter() - began
    end = {
        "epoch": settings.epochs,
        "train_acc": right / count,
        "test_acc": _accuracy(net, data, sequences),
        "train_seconds": seconds,
        "weights": sum(parameter.numel() for parameter in net.parameters()),
        "hidden_dim": net.recurrent.hidden_size,
    }
    of_run = {"settings": settings.as_dict(), "end": end}
    make_directory(folder)
    replace_file(folder / "gru.json", lambda file: file.write(json.dumps(of_run).encode()))


def finished(settings: TrainSettings, folder: Path) -> dict[str, Any] | None:
    """The last epoch, seconds of training and weights, or None if it has not finished in this folder.

    Raises:
        TrainingError: if the folder has a run of other settings.
    """
    path = folder / "gru.json"
    if not path.exists():
        return None
    of_run = json.loads(path.read_text(encoding="utf-8"))
    differing = compared(of_run.get("settings", {}), settings.as_dict())
    if differing:
        raise TrainingError(
            f"{path} belongs to a run with different settings:\n" + "\n".join(differing) + f"\nDelete {path.parent}"
        )
    end: dict[str, Any] = of_run["end"]
    return end


@torch.no_grad()
def _accuracy(net: GRU, data: ImageData, sequences: Callable[[torch.Tensor], torch.Tensor]) -> float:
    batches = zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
    right = sum(int((net(sequences(images)).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(data.test_labels)
