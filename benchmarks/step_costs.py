"""Memory and processor time of a training step of a study's row."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from g2gnet import G2GNet
from g2gnet.base.files import make_directory, replace_file
from g2gnet.data import DATASETS
from g2gnet.training import TrainSettings

from .machine import PeakMemory, load_lazy_parts, pytorch_threads

#: from settings, input_dim and num_classes
Build = Callable[[TrainSettings, int, int], nn.Module]


def step_costs(settings: TrainSettings, folder: Path, build: Build = G2GNet.from_settings) -> dict[str, float]:
    """What a training step takes, measured in a process of its own and kept, once for all seeds.

    Args:
        settings: of the run, on images of 28 × 28 pixels, or sequences of these.
        folder: of the run, beside which a file of the costs is kept.
        build: a function of a module, which makes the network.

    Returns:
        ``step_bytes``: the most memory, above the process with its imports, during the second step, and
        ``step_seconds``: the least processor time of the three after it.
    """
    path = folder.with_name(f"{folder.name.rpartition('-seed')[0]}-step.json")
    of_step = {name: value for name, value in settings.as_dict().items() if name not in ("seed", "epochs")}
    kept: Any = None
    with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
        kept = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(kept, dict) or kept.get("settings") != of_step:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            kept = {"settings": of_step, "costs": process.submit(_costs, settings, build).result()}
        make_directory(path.parent)
        replace_file(path, lambda file: file.write(json.dumps(kept).encode()))
    costs: dict[str, float] = kept["costs"]
    return costs


def _costs(settings: TrainSettings, build: Build) -> dict[str, float]:
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
    return {"step_bytes": most, "step_seconds": min(seconds)}


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
