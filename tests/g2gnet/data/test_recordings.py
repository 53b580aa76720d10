"""Recordings in the formats of their publishers: what is read, what is refused, and what is kept for the next time."""

import logging
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import seeded
from small_data import (
    nmnist_bytes,
    write_gestures,
    write_heidelberg,
    write_nmnist,
    write_speech,
    write_trials,
    write_wav,
)
from torch.nn import functional as F

from g2gnet.data import DataError, MissingDataError, as_samples, load_dataset, random_unit_shift
from g2gnet.data.binned import COUNTED
from g2gnet.data.speech_commands import mel_bands, mel_filters

h5py = pytest.importorskip("h5py")


def counted(shape, events):
    counts = torch.zeros(shape, dtype=torch.int64)
    for step, *place in events:
        if step < shape[0]:
            counts[(int(step), *map(int, place))] += 1
    return counts


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("shd", {}, (140, 140)), ("shd", {"bins": 700, "dt": 2.5, "steps": 100}, (100, 700)),
        ("shd", {"bins": 7, "dt": 100}, (14, 7)), ("ssc", {"steps": 20}, (20, 140)),
    ],
)  # fmt: skip
def test_spikes_of_the_cochlea_are_counted_by_channels_and_time(tmp_path, name, options, shape):
    """Spiking Speech Commands have a part for validation, too."""
    told = write_heidelberg(tmp_path / name.upper(), name, classes=35 if name == "ssc" else 20)
    data = load_dataset(name, tmp_path, **options)
    dt, width = options.get("dt", 10), 700 // shape[1]
    assert data.num_classes == (35 if name == "ssc" else 20)
    for part, (seconds, channels, labels) in told.items():
        images, found = data.part(part.replace("valid", "val"))
        assert images.shape == (len(labels), *shape)
        assert found.tolist() == labels.tolist()
        for image, times, units in zip(images, seconds, channels, strict=True):
            milliseconds = np.round(times.astype(float) * 1000, 3)
            assert torch.equal(image.long(), counted(shape, zip(milliseconds // dt, units // width, strict=True)))
    assert data.train_images[1].sum() == 0  # a sample without spikes
    samples = as_samples(data.train_images)
    assert samples.dtype == torch.float32
    assert torch.equal(samples, data.train_images.flatten(1).float()), "counts are not divided by 255"


def test_times_are_whole_microseconds_and_other_units_are_noticed(tmp_path):
    """0.57 s is 570 ms, though 0.57 · 1000 / 10 is below 57 in floating point."""
    write_heidelberg(tmp_path, "shd")

    def every_spike(**events):
        for part in ("train", "test"):
            with h5py.File(tmp_path / f"shd_{part}.h5", "r+") as file:
                del file["spikes"]
                for name, value in events.items():
                    values = file.create_dataset(f"spikes/{name}", file["labels"].shape, h5py.vlen_dtype(type(value)))
                    values[:] = [np.array([value])] * len(values)

    every_spike(times=0.57, units=3)
    images = load_dataset("shd", tmp_path, bins=700).train_images
    assert images.nonzero()[:, 1:].unique(dim=0).tolist() == [[57, 3]]
    every_spike(times=570.0, units=3)
    message = "no event of shd comes in the first 140 steps of 10 ms; are its times in other"
    with pytest.raises(DataError, match=message):
        load_dataset("shd", tmp_path)


def test_events_of_n_mnist(tmp_path):
    """An entry in row 240 adds 8.192 ms to the time of those after it."""
    told = write_nmnist(tmp_path / "NMNIST")
    data = load_dataset("nmnist", tmp_path, bins=17, dt=20)
    parts = {"Train": (data.train_images, data.train_labels), "Test": (data.test_images, data.test_labels)}
    for part, (images, labels) in parts.items():
        files = sorted((file for file in told if part in file.parts), key=lambda file: file.name)
        assert labels.tolist() == [int(file.parent.name) for file in files]
        assert len(labels[:10].unique()) > 5, "classes take turns"
        for image, file in zip(images, files, strict=True):
            events = [(t // 20_000, p, y // 2, x // 2) for x, y, p, t in told[file]]
            assert torch.equal(image.long(), counted((17, 2, 17, 17), events))
    events = [(1, 2, 0, 9_000), (0, 240, 0, 0), (1, 2, 1, 9_000), (0, 240, 0, 0), (1, 2, 1, 9_000)]
    first = min((tmp_path / "NMNIST/Train").glob("*/*.bin"), key=lambda file: file.name)
    first.write_bytes(nmnist_bytes(*np.array(events).T))
    image = load_dataset("nmnist", tmp_path, dt=1).train_images[0]
    assert image.nonzero().tolist() == [[9, 0, 2, 1], [17, 1, 2, 1], [25, 1, 2, 1]]


def test_gestures_begin_with_their_first_event(tmp_path, capsys):
    told = write_gestures(tmp_path / "DVSGesture")
    data = load_dataset("dvsgesture", tmp_path, bins=16, dt=50, steps=20)
    assert data.train_labels[:11].sort().values.tolist() == list(range(11))
    late = total = 0
    for file, events in told.items():
        part = data.train_images if "Train" in file.parent.parent.name else data.test_images
        number = int(file.parent.name[4:6]) * 11 + sorted(f"{n}.npy" for n in range(11)).index(file.name)
        begin = events[:, 3].min()
        expected = counted((20, 2, 16, 16), [((t - begin) // 50, p, y // 8, x // 8) for x, y, p, t in events])
        assert torch.equal(part[number].long(), expected)
        late, total = late + len(events) - int(expected.sum()), total + len(events)
    assert f"{late / total:.2%} of the events come after 20 × 50 ms and are left out" in capsys.readouterr().out


def test_gestures_as_published_begin_as_their_tables_say(tmp_path):
    told = write_trials(tmp_path / "DvsGesture")
    data = load_dataset("dvsgesture", tmp_path, bins=16, dt=10, steps=7)
    assert data.train_labels.tolist() == 2 * [*range(11)]
    images = torch.cat([data.train_images, data.test_images])
    expected = []
    for events, rows in told.values():
        for _, begin, end in rows.tolist():
            inside = [(t - begin, x, y, p) for x, y, p, t in events.tolist() if begin <= t <= end]
            places = [(t // 10_000, p, y // 8, x // 8) for t, x, y, p in inside if t < 70_000]
            expected.append(counted((7, 2, 16, 16), places))
    assert torch.equal(images.long(), torch.stack(expected))
    first = tmp_path / "DvsGesture/user00_train.aedat"
    table, whole = first.with_name("user00_train_labels.csv"), first.read_bytes()
    for file, content, message in (
        (first, whole[:-1], "its packets do not end with it: one of 50 entries|buffer is smaller"),
        (first, whole[:61], "it has no event"),
        (first, b"PK" + whole, "it does not begin as AEDAT 3.1 does"),
        (first, whole.split(b"\r\n#!END")[0], "it does not begin as AEDAT 3.1 does"),
        (table, b"class,begin,end\n12,0,5\n", "it has other columns than a class from 1 to 11, begin and end"),
        (table, b"class,begin,end\n1,0,5\n", "it has no event from 0 to 5 µs, where its table has a gesture"),
    ):
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_dataset("dvsgesture", tmp_path, dt=20)
        file.write_bytes(before)


def test_counts_are_kept_in_more_bits_where_they_need_them(tmp_path):
    write_gestures(tmp_path)
    first = tmp_path / "ibmGestureTrain/user00_led/0.npy"
    for count, dtype, kept in zip((127, 128, 1 << 15), COUNTED, (np.float16, np.int8, np.int32), strict=True):
        np.save(first, np.zeros((count, 4), kept))
        data = load_dataset("dvsgesture", tmp_path)
        assert data.train_images.dtype == dtype
        assert data.train_images[0].max() == count


def mel(frequency):
    return 2595 * np.log10(1 + frequency / 700)


def test_mel_bands_are_the_formula_of_the_module():
    sound = np.random.default_rng(1).normal(0, 0.1, 3000)
    steps, hop, bands = 20, 160, 8
    found = mel_bands(sound, mel_filters(bands), steps, hop)
    corners, places = np.linspace(mel(20), mel(8000), bands + 2), mel(np.arange(513) * 16000 / 1024)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    for t in (0, 3, 17, 19):
        part, there = np.zeros(1024), sound[t * hop : t * hop + 400]
        part[: len(there)] = there * window[: len(there)]
        power = np.abs(np.exp(-2j * np.pi * np.outer(np.arange(513), np.arange(1024)) / 1024) @ part) ** 2
        for band, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
            triangle = np.minimum((places - low) / (middle - low), (high - places) / (high - middle))
            energy = power @ np.maximum(triangle, 0)
            assert found[t, band] == pytest.approx(np.log(max(energy, 1e-6) / 1e-6), rel=2e-3)
    assert (found[19] == 0).all(), "after the end there is silence, which is 0"
    assert (mel_filters(200).max(0) > 0).all(), "each of as many bands as are allowed has a frequency"


def test_speech_commands_are_divided_by_their_lists(tmp_path):
    root = tmp_path / "speech_commands_v0.02"
    write_speech(root)
    write_wav(root / "bed" / "zz_nohash_0.wav", 8000 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000))
    data = load_dataset("gsc", tmp_path, bins=40)
    assert data.num_classes == 35
    assert [len(labels) for labels in (data.train_labels, data.val_labels, data.test_labels)] == [37, 12, 12]
    assert data.val_labels.unique().tolist() == [1, 3, 34]  # bed, cat, zero of 35 words
    assert (data.train_images.shape, data.train_images.dtype) == ((37, 100, 40), torch.float16)
    centres, tone = np.linspace(mel(20), mel(8000), 42)[1:-1], data.train_images[-1]  # the last name
    assert tone[50].argmax() == np.abs(centres - mel(1000)).argmin()


def test_what_is_missing_is_named_with_a_remedy(tmp_path, monkeypatch):
    for name, messages in {
        "shd": ["has shd_train.h5, shd_test.h5. Do", "SHD", "https://compneuro.net", "gunzip", "`data_dir`"],
        "gsc": ["has validation_list.txt, testing_list.txt. Do", "speech_commands_v0.02.tar.gz"],
        "nmnist": ["has Train, Test. Do", "tonic.datasets.NMNIST"],
        "dvsgesture": ["has ibmGestureTrain, ibmGestureTest. Do", "tonic.datasets.DVSGesture"],
    }.items():
        with pytest.raises(MissingDataError) as error:
            load_dataset(name, tmp_path)
        assert all(message in str(error.value) for message in messages)
    write_heidelberg(tmp_path, "shd")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(DataError, match=r"dataset=shd is read from HDF5: .*'g2gnet\[events\]' installs it"):
            load_dataset("shd", tmp_path)
    (tmp_path / "shd_test.h5").unlink()
    with pytest.raises(MissingDataError, match=f"shd is not in {tmp_path}: neither {tmp_path} nor {tmp_path}/SHD has"):
        load_dataset("shd", tmp_path)


def rewritten(name, make):
    def damage(path):
        with h5py.File(path, "r+") as file:
            new = make(file[name])
            del file[name]
            if new is not None:
                file[name] = new

    return damage


def changed(name, number, values):
    def damage(path):
        with h5py.File(path, "r+") as file:
            file[name][number] = np.array(values, file[name][number].dtype)

    return damage


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def saved(array):
    return lambda file: np.save(file, array)


def written(content):
    return lambda file: file.write_bytes(content)


def spike(time, unit):
    """Writes a spike into a sample that has none."""
    return lambda path: [changed("spikes/times", 1, [time])(path), changed("spikes/units", 1, [unit])(path)]


#: of each data set its writer and the file that is damaged
WRITERS = {
    "shd": (lambda root: write_heidelberg(root, "shd"), "shd_test.h5"),
    "nmnist": (write_nmnist, "Test/*/00000.bin"),
    "dvsgesture": (write_gestures, "ibmGestureTest/user01_led/10.npy"),
    "gsc": (write_speech, "bed/00000002_nohash_0.wav"),
}
NOWHERE = "an event has an invalid time, or a place outside of the sensor"
LIST, OTHER = "testing_list.txt", ", which is missing or in another list"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shd", truncated, "truncated file"),
        ("shd", rewritten("labels", lambda labels: None), "labels' doesn't exist"),
        ("shd", rewritten("labels", lambda labels: labels[:-1]), "it has 19 labels, and times of 20 and units of 20"),
        ("shd", rewritten("labels", lambda labels: labels[:] * 0.5), r"float\d+ \[20\], not integers \[N\]"),
        ("shd", rewritten("labels", lambda labels: labels[:] + 1), "labels are from 1 to 20, not from 0 to 19"),
        ("shd", rewritten("spikes/units", lambda units: np.ones((20, 5))), r"sample 0 has \d+ times and 5 units"),
        ("shd", changed("spikes/times", 1, [-0.5]), "sample 1 has 1 times and 0 units"),
        ("shd", spike(np.nan, 3), NOWHERE),
        ("shd", spike(0.5, 700), rf"sample 1, of units 700 … 700 and times 0\.5 … 0\.5 s: {NOWHERE}"),
        ("nmnist", written(b"\0" * 12), "cannot reshape array of size 12"),
        ("nmnist", written(nmnist_bytes([34], [0], [1], [5])), NOWHERE),
        ("nmnist", written(nmnist_bytes([0], [240], [1], [5])), "it has no event"),
        ("dvsgesture", truncated, "reshape|EOF|Failed to read all data"),
        ("dvsgesture", saved(np.zeros((5, 3))), r"it is float64 \[5, 3\], not numbers \[n, 4\]: x, y, polarity"),
        ("dvsgesture", saved(np.zeros(5, [("x", int), ("t", int)])), r"not numbers \[n, 4\]"),
        ("dvsgesture", saved(np.array([[0, 128, 0, 0]])), NOWHERE),
        ("dvsgesture", saved(np.array([[0, 0, 2, 0]])), NOWHERE),
        ("dvsgesture", saved(np.array([[0, 0, 0, np.nan]])), NOWHERE),
        ("gsc", truncated, "is damaged"),
        ("gsc", lambda file: write_wav(file, np.zeros(0)), r"damaged, .* \(it has int16 \[0\] at 16000 Hz"),
        ("gsc", lambda file: write_wav(file, np.zeros(9), 8000), r"at 8000 Hz, not int16 \[n\] at 16000"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, message):
    write, place = WRITERS[name]
    write(tmp_path)
    (file,) = tmp_path.glob(place)
    damage(file)
    with pytest.raises(DataError, match=message) as error:
        load_dataset(name, tmp_path)
    assert str(file) in str(error.value)
    assert "again" in str(error.value)
    assert not (tmp_path / "binned").exists()


@pytest.mark.parametrize(
    ("name", "put", "message"),
    [
        ("dvsgesture", lambda root: np.save(root / "ibmGestureTest/user01_led/11.npy", np.zeros((1, 4))),
         "11.npy is of none of the classes 0 … 10; move it away"),
        ("nmnist", lambda root: (root / "Train/0").rename(root / "Train/01"),
         "01/.*.bin is of none of the classes 0 … 9; move"),
        ("gsc", lambda root: write_wav(root / "dogs/a.wav", np.zeros(9)),
         "dogs/a.wav is of none of the classes backward … zero; move it away"),
        ("gsc", lambda root: (root / "bed/00000000_nohash_0.wav").unlink(),
         "validation_list.txt is damaged: it names .*bed/0.*, which is miss"),
        ("gsc", lambda root: (root / LIST).write_text(""), f"{LIST} is damaged: it is empty"),
        # by this name it would be a recording for training, too
        ("gsc", lambda root: (root / LIST).write_text("cat/../bed/00000001_nohash_0.wav"), f"{LIST} is .*{OTHER}"),
        ("gsc", lambda root: (root / LIST).write_text((root / "validation_list.txt").read_text()),
         rf"{LIST} .* names .*bed/00000000_nohash_0.wav{OTHER}"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_there_are_named(tmp_path, name, put, message):
    WRITERS[name][0](tmp_path)
    put(tmp_path)
    with pytest.raises(DataError, match=message):
        load_dataset(name, tmp_path)


def test_bins_that_do_not_fit_are_refused_before_anything_is_read(tmp_path):
    for name, options, message in (
        ("shd", {"bins": 128}, "bins=128 does not divide the 700 channels of shd; give one of .* 100, 140,"),
        ("nmnist", {"bins": 28}, "bins=28 does not divide the 34 pixels of a side of nmnist; give one of 1, 2, 17, 34"),
        ("gsc", {"bins": 201}, "bins=201 are more than the 200 bands that its sounds resolve of gsc"),
        ("gsc", {"dt": 0.1}, "dt=0.1 is no multiple of 0.0625 ms"),
        ("shd", {"dt": -1}, "dt=-1 must be a number from 0.1 to 60000"),
        ("shd", {"bins": 0}, "bins=0 must be a whole number of at least 1"),
        ("nmnist", {"steps": 0}, "steps=0 must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset(name, tmp_path, **options)


def test_sequences_that_do_not_fit_the_memory_are_refused_before_they_are_made(tmp_path, monkeypatch):
    write_heidelberg(tmp_path, "shd")
    monkeypatch.setattr("g2gnet.data.binned.available", lambda: 60 * 14 * 700 - 1)
    with pytest.raises(DataError, match=r"shd as sequences \[14, 700\] takes .* of memory.*; lower `T` or `bins`, or"):
        load_dataset("shd", tmp_path, bins=700, dt=100)


def test_recordings_are_read_once_and_hidden_files_are_none(tmp_path, monkeypatch, capsys):
    hidden = {"nmnist": "Train/0/._00000.bin", "dvsgesture": "ibmGestureTest/user00_led/._0.npy", "gsc": "bed/._0.wav"}
    for name, (write, _) in WRITERS.items():
        root = tmp_path / name
        write(root)
        first = load_dataset(name, root, steps=2).fingerprint
        (file,) = (root / "binned").glob(f"{name}_*")
        assert f"reading {name}: 2 × " in capsys.readouterr().out
        with monkeypatch.context() as patch:
            patch.setattr("g2gnet.data.binned._read", lambda *_: pytest.fail("it was read again"))
            assert load_dataset(name, root, steps=2).fingerprint == first
        assert f"reading the sequences of {name} from {file}" in capsys.readouterr().out
        if name in hidden:
            (root / hidden[name]).write_bytes(b"of macOS")
            file.unlink()
            assert load_dataset(name, root, steps=2).fingerprint == first


def test_nothing_is_kept_of_a_reading_that_was_stopped(tmp_path, monkeypatch):
    write_heidelberg(tmp_path, "shd")
    with monkeypatch.context() as patch:
        patch.setattr("g2gnet.data.binned.torch.from_numpy", lambda array: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            load_dataset("shd", tmp_path)
    assert not (tmp_path / "binned").exists()
    assert len(load_dataset("shd", tmp_path).train_labels) == 40


def test_other_settings_or_files_are_read_anew_and_fewer_samples_than_were_published_are_a_warning(tmp_path, caplog):
    write_heidelberg(tmp_path, "shd")
    with caplog.at_level(logging.WARNING, "g2gnet"):
        first = load_dataset("shd", tmp_path)
    assert "shd has 40 samples for train, and 8156 were published: some may be missing in" in caplog.text
    for options in ({"bins": 70}, {"dt": 14}, {"steps": 9}):
        load_dataset("shd", tmp_path, **options)
    changed("spikes/units", 2, [5] * 3)(tmp_path / "shd_train.h5")
    changed("spikes/times", 2, [0.5] * 3)(tmp_path / "shd_train.h5")
    assert load_dataset("shd", tmp_path).fingerprint != first.fingerprint
    assert len(list((tmp_path / "binned").iterdir())) == 5


def test_units_are_shifted_alike_at_all_steps_by_each_number_of_places():
    sequences = torch.randint(1, 9, (400, 5, 7), generator=seeded(0), dtype=torch.int8)
    moved = random_unit_shift(sequences, seeded(1), 2)
    assert moved.dtype == sequences.dtype
    seen = set()
    for before, after in zip(sequences, moved, strict=True):
        places = {shift: F.pad(before, (2 + shift, 2 - shift))[:, 2:9] for shift in range(-2, 3)}
        seen.add(next(shift for shift, expected in places.items() if torch.equal(after, expected)))
    assert seen == {-2, -1, 0, 1, 2}
