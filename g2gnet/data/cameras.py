"""Event cameras: N-MNIST (Orchard et al. 2015) and DVS-Gesture (Amir et al. 2017), in the files that tonic leaves.

N-MNIST is as published, ``Train/<digit>/<number>.bin`` and ``Test``: 40 bits for each event: x, y (8 each), polarity
(1), microseconds (23). An entry at y = 240 is no event: it adds 8,192 µs to all times from there on.

DVS-Gesture is tonic's: one file for each gesture, ``ibmGestureTrain/<user_light>/<class>.npy`` and ``ibmGestureTest``,
with an array [n, 4] of x, y, polarity and milliseconds. Its first event is its time 0.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from g2gnet.base.files import open_file, read_file
from g2gnet.data.binned import Grid, Recordings, folder_of, of_files
from g2gnet.data.catalog import DATASETS
from g2gnet.data.image_data import DataError

FORM = "events per cell, times of gestures from the first event"
COUNTS = {"nmnist": {"train": 60000, "test": 10000}, "dvsgesture": {"train": 1077, "test": 264}}
OVERFLOW_ROW, OVERFLOW = 240, 1 << 13

#: x, y, polarity and whole microseconds of the events of a file, [n] each
Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def parts(name: str, data_dir: Path) -> dict[str, Recordings]:
    """The folders of ``"nmnist"`` or ``"dvsgesture"``, in ``data_dir`` or where tonic puts them."""
    if name == "nmnist":
        folders, own, pattern, read = ("Train", "Test"), "NMNIST", "*/[!.]*.bin", read_nmnist
        remedy = f"put Train.zip and Test.zip of N-MNIST, unpacked, into {data_dir}, as tonic.datasets.NMNIST does"
    else:
        folders, own, pattern, read = ("ibmGestureTrain", "ibmGestureTest"), "DVSGesture", "*/[!.]*.npy", read_gesture
        remedy = f"let tonic.datasets.DVSGesture({str(data_dir)!r}) download it"
    root = folder_of(name, data_dir, (own, "."), folders, remedy)
    classes = [*map(str, range(DATASETS[name].num_classes))]
    found = {}
    for part, folder in zip(("train", "test"), folders, strict=True):
        # in an order in which classes take turns: MNIST's own, or user by user; macOS leaves hidden files
        files = sorted((root / folder).glob(pattern), key=lambda file: (name == "nmnist" or file.parent, file.name))
        if not files:
            raise DataError(f"{root / folder} holds no files {pattern}; {remedy}")
        names = [file.parent.name if name == "nmnist" else file.stem for file in files]
        found[part] = of_files(files, names, classes, partial(_frames, read))
    return found


def _frames(read: Callable[[Path], Events], file: Path, grid: Grid) -> np.ndarray:
    x, y, polarity, microseconds = read(file)
    if not len(x):
        raise ValueError("it has no event")
    return grid.count(microseconds, polarity, y // grid.width, x // grid.width)


def read_nmnist(file: Path) -> Events:
    """The events of a file of N-MNIST."""
    x, y, first, second, third = np.frombuffer(read_file(file), np.uint8).reshape(-1, 5).astype(np.int64).T
    overflows = y == OVERFLOW_ROW
    microseconds = ((first & 127) << 16 | second << 8 | third) + OVERFLOW * overflows.cumsum()
    events = ~overflows
    return x[events], y[events], first[events] >> 7, microseconds[events]


def read_gesture(file: Path) -> Events:
    """The events of a file of tonic's DVS-Gesture."""
    with open_file(file) as content:
        events = np.load(content, allow_pickle=False)
    if events.dtype.kind not in "iufb" or events.ndim != 2 or events.shape[1] != 4:
        raise ValueError(f"it is {events.dtype} {list(events.shape)}, not numbers [n, 4]: x, y, polarity, milliseconds")
    x, y, polarity, milliseconds = events.astype(np.float64).T
    return x, y, polarity, np.rint(1000 * (milliseconds - milliseconds.min(initial=np.inf)))
