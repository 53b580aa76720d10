"""The optimisation of one network: steps, epochs, evaluation, and a state from which to go on."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from g2g_kernels import Activity
from g2gnet.data import ImageData, as_samples, random_crop_and_flip
from g2gnet.dst import DSTScheduler
from g2gnet.layers import G2GLinear
from g2gnet.regularizer import RateTarget, rate_penalty, rate_target
from g2gnet.seeding import draw_device, stream
from g2gnet.training.cuda_graph import CapturedStep
from g2gnet.training.evaluation import Batch, autocast, build_network, run_images
from g2gnet.training.settings import TrainSettings

#: called after each training step with the images seen in it, and the mean loss and accuracy of the epoch so far
StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class _StepResult(NamedTuple):
    loss: torch.Tensor  # cross-entropy, a scalar
    correct: torch.Tensor  # correctly classified images, a scalar
    firing_rates: torch.Tensor  # mean rate of each layer [3]


class Trainer:
    """Trains one :class:`G2GNet` on one data set.

    Every random draw comes from a stream named by the seed and a counter (:mod:`g2gnet.seeding`), so that
    :meth:`state_dict` restores a run to the last bit.

    Args:
        settings: what to train and how.
        data: the images, on any device; they are moved to ``device``.
        device: where to compute.
        backend: kernels to use (None: the device decides).
        cuda_graph: replay each whole batch's step as a CUDA graph.
    """

    def __init__(
        self,
        settings: TrainSettings,
        data: ImageData,
        device: torch.device,
        backend: str | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.settings = settings
        self.device = device
        self.data = data.limited(settings.limit_train, settings.limit_test).to(device)
        self.net = build_network(settings, data.input_dim, data.num_classes, backend).to(device)
        self._initial_units = self._units()
        # PyTorch's fused update is for CPU and CUDA; DirectML takes the plain loop
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(
            self.net.parameters(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=fused,
            foreach=False,
            capturable=cuda_graph,
        )
        self._captured = CapturedStep(self._learn) if cuda_graph else None
        self.dst: DSTScheduler | None = None
        if settings.sparsity_mode == "dynamic":
            self.dst = DSTScheduler(
                [connection for connection, _ in self.net.layers()],
                self.optimizer,
                settings.dst_interval,
                settings.dst_fraction,
                settings.cp,
                settings.cg,
                settings.seed,
            )
        self.epoch = 0
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """All that a later :class:`Trainer` with the same settings needs to go on after this epoch."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "dst": self.dst.state_dict() if self.dst else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            RuntimeError, ValueError, KeyError: if the state does not fit the network.
        """
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.dst:
            self.dst.load_state_dict(state["dst"])
        for group in self.optimizer.param_groups:  # how to compute is not the checkpoint's to say
            group["capturable"] = self._captured is not None
        self.epoch, self.step = state["epoch"], state["step"]

    def train_epoch(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        """Trains for one epoch, evaluates, and returns the epoch's record.

        Raises:
            TrainingError: if the loss is not finite any more.
        """
        self.epoch += 1
        units_before = self._units()
        count = len(self.data.train_labels)
        order = torch.randperm(count, generator=stream(self.settings.seed, "order", self.epoch)).to(self.device)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        firing_rates = torch.zeros(3, device=self.device)
        start = time.perf_counter()
        self.net.train()
        for first in range(0, count, self.settings.batch_size):
            index = order[first : first + self.settings.batch_size]
            result = self._train_step(index)
            loss_sum += result.loss * len(index)
            correct += result.correct
            firing_rates += result.firing_rates * len(index)
            if on_step:
                seen = first + len(index)
                on_step(len(index), loss_sum / seen, correct / seen)
        train_loss = loss_sum.item() / count
        seconds = time.perf_counter() - start
        if not torch.isfinite(loss_sum).item():
            raise TrainingError(
                f"the training loss of epoch {self.epoch} is {train_loss}; lower --lr (now {self.settings.lr})"
            )
        connections = self._connections()
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "train_acc": correct.item() / count,
            **({"val_acc": self.evaluate("val")} if self.data.val_images is not None else {}),
            "test_acc": self.evaluate("test"),
            "seconds": round(seconds, 3),
            "samples_per_s": round(count / seconds, 1),
            "firing_rate": {f"lif{i + 1}": rate / count for i, rate in enumerate(firing_rates.tolist())},
            "density": {name: layer.mask.density for name, layer in connections.items()},
            "units": {name: layer.mask.num_units for name, layer in connections.items()},
            "units_pruned": self.dst.pruned if self.dst else 0,
            "units_grown": self.dst.grown if self.dst else 0,
            # of the units there were when this epoch began, and when training began
            "units_kept": self._kept(units_before),
            "initial_units_kept": self._kept(self._initial_units),
        }

    def _train_step(self, index: torch.Tensor) -> _StepResult:
        labels = self.data.train_labels[index]
        images = self.data.train_images[index]
        if self.settings.augments:
            images = random_crop_and_flip(images, self._stream("augment", self.step))
        inputs = self.net.encode(as_samples(images), self._stream("encode_train", self.step))
        target = None
        if self.settings.enforce_sparsity:
            target = rate_target(self.epoch, self.settings.epochs, self.settings.warmup_epochs)
        whole = len(index) == self.settings.batch_size
        learn = self._captured if self._captured and whole else self._learn
        result, activity = learn(inputs, labels, target)
        self.step += 1
        if self.dst:
            self.dst.step(inputs, activity)
        return result

    def _learn(
        self, inputs: torch.Tensor, labels: torch.Tensor, target: RateTarget | None
    ) -> tuple[_StepResult, Activity]:
        """Forward pass, loss, backward pass, update. Nothing here waits for the device, so that it can be captured."""
        with autocast(self.settings, self.device):
            activity = self.net.simulate(inputs)
        loss = F.cross_entropy(activity.counts, labels)
        objective = loss
        if target and target.strength > 0:
            objective = loss + rate_penalty(activity.rates[:-1], target)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        self.optimizer.step()
        with torch.no_grad():
            correct = (activity.counts.argmax(1) == labels).sum()
            firing_rates = torch.stack([rates.mean() for rates in activity.rates])
        return _StepResult(loss.detach(), correct, firing_rates), activity

    def run_images(self, part: str = "test", count: int | None = None) -> Iterator[Batch]:
        """What the network does with the first ``count`` (None: all) of the ``"test"`` or ``"val"`` images."""
        return run_images(self.net, self.settings, self.epoch, self.data, part, count)

    def evaluate(self, part: str = "test") -> float:
        """The share of the ``"test"`` or ``"val"`` images that are classified correctly."""
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in self.run_images(part):
            correct += (batch.activity.counts.argmax(1) == batch.labels).sum()
        return correct.item() / len(getattr(self.data, f"{part}_labels"))

    def _units(self) -> dict[str, torch.Tensor]:
        """Which units each connection has now: bool [block rows, block columns]."""
        units = {}
        for name, layer in self._connections().items():
            units[name] = torch.zeros(layer.mask.grid, dtype=torch.bool, device=self.device)
            units[name][layer.mask.unit_row.long(), layer.mask.unit_col.long()] = True
        return units

    def _kept(self, units: dict[str, torch.Tensor]) -> dict[str, float]:
        """The share of ``units`` that each connection still has, 0 to 1."""
        return {name: int((units[name] & now).sum()) / max(1, int(now.sum())) for name, now in self._units().items()}

    def _connections(self) -> dict[str, G2GLinear]:
        return {f"fc{number}": connection for number, (connection, _) in enumerate(self.net.layers(), 1)}

    def _stream(self, purpose: str, *counters: int) -> torch.Generator:
        """The run's stream of that name, on the device if it has generators."""
        return stream(self.settings.seed, purpose, *counters, device=draw_device(self.device))
