"""Data sets: real reading code on small files in the true format, and a message for whatever can be wrong."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import logging
import re
import threading
import zipfile
from pathlib import Path

import fashion_mnist_mini
import numpy as np
import pytest
import torch
from code_blocks import ROOT, run_blocks
from PIL import Image
from small_data import NOBODY_LISTENS, fashion_mnist_files, write
from torchvision.datasets import FashionMNIST

from g2gnet.data import DataError, dataset_name, fashion_mnist, load_dataset, npz


@pytest.fixture
def small_files(monkeypatch):
    return fashion_mnist_files(monkeypatch, train=60, test=20)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("subfolder", ["", "FashionMNIST/raw", "system"])
def test_files_are_found_and_read_in_every_layout(tmp_path, small_files, subfolder, compress, monkeypatch):
    """In the data folder, or the system's copy."""
    write(tmp_path / subfolder, small_files, compress)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "system")
    data = load_dataset("fashionmnist", tmp_path)
    assert data.train_images.numpy().tobytes() == small_files["train-images-idx3-ubyte"][16:]
    assert bytes(data.test_labels.tolist()) == small_files["t10k-labels-idx1-ubyte"][8:]
    assert data.train_labels.dtype == torch.int64
    assert (data.train_images.shape, data.input_dim, data.num_classes) == ((60, 28, 28), 784, 10)
    # reading leaves nothing behind in the user's folder
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


@pytest.fixture
def server(tmp_path, small_files, monkeypatch):
    """A folder that stands for a mirror, the second one after one that is down, with the published archives."""
    folder = tmp_path / "server"
    write(folder, small_files, compress=True)
    archives = {path.name: path.read_bytes() for path in folder.iterdir()}
    published = [(name, hashlib.md5(archives[name]).hexdigest()) for name, _ in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", published)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        threading.Thread(target=mirror.serve_forever).start()
        monkeypatch.setattr(FashionMNIST, "mirrors", [NOBODY_LISTENS, f"http://127.0.0.1:{mirror.server_port}/"])
        yield folder
        mirror.shutdown()


def test_files_are_downloaded_once_from_the_mirror_that_has_them(tmp_path, small_files, server, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "g2gnet")
    data = load_dataset("fashionmnist", tmp_path / "data")
    assert caplog.messages == [f"Data: Fashion-MNIST in {tmp_path / 'data/FashionMNIST/raw'}"]
    assert data.train_images.numpy().tobytes() == small_files["train-images-idx3-ubyte"][16:]
    # as torchvision leaves them
    files = {path.name for path in (tmp_path / "data/FashionMNIST/raw").iterdir() if path.is_file()}
    assert files == {*small_files, *(f"{name}.gz" for name in small_files)}
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    assert load_dataset("fashionmnist", tmp_path / "data").fingerprint == data.fingerprint


def test_a_download_with_another_checksum_is_refused(tmp_path, server):
    (server / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz:(.|\n)*refused(.|\n)*corrupted"):
        load_dataset("fashionmnist", tmp_path / "data")


@pytest.mark.usefixtures("small_files")
def test_without_files_and_network_one_message_lists_the_remedies(tmp_path):
    with pytest.raises(DataError, match=r"connect to the internet(.|\n)*apt-get install dataset-fas(.|\n)*`data_dir`"):
        load_dataset("fashionmnist", tmp_path)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_truncated_file_or_that_of_another_data_set_is_named_with_the_remedy(tmp_path, small_files, compress, name):
    """MNIST's have the names, the shapes and the range of labels of Fashion-MNIST's."""
    path = tmp_path / (f"{name}.gz" if compress else name)
    for keep in (0, 3, 11, -1):
        write(tmp_path, small_files, compress)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError, match=f"{path}.*damaged.*download it again"):
            load_dataset("fashionmnist", tmp_path)
    write(tmp_path, {**small_files, name: small_files[name][:-1] + b"\x07"}, compress)
    with pytest.raises(DataError, match=rf"{name}.* is damaged or of another data set .*`dataset=FILE.npz`"):
        load_dataset("fashionmnist", tmp_path)


def test_a_file_that_expands_beyond_its_size_is_refused_before_it_does(tmp_path, small_files, monkeypatch):
    write(tmp_path, small_files, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 27)))
    sizes, read = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size: sizes.append(size) or read(self, size))
    with pytest.raises(DataError, match="damaged"):
        load_dataset("fashionmnist", tmp_path)
    assert max(sizes) <= fashion_mnist.LARGEST + 1


