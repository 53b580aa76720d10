"""Gradual pruning (Zhu and Gupta 2017): how many weights all layers together have after each update."""

import math
from collections.abc import Collection, Sequence

import torch

from g2gnet.layers import SparseLayer


def unit_sizes(layer: SparseLayer) -> torch.Tensor:
    """int64 [num_units], the weights in the unit of each slot, those of its kernels one by one."""
    return layer.mask.unit_sizes * layer.weights_of_place


def mean_density(layers: Sequence[SparseLayer]) -> float:
    """The share of all layers' weights that exist."""
    return sum(int(unit_sizes(layer).sum()) for layer in layers) / possible_weights(layers)


def possible_weights(layers: Sequence[SparseLayer]) -> int:
    """All layers' weights, whether they exist or not."""
    return sum(math.prod(layer.mask.shape) * layer.weights_of_place for layer in layers)


def least_density(layers: Sequence[SparseLayer], frozen: Collection[SparseLayer] = ()) -> float:
    """The share of all layers' weights that one unit of each layer, the largest, and all units of frozen ones have."""
    sizes = [(unit_sizes(layer), layer in frozen) for layer in layers if layer.mask.num_units]
    left = sum(int(of_layer.sum() if all_stay else of_layer.max()) for of_layer, all_stay in sizes)
    return left / possible_weights(layers)


def weights_after(now: int, final: float, steps_left: int, interval: int) -> float:
    """The weights after an update that ``steps_left`` steps precede the last one: final + (now − final)·(steps_left /
    (steps_left + interval))³."""
    return final + max(0.0, now - final) * (steps_left / (steps_left + interval)) ** 3
