"""What is measured: a network trained for a while on real images, and the next batch of them.

A workload is prepared once, by the library's own trainer, and cached in a temporary folder under a name made of its
settings, so every contender loads the same weights, masks and images. Running it is left to other modules.
"""

import dataclasses
import functools
import getpass
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import g2gnet
from g2g_kernels.numbers import WHOLE
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2gnet import G2GNet, Synaptic
from g2gnet.base.tensor_files import read_tensors, write_tensors
from g2gnet.data import DATASETS, DataError, ImageData, as_samples, load_dataset
from g2gnet.training import Machine, NetworkSettings, SettingsError, TrainSettings
from g2gnet.training.trainer import Trainer

#: replaces Fashion-MNIST if that is unavailable
FALLBACK = "fashionmnist-mini"


@dataclasses.dataclass(frozen=True)
class Workload:
    """The settings of the measured training step; the defaults are those of ``train.py``, with an index network."""

    batch_size: int = TrainSettings.batch_size
    T: int = NetworkSettings.T
    hidden_dim: int = 2048
    p_inter: float = TrainSettings.p_inter
    block_size: int = TrainSettings.block_size
    num_groups: int = TrainSettings.num_groups
    model: str = "index"
    surrogate: str = TrainSettings.surrogate  # of the hidden layers; the output's is always ATan with α = 2
    alpha: float = TrainSettings.alpha
    recurrent: bool = False
    dataset: str = TrainSettings.dataset
    train_steps: int = 100  # before anything is measured, since firing rates decide the cost of events
    seed: int = TrainSettings.seed

    def __post_init__(self) -> None:
        if wanted := WHOLE.refuses(self.train_steps):
            raise SettingsError(f"train_steps={self.train_steps} must be {wanted}")
        self.settings()

    def settings(self) -> TrainSettings:
        """The trainer's settings; raises SettingsError if they are out of range."""
        shared = self.as_dict()
        steps = max(1, shared.pop("train_steps"))
        return TrainSettings(**shared, limit_train=steps * self.batch_size, limit_test=1000)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def path(self) -> Path:
        """The path of the prepared workload, existing or not."""
        key = json.dumps({**self.as_dict(), "g2g": g2gnet.__version__, "torch": torch.__version__}, sort_keys=True)
        return cache_dir() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def cache_dir() -> Path:
    """The folder of prepared workloads; delete it to prepare them again."""
    return Path(tempfile.gettempdir()) / f"g2g-benchmarks-{getpass.getuser()}"


class NeuronInputs(NamedTuple):
    """The inputs for measuring neurons alone, and the gradient that comes back, float32 [T, B, N]."""

    current: torch.Tensor
    grad_spikes: torch.Tensor
    parameters: dict[str, torch.Tensor]  # float32 scalars