def own_arrays(**changes):
    images = np.random.default_rng(0).integers(0, 256, (39, 5, 4), dtype=np.uint8)
    labels = {"train_labels": np.arange(30) % 3, "test_labels": np.arange(9, dtype=np.uint8) % 3}
    return {"train_images": images[:30], "test_images": images[30:], **labels, **changes}


def test_what_was_taken_for_channels_is_said(tmp_path, caplog):
    sizes = {"train_images": (30, 8, 6, 3), "test_images": (9, 8, 6, 3)}  # channels last
    np.savez(tmp_path / "mine.npz", **own_arrays(**{name: np.zeros(size, np.uint8) for name, size in sizes.items()}))
    caplog.set_level(logging.INFO, "g2gnet")
    load_dataset(dataset_name(tmp_path / "mine.npz"), tmp_path)
    assert caplog.messages == ["Data: 30 training and 9 test samples, [channels, height, width] = [8, 6, 3], 3 classes"]


def test_a_part_of_a_file_is_named(tmp_path):
    np.savez(tmp_path / "mine.npz", **own_arrays())
    content = (tmp_path / "mine.npz").read_bytes()
    (tmp_path / "mine.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="it is no whole file of numpy"):
        load_dataset(dataset_name(tmp_path / "mine.npz"), tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_data_of_ones_own_are_read_and_named_by_their_content(tmp_path, save, dtype):
    arrays = own_arrays()
    arrays |= {name: arrays[name].astype(dtype) for name in ("train_images", "test_images")}
    save(tmp_path / "mine.npz", **arrays)
    name = dataset_name(tmp_path / "mine.npz")
    assert re.fullmatch("mine-[0-9a-f]{8}", name)
    for _ in range(2):
        data = load_dataset(name, tmp_path)
        assert (data.name, data.input_dim, data.num_classes) == (name, 20, 3)
        assert np.array_equal(data.train_images.numpy(), arrays["train_images"])
        assert data.test_labels.tolist() == arrays["test_labels"].tolist()
        npz._paths.clear()  # another process finds it by its name in the folder of data
    save(tmp_path / "mine.npz", **own_arrays(test_labels=np.zeros(9, np.int64)))
    with pytest.raises(DataError, match=rf"mine.npz is mine-.*, not {name}"):
        load_dataset(name, tmp_path)


def test_the_page_makes_a_data_set_of_folders_of_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(
        f"leaves/{part}/{kind}/{n}.png" for part in ("train", "test") for kind in "ba" for n in "12"
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, number, number)).save(name)
    assert run_blocks(ROOT / "docs" / "data.md")["samples"].classes == ["a", "b"]
    data = load_dataset(dataset_name("leaves.npz"), Path())
    for first, images, labels in (
        (0, data.train_images, data.train_labels),
        (4, data.test_images, data.test_labels),
    ):
        assert images.shape == (4, 1, 32, 32)
        assert [image.unique().tolist() for image in images] == [[first + 2], [first + 3], [first], [first + 1]]
        assert labels.tolist() == [0, 0, 1, 1]


def test_other_arrays_are_refused_by_name(tmp_path):
    from_one = {"train_labels": np.arange(30) % 3 + 1, "test_labels": np.arange(9) % 3 + 1}
    for changes, message in (
        ({"train_labels": np.arange(29) % 3}, "train_images are 30, train_labels 29; give"),
        ({"train_labels": np.arange(30) - 1}, "train_labels are from -1 to 28, with 30 images; number"),
        ({"train_labels": np.full(30, 10**9)}, "train_labels are from 1000000000 to 1000000000"),
        (
            {"test_images": np.zeros((9, 4, 5), np.uint8)},
            r"uint8 \[30, 5, 4\], test_images uint8 \[9, 4, 5\]; give both the same",
        ),
        ({"test_images": np.zeros((0, 5, 4), np.uint8)}, r"test_images is uint8 \[0, 5, 4\]"),
        (
            {"train_images": np.full((30, 5, 4), np.nan, np.float32)},
            "train_images are float32 .* test_images uint8 .* the same",
        ),
        (
            {"train_images": np.array([print] * 30)},
            "train_images holds Python objects, such as .* give one array of num",
        ),
        (from_one, "up to 3, .* of class 0;"),
        ({"train_labels": np.arange(30) % 2 * 4}, "and test_labels are up to 4, and no image is of class 3; numb"),
        ({"val_images": np.zeros((5, 5, 4)), "val_labels": np.zeros(5, int)}, "it has val_images, val_labels beside"),
    ):
        np.savez(tmp_path / "mine.npz", **own_arrays(**changes))
        with pytest.raises(DataError, match=message):
            load_dataset(dataset_name(str(tmp_path / "mine.npz")), tmp_path)


SHAPED = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}, }}"
HEADERS = [SHAPED.format(shape) for shape in ("(" * 1500, "-" * 1500 + "1", f"({10**30}, {10**30})", "(30, 1e3)")]


