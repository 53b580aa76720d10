"""Features of a frozen CIFAR ResNet-32 in place of images, computed once for a data set: by the published weights, or a
file's."""

import hashlib
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from g2gnet.base.messages import say
from g2gnet.data import DATASETS, ImageData, load_dataset
from g2gnet.data.cache import NamedTensors, made_once
from g2gnet.data.resnet import ResNet32, load_resnet, new_resnet, weights_digest

__all__ = ["ResNet32", "load_features", "load_resnet", "new_resnet", "weights_digest"]

#: what is computed from an image; a different computation needs a different name
CUT = "layer2, mean over 4x4, min-max"
BATCH = 100
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


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
