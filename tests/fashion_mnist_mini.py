"""Makes the subset of Fashion-MNIST in the package from the full set: ``python tests/fashion_mnist_mini.py``."""

from pathlib import Path

import numpy as np
import torch

from g2gnet.data import ImageData, load_dataset
from g2gnet.data.fashion_mnist import MINI_FILE

TRAIN, TEST, SEED = 6000, 1000, 0


def balanced_subset(labels: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Indices, ascending, of ``size`` samples with equally many of each of the ten classes, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(10):
        members = (labels == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[: size // 10]])
    return torch.cat(chosen).sort().values


def write_mini(full: ImageData, path: Path = MINI_FILE) -> None:
    """Writes the subset of ``full`` that the package has."""
    train = balanced_subset(full.train_labels, TRAIN, SEED)
    test = balanced_subset(full.test_labels, TEST, SEED)
    parts = {"train_images": full.train_images[train], "train_labels": full.train_labels[train].to(torch.uint8)}
    parts |= {"test_images": full.test_images[test], "test_labels": full.test_labels[test].to(torch.uint8)}
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in parts.items()})


if __name__ == "__main__":
    write_mini(load_dataset("fashionmnist"))
    print(f"wrote {MINI_FILE}")
