"""Your own data: one ``.npz`` file, as ``numpy.savez`` writes it, with four arrays.

    train_images, test_images   uint8 (0 to 255 become 0 to 1), or float32 as they are; float64 becomes float32
        [N, D]                                              vectors
        [N, channels, height, width]                        images
        [N, T, D], [N, T, channels, height, width]          sequences (:data:`SEQUENCE_DIMENSIONS`), by default
    train_labels, test_labels   integers [N]: together each of 0 … C − 1 at least once

A run names such data by the file's name and the first digits of its SHA-256, as in ``name-1a2b3c4d``. Nothing in a file
is executed, and its sizes are checked before it is read.
"""

import hashlib
import io
import logging
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from g2gnet.base.files import open_file
from g2gnet.base.memory import available, gigabytes
from g2gnet.base.messages import reason
from g2gnet.data.image_data import DataError, ImageData

Content = TypeVar("Content")
logger = logging.getLogger("g2gnet.data")

SUFFIX = ".npz"
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
#: hexadecimal digits of the SHA-256 at the end of a name
DIGITS = 8
#: the most that is read of an array's header; NumPy refuses headers of more than 10,000 characters
HEADER_BYTES = 10_100
#: the axes of a sample, by the dimensions of an array of them, N included; and those that are sequences by default
AXES = {2: "[D]", 3: "[T, D]", 4: "[channels, height, width]", 5: "[T, channels, height, width]"}
SEQUENCE_DIMENSIONS = 3, 5
SAMPLES = "uint8, float32 or float64: [N, D], images [N, channels, height, width], or sequences [N, T, …] of either"

#: the data files given to this process, by name
_paths: dict[str, Path] = {}


def is_name(name: object) -> bool:
    """Whether ``name`` is one that :func:`name_of` gives."""
    return isinstance(name, str) and re.fullmatch(rf"[^/]+-[0-9a-f]{{{DIGITS}}}", name) is not None


def name_of(path: Path | str, remedy: str = "give the path of a file") -> str:
    """The name by which :func:`load` finds a file's data. Raises DataError, with the ``remedy``, if unreadable."""
    path = Path(path)
    try:
        with open_file(path) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"dataset={path} cannot be read ({reason(error)}); {remedy}") from error
    name = f"{path.stem}-{digest.hexdigest()[:DIGITS]}"
    _paths[name] = path
    return name


def load(name: str, data_dir: Path) -> ImageData:
    """Reads the data of that name, from the file that was given, or that in ``data_dir`` or the working directory.
    Raises DataError if it is missing, has other content than the name says, or lacks such arrays."""
    path = _path(name, data_dir)
    found = name_of(path, "give the directory that has it as `data_dir`")
    if found != name:
        raise DataError(f"{path} is {found}, not {name}: its content differs from the run's data; give its `data_dir`")
    arrays = _read_archive(path, _arrays)
    classes = 1 + max(int(arrays[f"{split}_labels"].max()) for split in ("train", "test"))
    (train, *shape), test = arrays["train_images"].shape, len(arrays["test_images"])
    # channels last would not fail, so the user reads what was taken for channels
    axes = AXES[1 + len(shape)]
    logger.info("Data: %d training and %d test samples, %s = %s, %d classes", train, test, axes, shape, classes)
    return ImageData(name=name, num_classes=classes, **{part: torch.from_numpy(arrays[part]) for part in ARRAYS})


def holds_sequences(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are sequences by default."""
    return 1 + len(shape) in SEQUENCE_DIMENSIONS


def sample_shape(name: str, data_dir: Path) -> tuple[int, ...]:
    """The shape of a sample, from the head of the file. Raises DataError if it is missing, or lacks such arrays."""
    return _read_archive(_path(name, data_dir), _headers)["train_images"][0][1:]


def directory_of(name: str) -> Path | None:
    """The directory of the file of that name that was given to this process, or None."""
    return _paths[name].parent if name in _paths else None


def _path(name: str, data_dir: Path) -> Path:
    if name in _paths:
        return _paths[name]
    file = f"{name[: -DIGITS - 1]}{SUFFIX}"
    return Path(file) if not (data_dir / file).exists() and Path(file).exists() else data_dir / file


def _read_archive(path: Path, read: Callable[[zipfile.ZipFile], Content]) -> Content:
    """What ``read`` finds in a file. Raises DataError if reading fails."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            return read(archive)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} cannot be used as data: it is no whole file of numpy.savez ({error})") from error
    except Exception as error:  # zipfile's and NumPy's readers can raise anything at a damaged file
        raise DataError(f"{path} cannot be used as data: {reason(error)}") from error


