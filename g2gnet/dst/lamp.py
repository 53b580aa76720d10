"""LAMP, layer-adaptive magnitude-based pruning (Lee et al. 2021): how many weights each layer keeps of those that all
layers may have together."""

from collections.abc import Sequence

import torch


def lamp_scores(magnitude: torch.Tensor) -> torch.Tensor:
    """LAMP scores of a layer's units, float64 [num_units] on the CPU: m² / Σ m² over the unit itself and all larger
    ones of its layer, where the ``magnitude`` m is the mean ``|w|``. Layers of small weights keep their part, and no
    layer loses its last unit while others have several. The largest unit has 1 even if all are 0.
    """
    squares, order = magnitude.cpu().double().square().sort(descending=True)
    adapted = torch.empty_like(squares)
    adapted[order] = squares / squares.cumsum(0).clamp(min=torch.finfo(squares.dtype).tiny)
    adapted[order[:1]] = 1
    return adapted


def layer_budgets(sizes: Sequence[torch.Tensor], magnitudes: Sequence[torch.Tensor], weights: float) -> list[float]:
    """The part of ``weights`` that each layer may keep: that of its units among the best of all layers
    (:func:`lamp_scores`). The first layer also gets the rest, less than a unit. ``sizes`` are the weights of each
    layer's units, int64 [num_units], ``magnitudes`` their mean ``|w|``.
    """
    of_all = torch.cat([of_layer.cpu() for of_layer in sizes])
    order = torch.cat([lamp_scores(of_layer) for of_layer in magnitudes]).argsort(descending=True, stable=True)
    best = order[of_all[order].cumsum(0) <= weights]
    kept = torch.zeros_like(of_all)
    kept[best] = of_all[best]
    first, *others = [float(of_layer.sum()) for of_layer in kept.split([len(of_layer) for of_layer in sizes])]
    return [first + weights - int(kept.sum()), *others]
