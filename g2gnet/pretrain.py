"""``python -m g2gnet.pretrain`` trains a CIFAR ResNet-32, whose features ``train.py --use_resnet`` can use.

SGD with momentum and cosine decay, random crops and flips: the recipe and the values of the published weights
(chenyaofo/pytorch-cifar-models, logs/cifar10/resnet32/default.log).
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from g2gnet import cli
from g2gnet.data import ImageData, load_dataset, random_crop_and_flip
from g2gnet.features import new_resnet
from g2gnet.features.weights import RELEASES
from g2gnet.files import replace_file
from g2gnet.seeding import draw_device, stream
from g2gnet.training import CheckpointError, Settings, TrainingError, run_epochs
from g2gnet.training.run_files import RunFiles
from g2gnet.training.settings import setting
from g2gnet.training.trainer import StepCallback


@dataclasses.dataclass(frozen=True)
class PretrainSettings(Settings):
    """The settings of one training of a ResNet-32."""

    dataset: str = setting("cifar10", "data", "data set", choices=tuple(RELEASES))
    limit_train: int | None = setting(None, "data", "use only the first N training images", low=1)
    limit_test: int | None = setting(None, "data", "use only the first N test images", low=1)

    epochs: int = setting(200, "training", "passes over the training images", low=1)
    batch_size: int = setting(256, "training", "images in a step", low=1)
    lr: float = setting(0.1, "training", "learning rate to begin with; it falls to 0 as a cosine", low=0, open_low=True)
    momentum: float = setting(0.9, "training", "Nesterov momentum", low=0, open_low=True, high=1)
    weight_decay: float = setting(5e-4, "training", "L2 penalty", low=0)
    seed: int = setting(42, "training", "seed of every random draw", low=0)

    @property
    def stem(self) -> str:
        return f"resnet32_{self.dataset}"


class PretrainTrainer:
    """Trains one ResNet-32; every draw comes from a named stream, so that its state resumes to the last bit.

    Args:
        settings: what to train and how.
        data: CIFAR images, on any device; they are moved to ``device``.
        device: where to compute.
    """

    def __init__(self, settings: PretrainSettings, data: ImageData, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.data = data.limited(settings.limit_train, settings.limit_test).to(device)
        self.network = new_resnet(settings.dataset).to(device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        self.epoch = 0
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """All that a later trainer with the same settings needs to go on after this epoch."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            RuntimeError, ValueError, KeyError: if the state does not fit the network.
        """
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]

    def learning_rate(self) -> float:
        """lr·½(1 + cos(π·step/steps)) (Loshchilov & Hutter 2017, without restarts)."""
        steps = self.settings.epochs * math.ceil(len(self.data.train_labels) / self.settings.batch_size)
        return self.settings.lr * (1 + math.cos(math.pi * self.step / steps)) / 2

    def train_epoch(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates, and returns the epoch's record.

        Raises:
            TrainingError: if the loss is not finite any more.
        """
        self.epoch += 1
        count = len(self.data.train_labels)
        order = torch.randperm(count, generator=stream(self.settings.seed, "order", self.epoch)).to(self.device)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        seen = 0
        start = time.perf_counter()
        self.network.train()
        for index in order.split(self.settings.batch_size):
            generator = stream(self.settings.seed, "augment", self.step, device=draw_device(self.device))
            labels = self.data.train_labels[index]
            logits = self.network(random_crop_and_flip(self.data.train_images[index], generator))
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.optimizer.step()
            self.step += 1
            loss_sum += loss.detach() * len(index)
            correct += (logits.argmax(1) == labels).sum()
            seen += len(index)
            if on_step:
                on_step(len(index), loss_sum / seen, correct / seen)
        train_loss = loss_sum.item() / count
        seconds = time.perf_counter() - start
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the training loss of epoch {self.epoch} is {train_loss}; lower --lr (now {self.settings.lr})"
            )
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "train_acc": correct.item() / count,
            "test_acc": self.evaluate(),
            "seconds": round(seconds, 3),
            "samples_per_s": round(count / seconds, 1),
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """The share of test images that are classified correctly."""
        self.network.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        size = self.settings.batch_size
        for images, labels in zip(self.data.test_images.split(size), self.data.test_labels.split(size), strict=True):
            correct += (self.network(images).argmax(1) == labels).sum()
        return correct.item() / len(self.data.test_labels)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="g2gnet.pretrain",
        description="Trains a CIFAR ResNet-32, whose features train.py --use_resnet --resnet_weights FILE can use.",
    )
    cli.add_settings_flags(parser, PretrainSettings)
    cli.add_machine_flags(parser, kernels=False)
    return parser


def pretrain(arguments: argparse.Namespace) -> None:
    settings = cli.settings_from(arguments, PretrainSettings)
    device, _ = cli.machine_from(arguments)
    run_epochs(
        settings,
        lambda: PretrainTrainer(settings, load_dataset(settings.dataset, arguments.data_dir), device),
        arguments.checkpoint_dir,
    )
    files = RunFiles(arguments.checkpoint_dir, settings.stem)
    checkpoint = files.load_checkpoint(settings.as_dict())
    if checkpoint is None:
        raise CheckpointError(f"{files.checkpoint} is gone; delete {files.marker} to train again")
    weights = Path(arguments.checkpoint_dir) / f"{settings.stem}.pt"
    replace_file(weights, lambda file: torch.save(checkpoint["model"], file))
    print(f"wrote {weights}, for train.py --dataset {settings.dataset} --use_resnet --resnet_weights {weights}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_program(build_parser(), pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
