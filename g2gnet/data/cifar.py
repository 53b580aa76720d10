"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision's readers."""

import hashlib
import tempfile
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, extract_archive

from g2gnet.base.files import directory, one_at_a_time
from g2gnet.data.download import download
from g2gnet.data.image_data import DataError, ImageData, MissingDataError

#: torchvision's reader of each data set; its class attributes hold the names, checksums and address of the files
READERS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load(name: str, data_dir: Path) -> ImageData:
    """Reads ``"cifar10"`` or ``"cifar100"`` (fine labels); images are uint8 [N, 3, 32, 32].

    The batches may be in ``data_dir`` as torchvision leaves them (``cifar-10-batches-py``, ``cifar-100-python``), or in
    the original archive; otherwise the archive is downloaded. They are pickles, which can run any code, so they are
    opened only if their checksums match the published ones. Raises DataError if they cannot be found, downloaded or
    read.
    """
    reader = READERS[name]
    folder = data_dir / reader.base_folder
    if not folder.is_dir():
        _fetch(name, data_dir, folder)
    parts = {}
    for part in ("train", "test"):
        try:
            data = reader(str(data_dir), train=part == "train")
        except (RuntimeError, OSError) as error:  # RuntimeError: a checksum differs
            raise DataError(_damage(name, folder) or f"the files in {folder} cannot be read ({error})") from error
        # torchvision moves the channels last, for pictures; the files have them first
        parts[f"{part}_images"] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        parts[f"{part}_labels"] = torch.tensor(data.targets)
    return ImageData(name=name, num_classes=len(data.classes), **parts)


def fingerprint(name: str) -> str:
    """The SHA-256 of the required checksums of the files of ``name``: it identifies their content."""
    return hashlib.sha256(repr(_files(READERS[name])).encode()).hexdigest()


def _files(reader: type[CIFAR10]) -> list[tuple[str, str]]:
    """Name and MD5 of every file that is read."""
    batches = [(file, md5) for file, md5 in [*reader.train_list, *reader.test_list]]
    return [*batches, (reader.meta["filename"], reader.meta["md5"])]


def _damage(name: str, folder: Path) -> str | None:
    for file, md5 in _files(READERS[name]):
        if not check_integrity(folder / file, md5):
            there = (folder / file).is_file()
            problem = "damaged (its checksum is not the published one)" if there else "missing"
            return f"{folder / file} is {problem}; move {folder} away and run this again to download it again"
    return None


def _fetch(name: str, data_dir: Path, folder: Path) -> None:
    """Puts the folder of batches into ``data_dir``, completely or not at all, from the archive there or a download."""
    reader = READERS[name]
    archive = data_dir / reader.filename
    if archive.exists() and not check_integrity(archive, reader.tgz_md5):
        raise DataError(
            f"{archive} is damaged (its checksum is not the published one); delete it, and this downloads it again"
        )
    try:
        with (
            one_at_a_time(folder),
            directory(data_dir),
            tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{name}-") as scratch,
        ):
            if folder.is_dir():  # another process put it there in the meantime
                return
            if not archive.exists():
                archive = Path(scratch, reader.filename)
                download([reader.url], archive, reader.tgz_md5)
            extract_archive(archive, scratch)
            Path(scratch, reader.base_folder).replace(folder)
    except OSError as error:
        raise MissingDataError(
            f"{name} is not in {data_dir} and could not be put there ({error}). Do one of these:\n"
            "  1. connect to the internet and run this again;\n"
            f"  2. put {reader.filename} into {data_dir}, or the folder {reader.base_folder} that it holds, or name "
            "the directory that has one of them as `data_dir`."
        ) from error
