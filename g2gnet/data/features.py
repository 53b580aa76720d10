"""Features of a frozen CIFAR ResNet-32 (He et al. 2016, section 4.2) in place of images, computed once for a data set.

Modules are named as in the published models of chenyaofo/pytorch-cifar-models, whose files load as they are.
"""

import hashlib
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from g2gnet.base.files import read_file
from g2gnet.base.messages import reason, say
from g2gnet.base.tensor_files import check_plain
from g2gnet.data import DATASETS, DataError, ImageData, load_dataset
from g2gnet.data.cache import NamedTensors, made_once

__all__ = ["ResNet32", "load_features", "load_resnet", "new_resnet", "weights_digest"]

#: hexadecimal digits of a file's SHA-256 that name its content, as in the names of the published files
DIGITS = 8
#: the name of the computation; a different computation needs a different name
CUT = "layer2, mean over 4x4, min-max"
BATCH = 100
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


class Release(NamedTuple):
    """A published file, whose name ends in its digest, and its normalisation of pixels."""

    url: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def digest(self) -> str:
        return self.url.removesuffix(".pt")[-DIGITS:]


_URL = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet"
#: means and standard deviations are those in the training logs of the release (logs/cifar10*/resnet32/default.log)
RELEASES = {
    "cifar10": Release(f"{_URL}/cifar10_resnet32-ef93fc4d.pt", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Release(f"{_URL}/cifar100_resnet32-84213ce6.pt", (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
}


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Five blocks. If the first one changes the shape, its shortcut is a projection."""
    from torchvision.models.resnet import BasicBlock  # importing torchvision takes a second

    shortcut = None
    if stride != 1:
        projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(4)))


class ResNet32(nn.Module):
    """Three stages of five blocks with 16, 32 and 64 channels, on uint8 images [B, 3, 32, 32].

    Pixels, from 0 to 1, are normalised with the ``mean`` and ``std`` of the three channels, which are not part of the
    state dict.

    Example:
        >>> net = ResNet32(10, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _two_stages(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() / 255 - self.mean) / self.std
        return self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes]."""
        return self.fc(self.layer3(self._two_stages(images)).mean((2, 3)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The second stage's output [B, 32, 16, 16], averaged over 4×4 pixels and scaled: [B, 512] from 0 to 1. Each
        sample is scaled separately, (x − min)/(max − min); a sample with all values equal becomes zeros."""
        x = F.avg_pool2d(self._two_stages(images), 4).flatten(1)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return torch.where(high > low, (x - low) / (high - low), 0.0)


def new_resnet(dataset: str) -> ResNet32:
    """A ResNet-32 for ``dataset`` with random weights.

    Example:
        >>> new_resnet("cifar100")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 100])
    """
    return ResNet32(DATASETS[dataset].num_classes, RELEASES[dataset].mean, RELEASES[dataset].std)


def weights_digest(dataset: str, file: Path | str | None = None) -> str:
    """The identifier of the weights in ``file``, the first eight hexadecimal digits of its SHA-256; None for the
    published ones, which are not read here. Raises DataError if the file cannot be read.

    Example:
        >>> weights_digest("cifar10", "checkpoints/resnet32_cifar10.pt")  # doctest: +SKIP
    """
    return RELEASES[dataset].digest if file is None else _digest(_read(Path(file)))


def load_resnet(dataset: str, file: Path | str | None = None) -> ResNet32:
    """A ResNet-32 for ``dataset`` in eval mode with the weights in ``file``, or the published ones (None).

    The published file is downloaded into PyTorch's hub directory unless it is there. Its digest must match. Raises
    DataError if the weights are unavailable, or are not those of such a network.

    Example:
        >>> net = load_resnet("cifar10")  # doctest: +SKIP
    """
    path = _published(dataset) if file is None else Path(file)
    content, network = _read(path), new_resnet(dataset)
    # PyTorch's hub checks what it downloads, not what it finds
    if file is None and _digest(content) != RELEASES[dataset].digest:
        raise DataError(
            f"{path} is damaged: its SHA-256 begins with {_digest(content)}, not {RELEASES[dataset].digest}; delete it "
            "and run this again"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_plain(state)
        network.load_state_dict(state)
        for name, tensor in network.state_dict().items():
            cast = torch.can_cast(state[name].dtype, tensor.dtype) and tensor.isfinite().all()
            if not cast or (name.endswith("running_var") and (tensor < 0).any()):
                raise ValueError(f"{name}, {state[name].dtype}, has numbers that such a network cannot have")
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise DataError(
            f"{path} does not hold the weights of a CIFAR ResNet-32 for {dataset}: "
            f"{textwrap.shorten(str(error), 300, placeholder=' …')}\n"
            f"Give another file as `resnet_weights`, or none to use the published weights; g2g-pretrain "
            f"--dataset {dataset} makes one."
        ) from error
    return network.eval().requires_grad_(False)


def _published(dataset: str) -> Path:
    """The path of the published weights, which are downloaded if they are not there."""
    url = RELEASES[dataset].url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        try:
            torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise DataError(
                f"the published ResNet-32 for {dataset} is not at {path} and could not be downloaded ({error}). "
                "Do one of these:\n"
                "  1. connect to the internet and run this again;\n"
                f"  2. download {url} elsewhere and give it as `resnet_weights`;\n"
                f"  3. train one (g2g-pretrain --dataset {dataset}) and give it as `resnet_weights`."
            ) from error
    return path


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise DataError(f"resnet_weights={path} cannot be read ({reason(error)}); give the name of a file") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def load_features(
    dataset: str, data_dir: Path | str = "data", weights: Path | str | None = None, device: torch.device | str = "cpu"
) -> ImageData:
    """The ResNet-32 features of CIFAR-10 or CIFAR-100 in place of the images: float32 [N, 512] from 0 to 1.

    They are computed on ``device`` with the ``weights`` in a file (None: the published ones), and cached in
    ``<data_dir>/features``, in a file named after the data, the weights, the cut and the kind of device (whose
    arithmetic differs in the last bits). Raises DataError if the data or the weights are unavailable.

    Example:
        >>> data = load_features("cifar10", data_dir="data")  # doctest: +SKIP
        >>> data.train_images.shape  # doctest: +SKIP
    """
    from g2gnet.data import cifar  # imports torchvision, which takes a second

    digest = weights_digest(dataset, weights)
    kind = torch.device(device).type
    key = hashlib.sha256(repr((cifar.fingerprint(dataset), digest, CUT, kind)).encode()).hexdigest()
    file = Path(data_dir) / "features" / f"{dataset}_resnet32-{digest}_{key[:16]}.pt"

    def make() -> NamedTensors:
        network = load_resnet(dataset, weights).to(device)
        if kind in ("cpu", "cuda"):
            # twice as fast on a CPU with AVX-512, in batches that stay in its caches; typed since PyTorch 2.15
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
        images = load_dataset(dataset, data_dir)
        say(f"computing the ResNet-32 features of {dataset}")
        return _compute(network, images, device)

    parts = made_once(file, "the ResNet-32 features", make)
    return ImageData(name=dataset, num_classes=DATASETS[dataset].num_classes, **parts)


@torch.no_grad()
def _compute(network: ResNet32, images: ImageData, device: torch.device | str) -> NamedTensors:
    parts = {name: getattr(images, name) for name in PARTS}
    for name in ("train_images", "test_images"):
        batches = tqdm(parts[name].split(BATCH), "features", leave=False, disable=not sys.stderr.isatty())
        parts[name] = torch.cat([network.features(batch.to(device)).cpu() for batch in batches])
    return parts
