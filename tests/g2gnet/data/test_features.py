"""ResNet-32 features: the network, its weights from every source, the cache, and runs that train on them."""

import email.message
import io
import itertools
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from small_data import NOBODY_LISTENS, publish_resnet, write_cifar, write_resnet
from torch.nn import functional as F

import train
from g2gnet.data import DataError, features, load_dataset
from g2gnet.data.features import load_features, load_resnet, new_resnet, weights_digest

#: values in the features of one image
FEATURES = 512

FLAGS = shlex.split("--dataset cifar10 --use_resnet --hidden_dim 16 --T 3 --epochs 1 --batch_size 16")


def by_names(state, images):
    """The second stage's output in float64, from the published names alone: conv, batch norm in eval mode, shortcut."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def convolution(x, name, norm, stride=1):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        parts = (state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias"))
        mean, var, scale, shift = parts
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    mean, std = torch.tensor(((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))).view(2, 3, 1, 1)
    x = convolution((images.double() / 255 - mean) / std, "conv1", "bn1").relu()
    for stage, block in itertools.product((1, 2), range(5)):
        name, stride = f"layer{stage}.{block}", 2 if (stage, block) == (2, 0) else 1
        shortcut = convolution(x, f"{name}.downsample.0", f"{name}.downsample.1", 2) if stride == 2 else x
        inner = convolution(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
        x = (convolution(inner, f"{name}.conv2", f"{name}.bn2") + shortcut).relu()
    return x


def test_features_are_the_scaled_means_of_the_second_stage(tmp_path):
    path = write_resnet(tmp_path / "weights.pt", "cifar10")
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = load_resnet("cifar10", path).features(images)
    maps = by_names(torch.load(path, weights_only=True), images)
    assert maps.shape == (5, 32, 16, 16)
    means = maps.view(5, 32, 4, 4, 4, 4).mean((3, 5)).view(5, FEATURES)
    low, high = means.amin(1, True), means.amax(1, True)
    assert (high - low).min() > 0.1
    # float32 through 21 convolutions
    torch.testing.assert_close(features.double(), (means - low) / (high - low), rtol=0, atol=2e-5)
    assert [features.amin(1).tolist(), features.amax(1).tolist()] == [[0.0] * 5, [1.0] * 5]
    network = new_resnet("cifar10").eval()  # whose features are equal everywhere
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(network.features(images), torch.zeros(5, FEATURES))


def test_the_state_dict_has_the_published_names_and_sizes():
    network = new_resnet("cifar100")
    stages = [f"layer{stage}.{block}" for stage, block in itertools.product((1, 2, 3), range(5))]
    down = [f"layer{stage}.0.downsample" for stage in (2, 3)]
    convolutions = ["conv1", *(f"{name}.conv{n}" for name in stages for n in (1, 2)), *(f"{name}.0" for name in down)]
    norms = ["bn1", *(f"{name}.bn{n}" for name in stages for n in (1, 2)), *(f"{name}.1" for name in down)]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [f"{name}.weight" for name in convolutions] + [f"{name}.{part}" for name in norms for part in parts]
    assert set(network.state_dict()) == {"fc.weight", "fc.bias", *expected}
    # 0.47 M, as the release has it
    assert sum(parameter.numel() for parameter in new_resnet("cifar10").parameters()) == 466_906
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 100)


def test_the_published_weights_are_loaded_or_downloaded_with_their_hash_checked(tmp_path, monkeypatch):
    path = publish_resnet(monkeypatch, tmp_path / "hub", "cifar10")
    network, content, expected = load_resnet("cifar10"), path.read_bytes(), weights_digest("cifar10")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(dict(network.state_dict()), torch.load(path, weights_only=True), rtol=0, atol=0)
    # the same file by its name is the same setting
    assert weights_digest("cifar10", path) == expected
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{path} is damaged: its SHA-256 begins with .*, not {expected}; delete it"):
        load_resnet("cifar10")
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(DataError) as error:
        load_resnet("cifar10")
    for remedy in ("connect to the internet", f"download {NOBODY_LISTENS}", "`resnet_weights`", "g2g-pretrain"):
        assert remedy in str(error.value)

    class Answer(io.BytesIO):
        def info(self):
            return email.message.Message()

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(content[:-1]))
    with pytest.raises(DataError, match="invalid hash value"):
        load_resnet("cifar10")
    assert not list((tmp_path / "hub/checkpoints").iterdir())
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(content))
    assert load_resnet("cifar10").fc.out_features == 10


def scaled(path, name, factor):
    state = torch.load(path, weights_only=True)
    torch.save({**state, name: torch.from_numpy(state[name].numpy() * np.array(factor))}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: write_resnet(path, "cifar100"), r"size mismatch for fc\.weight"),
        (lambda path: torch.save({}, path), r"Missing key\(s\) in state_dict"),
        (lambda path: scaled(path, "bn1.running_var", -1), r"bn1\.running_var, torch\.float\d+, has numbers that such"),
        (lambda path: scaled(path, "conv1.weight", 1j), r"conv1\.weight, torch\.complex\d+, has numbers"),
        (lambda path: scaled(path, "conv1.weight", 1e300), r"conv1\.weight, torch\.float64, has numbers that such a"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "PytorchStreamReader failed"),
    ],
    ids=["of another data set", "empty", "variance", "complex", "large", "truncated"],
)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_wrong_file_is_refused(weights_file, damage, message):
    damage(weights_file)
    with pytest.raises(DataError, match=message) as error:
        load_resnet("cifar10", weights_file)
    assert f"{weights_file} does not hold the weights of a CIFAR ResNet-32 for cifar10" in str(error.value)
    assert "`resnet_weights`" in str(error.value)
    for path in (weights_file.with_name("none.pt"), weights_file.parent):
        with pytest.raises(DataError, match=re.escape(f"resnet_weights={path} cannot be read")):
            weights_digest("cifar10", path)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    write_cifar(monkeypatch, tmp_path / "data", "cifar10")
    return tmp_path / "data"


@pytest.fixture
def weights_file(tmp_path):
    return write_resnet(tmp_path / "weights.pt", "cifar10")


def test_features_are_computed_once(data_dir, weights_file, monkeypatch, capsys):
    monkeypatch.setattr(features, "BATCH", 16)

    def computed():
        return load_features("cifar10", data_dir, weights_file)

    first = computed()
    assert "computing" in capsys.readouterr().out
    images, network = load_dataset("cifar10", data_dir), load_resnet("cifar10", weights_file)
    assert (first.input_dim, first.num_classes) == (512, 10)
    for part in ("train", "test"):
        expected = network.features(getattr(images, f"{part}_images"))
        # a convolution may add in another order in another memory format or batch
        torch.testing.assert_close(getattr(first, f"{part}_images"), expected, rtol=0, atol=1e-5)
        assert torch.equal(getattr(first, f"{part}_labels"), getattr(images, f"{part}_labels"))
    (file,) = (data_dir / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert computed().fingerprint == first.fingerprint
    assert f"{file} is damaged" in capsys.readouterr().err
    for name in ("load_dataset", "load_resnet"):
        monkeypatch.setattr(features, name, lambda *_: pytest.fail("the cache holds everything"))
    assert computed().fingerprint == first.fingerprint
    assert f"reading the ResNet-32 features from {file}" in capsys.readouterr().out


def test_other_data_weights_cuts_or_devices_have_other_features(data_dir, weights_file, tmp_path, monkeypatch):
    """Arithmetic of devices differs in the last bits: a run on one must not go on with the features of the other."""
    devices = []

    def compute(network, images, device):  # only the cache is tested
        devices.append(device)
        return {name: getattr(images, name) for name in features.PARTS}

    monkeypatch.setattr(features, "load_resnet", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(features, "_compute", compute)
    for device in ("cpu", "meta", torch.device("cpu"), "cpu:0"):
        load_features("cifar10", data_dir, weights_file, device)
    assert devices == ["cpu", "meta"]
    load_features("cifar10", data_dir, write_resnet(tmp_path / "other.pt", "cifar10", seed=1))
    monkeypatch.setattr(features, "CUT", "another")
    load_features("cifar10", data_dir, weights_file)
    (data_dir / "cifar-10-batches-py").rename(data_dir / "old")
    write_cifar(monkeypatch, data_dir, "cifar10", train=45)
    assert len(load_features("cifar10", data_dir, weights_file).train_labels) == 45
    assert len(list((data_dir / "features").iterdir())) == len(devices) == 5


def test_a_data_directory_that_cannot_be_written_only_costs_the_cache(data_dir, weights_file, capsys):
    (data_dir / "features").write_text("in the way")
    assert len(load_features("cifar10", data_dir, weights_file).train_labels) == 50
    assert "the next run computes them again" in capsys.readouterr().err


def test_a_run_remembers_the_hash_of_its_weights_and_leaves_them_out(data_dir, weights_file, tmp_path, capsys):
    flags = [*FLAGS, "--data_dir", str(data_dir), "--checkpoint_dir", str(tmp_path)]
    assert train.main([*flags, "--resnet_weights", str(weights_file)]) == 0
    checkpoint = torch.load(tmp_path / "resnet_cifar10_dense_p0.15_T3_current.pth", weights_only=True)
    digest = weights_digest("cifar10", weights_file)
    assert checkpoint["settings"]["resnet_weights"] == digest
    assert checkpoint["model"]["fc1.values"].shape[1:] == (16, 64)
    assert not any("conv" in name for name in checkpoint["model"])
    # the same content under another name is the same run
    assert train.main([*flags, "--resnet_weights", str(weights_file.rename(tmp_path / "moved.pt"))]) == 0
    assert "is finished" in capsys.readouterr().out
    # other weights are another
    other = write_resnet(tmp_path / "other.pt", "cifar10", seed=1)
    for given, now in ((["--resnet_weights", str(other)], weights_digest("cifar10", other)), ([], "ef93fc4d")):
        assert train.main([*flags, *given]) == 1
        assert f"resnet_weights: {digest} there, {now} now" in capsys.readouterr().err