class LinearInputs(NamedTuple):
    """The inputs of the second layer's product alone, and the gradient that comes back, float32 [T, B, H]."""

    x: torch.Tensor
    grad_y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A workload with its weights and its batch."""

    workload: Workload  # whose data set is the one that was used
    state: dict[str, torch.Tensor]
    images: torch.Tensor  # float32 [B, D], from 0 to 1
    labels: torch.Tensor  # int64 [B]
    test_accuracy: float  # on 1,000 test images
    note: str  # on the preparation, or ""

    @property
    def num_classes(self) -> int:
        return DATASETS[self.workload.dataset].num_classes

    def network(self, backend: str | None = None) -> G2GNet:
        """The network, on the CPU, with its trained weights."""
        dataset, draw = DATASETS[self.workload.dataset], torch.Generator().manual_seed(0)
        sizes = math.prod(dataset.shape), dataset.num_classes
        net = G2GNet.from_settings(self.workload.settings(), *sizes, backend, draw)
        net.load_state_dict(self.state)
        return net

    @functools.cached_property
    @torch.no_grad()
    def lif_inputs(self) -> NeuronInputs:
        """The input currents of the second hidden layer, its β and θ, and a random gradient."""
        net = self.network("torch")
        parameters = {name: value.detach() for name, value in net.lif2.by_name.items()}
        return NeuronInputs(net.fc2(self._first_spikes), self._noise(1)[0], parameters)

    @functools.cached_property
    def synaptic_inputs(self) -> NeuronInputs:
        """The same for synaptic neurons, at their initial γ: currents times 1 − γ, so their sum is the same."""
        current, gradient, parameters = self.lif_inputs
        syn_decay = torch.tensor(Synaptic.initial["syn_decay"])
        return NeuronInputs(current * (1 - syn_decay), gradient, {"syn_decay": syn_decay, **parameters})

    @functools.cached_property
    def spike_inputs(self) -> LinearInputs:
        """The input spikes of the second layer, and a random gradient."""
        return LinearInputs(self._first_spikes, self._noise(1)[0])

    @functools.cached_property
    def dense_inputs(self) -> LinearInputs:
        """Nonzero random numbers in place of the spikes, and a random gradient."""
        gradient, x = self._noise(2)
        return LinearInputs(x, gradient)

    def convert(self, inputs: str, dtype: torch.dtype) -> None:
        """Converts ``spike_inputs`` or ``dense_inputs`` to ``dtype``."""
        self.__dict__[inputs] = LinearInputs(*(tensor.to(dtype) for tensor in getattr(self, inputs)))

    @functools.cached_property
    @torch.no_grad()
    def _first_spikes(self) -> torch.Tensor:
        net = self.network("torch")
        return net.lif1(net.fc1(self.images), steps=net.T)

    @functools.cached_property
    @torch.no_grad()
    def event_shares(self) -> list[float]:
        """The share of each layer's neurons, over all steps and samples, that pass a gradient on (nonzero derivative of
        the surrogate). 1 for a surrogate without compact support."""
        net = self.network()  # on the fastest backend, since that of plain PyTorch forms dense weights
        passing, neurons, state = [0] * net.depth, [0] * net.depth, None
        for _ in range(net.T):
            _, state = net.step(self.images, state)
            for number, (membrane, (_, lif)) in enumerate(zip(state, net.layers(), strict=True)):
                assert isinstance(membrane, torch.Tensor)  # of LIF neurons
                slope = SURROGATES[lif.surrogate].derivative(membrane - lif.by_name["threshold"], lif.alpha)
                passing[number] += int(slope.count_nonzero())
                neurons[number] += slope.numel()
        return [count / number for count, number in zip(passing, neurons, strict=True)]

    def _noise(self, count: int) -> torch.Tensor:
        """Standard normal numbers [count, T, B, H]."""
        w, draw = self.workload, torch.Generator().manual_seed(self.workload.seed)
        return torch.randn(count, w.T, len(self.images), w.hidden_dim, generator=draw)

    def active_weights(self) -> dict[str, int]:
        """The number of weights that exist in each connection: ``fc1``, ``rec1`` if it is recurrent, …."""
        return {name: each.mask.num_weights for name, each in self.network("torch").connections().items()}

    def density(self) -> float:
        """The share of existing weights in all connections together."""
        masks = [connection.mask for connection in self.network("torch").connections().values()]
        return sum(mask.num_weights for mask in masks) / sum(math.prod(mask.shape) for mask in masks)


def load(path: Path) -> Prepared:
    """Reads a workload written by :func:`prepare`."""
    fields = read_tensors(path)
    return Prepared(**{**fields, "workload": Workload(**fields["workload"])})


def prepare(workload: Workload, data_dir: str = "data", on_step: Callable[[int], None] | None = None) -> Path:
    """Trains the workload's network unless this was done before; returns the file for :func:`load`.

    If Fashion-MNIST is unavailable, the subset in the package replaces it. ``on_step`` is called after each training
    step with the number of steps so far.
    """
    if workload.path.exists():
        return workload.path
    try:
        return _train(workload, load_dataset(workload.dataset, data_dir), "", on_step)
    except DataError:
        if workload.dataset != "fashionmnist":
            raise
    stand_in = dataclasses.replace(workload, dataset=FALLBACK)
    if stand_in.path.exists():
        return stand_in.path
    note = f"Fashion-MNIST is unavailable: this is {FALLBACK}, 6,000 of its images"
    return _train(stand_in, load_dataset(FALLBACK), note, on_step)


def _train(workload: Workload, data: ImageData, note: str, on_step: Callable[[int], None] | None) -> Path:
    if workload.batch_size > len(data.train_labels):
        raise SettingsError(f"batch_size={workload.batch_size} exceeds the {len(data.train_labels)} training images")
    trainer = Trainer(workload.settings(), data, Machine(torch.device("cpu")))
    while trainer.step < workload.train_steps:
        trainer.train_epoch((lambda *_: on_step(trainer.step)) if on_step else None)
    prepared = {
        "workload": workload.as_dict(),
        "state": trainer.net.state_dict(),
        # the last images: the trainer used the first
        "images": as_samples(data.train_images[-workload.batch_size :]),
        "labels": data.train_labels[-workload.batch_size :].clone(),
        "test_accuracy": trainer.evaluate().accuracy,
        "note": note,
    }
    workload.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_tensors(workload.path, prepared)
    return workload.path
