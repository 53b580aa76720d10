"""LAMP, layer-adaptive magnitude-based pruning (Lee et al. 2021): how all layers share the weights that may stay."""

from collections.abc import Sequence

import torch


def lamp_scores(magnitude: torch.Tensor) -> torch.Tensor:
    """LAMP scores of a layer's units, float64 [num_units] on the CPU: m² / Σ m² over the unit itself and all larger
    ones of its layer, m being the ``magnitude``, the mean ``|w|``. They do not depend on the scale of a layer's
    weights, and no layer loses its last unit while others have several: the largest one has score 1 even if all are 0.
    """
    squares, order = magnitude.cpu().double().square().sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0).clamp(min=torch.finfo(squares.dtype).tiny)
    scores[order[:1]] = 1
    return scores


def layer_budgets(sizes: Sequence[torch.Tensor], magnitudes: Sequence[torch.Tensor], weights: float) -> list[float]:
    """How many of ``weights`` each layer may keep. The units of all layers with the highest LAMP scores stay, as many
    as fit. The first layer also gets what is left, less than a unit.

    Args:
        sizes: the weights in each unit, layer by layer, int64 [num_units].
        magnitudes: the mean ``|w|`` of each unit, likewise.
    """
    all_sizes = torch.cat([of_layer.cpu() for of_layer in sizes])
    best_first = torch.cat([lamp_scores(of_layer) for of_layer in magnitudes]).argsort(descending=True, stable=True)
    stay = best_first[all_sizes[best_first].cumsum(0) <= weights]
    kept = torch.zeros_like(all_sizes)
    kept[stay] = all_sizes[stay]
    first, *others = [float(of_layer.sum()) for of_layer in kept.split([len(of_layer) for of_layer in sizes])]
    return [first + weights - int(kept.sum()), *others]
