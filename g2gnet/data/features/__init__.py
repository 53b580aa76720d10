"""Features of a frozen CIFAR ResNet-32 in place of images, computed once for a data set."""

from g2gnet.data.features.cache import load_features
from g2gnet.data.features.pretrained_weights import load_resnet, new_resnet, weights_digest
from g2gnet.data.features.resnet import FEATURES, ResNet32

__all__ = ["FEATURES", "ResNet32", "load_features", "load_resnet", "new_resnet", "weights_digest"]
