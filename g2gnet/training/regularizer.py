"""The firing-rate regulariser, which pulls the mean rate of every hidden neuron towards a falling target."""

from collections.abc import Sequence

import torch


def rate_target(epoch: int, epochs: int, warmup_epochs: int) -> tuple[float, float]:
    """The strength λ and the target, in spikes per step, for ``epoch``, counted from 1 to ``epochs``.

    λ = 0 in the warm-up. Then, with u = (epoch − warm-up) / (epochs − warm-up), which is 1 in the last epoch,
    λ = 1e-4 + u·(1e-2 − 1e-4) and target = 0.25 − 0.16·u.

    Example:
        >>> rate_target(epoch=1, epochs=20, warmup_epochs=5)
        (0.0, 0.25)
    """
    if epoch <= warmup_epochs:
        return 0.0, 0.25
    u = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return 1e-4 + u * (1e-2 - 1e-4), 0.25 - 0.16 * u


def rate_penalty(hidden_rates: Sequence[torch.Tensor], strength: float, target: float) -> torch.Tensor:
    """λ·Σ over hidden layers and neurons (rate − target)², from rates [N] per layer (mean over steps and samples).

    Example:
        >>> rates = [torch.tensor([0.1, 0.3]), torch.tensor([0.2])]
        >>> rate_penalty(rates, strength=0.5, target=0.1)
        tensor(0.0250)
    """
    return strength * torch.stack([((rates - target) ** 2).sum() for rates in hidden_rates]).sum()
