"""Checks of a run's samples, and of the numbers in its training, without making the device wait."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from g2gnet.data import ImageData, as_samples
from g2gnet.data.augmentation import shift_problem
from g2gnet.network_settings import SettingsError
from g2gnet.neurons import SpikingNeurons
from g2gnet.sequences import input_order
from g2gnet.training.run_settings import TrainSettings

logger = logging.getLogger("g2gnet")

#: steps between two readings of a :class:`FiniteWatch`
CHECK_INTERVAL = 100
#: mean firing rates below and above which a layer carries almost no information
SILENT, SATURATED = 1e-4, 0.99
#: largest share of a layer's neurons that may never fire without a warning
MOSTLY_SILENT = 0.5
#: how far outside 0 … 1 a decay is learned without a warning
FAR = 0.1
#: remedies for silent and saturated layers, for numbers that grow without bound, and for parameters that drift
WAKE, CALM = (
    "raise `init_gain` or `enc_scale` (or `standardize`, where it is off)",
    "lower `enc_scale`, or give `enforce_sparsity`",
)
LOWER = "lower `lr`, or the settings that scale inputs, weights or thresholds"
DRIFTING = "that is harmless if it stays there; if it moves on, lower `lr`"

_NEVER = torch.iinfo(torch.int64).max


class TrainingError(RuntimeError):
    """Training cannot continue; the message gives the reason and a remedy."""


class FiniteWatch:
    """Records on the device the first step in which the loss and each gradient of a module were not finite, in one pass
    over the gradients. :meth:`note` does not wait for the device, :meth:`check` does."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._parameters = dict(module.named_parameters())
        self._first = torch.full((1 + len(self._parameters),), _NEVER, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)

    def resume(self, step: int) -> None:
        """Continues after ``step``."""
        self._step.fill_(step)

    @torch.no_grad()
    def note(self, loss: torch.Tensor) -> None:
        """Records the loss (a scalar) and the gradients of the next step."""
        self._step.add_(1)
        # 0·∞ and 0·NaN are NaN
        zeros = [loss * 0]
        for parameter in self._parameters.values():
            zeros.append(zeros[0] if parameter.grad is None else (parameter.grad * 0).sum())
        fine = torch.stack(zeros) == 0
        self._first.copy_(torch.where(fine, self._first, torch.minimum(self._first, self._step)))

    def check(self) -> None:
        """Raises TrainingError, naming the step and the layer, if anything recorded so far was not finite."""
        loss, *gradients = self._first.tolist()
        step = min(loss, *gradients)
        if step < _NEVER:
            names = [name for name, bad in zip(self._parameters, gradients, strict=True) if bad == step]
            what = ["the loss"] if loss == step else []
            # the backward pass runs from output to input: it fails in the last of these layers first
            what += [f"the gradient of {name}" for name in names[-1:]]
            remedy = LOWER if step > 1 else "no weight has changed yet: look for the largest values in the data"
            raise TrainingError(f"in step {step} {' and '.join(what)} became non-finite; {remedy}")


class LayerWatch:
    """Warns, once for each layer and problem, about neurons that do nothing useful (logger ``g2gnet``)."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def check(
        self, epoch: int, rates: Mapping[str, float], silent: Mapping[str, float], neurons: Mapping[str, SpikingNeurons]
    ) -> None:
        """Checks each layer after an epoch: its mean firing rate, its share of silent neurons, and its decays."""
        for name, rate in rates.items():
            if rate < SILENT:
                self._warn(name, "silent", f"fell silent in epoch {epoch} (firing rate {rate:.2g}); {WAKE}")
            elif silent[name] > MOSTLY_SILENT:
                share = f"{100 * silent[name]:.0f} % of its neurons"
                self._warn(name, "silent", f"is mostly silent: {share} never fired in epoch {epoch}; {WAKE}")
            if rate > SATURATED:
                self._warn(name, "saturated", f"saturates in epoch {epoch} (firing rate {rate:.2g}); {CALM}")
        for name, layer in neurons.items():
            for decay in layer.model.decays:
                values = layer.by_name[decay]
                low, high = values.min().item(), values.max().item()
                if low < -FAR or high > 1 + FAR:
                    learned = f"{decay} = {low if low < -FAR else high:.4g} in epoch {epoch}, outside 0 … 1"
                    self._warn(name, decay, f"has learned {learned}: it counts as {int(low >= -FAR)}; {DRIFTING}")

    def check_classes(self, connection: str, fan_in: torch.Tensor) -> None:
        """Checks that the last connection has weights for every class: ``fan_in``, int64 [classes]."""
        if unseen := int((fan_in == 0).sum()):
            classes = f"{unseen} of {len(fan_in)} classes, whose scores therefore do not depend on the input"
            text = f"has no weights for {classes}; lower `block_size`, or keep more weights"
            self._warn(connection, "classes", text)

    def _warn(self, layer: str, problem: str, text: str) -> None:
        if (layer, problem) not in self._warned:
            self._warned.add((layer, problem))
            logger.warning("%s %s", layer, text)


def check_labels(data: ImageData) -> None:
    """Warns if tested images have classes that no training image has."""
    for part, labels in (("test", data.test_labels), ("validation", data.val_labels)):
        if labels is None:
            continue
        if unknown := labels[torch.isin(labels, data.train_labels, invert=True)].tolist():
            of = f"of classes without a training image ({', '.join(map(str, sorted(set(unknown))))})"
            what = f"{len(unknown)} of {len(labels)} {part} images are {of}, which cannot be learned"
            logger.warning("%s; give some, or leave `limit_train` out", what)


def check_rates(settings: TrainSettings, data: ImageData) -> None:
    """Warns if training samples are no spike probabilities, since ``enc="rate"`` clips them."""
    outside = 0
    for images in data.train_images.split(1024) if settings.enc == "rate" else ():
        rates = as_samples(images) * settings.enc_scale + settings.enc_bias
        outside += int(((rates < 0) | (rates > 1)).sum())
    if outside:
        share = f"{100 * outside / data.train_images.numel():.3g} %"
        what = f"{share} of the inputs are below 0 or above 1 and are clipped, since `enc=rate` takes them for spike"
        logger.warning("%s probabilities; change `enc_scale` and `enc_bias`, or give `enc=current`", what)


def check_images(settings: TrainSettings, data: ImageData) -> None:
    """Raises SettingsError if settings change samples as images, but the samples are none."""
    shape, what = data.train_images.shape[1:], "vectors"
    if settings.sequence == "own":
        shape, what = shape[1:], "sequences of vectors"
    for name, value in settings.of_images().items() if len(shape) < 2 else ():
        are = f"those of {data.name} are {what} of {shape.numel()} values"
        raise SettingsError(f"{name}={value} needs images, but {are}; leave `{name}` out")
    if far := shift_problem(settings.unit_shift, data.name, shape):
        raise SettingsError(far)


def order_of(settings: TrainSettings, data: ImageData) -> torch.Tensor:
    """The places of each step's inputs in a sample, int64 [T, D]. Raises SettingsError if the samples cannot unfold as
    the settings say, or have another length than ``T``."""
    try:
        order = input_order(
            settings.sequence, data.train_images.shape[1:], settings.sequence_step, settings.sequence_seed
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if len(order) != settings.T:
        sequences = f"the sequences of {data.name} with sequence={settings.sequence}"
        raise SettingsError(f"T={settings.T} is not the length of {sequences}; give `T={len(order)}`")
    return order
