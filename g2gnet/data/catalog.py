"""The data sets by name."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from g2gnet.data.image_data import ImageData


class DatasetSizes(NamedTuple):
    """The number of values in a sample and of classes."""

    input_dim: int
    num_classes: int


#: every data set that ``--dataset`` takes
DATASETS = {
    "fashionmnist": DatasetSizes(784, 10),
    "fashionmnist-mini": DatasetSizes(784, 10),
    "cifar10": DatasetSizes(3072, 10),
    "cifar100": DatasetSizes(3072, 100),
}


def load_dataset(name: str, data_dir: Path | str = "data") -> ImageData:
    """Reads a data set from ``data_dir``, from where the system keeps it, or by downloading it.

    Raises:
        ValueError: for an unknown name.
        DataError: if it cannot be found, downloaded or read.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    from g2gnet.data import cifar, fashion_mnist  # torchvision takes a second to import: only where data is read

    readers: dict[str, Callable[[Path], ImageData]] = {
        "fashionmnist": fashion_mnist.load,
        "fashionmnist-mini": lambda _: fashion_mnist.load_mini(),
        "cifar10": lambda data_dir: cifar.load("cifar10", data_dir),
        "cifar100": lambda data_dir: cifar.load("cifar100", data_dir),
    }
    return readers[name](Path(data_dir))
