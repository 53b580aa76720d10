"""Features of a frozen CIFAR ResNet-32 in place of images, computed once for a data set."""

from g2gnet.features.cache import load_features
from g2gnet.features.resnet import FEATURES, ResNet32
from g2gnet.features.weights import load_resnet, new_resnet, weights_digest

__all__ = ["FEATURES", "ResNet32", "load_features", "load_resnet", "new_resnet", "weights_digest"]
