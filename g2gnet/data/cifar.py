"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision's readers."""

import hashlib
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from g2gnet.base.files import one_at_a_time
from g2gnet.data.image_data import ImageData, MissingDataError

#: torchvision's reader of each data set; its class attributes hold the names, checksums and address of the files
READERS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load(name: str, data_dir: Path) -> ImageData:
    """Reads ``"cifar10"`` or ``"cifar100"`` (fine labels); images are uint8 [N, 3, 32, 32].

    ``data_dir`` may have the batches as torchvision leaves them (``cifar-10-batches-py``, ``cifar-100-python``), or the
    original archive, which is downloaded otherwise. Batches are pickles, which can run any code, and are opened only if
    their checksums are the published ones. Raises DataError if they cannot be found, downloaded or read."""
    reader, parts = READERS[name], {}
    folder = data_dir / reader.base_folder
    try:
        with one_at_a_time(folder):
            for part in ("train", "test"):
                data = reader(str(data_dir), train=part == "train", download=part == "train")
                # torchvision moves the channels last, for pictures; the files have them first
                parts[f"{part}_images"] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
                parts[f"{part}_labels"] = torch.tensor(data.targets)
    except (OSError, RuntimeError) as error:  # RuntimeError: a checksum differs
        raise MissingDataError(
            f"{name} is not in {data_dir}, or damaged, and could not be put there ({error}). Do one of these:\n"
            f"  1. connect to the internet, delete {folder} if it is there, and run this again;\n"
            f"  2. put {reader.filename} into {data_dir}, or the folder {reader.base_folder} that it holds, or name "
            "the directory that has one of them as `data_dir`."
        ) from error
    return ImageData(name=name, num_classes=len(data.classes), **parts)


def fingerprint(name: str) -> str:
    """The SHA-256 of the required checksums of the files of ``name``: it identifies their content."""
    reader = READERS[name]
    batches = [(file, md5) for file, md5 in [*reader.train_list, *reader.test_list]]
    return hashlib.sha256(repr([*batches, (reader.meta["filename"], reader.meta["md5"])]).encode()).hexdigest()
