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
from g2gnet.messages import say
from g2gnet.seeding import draw_device, stream
from g2gnet.settings import setting, with_default
from g2gnet.training import CheckpointError, run_epochs
from g2gnet.training.health import CHECK_INTERVAL, FiniteWatch
from g2gnet.training.run_files import RunFiles
from g2gnet.training.settings import RunSettings
from g2gnet.training.state import check_like, check_position, load_model, load_optimizer
from g2gnet.training.trainer import StepCallback


@dataclasses.dataclass(frozen=True)
class PretrainSettings(RunSettings):
    """The settings of one training of a ResNet-32."""

    dataset: str = setting("cifar10", "data", "data set", choices=tuple(RELEASES))
    epochs: int = with_default(RunSettings, "epochs", 200)
    lr: float = setting(0.1, "training", "initial learning rate; it falls to 0 along a cosine", low=0, open_low=True)
    momentum: float = setting(0.9, "training", "Nesterov momentum", low=0, open_low=True, high=1)
    weight_decay: float = setting(5e-4, "training", "L2 penalty", low=0)

    @property
    def stem(self) -> str:
        return f"resnet32_{self.dataset}"


@dataclasses.dataclass
class PretrainProgress:
    """The sums over the steps of an unfinished epoch."""

    loss: torch.Tensor  # Σ over images of the cross-entropy, a scalar
    correct: torch.Tensor  # correctly classified images, a scalar
    seconds: float = 0.0


class PretrainTrainer:
    """Trains one ResNet-32; every draw comes from a named stream, so its state resumes to the last bit.

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
        self.epoch = 0  # finished epochs
        self.step = 0
        self.progress: PretrainProgress | None = None  # of a started epoch
        self._batches = math.ceil(len(self.data.train_labels) / settings.batch_size)
        self._finite = FiniteWatch(self.network, device, f"lower --lr (now {settings.lr})")

    def state_dict(self) -> dict[str, Any]:
        """All that a later trainer with the same settings needs to resume after this step.

        Raises:
            TrainingError: if the loss or a gradient was not finite: there is nothing to resume from.
        """
        self._finite.check()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "progress": vars(self.progress) if self.progress else None,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state.

        Raises:
            Exception: of a kind in ``g2gnet.training.state.UNFIT``, if the state does not fit the network.
        """
        check_position(state, self._batches)
        load_model(self.network, state["model"])
        load_optimizer(self.optimizer, state["optimizer"], ("momentum_buffer",))
        self.epoch, self.step = state["epoch"], state["step"]
        self._finite.resume(self.step)
        self.progress = None
        if state["progress"] is not None:
            saved, zero = state["progress"], torch.zeros((), device=self.device)
            self.progress = PretrainProgress(
                check_like("progress/loss", saved["loss"], zero),
                check_like("progress/correct", saved["correct"], zero),
                float(saved["seconds"]),
            )

    def learning_rate(self) -> float:
        """lr·½(1 + cos(π·step/steps)) (Loshchilov & Hutter 2017, without restarts)."""
        steps = self.settings.epochs * self._batches
        return self.settings.lr * (1 + math.cos(math.pi * self.step / steps)) / 2

    def train_epoch(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        """Trains for one epoch, or what is left of it, evaluates, and returns the epoch's record.

        ``on_step`` may end it by an exception, as for :meth:`g2gnet.training.Trainer.train_epoch`.

        Raises:
            TrainingError: if the loss or a gradient becomes non-finite.
        """
        count, size = len(self.data.train_labels), self.settings.batch_size
        generator = stream(self.settings.seed, "order", self.epoch + 1)
        order = torch.randperm(count, generator=generator).to(self.device)
        zero = torch.zeros((), device=self.device)
        self.progress = progress = self.progress or PretrainProgress(zero, zero.clone())
        self.network.train()
        for first in range((self.step - self.epoch * self._batches) * size, count, size):
            start = time.perf_counter()
            index = order[first : first + size]
            generator = stream(self.settings.seed, "augment", self.step, device=draw_device(self.device))
            labels = self.data.train_labels[index]
            logits = self.network(random_crop_and_flip(self.data.train_images[index], generator))
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.step += 1
            self._finite.note(loss.detach())
            if self.step % CHECK_INTERVAL == 0:
                self._finite.check()
            self.optimizer.step()
            progress.loss += loss.detach() * len(index)
            progress.correct += (logits.argmax(1) == labels).sum()
            progress.seconds += time.perf_counter() - start
            if on_step:
                seen = first + len(index)
                on_step(seen, progress.loss / seen, progress.correct / seen)
        start = time.perf_counter()
        self._finite.check()
        train_loss = progress.loss.item() / count
        seconds = progress.seconds + time.perf_counter() - start
        self.epoch += 1
        self.progress = None
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "train_acc": progress.correct.item() / count,
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
    parser = cli.Parser(
        prog="python -m g2gnet.pretrain",
        description="Trains a CIFAR ResNet-32, whose features train.py --use_resnet --resnet_weights FILE can use.",
    )
    cli.add_settings_flags(parser, PretrainSettings)
    group = cli.add_machine_flags(parser, kernels=False)
    cli.add_json_flag(group, "the settings, the last epoch's results and the files' names")
    return parser


def pretrain(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = cli.settings_from(arguments, PretrainSettings)
    weights = Path(arguments.checkpoint_dir) / f"{settings.stem}.pt"
    files = RunFiles(arguments.checkpoint_dir, settings.stem)
    cli.check_json(arguments, [weights, *files.files()])
    machine = cli.machine_from(arguments)
    files.check()
    cli.check_output(weights)
    result = run_epochs(
        settings,
        lambda: PretrainTrainer(settings, load_dataset(settings.dataset, arguments.data_dir), machine.device),
        arguments.checkpoint_dir,
        machine,
    )
    checkpoint = files.load_checkpoint(settings)
    if checkpoint is None:
        raise CheckpointError(f"{files.checkpoint} is missing; delete {files.marker} to train again")
    cli.write_file(weights, lambda file: torch.save(checkpoint.state["model"], file))
    say(f"wrote {weights}, for train.py --dataset {settings.dataset} --use_resnet --resnet_weights {weights}")
    paths = {**files.paths(), "weights": str(weights)}
    return {"settings": settings.given(), "result": result, "files": paths}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_program(build_parser(), pretrain, argv)


if __name__ == "__main__":
    sys.exit(main())
