"""Event cameras: N-MNIST (Orchard et al. 2015) and DVS-Gesture (Amir et al. 2017), as published or as tonic has them.

N-MNIST is as published, ``Train/<digit>/<number>.bin`` and ``Test``: 40 bits for each event: x, y (8 each), polarity
(1), microseconds (23). An entry at y = 240 is no event: it adds 8,192 µs to all times from there on.

DVS-Gesture as published is a folder of recordings in AEDAT 3.1, ``user01_led.aedat``, each with a table of its
gestures, ``user01_led_labels.csv``: class (from 1), begin and end in microseconds; ``trials_to_train.txt`` and
``trials_to_test.txt`` list the recordings. A gesture begins at the time of the table. After lines of text a recording
has packets: a header of 28 bytes with the type (1: events of polarity), the bytes of an entry, overflows of the
clock (2³¹ µs each) and the number of entries; an entry has 32 bits, x (15), y (15), polarity (1) and validity (1), and
microseconds (32).

tonic's DVS-Gesture has one file for each gesture, ``ibmGestureTrain/<user_light>/<class>.npy`` and ``ibmGestureTest``,
with an array [n, 4] of x, y, polarity and milliseconds. Its first event is its time 0.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from g2gnet.base.files import open_file, read_file
from g2gnet.data.binned import Grid, Recordings, folder_of, of_files, reading
from g2gnet.data.catalog import DATASETS
from g2gnet.data.image_data import DataError

FORM = "events per cell, times of gestures from the first event, or the begin in a table"
COUNTS = {"nmnist": {"train": 60000, "test": 10000}, "dvsgesture": {"train": 1077, "test": 264}}
OVERFLOW_ROW, OVERFLOW = 240, 1 << 13
#: of DVS-Gesture as published, the lists of recordings, and how many gestures their tables have
TRIALS = {"train": "trials_to_train.txt", "test": "trials_to_test.txt"}
IN_TABLES = {"train": 1176, "test": 288}
#: of AEDAT 3.1: the end of the text, the header of a packet, its first number where events have polarity, an event
END = b"#!END-HEADER\r\n"
HEADER = np.dtype([("type", "<i2"), ("source", "<i2"), *((name, "<i4") for name in (
    "size", "offset", "overflow", "capacity", "number", "valid"
))])  # fmt: skip
POLARITY = 1
EVENT = np.dtype([("data", "<u4"), ("time", "<i4")])

#: x, y, polarity and whole microseconds of the events of a file, [n] each
Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def parts(name: str, data_dir: Path) -> dict[str, Recordings]:
    """The folders of ``"nmnist"`` or ``"dvsgesture"``, in ``data_dir`` or where tonic puts them."""
    if name == "nmnist":
        folders, own, pattern, read = ("Train", "Test"), "NMNIST", "*/[!.]*.bin", read_nmnist
        remedy = f"put Train.zip and Test.zip of N-MNIST, unpacked, into {data_dir}, as tonic.datasets.NMNIST does"
    else:
        if root := next(
            (each for each in (data_dir / "DvsGesture", data_dir) if (each / TRIALS["train"]).exists()), None
        ):
            return {part: _trials(root, part) for part in TRIALS}
        folders, own, pattern, read = ("ibmGestureTrain", "ibmGestureTest"), "DVSGesture", "*/[!.]*.npy", read_gesture
        remedy = (
            f"put DvsGesture.tar.gz, unpacked, into {data_dir}, or let tonic.datasets.DVSGesture({str(data_dir)!r}) "
            "download it"
        )
    root = folder_of(name, data_dir, (own, "."), folders, remedy)
    classes = [*map(str, range(DATASETS[name].num_classes))]
    found = {}
    for part, folder in zip(("train", "test"), folders, strict=True):
        # in an order in which classes take turns: MNIST's own, or user by user; macOS leaves hidden files
        files = sorted((root / folder).glob(pattern), key=lambda file: (name == "nmnist" or file.parent, file.name))
        if not files:
            raise DataError(f"{root / folder} holds no files {pattern}; {remedy}")
        names = [file.parent.name if name == "nmnist" else file.stem for file in files]
        found[part] = of_files(files, names, classes, COUNTS[name][part], partial(_frames, read))
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


def _trials(root: Path, part: str) -> Recordings:
    """The gestures of the recordings that a list names. Raises DataError for a damaged list or table."""
    classes, files, tables = DATASETS["dvsgesture"].num_classes, [], []
    with reading(root / TRIALS[part]):
        names = read_file(root / TRIALS[part]).decode("ascii").split()
    for name in names:
        file = root / name
        table = file.with_name(f"{file.stem}_labels.csv")
        with reading(table):
            rows = np.loadtxt(io.BytesIO(read_file(table)), np.int64, delimiter=",", skiprows=1, ndmin=2)
            if rows.shape[1:] != (3,) or not ((rows[:, 0] >= 1) & (rows[:, 0] <= classes)).all():
                raise ValueError(f"it has other columns than a class from 1 to {classes}, begin and end")
        files += [file, table]
        tables.append(rows)
    if not tables:
        raise DataError(f"{root / TRIALS[part]} names no recording; download it again")

    def samples(grid: Grid) -> Iterator[np.ndarray]:
        for file, rows in zip(files[::2], tables, strict=True):
            with reading(file):
                x, y, polarity, time = read_aedat(file)
            for _, begin, end in rows:
                during = (time >= begin) & (time <= end)
                with reading(file):
                    if not during.any():
                        raise ValueError(f"it has no event from {begin} to {end} µs, where its table has a gesture")
                    places = polarity[during], y[during] // grid.width, x[during] // grid.width
                    yield grid.count(time[during] - begin, *places)

    return Recordings(files, np.concatenate(tables)[:, 0] - 1, IN_TABLES[part], samples)


def read_aedat(file: Path) -> Events:
    """The events of polarity of a recording in AEDAT 3.1."""
    content = read_file(file)
    if not content.startswith(b"#!AER-DAT3.1") or (place := content.find(END)) < 0:
        raise ValueError("it does not begin as AEDAT 3.1 does")
    place, found = place + len(END), []
    while place < len(content):
        header = np.frombuffer(content, HEADER, 1, place)[0]
        place, number = place + HEADER.itemsize, int(header["number"])
        if header["type"] == POLARITY:
            if header["size"] != EVENT.itemsize:
                raise ValueError(f"its events have {header['size']} bytes, not {EVENT.itemsize}")
            events = np.frombuffer(content, EVENT, number, place)
            times = events["time"].astype(np.int64) + (int(header["overflow"]) << 31)
            found.append((events["data"].astype(np.int64), times))
        place += number * int(header["size"])
        if number < 0 or header["size"] <= 0 or place > len(content):
            raise ValueError(f"its packets do not end with it: one of {number} entries goes on behind it")
    if not found:
        raise ValueError("it has no event")
    data, time = (np.concatenate(each) for each in zip(*found, strict=True))
    valid = data & 1 == 1
    data, time = data[valid], time[valid]
    return data >> 17, data >> 2 & 0x7FFF, data >> 1 & 1, time
