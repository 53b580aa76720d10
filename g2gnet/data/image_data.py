"""A data set as the rest of the program sees it."""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch


class DataError(RuntimeError):
    """A data set is missing or damaged; the message names the file and the remedies."""


class MissingDataError(DataError):
    """A data set is not there and cannot be downloaded."""


@dataclass(frozen=True)
class ImageData:
    """A data set held in memory; batches are gathered by index on its device.

    Images are uint8 [N, ...], each flattened image a sample; float32 features [N, D]; or recordings as sequences
    [N, T, ...], float16 or counts of events in other integers. Labels are int64 [N]. Validation images are training
    images that are held out.

    Example:
        >>> images, labels = torch.randint(256, (20, 8, 8), dtype=torch.uint8), torch.arange(20) % 4
        >>> data = ImageData("toy", images[:15], labels[:15], images[15:], labels[15:], num_classes=4)
        >>> data.input_dim, len(data.limited(10, 2).train_labels)
        (64, 10)
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    val_images: torch.Tensor | None = None
    val_labels: torch.Tensor | None = None

    @property
    def input_dim(self) -> int:
        """Values in one sample."""
        return self.train_images[0].numel()

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of shapes, dtypes and values of all tensors, which identifies the content."""
        digest = hashlib.sha256()
        for name, value in self._tensors().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on ``device``."""
        return replace(self, **{name: each.to(device) for name, each in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: each for name, each in vars(self).items() if isinstance(each, torch.Tensor)}

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all training samples (:func:`~g2gnet.data.as_samples`). Raises DataError if
        all are equal."""
        total = square = 0.0
        for images in self.train_images.split(1024):
            values = images.cpu().double()
            total += values.sum().item()
            square += values.square().sum().item()
        mean = total / self.train_images.numel()
        deviation = math.sqrt(max(0.0, square / self.train_images.numel() - mean**2))
        if deviation == 0:
            given = f"the {len(self.train_labels)} training images of {self.name}"
            raise DataError(f"all values of {given} are {mean:g}; leave `standardize` out")
        unit = 255 if self.train_images.dtype == torch.uint8 else 1
        return mean / unit, deviation / unit

    def limited(self, train: int | None, test: int | None) -> "ImageData":
        """The first ``train`` training images, as many validation and ``test`` test images (None: all of them)."""
        limits = {"train": train, "val": train, "test": test}
        return replace(self, **{name: each[: limits[name.partition("_")[0]]] for name, each in self._tensors().items()})

    def part(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels of ``"train"``, ``"val"`` or ``"test"``."""
        return getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")

    def held_out(self, index: torch.Tensor) -> "ImageData":
        """The same data, with the training images of these numbers (int64 [n]) as validation images."""
        images, labels = self.train_images, self.train_labels
        trains = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, index, False)
        held: Any = {"val_images": images[index], "val_labels": labels[index]}
        return replace(self, train_images=images[trains], train_labels=labels[trains], **held)
