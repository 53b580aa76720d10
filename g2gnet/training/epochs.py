"""The loop of every trainer: epochs of steps on shuffled batches, resumable inside an epoch."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import nn

from g2gnet.base.schedules import SCHEDULES
from g2gnet.base.seeding import stream
from g2gnet.data import ImageData
from g2gnet.training.checks import CHECK_INTERVAL, FiniteWatch
from g2gnet.training.held_out import held_out
from g2gnet.training.run_settings import RunSettings
from g2gnet.training.saved_state import POSITION, check_form, load_model, load_optimizer

#: called after each training step with the number of images in the epoch so far, and their mean loss and accuracy
StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]


class EpochTrainer(ABC):
    """Trains a module on images, which are moved to ``device``.

    Every random draw comes from a stream named by the seed and a counter (:mod:`g2gnet.base.seeding`), so that
    :meth:`state_dict` restores a run to the last bit.

    Attributes:
        net, optimizer: made by the subclass, which then calls ``_watch``.
        fingerprint: of the data, before images are held out.
        held_out: with ``settings.validation``, the numbers of the held-out training images, int64 [n].
        judges: the images that each epoch is tested on, ``"val"`` and ``"test"`` or one of them.
        epoch, step: number of finished epochs and steps.
        progress: sums over the steps of a started epoch: ``loss`` and ``correct`` (number of correctly classified
            images), scalars summed over images, ``seconds``, ``cpu_seconds`` of all threads together, and those of the
            subclass.
    """

    #: names of the optimizer's tensors of each parameter
    optimizer_state: ClassVar[Collection[str]]
    #: how the learning rate falls, a name in ``SCHEDULES``, after a number of steps in which it rises
    lr_schedule, lr_warmup = "constant", 0
    net: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, settings: RunSettings, data: ImageData, device: torch.device) -> None:
        self.device = device
        data = data.limited(settings.limit_train, settings.limit_test)
        self.fingerprint = data.fingerprint
        self.held_out: torch.Tensor | None = None
        if settings.validation is not None:
            self.held_out = held_out(data.train_labels, settings.validation, settings.validation_seed)
            data = data.held_out(self.held_out)
        self.data = data.to(device)
        self.judges = ("val",) * (data.val_images is not None) + ("test",) * (self.held_out is None)
        self.epoch = 0
        self.step = 0
        self.progress: dict[str, Any] | None = None
        self._seed, self._batch_size = settings.seed, settings.batch_size
        self._batches = math.ceil(len(self.data.train_labels) / settings.batch_size)
        self._steps = settings.epochs * self._batches

    def _watch(self, lr: float) -> None:
        """Starts watching the loss and the gradients of ``net``. ``lr`` is the initial learning rate."""
        self._lr = lr
        self._finite = FiniteWatch(self.net, self.device)

    @abstractmethod
    def _train_step(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Makes a step on the images of a batch, calls ``_stepped``, and returns the addends of ``progress``."""

    @abstractmethod
    def _measures(self, progress: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """The accuracies after an epoch, on images that are not trained on, and the rest of its record."""

    def _no_progress(self) -> dict[str, Any]:
        """The progress before the first step of an epoch."""
        zero = torch.zeros((), device=self.device)
        return {"loss": zero, "correct": zero.clone(), "seconds": 0.0, "cpu_seconds": 0.0}

    @abstractmethod
    def test(self, state: dict[str, Any]) -> float:
        """The share of the test images that the network of a saved state classifies correctly."""

    def state_dict(self) -> dict[str, Any]:
        """The state from which a trainer with these settings resumes. Raises TrainingError if it is not finite."""
        self._finite.check()
        return {
            **({} if self.held_out is None else {"held_out": self.held_out}),
            "epoch": self.epoch,
            "step": self.step,
            "progress": self.progress,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state. Raises an exception in ``saved_state.UNFIT`` if it does not fit the network."""
        check_form("state", state, POSITION, low=0)
        epoch, step, progress = state["epoch"], state["step"], state["progress"]
        inside = step - epoch * self._batches
        if inside != 0 if progress is None else not 0 < inside <= self._batches:
            raise ValueError(f"epoch={epoch} and step={step} are at odds: an epoch has {self._batches} steps")
        mine = self.held_out
        if mine is not None and not torch.equal(check_form("held_out", state["held_out"], mine), mine):
            raise ValueError("it holds out other training images than those of its `validation_seed` here")
        load_model(self.net, state["model"])
        load_optimizer(self.optimizer, state["optimizer"], self.optimizer_state, step)
        self.epoch, self.step = epoch, step
        if step:
            self._set_lr(step - 1)  # saved with the optimizer; a finished run takes no step that would set it
        self._finite.resume(step)
        self.progress = None if progress is None else check_form("progress", progress, self._no_progress(), low=0)

    def train_epoch(self, on_step: StepCallback | None = None) -> dict[str, Any]:
        """Trains an epoch, or the rest of a started one, evaluates, and returns its record. An exception of ``on_step``
        ends it after the step, where :meth:`state_dict` and another call resume. Raises TrainingError if the loss or a
        gradient is not finite."""
        count, size = len(self.data.train_labels), self._batch_size
        order = torch.randperm(count, generator=stream(self._seed, "order", self.epoch + 1)).to(self.device)
        self.progress = progress = self.progress or self._no_progress()
        self.net.train()
        for first in range((self.step - self.epoch * self._batches) * size, count, size):
            start, cpu_start = time.perf_counter(), time.process_time()
            index = order[first : first + size]
            self._set_lr(self.step)
            for name, added in self._train_step(index).items():
                progress[name] += added
            progress["seconds"] += time.perf_counter() - start
            progress["cpu_seconds"] += time.process_time() - cpu_start
            if on_step:
                seen = first + len(index)
                on_step(seen, progress["loss"] / seen, progress["correct"] / seen)
        start = time.perf_counter()
        self._finite.check()
        train_loss, train_acc = progress["loss"].item() / count, progress["correct"].item() / count
        seconds = progress["seconds"] + time.perf_counter() - start
        self.epoch += 1
        self.progress = None
        accuracies, others = self._measures(progress)
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "train_acc": train_acc,
            **accuracies,
            "seconds": round(seconds, 3),
            "cpu_seconds": round(progress["cpu_seconds"], 3),
            "samples_per_s": round(count / seconds, 1),
            **others,
        }

    def _stepped(self) -> None:
        """Counts a step; every ``CHECK_INTERVAL`` steps checks that all numbers were finite."""
        self.step += 1
        if self.step % CHECK_INTERVAL == 0:
            self._finite.check()

    def _set_lr(self, step: int) -> None:
        """Sets the learning rate of step ``step``, counted from 0."""
        if self.lr_schedule == "constant" and not self.lr_warmup:
            return
        lr = self._lr * ((step + 1) / (self.lr_warmup + 1))
        if step >= self.lr_warmup:
            share = (step - self.lr_warmup) / (self._steps - self.lr_warmup)
            lr = self._lr * SCHEDULES[self.lr_schedule](share)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1)
