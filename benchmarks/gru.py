"""PyTorch's GRU on the data of a training run, with as many weights: the yardstick of :mod:`benchmarks.sequence_study`.

One layer, whose last state a linear layer reads; sequences, standardising, batches, epochs, learning rate and its
schedule are those of the run's settings, which also name the network whose weights are counted. After every epoch all
of it is saved, so that training resumes from there.
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
from g2gnet.base.tensor_files import read_tensors, write_tensors
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
def train(settings: TrainSettings, folder: Path, on_epoch: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Trains the GRU, or resumes it; returns its last epoch: accuracies, seconds of training, parameters.

    Args:
        settings: of the run whose data, batches and learning rates it takes.
        folder: of its files.
        on_epoch: called with a line after each epoch.
    """
    done = finished(settings, folder)
    if done is not None:
        return done
    data = load_dataset(settings.dataset, "data").limited(settings.limit_train, settings.limit_test)
    order = order_of(settings, data)
    mean, deviation = data.moments() if settings.standardize else (0.0, 1.0)

    def sequences(images: torch.Tensor) -> torch.Tensor:
        return unfold((as_samples(images) - mean) / deviation, order)

    net = build(settings, order.shape[1], data.num_classes)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr, weight_decay=settings.weight_decay)
    count, seconds = len(data.train_labels), 0.0
    of_epoch = -(-count // settings.batch_size)
    factor = SCHEDULES[settings.lr_schedule]
    first, path = 0, folder / "gru.pt"
    end: dict[str, Any] = {}
    make_directory(folder)
    if path.exists():
        saved = read_tensors(path)
        _check(path, saved.get("settings", {}), settings)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["epoch"], saved["seconds"]
    for epoch in range(first, settings.epochs):
        began, right = time.perf_counter(), 0
        drawn = torch.randperm(count, generator=stream(settings.seed, "order", epoch))
        for step, chosen in enumerate(drawn.split(settings.batch_size), epoch * of_epoch):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor(step / (of_epoch * settings.epochs))
            labels = data.train_labels[chosen].long()
            logits = net(sequences(data.train_images[chosen]))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            if settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip_grad_norm)
            optimizer.step()
            right += int((logits.argmax(1) == labels).sum())
        seconds += time.perf_counter() - began
        end = {"epoch": epoch + 1, "train_acc": right / count, "test_acc": _accuracy(net, data, sequences)}
        write_tensors(
            path,
            {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "seconds": seconds,
                "settings": settings.as_dict(),
            },
        )
        on_epoch(f"epoch {epoch + 1}: test accuracy {end['test_acc']:.4f}, {seconds:.0f} s")
    if not end:  # it was killed between its last epoch and its end
        end = {"epoch": settings.epochs, "test_acc": _accuracy(net, data, sequences)}
    weights = sum(parameter.numel() for parameter in net.parameters())
    end |= {"train_seconds": seconds, "weights": weights, "hidden_dim": net.recurrent.hidden_size}
    of_run = {"settings": settings.as_dict(), "end": end}
    replace_file(folder / "gru.json", lambda file: file.write(json.dumps(of_run).encode()))
    return end


def finished(settings: TrainSettings, folder: Path) -> dict[str, Any] | None:
    """What :func:`train` returned, or None if it has not finished in this folder.

    Raises:
        TrainingError: if the folder has a run of other settings.
    """
    path = folder / "gru.json"
    if not path.exists():
        return None
    of_run = json.loads(path.read_text(encoding="utf-8"))
    _check(path, of_run.get("settings", {}), settings)
    end: dict[str, Any] = of_run["end"]
    return end


def _check(path: Path, theirs: dict[str, Any], ours: TrainSettings) -> None:
    """Raises TrainingError unless a run was made with these settings."""
    differing = compared(theirs, ours.as_dict())
    if differing:
        raise TrainingError(
            f"{path} belongs to a run with different settings:\n" + "\n".join(differing) + f"\nDelete {path.parent}"
        )


@torch.no_grad()
def _accuracy(net: GRU, data: ImageData, sequences: Callable[[torch.Tensor], torch.Tensor]) -> float:
    batches = zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
    right = sum(int((net(sequences(images)).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(data.test_labels)
