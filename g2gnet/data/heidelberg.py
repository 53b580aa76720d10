"""Spiking Heidelberg Digits and Spiking Speech Commands (Cramer et al. 2022) in their published HDF5 files, read by
``h5py``: for each sample ``spikes/times``, seconds, and ``spikes/units``, their channels; and ``labels``."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from g2gnet.base.files import open_file
from g2gnet.base.messages import reason
from g2gnet.base.optional import optional_package
from g2gnet.data.binned import Grid, Recordings, folder_of
from g2gnet.data.image_data import DataError

FORM = "events per cell"
COUNTS = {"shd": {"train": 8156, "test": 2264}, "ssc": {"train": 75466, "val": 9981, "test": 20382}}
READ = 256  # samples at once


def parts(name: str, data_dir: Path) -> dict[str, Recordings]:
    """The files ``shd_train.h5`` and so on, in ``data_dir`` or where tonic puts them."""
    try:
        optional_package("h5py", "events")
    except ImportError as error:
        raise DataError(f"dataset={name} is read from HDF5: {error}") from error
    files = {part: f"{name}_{'valid' if part == 'val' else part}.h5" for part in COUNTS[name]}
    remedy = f"download {', '.join(files.values())} from https://compneuro.net and gunzip them into {data_dir}"
    folder = folder_of(name, data_dir, (".", name.upper()), list(files.values()), remedy)
    paths = {part: folder / file for part, file in files.items()}
    return {
        part: Recordings([path], _labels(path), COUNTS[name][part], partial(_samples, path))
        for part, path in paths.items()
    }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file. Any error becomes a DataError that names it."""
    import h5py

    try:
        open_file(path).close()  # h5py would wait for a FIFO's writer
        with h5py.File(path, "r") as file:
            yield file
    except Exception as error:  # a damaged file can make h5py raise anything
        raise DataError(f"{path} is damaged, or no file of these data ({reason(error)}); download it again") from error


def _labels(path: Path) -> np.ndarray:
    """The labels, if there are as many lists of times and of units."""
    with _opened(path) as file:
        labels = file["labels"]
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels):
            raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}, not integers [N]")
        times, units = len(file["spikes/times"]), len(file["spikes/units"])
        if not times == units == len(labels):
            raise ValueError(f"it has {len(labels)} labels, and times of {times} and units of {units} samples")
        return labels[()].astype(np.int64)


def _samples(path: Path, grid: Grid) -> Iterator[np.ndarray]:
    with _opened(path) as file:
        times, units = file["spikes/times"], file["spikes/units"]
        for begin in range(0, len(times), READ):
            block = slice(begin, begin + READ)
            for number, (seconds, channels) in enumerate(zip(times[block], units[block], strict=True), begin):
                if len(seconds) != len(channels):
                    raise ValueError(f"sample {number} has {len(seconds)} times and {len(channels)} units")
                microseconds = np.rint(seconds.astype(np.float64) * 1e6)  # of float16
                try:
                    counts = grid.count(microseconds, channels // grid.width)
                except ValueError as error:
                    has = f"units {channels.min()} … {channels.max()} and times {seconds.min():g} … {seconds.max():g} s"
                    raise ValueError(f"sample {number}, of {has}: {error}") from error
                yield counts
