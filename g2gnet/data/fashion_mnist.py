"""Fashion-MNIST (Xiao et al. 2017): the full set, verified by checksums, and the subset in the package."""

import gzip
import hashlib
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import download_and_extract_archive

from g2gnet.base.files import one_at_a_time, open_file
from g2gnet.base.messages import reason
from g2gnet.data.image_data import DataError, ImageData, MissingDataError

logger = logging.getLogger("g2gnet.data")

#: where the Debian package dataset-fashion-mnist puts its files
SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")
MINI_FILE = Path(__file__).with_name("fashion_mnist_mini.npz")

#: the SHA-256 of the four IDX files once they are unpacked (they are gzipped in several ways), and the largest's bytes
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 16 + 60_000 * 28 * 28


def load(name: str, data_dir: Path) -> ImageData:
    """Reads ``"fashionmnist-mini"`` from the package, or the full set ``"fashionmnist"`` from ``data_dir`` or the
    system's copy; if it is in neither, it is downloaded into ``data_dir``. There the four IDX files, gzipped or not,
    may be where torchvision puts them (``FashionMNIST/raw``) or directly in the folder."""
    if name == "fashionmnist-mini":
        return load_mini()
    raw = data_dir / "FashionMNIST" / "raw"
    files = _found(raw) or _found(data_dir) or _found(SYSTEM_DIR)
    if not files:
        try:
            with one_at_a_time(raw):
                if not _found(raw):  # another process may have downloaded them in the meantime
                    _download(raw)
        except OSError as error:
            raise MissingDataError(
                f"Fashion-MNIST is neither in {data_dir} nor in {SYSTEM_DIR}, and could not be downloaded ({error}). "
                "Do one of these:\n"
                "  1. connect to the internet and run this again;\n"
                "  2. on Debian or Ubuntu: apt-get install dataset-fashion-mnist;\n"
                f"  3. put the files {', '.join(name + '.gz' for name in DIGESTS)} into {data_dir}, "
                "or give their folder as `data_dir`."
            ) from error
        files = _found(raw)
    logger.info("Data: Fashion-MNIST in %s", next(iter(files.values())).parent)
    parts = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        parts[f"{part}_images"] = _content(files, f"{name}-images-idx3-ubyte", header=16).view(-1, 28, 28)
        parts[f"{part}_labels"] = _content(files, f"{name}-labels-idx1-ubyte", header=8).long()
    return ImageData(name="fashionmnist", num_classes=10, **parts)


def _download(folder: Path) -> None:
    """Downloads and unpacks the four archives, each from the first mirror that has it with its checksum."""
    for name, checksum in FashionMNIST.resources:
        errors = []
        for mirror in FashionMNIST.mirrors:
            try:
                download_and_extract_archive(f"{mirror}{name}", str(folder), filename=name, md5=checksum)
                break
            except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
                errors.append(f"{mirror}{name}: {error}")
        else:
            raise OSError("\n".join(errors))


def _found(folder: Path) -> dict[str, Path]:
    """The four files of a folder by name, gzipped or not; empty if one is missing."""
    found = {name: path for name in DIGESTS for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
    return found if len(found) == len(DIGESTS) else {}


def _content(files: Mapping[str, Path], name: str, header: int) -> torch.Tensor:
    """The values of a file behind its header, after a check of its content; no more than the largest is unpacked."""
    path = files[name]
    try:
        with open_file(path) as file, gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file as plain:
            content = plain.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({reason(error)}); delete it and download it again") from error
    if hashlib.sha256(content).hexdigest() != DIGESTS[name]:
        raise DataError(
            f"{path} is damaged or of another data set (its checksum is not that of Fashion-MNIST's); delete it and "
            "download it again, or give another folder as `data_dir`. Data of your own go into a file for "
            "`dataset=FILE.npz`"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())


def load_mini() -> ImageData:
    """Reads the class-balanced subset of 6,000 training and 1,000 test images that ships with the package."""
    with np.load(MINI_FILE, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    labels = {name: tensors[name].long() for name in ("train_labels", "test_labels")}
    return ImageData(name="fashionmnist-mini", num_classes=10, **{**tensors, **labels})