@pytest.mark.parametrize("header", [*HEADERS, "{'descr': [('x', '<f4', ((((", "\x00\xff", ""], ids=range(7))
def test_a_crafted_header_is_refused_by_the_name_of_its_file(tmp_path, header):
    np.savez(tmp_path / "mine.npz", **own_arrays())
    text, version = header.encode("latin1"), 1 + len(header) % 3
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    with zipfile.ZipFile(tmp_path / "mine.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["train_images.npy"] = b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(64)
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match=r"mine\.npz cannot be used as data: ."):
        load_dataset(dataset_name(str(tmp_path / "mine.npz")), tmp_path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Spaces, of which the archive holds a thousandth: a file of 4 MB can claim 4 GB."""
    arrays, claimed, sizes = own_arrays(), 1 << 24, []
    del arrays["test_labels"]
    np.savez(tmp_path / "mine.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "mine.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test_labels.npy", b"\x93NUMPY\2\0" + claimed.to_bytes(4, "little") + b" " * claimed)
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: sizes.append(n) or read(self, n))
    with pytest.raises(DataError, match=r"mine\.npz cannot be used .*: EOF: reading array header"):
        load_dataset(dataset_name(tmp_path / "mine.npz"), tmp_path)
    assert 0 < min(sizes) <= max(sizes) < 1 << 20


def test_the_size_of_arrays_is_known_before_they_are_read(tmp_path, monkeypatch):
    images = {f"{part}_images": np.zeros((n, 5000, 400), np.uint8) for part, n in (("train", 30), ("test", 9))}
    np.savez_compressed(tmp_path / "mine.npz", **own_arrays(**images))
    monkeypatch.setattr(npz, "available", lambda: 1 << 20)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(DataError, match=r"its arrays take 0\.1 GB of memory"):
        load_dataset(dataset_name(str(tmp_path / "mine.npz")), tmp_path)
    monkeypatch.undo()
    for content in (b"", b"PK\x05\x06" + bytes(18), b"text"):
        (tmp_path / "mine.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"mine\.npz cannot be used as data"):
            load_dataset(dataset_name(str(tmp_path / "mine.npz")), tmp_path)


def test_a_fingerprint_is_that_of_values_shapes_and_dtypes():
    data = load_dataset("fashionmnist-mini").limited(50, 50)
    same = dataclasses.replace(data, name="other", train_images=data.train_images.clone())
    assert same.fingerprint == data.fingerprint
    flat, wide = data.train_images.flatten(1), data.train_images.to(torch.int16)
    for images in (data.train_images.flip(0), flat, wide):
        assert dataclasses.replace(data, train_images=images).fingerprint != data.fingerprint


def test_the_subset_in_the_package_is_balanced_and_needs_no_files():
    data = load_dataset("fashionmnist-mini", "/nonexistent")
    for part, count in (("train", 600), ("test", 100)):
        images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
        assert (images.shape, images.dtype) == ((10 * count, 28, 28), torch.uint8)
        assert labels.bincount().tolist() == [count] * 10


@pytest.mark.skipif(not fashion_mnist.SYSTEM_DIR.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_subset_is_made_of_the_real_images(tmp_path):
    full = load_dataset("fashionmnist", tmp_path)
    assert full.train_images.shape == (60000, 28, 28)
    fashion_mnist_mini.write_mini(full, tmp_path / "mini.npz")
    with np.load(tmp_path / "mini.npz") as new, np.load(fashion_mnist.MINI_FILE) as shipped:
        assert set(new.files) == set(shipped.files)
        assert all(np.array_equal(new[name], shipped[name]) for name in new.files)


def test_limits_keep_the_first_images():
    data = load_dataset("fashionmnist-mini")
    limited, held = data.limited(100, None), data.held_out(torch.arange(200)).limited(100, None)
    for found in (limited.train_images, held.val_images):
        assert torch.equal(found, data.train_images[:100])
    assert [len(labels) for labels in (limited.train_labels, limited.test_labels, held.val_labels)] == [100, 1000, 100]


def test_other_names_are_refused():
    long = "/runs/validation/fold-6/" * 4 + "fashionmnist-validation.npz"
    known = r"dataset='mnist' is unknown; choose one of .*, cifar100, .* or .* own .npz file"
    for name, message in (("mnist", known), (long, r"dataset='/runs/.*\.\.\..*validation\.npz' is unknown")):
        with pytest.raises(ValueError, match=message):
            load_dataset(name)
