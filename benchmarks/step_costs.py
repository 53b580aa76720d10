"""Memory and processor time of a training step of a study's row."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.data import DATASETS
from g2gnet.training import TrainingError, TrainSettings

from .harness import Racer, Session, race
from .machine import PeakMemory, load_lazy_parts

COSTS = ("step_bytes", "step_seconds")
#: from settings, input_dim and num_classes
Build = Callable[[TrainSettings, int, int], nn.Module]


def step_costs(settings: TrainSettings, build: Build) -> dict[str, float]:
    """What a training step on images of 28 × 28 pixels takes, in a process of its own with one thread.

    Returns:
        ``step_bytes``: the most memory, above the process with its imports, during the second step, and
        ``step_seconds``: the least processor time of the three after it.
    """
    racer = Racer("step", _Step, (settings, build))
    race([racer], repeats=3)
    if racer.reason:
        raise TrainingError(f"a step cannot be measured: {racer.reason}")
    return dict(zip(COSTS, (racer.peak_bytes or 0, min(racer.cpu_seconds)), strict=True))


class _Step(Session):
    def __init__(self, settings: TrainSettings, build: Build) -> None:
        torch.set_num_threads(1)
        self.about = settings, build

    def build(self) -> None:
        load_lazy_parts(self.device)
        self.memory = PeakMemory(self.device)
        self.step = _training_step(*self.about)  # type: ignore[method-assign]

    def step(self) -> None:
        raise NotImplementedError  # before it is built

    def results(self) -> None:
        """Nothing to check."""


def _training_step(settings: TrainSettings, build: Build) -> Callable[[], None]:
    """A training step on random inputs."""
    values, classes = 28 * 28, DATASETS["fashionmnist"].num_classes
    held = settings.sequence == "none"
    per_step = values if held else values // settings.T
    x = torch.randn(*(() if held else (settings.T,)), settings.batch_size, per_step)
    labels = torch.randint(classes, (settings.batch_size,))
    net = build(settings, per_step, classes)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = net.simulate(x, chunk=settings.chunk).output if isinstance(net, G2GNet) else net(x)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step
