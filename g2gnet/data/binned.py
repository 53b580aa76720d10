"""Recordings, of events or sounds, as sequences: read once, counted in bins of time and place, and kept in a file.

A module reads the files of a data set, all below one directory, with

    parts(name, data_dir)   the :class:`Recordings` of ``"train"``, ``"test"`` and perhaps ``"val"``
    FORM                    what its samples hold, for the name of the file; change it with the samples
"""

import contextlib
import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from g2g_kernels.numbers import COUNT, Number
from g2gnet.base.memory import available, gigabytes
from g2gnet.base.messages import reason, say
from g2gnet.data.cache import NamedTensors, made_once
from g2gnet.data.image_data import DataError, ImageData, MissingDataError

logger = logging.getLogger("g2gnet")

#: dtypes of counts; the first that holds them is used
COUNTED = (torch.int8, torch.int16, torch.int32)
#: times at or beyond this (microseconds) are invalid
LATEST = 1e12
#: milliseconds of a step
STEP = Number(0.1, 60_000)


class Binning(NamedTuple):
    """How recordings become sequences, unless a run states something else.

    Attributes:
        units: of the sensor: channels of a cochlea, or pixels of a side of a camera.
        bins: in which units are counted, a divisor of ``units``.
        dt, milliseconds: of a time step in milliseconds, and of a sample, from its start.
        resolution: of the recordings in milliseconds; ``dt`` is a multiple of it.
        camera: a sample is [T, 2, bins, bins], with events of both polarities; otherwise [T, bins].
        bands: ``bins`` are bands of a sound's power, any number up to ``units``.
    """

    units: int
    bins: int
    dt: float
    milliseconds: float
    resolution: float = 0.001
    camera: bool = False
    bands: bool = False

    def or_usual(self, bins: int | None, dt: float | None) -> tuple[int, float]:
        """These numbers, or the usual ones for None."""
        return self.bins if bins is None else bins, self.dt if dt is None else dt

    def steps(self, dt: float) -> int:
        """The time steps of a sample."""
        return max(1, math.ceil(self.milliseconds / dt - 1e-9))

    def shape(self, steps: int, bins: int) -> tuple[int, ...]:
        """The shape of a sample."""
        return (steps, 2, bins, bins) if self.camera else (steps, bins)

    def problems(self, name: str, bins: int, dt: float) -> list[str]:
        """What is wrong with these settings of the data set ``name``."""
        what = "pixels of a side" if self.camera else "bands that its sounds resolve" if self.bands else "channels"
        problems = []
        if bins > self.units:
            problems.append(f"bins={bins} are more than the {self.units} {what} of {name}; give fewer")
        elif not self.bands and self.units % bins:
            divisors = ", ".join(str(each) for each in range(1, self.units + 1) if self.units % each == 0)
            problems.append(f"bins={bins} does not divide the {self.units} {what} of {name}; give one of {divisors}")
        if abs(dt / self.resolution - round(dt / self.resolution)) > 1e-6:
            problems.append(f"dt={dt} is no multiple of {self.resolution:g} ms, in which {name} is sampled; give one")
        return problems


class Grid:
    """The cells of a sample, time steps × places of ``width`` units of the sensor, in which ``events`` are counted.
    ``late`` events come after the last step."""

    def __init__(self, shape: tuple[int, ...], dt: float, width: int) -> None:
        self.shape, self.dt, self.bins, self.width = shape, dt, shape[-1], width
        self.events = self.late = 0

    def count(self, microseconds: np.ndarray, *places: np.ndarray) -> np.ndarray:
        """How many events fall into each cell, from their whole microseconds and their places on each axis of a step,
        [n] each. Raises ValueError for an event before 0, or at no place."""
        for values, size in zip((microseconds, *places), (LATEST, *self.shape[1:]), strict=True):
            if not ((values >= 0) & (values < size)).all():
                raise ValueError("an event has an invalid time, or a place outside of the sensor")
        steps = microseconds.astype(np.int64) // round(1000 * self.dt)
        inside = steps < self.shape[0]
        self.events += len(steps)
        self.late += len(steps) - int(inside.sum())
        cells = np.ravel_multi_index([each[inside].astype(np.int64) for each in (steps, *places)], self.shape)
        return np.bincount(cells, minlength=math.prod(self.shape)).reshape(self.shape)


class Recordings(NamedTuple):
    """A part of a data set that was found, but not read: its files, labels, int64 [N], how many samples were published,
    and ``samples``, which reads one after another in the shape of a grid: counts, or float16. It raises DataError,
    which names a damaged file."""

    files: Sequence[Path]
    labels: np.ndarray
    published: int
    samples: Callable[[Grid], Iterator[np.ndarray]]


