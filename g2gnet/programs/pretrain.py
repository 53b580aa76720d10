"""Trains a CIFAR ResNet-32, whose features train.py --use_resnet --resnet_weights FILE can use."""

# SGD with momentum and cosine decay, random crops and flips, with the hyperparameters of the published weights
# (chenyaofo/pytorch-cifar-models, logs/cifar10/resnet32/default.log)

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet.base.messages import say
from g2gnet.base.seeding import draw_device, stream
from g2gnet.data import ImageData, load_dataset, random_crop_and_flip
from g2gnet.data.features import RELEASES, new_resnet
from g2gnet.network_settings import setting, with_default
from g2gnet.programs import flags, output
from g2gnet.programs.main import run_program
from g2gnet.training import run_epochs
from g2gnet.training.checkpoints import RunFiles, read_checkpoint
from g2gnet.training.epochs import EpochTrainer
from g2gnet.training.run_settings import RunSettings
from g2gnet.training.saved_state import load_model


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
        return f"resnet32_{self.dataset}{self.seed_in_stem}"


class PretrainTrainer(EpochTrainer):
    """Trains one ResNet-32; the learning rate falls along a cosine (Loshchilov & Hutter 2017, without restarts)."""

    optimizer_state = ("momentum_buffer",)
    lr_schedule = "cosine"

    def __init__(self, settings: PretrainSettings, data: ImageData, device: torch.device) -> None:
        super().__init__(settings, data, device)
        self.settings = settings
        self.net = new_resnet(settings.dataset).to(device)
        options = {name: getattr(settings, name) for name in ("lr", "momentum", "weight_decay")}
        self.optimizer = torch.optim.SGD(self.net.parameters(), nesterov=True, **options)
        self._watch(settings.lr)

    def _train_step(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        generator = stream(self.settings.seed, "augment", self.step, device=draw_device(self.device))
        labels = self.data.train_labels[index]
        logits = self.net(random_crop_and_flip(self.data.train_images[index], generator))
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._finite.note(loss.detach())
        self.optimizer.step()
        self._stepped()
        return {"loss": loss.detach() * len(index), "correct": (logits.argmax(1) == labels).sum()}

    def _measures(self, progress: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        return {f"{part}_acc": self._accuracy(self.net, part) for part in self.judges}, {}

    def test(self, state: dict[str, Any]) -> float:
        net = new_resnet(self.settings.dataset)
        load_model(net, state["model"])
        return self._accuracy(net.to(self.device), "test")

    @torch.no_grad()
    def _accuracy(self, net: nn.Module, part: str) -> float:
        """The share of the ``"test"`` or ``"val"`` images that ``net`` classifies correctly."""
        net.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        all_images, all_labels, size = *self.data.part(part), self.settings.batch_size
        for images, labels in zip(all_images.split(size), all_labels.split(size), strict=True):
            correct += (net(images).argmax(1) == labels).sum()
        return correct.item() / len(all_labels)


def build_parser() -> flags.Parser:
    parser = flags.Parser(prog="g2g-pretrain", description=__doc__)
    flags.add_settings_flags(parser, PretrainSettings)
    group = flags.add_machine_flags(parser, kernels=False)
    flags.add_json_flag(group, "the settings, the last epoch's results and the files' names")
    return parser


def pretrain(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = flags.settings_from(arguments, PretrainSettings)
    weights = Path(arguments.checkpoint_dir) / f"{settings.stem}.pt"
    files = RunFiles(arguments.checkpoint_dir, settings.stem)
    output.check_json(arguments, [weights, *files.files()])
    machine = flags.machine_from(arguments)
    files.check()
    output.check_output(weights)
    result = run_epochs(
        settings,
        lambda: PretrainTrainer(settings, load_dataset(settings.dataset, arguments.data_dir), machine.device),
        arguments.checkpoint_dir,
        machine,
    )
    model = read_checkpoint(files.checkpoint if settings.validation is None else files.best)["model"]
    output.write_file(weights, lambda file: torch.save(model, file))
    say(f"wrote {weights}, for train.py --dataset {settings.dataset} --use_resnet --resnet_weights {weights}")
    paths = {**files.paths(), "weights": str(weights)}
    return {"settings": settings.flag_values(), "result": result, "files": paths}


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(build_parser(), pretrain, argv)