def _headers(archive: zipfile.ZipFile) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the four arrays. Raises ValueError if they are not as above."""
    names = [member.removesuffix(".npy") for member in archive.namelist()]
    if missing := [name for name in ARRAYS if name not in names]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if others := [name for name in names if name.endswith(("_images", "_labels")) and name not in ARRAYS]:
        raise ValueError(
            f"it has {', '.join(others)} besides {', '.join(ARRAYS)}; put them into these, where `validation` holds "
            "training images out, or leave them out"
        )
    headers = {name: _header(archive, name) for name in ARRAYS}
    for name, (shape, dtype) in headers.items():
        if name.endswith("labels"):
            wanted = "integers [N], as the second result of np.unique(labels, return_inverse=True)"
            fits = dtype.kind in "iu" and len(shape) == 1
        else:
            fits, wanted = dtype in (np.uint8, np.float32, np.float64) and len(shape) in AXES, SAMPLES
        if not fits or 0 in shape:
            size = ", no axis of size 0" if 0 in shape else ""
            raise ValueError(f"{name} is {dtype} {list(shape)}; give {wanted}{size}")
    for split in ("train", "test"):
        count, labels = headers[f"{split}_images"][0][0], headers[f"{split}_labels"][0][0]
        if count != labels:
            raise ValueError(f"{split}_images are {count}, {split}_labels {labels}; give each image one label")
    (train, train_dtype), (test, test_dtype) = headers["train_images"], headers["test_images"]
    if train[1:] != test[1:] or train_dtype != test_dtype:
        raise ValueError(
            f"train_images are {train_dtype} {list(train)}, test_images {test_dtype} {list(test)}; give both the same "
            "dtype and shape of an image"
        )
    return headers


def _arrays(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """The four arrays. Raises ValueError, before it allocates memory for them, if they are not as above."""
    headers = _headers(archive)
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
    free = available()
    if free is not None and needed > free:
        raise ValueError(f"its arrays take {gigabytes(needed)} of memory, and there are {gigabytes(free)}")
    arrays = {}
    for name, (shape, _) in headers.items():
        with archive.open(f"{name}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
        if name.endswith("labels"):
            if array.min() < 0 or array.max() >= shape[0]:
                raise ValueError(
                    f"{name} are from {array.min()} to {array.max()}, with {shape[0]} images; number classes from 0, "
                    "as np.unique(labels, return_inverse=True) does"
                )
            array = array.astype(np.int64)
        elif array.dtype == np.float64:
            with np.errstate(over="ignore"):  # infinities are refused below
                array = array.astype(np.float32)
        if not (finite := np.isfinite(array).reshape(len(array), -1).all(1)).all():
            first = f"{name}[{int(np.argmin(finite))}] is the first of {int((~finite).sum())}"
            raise ValueError(f"{name} are not finite everywhere: {first}; replace NaN and infinite values")
        arrays[name] = array
    found = np.union1d(arrays["train_labels"], arrays["test_labels"])
    if len(found) <= found[-1]:
        lacking = int(np.setdiff1d(np.arange(len(found) + 1), found)[0])
        raise ValueError(
            f"train_labels and test_labels are up to {found[-1]}, and no image is of class {lacking}; number classes "
            "from 0 without gaps, as np.unique(labels, return_inverse=True) does"
        )
    return arrays


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """The declared shape and dtype of an array, if they match the size of the archive's member."""
    with archive.open(f"{name}.npy") as member:
        head = io.BytesIO(member.read(HEADER_BYTES))  # NumPy would read all of a longer header before it refuses it
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, such as arrays of different shapes; give one array of numbers")
    size = head.tell() + math.prod(shape) * dtype.itemsize
    if size != archive.getinfo(f"{name}.npy").file_size:
        raise ValueError(f"{name} does not have the size that it claims")
    return shape, dtype
