"""The ResNet-32 for CIFAR (He et al. 2016, section 4.2) and its features after the second stage.

Modules are named as in the published models of chenyaofo/pytorch-cifar-models, whose files load as they are.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Five blocks, the first of which changes the shape, for which its shortcut is projected."""
    from torchvision.models.resnet import BasicBlock  # importing torchvision takes a second

    shortcut = None
    if stride != 1:
        projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
    first = BasicBlock(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(4)))


class ResNet32(nn.Module):
    """Three stages of five blocks with 16, 32 and 64 channels, on uint8 images [B, 3, 32, 32].

    The pixels are normalised with the ``mean`` and ``std`` of the three channels, values from 0 to 1, which are not
    part of the state dict.

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
        """The second stage's output [B, 32, 16, 16], averaged over 4×4 pixels and scaled: [B, 512] from 0 to 1.

        Each sample is scaled separately, (x − min)/(max − min); a sample with all values equal becomes zeros.
        """
        x = F.avg_pool2d(self._two_stages(images), 4).flatten(1)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return torch.where(high > low, (x - low) / (high - low), 0.0)
