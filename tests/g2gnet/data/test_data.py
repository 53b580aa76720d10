"""Data sets: real reading code on small files in the true format, and a message for whatever can be wrong."""

import gzip
import hashlib
import io
import re
import sys

import numpy as np
import pytest
import torch
from small_data import NOBODY_LISTENS, cifar_archive, cifar_files, fashion_mnist_files, idx_bytes, write
from torchvision.datasets import FashionMNIST

from g2gnet.data import DataError, as_samples, cifar, fashion_mnist, load_dataset


@pytest.fixture
def small_files(monkeypatch):
    return fashion_mnist_files(monkeypatch, train=60, test=20)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("subfolder", ["", "FashionMNIST/raw"])
def test_files_are_found_and_read_in_every_layout(tmp_path, small_files, subfolder, compress):
    write(tmp_path / subfolder, small_files, compress)
    data = load_dataset("fashionmnist", tmp_path)
    raw = np.frombuffer(small_files["train-images-idx3-ubyte"][16:], np.uint8).reshape(60, 28, 28)
    assert np.array_equal(data.train_images.numpy(), raw)
    labels = np.frombuffer(small_files["t10k-labels-idx1-ubyte"][8:], np.uint8)
    assert np.array_equal(data.test_labels.numpy(), labels)
    assert data.train_labels.dtype == torch.int64
    assert (data.input_dim, data.num_classes) == (784, 10)
    # reading leaves nothing behind in the user's folder
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def test_the_system_copy_is_used_when_the_data_folder_has_none(tmp_path, small_files, monkeypatch):
    write(tmp_path / "system", small_files, compress=True)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_DIR", tmp_path / "system")
    assert len(load_dataset("fashionmnist", tmp_path / "empty").train_labels) == 60


@pytest.fixture
def server(tmp_path, small_files, monkeypatch):
    """A folder that stands for a mirror, the second one after one that is down, with the published archives."""
    folder = tmp_path / "server"
    write(folder, small_files, compress=True)
    archives = {path.name: path.read_bytes() for path in folder.iterdir()}
    published = [(name, hashlib.md5(archives[name]).hexdigest()) for name, _ in FashionMNIST.resources]
    monkeypatch.setattr(FashionMNIST, "resources", published)
    monkeypatch.setattr(FashionMNIST, "mirrors", [NOBODY_LISTENS, f"{folder.as_uri()}/"])
    return folder


def test_files_are_downloaded_once_from_the_mirror_that_has_them(tmp_path, small_files, server, monkeypatch, capsys):
    data = load_dataset("fashionmnist", tmp_path / "data")
    raw = np.frombuffer(small_files["train-images-idx3-ubyte"][16:], np.uint8).reshape(60, 28, 28)
    assert np.array_equal(data.train_images.numpy(), raw)
    # as torchvision leaves them
    files = {path.name for path in (tmp_path / "data/FashionMNIST/raw").iterdir() if path.is_file()}
    assert files == {*small_files, *(f"{name}.gz" for name in small_files)}
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    assert torch.equal(load_dataset("fashionmnist", tmp_path / "data").train_images, data.train_images)
    assert capsys.readouterr().err == "", "no bar where there is no terminal"


def test_a_download_with_another_checksum_is_refused(tmp_path, server):
    (server / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(
        DataError, match=r"Connection refused.*t10k-labels-idx1-ubyte.gz: what is there has not the publ"
    ):
        load_dataset("fashionmnist", tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*.gz") if path.is_file()]


def test_a_download_shows_the_time_left_on_a_terminal(tmp_path, monkeypatch):
    files = cifar_files(monkeypatch, "cifar10", train=50, test=20)
    reader = cifar.READERS["cifar10"]
    (tmp_path / reader.filename).write_bytes(cifar_archive("cifar10", files))
    monkeypatch.setattr(reader, "url", (tmp_path / reader.filename).as_uri())

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        assert len(load_dataset("cifar10", tmp_path / "data").train_labels) == 50
        assert re.search(r"\r100%\|.*\[00:00<00:00, ", sys.stderr.getvalue())
    assert [path.name for path in (tmp_path / "data").glob("[!.]*")] == [reader.base_folder]


@pytest.mark.usefixtures("small_files")
def test_without_files_and_network_one_message_lists_the_remedies(tmp_path):
    with pytest.raises(DataError) as error:
        load_dataset("fashionmnist", tmp_path)
    for remedy in (
        "connect to the internet",
        "apt-get install dataset-fashion-mnist",
        "--data_dir",
        "fashionmnist-mini",
    ):
        assert remedy in str(error.value)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 3, 11, -1])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path, small_files, compress, name, keep):
    write(tmp_path, small_files, compress)
    path = tmp_path / (f"{name}.gz" if compress else name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="damaged") as error:
        load_dataset("fashionmnist", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "fetch" in str(error.value)


def test_files_of_another_data_set_are_refused(tmp_path, small_files):
    small_files["train-labels-idx1-ubyte"] = idx_bytes(np.full(60, 11))
    write(tmp_path, small_files, compress=False)
    with pytest.raises(DataError, match=r"labels in .* go up to 11, not 9"):
        load_dataset("fashionmnist", tmp_path)
    small_files["train-labels-idx1-ubyte"] = idx_bytes(np.zeros(59))
    write(tmp_path, small_files, compress=False)
    with pytest.raises(DataError, match=r"60, 28, 28.* images and 59 labels"):
        load_dataset("fashionmnist", tmp_path)


def test_the_subset_in_the_package_is_balanced_and_needs_no_files():
    data = load_dataset("fashionmnist-mini", "/nonexistent")
    assert data.train_images.shape == (6000, 28, 28)
    assert data.test_images.shape == (1000, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [600] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10


@pytest.mark.skipif(not fashion_mnist.SYSTEM_DIR.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_subset_is_made_of_the_real_images(tmp_path):
    """Writing it anew from the full set gives what is in the package."""
    full = load_dataset("fashionmnist", tmp_path)
    assert full.train_images.shape == (60000, 28, 28)
    fashion_mnist.write_mini(full, tmp_path / "mini.npz")
    with np.load(tmp_path / "mini.npz") as new, np.load(fashion_mnist.MINI_FILE) as shipped:
        assert set(new.files) == set(shipped.files)
        for name in new.files:
            assert np.array_equal(new[name], shipped[name]), name


def test_samples_run_from_zero_to_one():
    images = torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(as_samples(images), torch.tensor([[0.0, 0.2, 0.4, 1.0]]))


def test_limits_keep_the_first_images():
    data = load_dataset("fashionmnist-mini")
    limited = data.limited(100, None)
    assert torch.equal(limited.train_images, data.train_images[:100])
    assert len(limited.train_labels) == 100
    assert len(limited.test_labels) == 1000


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"dataset='mnist' is unknown; choose one of fashionmnist, .*, cifar100"):
        load_dataset("mnist")
