"""How much memory a run needs at least, which its sizes say before anything is allocated."""

import itertools
import math

import torch

from g2gnet.base.memory import available, gigabytes
from g2gnet.network_settings import SettingsError
from g2gnet.neurons import NEURONS
from g2gnet.training.run_settings import TrainSettings

#: bytes of a weight that is trained: the weight, its gradient and Adam's two moments, in float32; and of its average
WEIGHT, AVERAGE = 16, 4
#: bytes of a unit of the grid while a mask is drawn: a random key, its order and its rank
DRAWN_UNIT = 20
#: bytes of a unit that exists: its row and column, and its places by row and by column
UNIT = 16


def least_bytes(settings: TrainSettings, input_dim: int, num_classes: int, samples: int, device: str = "cpu") -> int:
    """The least memory of training with ``samples`` images per step in this process, in bytes. On a CPU the states of
    all time steps (of a chunk) are kept for the backward pass."""
    sizes = input_dim, *settings.hidden_sizes, num_classes
    sparse, drawn, total = settings.model != "dense", 0, 0
    of_weight = WEIGHT if settings.average is None else WEIGHT + AVERAGE
    for below, size in itertools.pairwise(sizes):
        weights, grid = below * size, math.prod(-(-side // settings.block_size) for side in (below, size))
        density = 1.0
        if sparse:
            inside = 1 / min(settings.num_groups, max(below, size))
            density = inside * settings.p_intra + (1 - inside) * settings.p_inter
            drawn = max(drawn, grid * DRAWN_UNIT)
        total += int(density * (weights * of_weight + grid * UNIT))
    share = settings.p_intra / settings.num_groups if sparse else 1  # of those between groups there may be none
    for number, size in enumerate(settings.hidden_sizes, 1):
        total += int(settings.is_recurrent(number) * size**2 * of_weight * share)
    words = sum(-(-size // 64) * 8 for size in sizes[1:])  # a bit for each spike
    kept = 4 * len(NEURONS[settings.neuron].model.states) * sum(sizes[2:]) if device == "cpu" else 0
    recomputed = settings.T if settings.chunk is None else min(settings.chunk, settings.T)
    inputs = 4 * input_dim * (1 if settings.sequence == "none" else settings.T)
    return total + drawn + samples * (inputs + settings.T * words + recomputed * kept)


def check_memory(settings: TrainSettings, input_dim: int, num_classes: int, samples: int, device: torch.device) -> None:
    """Raises SettingsError if the device cannot hold what training needs at least (:func:`least_bytes`)."""
    needed, free = least_bytes(settings, input_dim, num_classes, samples, device.type), available(device)
    if free is not None and needed > free:
        raise SettingsError(
            f"training takes at least {gigabytes(needed)} of memory with hidden_dim={settings.hidden_dim}, "
            f"T={settings.T} and {samples} images per step, and there are {gigabytes(free)}; lower `hidden_dim`"
            f"{' or `p_inter`, raise `block_size`' if settings.model != 'dense' else ''}, or lower "
            f"{'`T`, ' if settings.sequence == 'none' else ''}`chunk` or `batch_size`"
        )
