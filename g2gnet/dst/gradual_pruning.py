"""Gradual pruning (Zhu and Gupta 2017): how many weights all layers together have after each update."""

import math
from collections.abc import Collection, Sequence

from g2gnet.layers import G2GLinear


def mean_density(layers: Sequence[G2GLinear]) -> float:
    """The share of the weights of all layers together that exist."""
    return sum(layer.mask.num_weights for layer in layers) / possible_weights(layers)


def possible_weights(layers: Sequence[G2GLinear]) -> int:
    """The weights of all layers together, whether they exist or not."""
    return sum(math.prod(layer.mask.shape) for layer in layers)


def least_density(layers: Sequence[G2GLinear], frozen: Collection[G2GLinear] = ()) -> float:
    """The share of the weights of all layers together that one unit of each, its largest, has; all of frozen ones."""
    of_layers = [(layer.mask.unit_sizes, layer in frozen) for layer in layers if layer.mask.num_units]
    left = sum(int(sizes.sum() if all_stay else sizes.max()) for sizes, all_stay in of_layers)
    return left / possible_weights(layers)


def weights_after(now: int, final: float, steps_left: int, interval: int) -> float:
    """The number of weights after an update that is followed by ``steps_left`` steps until the last one: with W weights
    ``now`` and F ``final`` ones F + (W − F)·(steps_left / (steps_left + interval))³."""
    return final + max(0.0, now - final) * (steps_left / (steps_left + interval)) ** 3
