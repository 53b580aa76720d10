"""Gradual pruning (Zhu and Gupta 2017): how many weights each layer keeps in an update (LAMP), as how many units."""

import math
from collections.abc import Collection, Sequence

import torch

from g2g_kernels.numbers import share_of
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


def lamp_scores(magnitude: torch.Tensor) -> torch.Tensor:
    """LAMP scores (Lee et al. 2021) of units, by which those of different layers are compared: float64 [num_units] on
    the CPU, m² / Σ m² over the unit itself and all larger ones of its layer, where the ``magnitude`` m is the mean
    ``|w|``. Layers of small weights keep their part, and none loses its last unit while others have several. The
    largest has 1 even if all are 0.
    """
    squares, order = magnitude.cpu().double().square().sort(descending=True)
    adapted = torch.empty_like(squares)
    adapted[order] = squares / squares.cumsum(0).clamp(min=torch.finfo(squares.dtype).tiny)
    adapted[order[:1]] = 1
    return adapted


def layer_budgets(
    sizes: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], final: float, left: int, interval: int
) -> list[float]:
    """The weights that each layer may keep in an update, after which ``left`` steps follow until the last one: of all,
    F + (W − F)·(left / (left + interval))³, W being the weights that there are and F ``final`` ones. Its part is that
    of its units that are among the best of all (:func:`lamp_scores`); the first also gets what is over, less than a
    unit. ``sizes`` are the weights of each layer's units, int64 [num_units], ``scores`` their mean ``|w|``.
    """
    of_all = torch.cat([of_layer.cpu() for of_layer in sizes])
    weights = final + max(0.0, int(of_all.sum()) - final) * (left / (left + interval)) ** 3
    order = torch.cat([lamp_scores(score) for score in scores]).argsort(descending=True, stable=True)
    remain = torch.empty_like(of_all)
    remain[order] = of_all[order] * (of_all[order].cumsum(0) <= weights)
    first, *others = [float(of_layer.sum()) for of_layer in remain.split([len(of_layer) for of_layer in sizes])]
    return [first + weights - int(remain.sum()), *others]


def units_within(budget: float, strongest: torch.Tensor, best: torch.Tensor, fraction: float) -> tuple[int, int, float]:
    """How many units of a layer stay and grow, and what they leave of a ``budget`` of weights: less than a unit. As
    many stay as fit, at least one; a ``fraction`` of these is replaced by as many weights, or fewer where units that
    grow are too small for that. ``strongest`` are the sizes of the units that there are, those that stay first, int64
    [n]; ``best`` those of units that can grow.
    """
    have, get = (torch.nn.functional.pad(sizes.cpu().double().cumsum(0), (1, 0)) for sizes in (strongest, best))
    kept = max(1, int((have <= budget).sum()) - 1)
    stay = torch.arange(kept - min(share_of(fraction, kept), len(best)), kept + 1)
    room = budget - have[stay]
    grown = torch.searchsorted(get, room, right=True) - 1
    grown = torch.minimum(grown, len(strongest) - stay).clamp(min=0) * (stay < kept)
    left = room - get[grown]
    chosen = int(((left < strongest.max().item()) & (stay + grown > 0)).int().argmax())
    return int(stay[chosen]), int(grown[chosen]), left[chosen].item()
