"""How a quantity falls in the course of training, by name."""

import math
from collections.abc import Callable

#: from the share of training that is over, 0 to 1, to the factor by which the quantity is multiplied
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}
