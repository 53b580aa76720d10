"""LAMP, by which one budget of weights is shared out among layers."""

import torch


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
