"""CIFAR-10 and CIFAR-100: the real reading code on small files in the true format, and the augmentation."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small_data import cifar_archive, cifar_files, expect_files, write
from torch.nn import functional as F
from torchvision.transforms import v2

from g2gnet.base.seeding import stream
from g2gnet.data import DataError, as_samples, cifar, load_dataset, random_crop_and_flip, random_erase
from g2gnet.data.augmentation import SHIFTS

ALL_FILES = {
    "cifar10": ("cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]),
    "cifar100": ("cifar-100-python", ["train", "test", "meta"]),
}


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_files_are_found_and_read(tmp_path, monkeypatch, name, packed):
    files = cifar_files(monkeypatch, name, train=50, test=20)
    folder, names = ALL_FILES[name]
    assert sorted(files) == sorted(names)
    if packed:
        (tmp_path / cifar.READERS[name].filename).write_bytes(cifar_archive(name, files))
    else:
        write(tmp_path / folder, files)
    data = load_dataset(name, tmp_path)
    assert (data.name, data.input_dim, data.num_classes) == (name, 3072, 10 if name == "cifar10" else 100)
    batches = [pickle.loads(files[batch]) for batch in names[:-1]]
    # the samples are the rows of the files: channel first, and each channel row by row
    rows = torch.from_numpy(np.concatenate([batch["data"] for batch in batches]))
    labels = [label for batch in batches for label in batch.get("labels", batch.get("fine_labels"))]
    assert torch.equal(torch.cat([data.train_images, data.test_images]), rows.view(70, 3, 32, 32))
    assert torch.cat([data.train_labels, data.test_labels]).tolist() == labels
    torch.testing.assert_close(as_samples(data.train_images), rows[:50] / 255)
    # the folder of batches is all that was added, and it is found the next time
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == sorted(names)
    assert len(list(tmp_path.iterdir())) == 1 + packed
    assert load_dataset(name, tmp_path).fingerprint == data.fingerprint


@pytest.mark.parametrize("name", ALL_FILES)
def test_without_files_and_network_one_message_lists_the_remedies(tmp_path, monkeypatch, name):
    cifar_files(monkeypatch, name, train=50, test=20)
    remedies = rf"connect to the internet(.|\n)*{cifar.READERS[name].filename} into(.|\n)*`data_dir`"
    with pytest.raises(DataError, match=remedies):
        load_dataset(name, tmp_path / "data")


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_damaged_files_are_those_of_the_archive_again_or_refused(tmp_path, monkeypatch, damage):
    for name, file in (("cifar10", "data_batch_3"), ("cifar10", "batches.meta"), ("cifar100", "test")):
        files = cifar_files(monkeypatch, name, train=50, test=20)
        path, changed = tmp_path / ALL_FILES[name][0] / file, files[file][:-1]
        write(path.parent, files)
        expected = load_dataset(name, tmp_path).fingerprint
        path.write_bytes(changed) if damage == "damaged" else path.unlink()
        with pytest.raises(DataError, match=rf"or damaged, and .*\n.*delete {path.parent} if it is there"):
            load_dataset(name, tmp_path)
        assert damage == "missing" or path.read_bytes() == changed
        archive, content = tmp_path / cifar.READERS[name].filename, cifar_archive(name, files)
        archive.write_bytes(content[:-1])
        with pytest.raises(DataError, match="or damaged"):
            load_dataset(name, tmp_path)
        archive.write_bytes(content)
        if "meta" in file:  # which torchvision's download does not look at
            shutil.rmtree(path.parent)
        assert load_dataset(name, tmp_path).fingerprint == expected
        archive.unlink()


def test_only_files_with_the_published_checksum_are_unpickled(tmp_path, monkeypatch):
    trace = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (trace,)

    harmful = cifar_files(monkeypatch, "cifar10", train=50, test=20) | {"batches.meta": pickle.dumps(Payload())}
    write(tmp_path / "cifar-10-batches-py", harmful)
    with pytest.raises(DataError, match="metadata file not found or corrupted"):
        load_dataset("cifar10", tmp_path)
    assert not trace.exists()
    # the payload works, were it not for the checksum
    expect_files(monkeypatch, "cifar10", harmful)
    with pytest.raises(TypeError):
        load_dataset("cifar10", tmp_path)
    assert trace.exists()


def by_loop(images, generator, shift):
    """The same draws, applied to one image after another with slices."""
    top, left = torch.randint(2 * shift + 1, (2, len(images), 1), generator=generator)
    flipped = torch.randint(2, (len(images), 1), generator=generator)
    (height, width), changed = images.shape[-2:], []
    for image, y, x, flip in zip(images, top, left, flipped, strict=True):
        padded = F.pad(image, (shift,) * 4)
        crop = padded[..., y : y + height, x : x + width]
        changed.append(crop.flip(-1) if flip else crop)
    return torch.stack(changed)


@pytest.mark.parametrize("shape", [(50, 3, 32, 32), (20, 28, 28), (3, 2, 5, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("shift", SHIFTS.values())
def test_crops_and_flips_are_those_of_a_loop(shape, shift):
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=stream(0, "network"))
    expected = by_loop(images, stream(5, "augment", 3), shift)
    for each in (images, images.mT.contiguous().mT):  # contiguous or not
        changed = random_crop_and_flip(each, stream(5, "augment", 3), shift)
        assert changed.dtype == torch.uint8
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("shape", [(2000, 28, 28), (2000, 3, 20, 12)])
def test_rectangles_are_erased_as_torchvision_erases_them(shape):
    """Heights, widths and places by Kolmogorov and Smirnov, how many by the normal approximation of a binomial."""
    probability = 0.7
    images = torch.full(shape, 9, dtype=torch.uint8)
    ours = random_erase(images, stream(3, "erase", 0), probability)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.stack([v2.RandomErasing(p=1.0)(image[None] if image.ndim == 2 else image) for image in images])
    found = [boxes(changed.reshape(len(images), -1, *shape[-2:])) for changed in (ours, theirs)]
    for of_ours, of_theirs in zip(*found, strict=True):
        assert stats.ks_2samp(of_ours, of_theirs).pvalue > 1e-3
    # of theirs a few have no rectangle that fits
    share = probability * len(found[1][0]) / len(images)
    assert abs(len(found[0][0]) - share * len(images)) < 4 * (len(images) * share * (1 - share)) ** 0.5
    assert ours.dtype == torch.uint8


def boxes(images):
    """Height, width, top and left of the rectangle of zeros in each image that has one, in all channels alike."""
    missing = images == 0
    assert (missing == missing[:, :1]).all()
    lines = missing[:, 0].any(2), missing[:, 0].any(1)
    erased = lines[0].any(1)
    rows, columns = (line[erased].int() for line in lines)
    # a full rectangle
    assert torch.equal(missing[erased, 0], (rows[:, :, None] * columns[:, None, :]).bool())
    for line in (rows, columns):
        assert (line.diff(dim=1) > 0).sum() + line[:, 0].sum() == len(line)
    return rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)


def test_no_image_or_each_loses_a_rectangle_and_changes_out_of_range_are_refused():
    images, small, draw = torch.ones(300, 28, 28), torch.ones(3, 1, 1), stream(1, "erase", 0)
    assert torch.equal(random_erase(images, draw, 0.0), images)
    assert (random_erase(images, draw, 1.0) == 0).flatten(1).any(1).all()
    assert torch.equal(random_erase(small, draw, 1.0), small)
    for probability in (-1, 2, float("nan")):
        with pytest.raises(ValueError, match=f"probability={probability}"):
            random_erase(images, draw, probability)
    with pytest.raises(ValueError, match="shift=-1"):
        random_crop_and_flip(images, draw, -1)
