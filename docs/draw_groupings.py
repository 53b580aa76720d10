"""Draws docs/groupings.png: which weights the three G2GNets have, and which pixels one hidden group sees.

pip install -e ".[plots]" && python docs/draw_groupings.py
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import ListedColormap

from g2gnet import G2GNet

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HIDDEN, BLOCK = 256, 8
NOTES = {
    "index": "contiguous groups\nin every layer",
    "random": "a random assignment,\ndrawn for each side of each layer",
    "mixer": "fc1 and fc3 contiguous,\nfc2 interleaved (group = i mod 8)",
}


def draw(folder: Path) -> None:
    figure, axes = plt.subplots(3, 3, figsize=(8.2, 8.6), layout="constrained", width_ratios=(0.72, 1, 1))
    colours = ListedColormap(["#f1efe8", "#1f5a7a"])
    for row, (model, note) in enumerate(NOTES.items()):
        net = G2GNet(784, HIDDEN, 10, model, block_size=BLOCK, generator=torch.Generator().manual_seed(0))
        pixels = (net.fc1.mask.cols.layout.group_of == 2).view(28, 28)
        # the order of fc2's inputs is that of fc1's outputs: neuron order, which shows how the groups interleave
        for column, (picture, title) in enumerate(
            (
                (pixels, "pixels of input group 3"),
                (net.fc1.mask.to_dense(), f"fc1: {HIDDEN} hidden × 784 inputs"),
                (net.fc2.mask.to_dense(), f"fc2: {HIDDEN} hidden × {HIDDEN} hidden"),
            )
        ):
            axis = axes[row, column]
            axis.imshow(
                picture.numpy(), cmap=colours, interpolation="nearest", aspect="auto" if column == 1 else "equal"
            )
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{model}\n{note}", fontsize=9)
    figure.savefig(folder / "groupings.png", dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).parent)
