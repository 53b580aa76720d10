"""Gradual pruning (Zhu and Gupta 2017): how many weights each layer keeps in an update, and as how many units."""

import math
from collections.abc import Collection, Sequence

import torch

from g2g_kernels.numbers import share_of
from g2gnet.dst.lamp import lamp_scores
from g2gnet.layers import G2GLinear


def mean_density(layers: Sequence[G2GLinear]) -> float:
    """The share of the weights of all layers together that exist."""
    exist = sum(layer.mask.num_weights for layer in layers)
    return exist / sum(math.prod(layer.mask.shape) for layer in layers)


def least_density(layers: Sequence[G2GLinear], frozen: Collection[G2GLinear] = ()) -> float:
    """The share of the weights of all layers together that one unit of each, its largest, has; all of frozen ones."""
    of_layers = [(layer.mask.unit_sizes, layer in frozen) for layer in layers if layer.mask.num_units]
    left = sum(int(sizes.sum() if all_stay else sizes.max()) for sizes, all_stay in of_layers)
    return left / sum(math.prod(layer.mask.shape) for layer in layers)


def layer_budgets(
    sizes: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], final: float, left: int, interval: int
) -> list[float]:
    """The weights that each layer may keep in an update, after which ``left`` steps follow until the last one: of all,
    F + (W − F)·(left / (left + interval))³, W being the weights that there are and F ``final`` ones. Its part is that
    of its units that are among the best of all (:func:`g2gnet.dst.lamp.lamp_scores`); the first also gets what is
    over, less than a unit. ``sizes`` are the weights of each layer's units, int64 [num_units], ``scores`` their mean
    ``|w|``.
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
    pad = torch.nn.functional.pad
    have, get = (pad(sizes.cpu().double().cumsum(0), (1, 0)) for sizes in (strongest, best))
    kept = max(1, int((have <= budget).sum()) - 1)
    stay = torch.arange(kept - min(share_of(fraction, kept), len(best)), kept + 1)
    room = budget - have[stay]
    grown = torch.searchsorted(get, room, right=True) - 1
    grown = torch.minimum(grown, len(strongest) - stay).clamp(min=0) * (stay < kept)
    left = room - get[grown]
    chosen = int(((left < strongest.max().item()) & (stay + grown > 0)).int().argmax())
    return int(stay[chosen]), int(grown[chosen]), left[chosen].item()
