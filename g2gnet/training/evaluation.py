"""Builds a network from settings and runs it on images, for evaluation and analysis."""

import contextlib
from collections.abc import Iterator

import torch

from g2gnet.base.distributed import ALONE, World
from g2gnet.base.seeding import draw_device, stream
from g2gnet.data import ImageData, as_samples
from g2gnet.images import Shape
from g2gnet.inspect import Batch
from g2gnet.network import G2GNet
from g2gnet.training.run_settings import TrainSettings


def build_network(settings: TrainSettings, inputs: int | Shape, num_classes: int, backend: str | None = None) -> G2GNet:
    """The initial network of a run with ``settings``, on the CPU; the seed draws masks and weights."""
    return G2GNet.from_settings(settings, inputs, num_classes, backend, stream(settings.seed, "network"))


def autocast(settings: TrainSettings, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which operations have ``settings.precision``."""
    if settings.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def run_images(
    net: G2GNet,
    settings: TrainSettings,
    epoch: int,
    data: ImageData,
    part: str = "test",
    count: int | None = None,
    world: World = ALONE,
) -> Iterator[Batch]:
    """Runs ``net`` in batches on the first ``count`` (None: all) of the ``"test"`` or ``"val"`` images of ``data``, on
    one device. Each ``epoch`` has its own rate-coded spikes. The processes of ``world`` share whole batches, so their
    results are those of one process."""
    net.eval()
    images, labels = (each[:count] for each in data.part(part))
    device = images.device
    for first in range(0, len(labels), settings.batch_size)[world.rank :: world.size]:
        batch = slice(first, first + settings.batch_size)
        generator = stream(settings.seed, f"encode_{part}", epoch, first, device=draw_device(device))
        with torch.no_grad(), autocast(settings, device):
            inputs = net.encode(as_samples(images[batch]), generator)
            activity = net.simulate(inputs, chunk=settings.chunk)
        yield Batch(inputs, activity, labels[batch])
