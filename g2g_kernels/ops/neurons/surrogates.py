"""Surrogate derivatives of the spike S = 1[U > θ], as functions of x = U − θ and the sharpness α. They are derivatives
of smooth steps from 0 to 1, the *primitives*. At the default α = 2 all have unit area, so they are interchangeable. All
are 0 at ±∞, and NaN at NaN."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

#: the defaults
SURROGATE, ALPHA = "atan", 2.0


class Surrogate(NamedTuple):
    """A stand-in for dS/dU, ``derivative(x, alpha)``, and its smooth step ``primitive(x, alpha)``; ``compact`` if the
    derivative is 0 where |x| ≥ 1/α, so that most neurons pass no gradient on."""

    derivative: Callable[[torch.Tensor, float], torch.Tensor]
    primitive: Callable[[torch.Tensor, float], torch.Tensor]
    compact: bool = False


def _sigmoid_derivative(x: torch.Tensor, alpha: float) -> torch.Tensor:
    s = torch.sigmoid(alpha * x)
    return alpha * s * (1 - s)


def _clamp(x: torch.Tensor, most: float) -> torch.Tensor:
    """x from −most to most, with slope 1 in between and at NaN, and 0 at both ends."""
    return torch.where(x.abs() >= most, x.detach().clamp(-most, most), x)


def _fast_sigmoid_primitive(x: torch.Tensor, alpha: float) -> torch.Tensor:
    x = _clamp(x, torch.finfo(x.dtype).max / (4 * max(1.0, alpha)))  # at ∞ the quotient would be NaN
    return x / (1 + alpha * x.abs()) + 0.5


def _triangle_primitive(x: torch.Tensor, alpha: float) -> torch.Tensor:
    z = _clamp(alpha * x, 1)
    return 0.5 + z - 0.5 * z * z.abs()


def _boxcar_primitive(x: torch.Tensor, alpha: float) -> torch.Tensor:
    z = _clamp(alpha * x, 1)
    return z / 2 + 0 * z * z + 0.5  # the slope at NaN is NaN


SURROGATES: dict[str, Surrogate] = {
    # (α/2) / (1 + (π/2·α·x)²): Fang et al. 2021, as in snnTorch
    "atan": Surrogate(
        lambda x, alpha: (alpha / 2) / (1 + (math.pi / 2 * alpha * x) ** 2),
        lambda x, alpha: torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5,
    ),
    # 1 / (1 + α|x|)²: Zenke & Ganguli 2018
    "fast_sigmoid": Surrogate(lambda x, alpha: 1 / (1 + alpha * x.abs()) ** 2, _fast_sigmoid_primitive),
    # α·σ(αx)·(1 − σ(αx))
    "sigmoid": Surrogate(_sigmoid_derivative, lambda x, alpha: torch.sigmoid(alpha * x)),
    # α·max(0, 1 − α|x|): Bellec et al. 2018, scaled to unit area
    "triangle": Surrogate(
        lambda x, alpha: alpha * (1 - alpha * x.abs()).clamp(min=0), _triangle_primitive, compact=True
    ),
    # α/2 where |x| < 1/α: Wu et al. 2018
    "boxcar": Surrogate(
        lambda x, alpha: (alpha / 2 + 0 * x).masked_fill(alpha * x.abs() >= 1, 0), _boxcar_primitive, compact=True
    ),
}
