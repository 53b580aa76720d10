"""Schedules: how a quantity falls during training, by name."""

import math
from collections.abc import Callable

#: the factor of the quantity for a finished share of training, 0 to 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}
