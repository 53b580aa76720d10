"""LAMP, by which one budget of weights is shared out among layers."""

import torch


def layer_adapted(size: torch.Tensor) -> torch.Tensor:
    """By what units of different layers are compared (LAMP: Lee et al. 2021, of units), float64 [num_units] on CPU:
    size² / Σ size² over the unit itself and all larger ones of its layer, where size is the mean ``|w|``. Layers of
    small weights keep their part, and none loses its last unit while others have several. The largest has 1 even if all
    are 0.
    """
    squares, order = size.cpu().double().square().sort(descending=True)
    adapted = torch.empty_like(squares)
    adapted[order] = squares / squares.cumsum(0).clamp(min=torch.finfo(squares.dtype).tiny)
    adapted[order[:1]] = 1
    return adapted
