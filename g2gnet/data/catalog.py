"""The data sets by name. A new one is an entry here and a module that reads it."""

import importlib
import math
from pathlib import Path
from typing import NamedTuple

from g2gnet.data import own
from g2gnet.data.image_data import ImageData


class Dataset(NamedTuple):
    """What is known about a data set before it is read.

    Attributes:
        shape: of an image, (height, width) or (channels, height, width).
        num_classes: number of classes.
        module: of this package; its ``load(name, data_dir)`` gives the :class:`ImageData`. It is imported only when
            data are read, since importing torchvision takes a second.
        crops: whether ``augment="auto"`` shifts and mirrors its images.
        classes: their names, where they are few.
    """

    shape: tuple[int, ...]
    num_classes: int
    module: str
    crops: bool = False
    classes: tuple[str, ...] = ()

    @property
    def input_dim(self) -> int:
        """Values in an image."""
        return math.prod(self.shape)


_CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

#: every data set by name
DATASETS = {
    "fashionmnist": Dataset((28, 28), 10, "fashion_mnist", classes=_CLOTHES),
    "fashionmnist-mini": Dataset((28, 28), 10, "fashion_mnist", classes=_CLOTHES),
    "cifar10": Dataset((3, 32, 32), 10, "cifar", crops=True, classes=_THINGS),
    "cifar100": Dataset((3, 32, 32), 100, "cifar", crops=True),
}


def dataset_name(given: str) -> str:
    """The name of the data set that is asked for: one of :data:`DATASETS`, or your own file.

    Raises:
        DataError: if the file cannot be read.
    """
    return own.name_of(given) if given.endswith(own.SUFFIX) else given


def load_dataset(name: str, data_dir: Path | str = "data") -> ImageData:
    """Reads a data set from ``data_dir`` or the system's copy, or downloads it.

    Your own data (:func:`dataset_name`) come from the given file, or the file of that name in ``data_dir``.

    Raises:
        ValueError: for an unknown name.
        DataError: if it cannot be found, downloaded or read.
    """
    if own.is_name(name):
        return own.load(name, Path(data_dir))
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise ValueError(
            f"dataset={name!r} is unknown; choose one of {known}, or the name of your own .npz file (dataset_name)"
        )
    module = importlib.import_module(f"{__package__}.{DATASETS[name].module}")
    return module.load(name, Path(data_dir))
