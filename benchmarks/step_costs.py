"""Memory and processor time of a training step of a study's row."""

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.data import DATASETS
from g2gnet.training import TrainSettings

from .machine import PeakMemory, load_lazy_parts, pytorch_threads

COSTS = ("step_bytes", "step_seconds")
#: from settings, input_dim and num_classes
Build = Callable[[TrainSettings, int, int], nn.Module]


def step_costs(settings: TrainSettings, build: Build) -> dict[str, float]:
    """What a training step on images of 28 × 28 pixels takes, in a process of its own with one thread.

    Returns:
        ``step_bytes``: the most memory, above the process with its imports, during the second step, and
        ``step_seconds``: the least processor time of the three after it.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(costs, settings, build).result()


def costs(settings: TrainSettings, build: Build) -> dict[str, float]:
    """The same in this process; ``build``, a function of a module, makes the network."""
    device = torch.device("cpu")
    with pytorch_threads(1):
        load_lazy_parts(device)
        memory = PeakMemory(device)
        step = _training_step(settings, build)
        step()
        memory.restart()
        step()
        most, seconds = memory.above(), []
        for _ in range(3):
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
    return dict(zip(COSTS, (most, min(seconds)), strict=True))


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
