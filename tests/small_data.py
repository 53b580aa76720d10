"""Small data sets in the exact format of the published files, for the real reading code. Where that code knows the size
or the checksum of the published files, it is told those of the small ones."""

import functools
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import wave
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST

from g2gnet.data import cifar, fashion_mnist
from g2gnet.data.features import RELEASES, new_resnet, weights_digest

NOBODY_LISTENS = "http://127.0.0.1:9/"  # refused at once


def idx_bytes(array):
    """An array in the IDX format: magic (type 8 = uint8, dimensions), big-endian sizes, the values."""
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def labels_of(count, classes):
    """As many of each class as can be, in random order."""
    return np.random.default_rng(1).permutation(np.arange(count) % classes)


def fashion_mnist_files(monkeypatch, train, test):
    """The four files of a small Fashion-MNIST as bytes by name, of random pixels."""
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", Path("/nonexistent"))
    monkeypatch.setattr(FashionMNIST, "mirrors", [NOBODY_LISTENS])
    generator = np.random.default_rng(0)
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(generator.integers(0, 256, (count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(labels_of(count, 10))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(fashion_mnist, "DIGESTS", digests)
    return files


def cifar_files(monkeypatch, name, train, test):
    """The files of a small CIFAR-10 or CIFAR-100 as bytes by name, of random pixels; ``train`` is divisible by 5."""
    generator = np.random.default_rng(0)
    classes = 10 if name == "cifar10" else 100
    reader = cifar.READERS[name]
    batches = {}
    for listed, count in ((reader.train_list, train), (reader.test_list, test)):
        for (batch, _), part in zip(listed, np.split(labels_of(count, classes), len(listed)), strict=True):
            # as published: rows of 1,024 red, 1,024 green and 1,024 blue values, each channel row by row
            data = generator.integers(0, 256, (len(part), 3072), dtype=np.uint8)
            names = [f"image_{number}.png" for number in range(len(part))]
            batches[batch] = {"batch_label": f"part of {name}", "data": data, "filenames": names}
            fine, coarse = part.tolist(), (part // 5).tolist()
            batches[batch] |= {"labels": fine} if classes == 10 else {"fine_labels": fine, "coarse_labels": coarse}
    batches[reader.meta["filename"]] = {reader.meta["key"]: [f"class {number}" for number in range(classes)]}
    files = {file: pickle.dumps(content, protocol=2) for file, content in batches.items()}
    expect_files(monkeypatch, name, files)
    return files


def expect_files(monkeypatch, name, files):
    """Makes the checksums of ``files`` those that the reader of ``name`` expects."""
    reader = cifar.READERS[name]
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    expected = {
        "url": NOBODY_LISTENS + reader.filename,
        "tgz_md5": hashlib.md5(cifar_archive(name, files)).hexdigest(),
        "train_list": [(file, md5[file]) for file, _ in reader.train_list],
        "test_list": [(file, md5[file]) for file, _ in reader.test_list],
        "meta": {**reader.meta, "md5": md5[reader.meta["filename"]]},
    }
    monkeypatch.setitem(cifar.READERS, name, type("SmallReader", (reader,), expected))


def cifar_archive(name, files):
    """``files`` packed as they are published."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{cifar.READERS[name].base_folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


def write(folder, files, compress=False):
    """Writes files, given as bytes by name, gzipped if asked to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}{'.gz' if compress else ''}").write_bytes(gzip.compress(content) if compress else content)


def write_cifar(monkeypatch, data_dir, name, train=50, test=20):
    """Writes a small CIFAR in torchvision's layout."""
    write(data_dir / cifar.READERS[name].base_folder, cifar_files(monkeypatch, name, train, test))


@functools.cache
def resnet_weights(name, seed):
    """A file with random weights of a ResNet-32 for ``name``, as bytes; its running statistics are those of noise."""
    torch.manual_seed(seed)
    network = new_resnet(name)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics are plain means: one batch sets them
    with torch.no_grad():
        network(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8))
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getvalue()


def write_resnet(path, name, seed=0):
    """Writes such a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(resnet_weights(name, seed))
    return path


def publish_resnet(monkeypatch, hub, name):
    """Puts weights into PyTorch's hub directory ``hub`` as if they were the published ones for ``name``."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    path = write_resnet(hub / "checkpoints" / "new.pt", name)
    published = path.with_name(f"{name}_resnet32-{weights_digest(name, path)}.pt")
    path.rename(published)
    release = RELEASES[name]._replace(url=NOBODY_LISTENS + published.name)
    monkeypatch.setitem(RELEASES, name, release)
    return published


#: of the samples of :func:`write_own`
OWN_LABELS = np.arange(60) % 4


def write_own(path, *shape, dtype=np.float32):
    """A file of data of one's own: 40 training and 20 test samples of that shape, of four classes."""
    images = (np.random.default_rng(0).random((60, *shape)) * (1 if dtype == np.float32 else 255)).astype(dtype)
    parts = {"train": slice(40), "test": slice(40, None)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    np.savez(path, **arrays, **{f"{name}_labels": OWN_LABELS[part] for name, part in parts.items()})
    return path


def write_heidelberg(folder, name, classes=20, train=40, test=20):
    """The files of a small SHD or SSC; by part, the seconds, channels and labels of its samples."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    generator, told = np.random.default_rng(0), {}
    for part, count in {"train": train, **({"valid": test} if name == "ssc" else {}), "test": test}.items():
        events = generator.integers(0, 300, count)
        events[1] = 0
        seconds = [np.sort(generator.uniform(0, 1.1, n)).astype(np.float16) for n in events]
        channels = [generator.integers(0, 700, n).astype(np.uint16) for n in events]
        labels = labels_of(count, classes).astype(np.uint16)
        with h5py.File(folder / f"{name}_{part}.h5", "w") as file:
            for key, lists in (("spikes/times", seconds), ("spikes/units", channels)):
                file.create_dataset(key, (count,), h5py.vlen_dtype(lists[0].dtype))
                for number, values in enumerate(lists):
                    file[key][number] = values
            file["labels"], file["extra/keys"] = labels, np.array([b"zero"] * classes)
            file["extra/speaker"] = labels % 12
        told[part] = seconds, channels, labels
    return told


def nmnist_bytes(x, y, polarity, microseconds):
    """Events in the format of N-MNIST: 8 bits of x and of y, 1 of polarity, 23 of time, the highest first."""
    bits = (np.int64(x) << 32) | (np.int64(y) << 24) | (np.int64(polarity) << 23) | np.int64(microseconds)
    return b"".join(int(each).to_bytes(5, "big") for each in bits)


def write_nmnist(folder, train=40, test=20):
    """A small N-MNIST in tonic's folders; by file, the events [n, 4] of x, y, polarity and microseconds."""
    generator, told = np.random.default_rng(0), {}
    for part, count in (("Train", train), ("Test", test)):
        for number, label in enumerate(labels_of(count, 10)):
            file = folder / part / str(label) / f"{number:05}.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            n = int(generator.integers(20, 60))
            sides = (34, 34, 2, 340_000)
            told[file] = np.stack([generator.integers(0, side, n) for side in sides], 1)
            file.write_bytes(nmnist_bytes(*told[file].T))
    return told


def write_gestures(folder, train=4, test=2):
    """A small DVS-Gesture in tonic's folders, of so many users; by file, the array [n, 4] that it holds."""
    generator, told = np.random.default_rng(0), {}
    for part, users in (("ibmGestureTrain", train), ("ibmGestureTest", test)):
        for user in range(users):
            for label in range(11):
                file = folder / part / f"user{user:02}_led" / f"{label}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                columns = [generator.integers(0, side, 50) for side in (128, 128, 2)]
                told[file] = np.stack([*columns, 7000 + np.sort(generator.integers(0, 1500, 50))], 1)
                np.save(file, told[file])
    return told


def aedat_packet(kind, entries, overflow=0):
    """A packet of AEDAT 3.1 with entries (two whole numbers of 32 bits each) of a type."""
    header = struct.pack("<hhiiiiii", kind, 1, 8, 4, overflow, len(entries), len(entries), len(entries))
    return header + b"".join(struct.pack("<Ii", data, time) for data, time in entries)


def write_trials(folder, train=2, test=1):
    """A small DVS-Gesture as published, of so many recordings; by recording its events (x, y, polarity, µs), of which
    each third is said to be invalid, and the rows of its table."""
    generator, told = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("test", test)):
        names = [f"user{number:02}_{part}.aedat" for number in range(count)]
        (folder / f"trials_to_{part}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            events = np.stack([generator.integers(0, side, 300) for side in (128, 128, 2, 1 << 20)], 1)
            events[:, 3] = np.sort(events[:, 3]) + (1 << 31) - (1 << 19)  # the clock overflows amid them
            words = [
                (x << 17 | y << 2 | p << 1 | (number % 3 > 0), t) for number, (x, y, p, t) in enumerate(events.tolist())
            ]
            packets = [aedat_packet(0, [(7, 7)])]  # a special event
            for late in (0, 1):
                own = [(word, t - (late << 31)) for word, t in words if t >> 31 == late]
                packets += [aedat_packet(1, own[first : first + 50], late) for first in range(0, len(own), 50)]
            text = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
            (folder / name).write_bytes(text + b"".join(packets))
            begins = (1 << 31) - (1 << 19) + np.arange(11) * 90_000
            told[name] = events[np.arange(300) % 3 > 0], np.stack([1 + np.arange(11), begins, begins + 80_000], 1)
            rows = "".join(f"{label},{begin},{end}\n" for label, begin, end in told[name][1])
            (folder / f"{name[:-6]}_labels.csv").write_text(f"class,startTime_usec,endTime_usec\n{rows}")
    return told


def write_wav(file, samples, rate=16000):
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as content:
        content.setnchannels(1)
        content.setsampwidth(2)
        content.setframerate(rate)
        content.writeframes(samples.astype("<i2").tobytes())


def write_speech(folder, words=("bed", "cat", "zero"), speakers=20):
    """A small Speech Commands: of each word recordings of so many speakers, some of validation and of testing."""
    generator, lists = np.random.default_rng(0), {"validation": [], "testing": []}
    write_wav(folder / "_background_noise_" / "white_noise.wav", np.zeros(32000))
    for word in words:
        for speaker in range(speakers):
            name = f"{word}/{speaker:08x}_nohash_0.wav"
            write_wav(folder / name, generator.normal(0, 3000, int(generator.integers(8000, 16001))))
            if speaker % 5 < 2:
                lists[("validation", "testing")[speaker % 5]].append(name)
    for name, files in lists.items():
        (folder / f"{name}_list.txt").write_text("".join(f"{file}\n" for file in files))


def write_recordings(data_dir):
    """All of these, where their readers look first."""
    write_heidelberg(data_dir, "shd")
    write_heidelberg(data_dir, "ssc", classes=35, train=70, test=35)
    write_nmnist(data_dir / "NMNIST")
    write_gestures(data_dir / "DVSGesture")
    write_speech(data_dir / "SpeechCommands" / "speech_commands_v0.02")
