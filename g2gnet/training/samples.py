"""Whether the samples of a data set are what a run's settings need, and how they unfold over time."""

import torch

from g2gnet.data import ImageData, npz
from g2gnet.data.augmentation import shift_problem
from g2gnet.network_settings import SettingsError
from g2gnet.sequences import input_order
from g2gnet.training.run_settings import TrainSettings


def check_images(settings: TrainSettings, data: ImageData) -> None:
    """Raises SettingsError if samples are to be changed as images, but are none."""
    shape, what, wanted = data.train_images.shape[1:], "vectors", "[N, ..., height, width]"
    if settings.sequence == "own":
        shape, what, wanted = shape[1:], "sequences of vectors", "[N, T, ..., height, width]"
    for name, value in settings.of_images().items():
        if len(shape) < 2:
            others = f", or give arrays of shape {wanted}" if npz.is_name(data.name) else ""
            raise SettingsError(
                f"{name}={value} needs images, but those of {data.name} are {what} of {shape.numel()} values; leave "
                f"`{name}` out{others}"
            )
    if far := shift_problem(settings.unit_shift, data.name, shape):
        raise SettingsError(far)


def order_of(settings: TrainSettings, data: ImageData) -> torch.Tensor:
    """Where each step's inputs lie in a sample, int64 [T, D]. Raises SettingsError if samples unfold in another way
    than the settings say, or have another length than ``T``."""
    try:
        order = input_order(
            settings.sequence, data.train_images.shape[1:], settings.sequence_step, settings.sequence_seed
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if len(order) != settings.T:
        raise SettingsError(
            f"T={settings.T} is not the length of the sequences of {data.name} with sequence={settings.sequence}; give "
            f"`T={len(order)}`"
        )
    return order
