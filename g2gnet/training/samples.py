"""Checks that the samples of a data set suit a run's settings, and unfolds them over time."""

import torch

from g2gnet.data import ImageData
from g2gnet.data.augmentation import shift_problem
from g2gnet.network_settings import SettingsError
from g2gnet.sequences import input_order
from g2gnet.training.run_settings import TrainSettings


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