def load(
    name: str, data_dir: Path, module: Any, classes: int, binning: Binning, bins: int, dt: float, steps: int | None
) -> ImageData:
    """The data set ``name`` as sequences of ``steps`` steps (None: as ``binning`` says) of ``dt`` milliseconds, from
    files below ``data_dir``; the sequences are kept in ``binned`` there. Counts are integers other than uint8, features
    float16. Raises ValueError for settings that do not fit the data set, DataError for missing or damaged files."""
    bins, dt = COUNT.check("bins", bins), STEP.check("dt", dt)
    if problems := binning.problems(name, bins, dt):
        raise ValueError("; ".join(problems))
    shape = binning.shape(binning.steps(dt) if steps is None else COUNT.check("steps", steps), bins)
    parts: Mapping[str, Recordings] = module.parts(name, data_dir)
    for part, (files, labels, published, _) in parts.items():
        if labels.min() < 0 or labels.max() >= classes:
            found = f"labels are from {labels.min()} to {labels.max()}, not from 0 to {classes - 1}"
            raise DataError(f"{files[0]}: {found}; download it again")
        if len(labels) != published:
            text = "%s has %d samples for %s, and %d were published: some may be missing in %s"
            logger.warning(text, name, len(labels), part, published, data_dir)
    files = [file for part in parts.values() for file in part.files]  # identified without reading them:
    about = [(str(file.relative_to(data_dir)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((module.FORM, shape, dt, about)).encode()).hexdigest()
    kept = data_dir / "binned" / f"{name}_bins{bins}_dt{dt:g}_T{shape[0]}_{key[:16]}.pt"
    grid = Grid(shape, dt, binning.units // bins)
    tensors = made_once(kept, f"the sequences of {name}", lambda: _read(name, parts, binning, grid))
    return ImageData(name=name, num_classes=classes, **tensors)


def _read(name: str, parts: Mapping[str, Recordings], binning: Binning, grid: Grid) -> NamedTensors:
    """The samples and labels of all parts. Raises DataError if they do not fit into memory, or have no event."""
    dtype = torch.float16 if binning.bands else COUNTED[0]
    needed = sum(len(part.labels) for part in parts.values()) * math.prod(grid.shape) * dtype.itemsize
    free = available()
    if free is not None and needed > free:
        raise DataError(
            f"{name} as sequences {list(grid.shape)} takes {gigabytes(needed)} of memory, and there are "
            f"{gigabytes(free)}; lower `T` or `bins`, or raise `dt`"
        )
    say(f"reading {name}: {' × '.join(map(str, grid.shape))} values in each sample")
    tensors: NamedTensors = {}
    for part, (_, labels, _, samples) in parts.items():
        images = torch.empty(len(labels), *grid.shape, dtype=dtype)
        bar = tqdm(samples(grid), f"{name} {part}", len(labels), leave=False, disable=not sys.stderr.isatty())
        for number, sample in enumerate(bar):
            while not dtype.is_floating_point and sample.max() > torch.iinfo(images.dtype).max:
                images = images.to(COUNTED[COUNTED.index(images.dtype) + 1])
            images[number] = torch.from_numpy(sample)
        tensors |= {f"{part}_images": images, f"{part}_labels": torch.from_numpy(labels)}
    if grid.late == grid.events and not binning.bands:
        raise DataError(
            f"no event of {name} comes in the first {grid.shape[0]} steps of {grid.dt:g} ms; are its times in other "
            "units? Raise `T` or `dt`"
        )
    if grid.late:
        say(f"{grid.late / grid.events:.2%} of the events come after {grid.shape[0]} × {grid.dt:g} ms and are left out")
    return tensors


def of_files(
    files: Sequence[Path],
    names: Sequence[str],
    classes: Sequence[str],
    published: int,
    read: Callable[[Path, Grid], np.ndarray],
) -> Recordings:
    """Recordings in one file each, with the name of its class. Raises DataError for a file of no class."""
    for file, name in zip(files, names, strict=True):
        if name not in classes:
            raise DataError(f"{file} is of none of the classes {classes[0]} … {classes[-1]}; move it away")

    def samples(grid: Grid) -> Iterator[np.ndarray]:
        for file in files:
            with reading(file):
                sample = read(file, grid)
            yield sample

    labels = np.array([classes.index(name) for name in names], dtype=np.int64)
    return Recordings(files, labels, published, samples)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns errors into a DataError that names the file; NumPy's and SciPy's readers can raise anything at a damaged
    one."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{file} is damaged, or not a file of these data ({reason(error)}); unpack or download it again"
        ) from error


def folder_of(name: str, data_dir: Path, places: Sequence[str], wanted: Sequence[str], remedy: str) -> Path:
    """The first of ``places`` below ``data_dir`` with all of ``wanted``; MissingDataError with the ``remedy``."""
    folders = [data_dir / place for place in places]
    for folder in folders:
        if all((folder / each).exists() for each in wanted):
            return folder
    raise MissingDataError(
        f"{name} is not in {data_dir}: neither {' nor '.join(map(str, folders))} has {', '.join(wanted)}. Do one of:\n"
        f"  1. {remedy};\n"
        "  2. give the directory that has it as `data_dir`."
    )
