"""Plain PyTorch ``g2g_lif``: the two operators one after the other, layer by layer. The oracle for every backend."""

from collections.abc import Sequence

import torch

from g2g_kernels.ops.g2g_linear.reference import g2g_linear
from g2g_kernels.ops.lif.reference import lif


def g2g_lif(
    x: torch.Tensor,
    layers: Sequence[tuple],
    steps: int | None,
    reset: str,
    surrogate: str,
    alpha: float,
) -> list[torch.Tensor]:
    """The spikes [T, B, N] of every layer."""
    spikes = []
    for values, mask, bias, beta, threshold in layers:
        x = lif(g2g_linear(x, values, mask, bias), beta, threshold, steps, reset, surrogate, alpha)
        spikes.append(x)
        steps = None
    return spikes
