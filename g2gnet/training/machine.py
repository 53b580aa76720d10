"""The machine of a run, which does not change its results, and whether it has enough memory."""

import math
from typing import NamedTuple

import torch

from g2g_kernels import available_backends
from g2g_kernels.cpu.library import instruction_set
from g2g_kernels.dispatch import forced_backend
from g2gnet.base.distributed import ALONE, World
from g2gnet.base.memory import available, gigabytes
from g2gnet.base.version import __version__
from g2gnet.images import Shape
from g2gnet.network_settings import SettingsError
from g2gnet.neurons import NEURONS
from g2gnet.notation import placed
from g2gnet.training.run_settings import TrainSettings
from g2gnet.weights.patterns import FULL

#: bytes of a trained weight: the weight, its gradient and Adam's two moments, in float32
WEIGHT = 16


class Machine(NamedTuple):
    """The device of this process, the backend (None: the device decides) and the processes that make the same calls.

    Example:
        >>> Machine(torch.device("cpu"), backend="torch").versions()["backend"]
        'torch'
    """

    device: torch.device
    backend: str | None = None
    world: World = ALONE

    def versions(self) -> dict[str, str]:
        """Everything besides the settings that may change the last bits of a result."""
        backend = forced_backend(self.backend)
        if backend is None:
            preferred = {"cuda": "triton", "cpu": "cpu"}.get(self.device.type, "torch")
            backend = preferred if preferred in available_backends() else "torch"
        return {
            "g2g": __version__,
            "torch": str(torch.__version__),
            "device": self.device.type,
            "backend": backend,
            "instruction set": instruction_set() if backend == "cpu" else "PyTorch's own",
        }


def least_bytes(
    settings: TrainSettings, inputs: int | Shape, num_classes: int, samples: int, device: str = "cpu"
) -> int:
    """A lower bound, in bytes, of the memory of training with ``samples`` images per step in this process: weights, a
    bit for each spike, and on a CPU the states of all time steps (of a chunk), kept for the backward pass."""
    weights, forms = 0.0, settings.layer_forms(num_classes)
    layers = placed(forms, inputs if isinstance(inputs, tuple) else (inputs,))
    for form, (_, (size, below)) in zip(forms, layers, strict=True):
        inside = 1 / min(settings.num_groups, max(below, size))
        density = inside * settings.p_intra + (1 - inside) * settings.p_inter
        weights += below * size * (form.kernel or 1) ** 2 * (1 if settings.model in FULL else density)
    sizes = [math.prod(layer.shape) for layer in layers]
    spikes = settings.T * sum(-(-size // 64) * 8 for size in sizes)
    kept = 4 * len(NEURONS[settings.neuron].model.states) * sum(sizes[1:]) if device == "cpu" else 0
    return int(weights * WEIGHT) + samples * (spikes + min(settings.T, settings.chunk or settings.T) * kept)


def check_memory(
    settings: TrainSettings, inputs: int | Shape, num_classes: int, samples: int, device: torch.device
) -> None:
    """Raises SettingsError if the device has less memory than training needs at least (:func:`least_bytes`)."""
    needed, free = least_bytes(settings, inputs, num_classes, samples, device.type), available(device)
    if free is not None and needed > free:
        which = "hidden_dim" if settings.layers is None else "layers"
        sizes = f"{which}={getattr(settings, which)}, T={settings.T} and {samples} images per step"
        takes = f"training takes at least {gigabytes(needed)} of memory with {sizes}, and there are {gigabytes(free)}"
        raise SettingsError(f"{takes}; lower `{which}`, `T`, `chunk` or `batch_size`")
