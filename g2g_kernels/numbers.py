"""Kinds of numbers, and the one check of each: of arguments, settings and the content of files. C would silently cut
whole numbers off, and make large floating-point numbers infinite and small ones 0."""

import math
import numbers
import operator
from typing import Any, NamedTuple

import torch

#: the range of PyTorch's and of C's whole numbers
INT32, INT64 = ((-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (32, 64))
#: of float32: the least magnitude above 0 (smaller ones are flushed to 0), and the largest
FLOAT32 = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def share_of(share: float, count: int) -> int:
    """⌊share · count⌋ without the rounding of the product: 0.57 of 4,700 are 2,679.

    Example:
        >>> share_of(0.57, 4700), int(0.57 * 4700)
        (2679, 2678)
    """
    return math.floor(share * count + 1e-13 * count)


class Number(NamedTuple):
    """A kind of number.

    Attributes:
        low, high: its range.
        open_low, open_high: whether that excludes them.
        whole: whether it is whole and fits an int64. Other numbers fit a float32: there they are finite, and not 0
            where 0 is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False

    @property
    def range(self) -> str:
        """The range in words; empty for any number."""
        if math.isfinite(self.low) and math.isfinite(self.high) and not (self.open_low or self.open_high):
            return f"from {self.low} to {self.high}"
        low = "" if self.low == -math.inf else f"{'above' if self.open_low else 'at least'} {self.low}"
        high = "" if self.high == math.inf else f"{'below' if self.open_high else 'at most'} {self.high}"
        return " and ".join(filter(None, (low, high)))

    def __str__(self) -> str:
        if not self.range:
            return "a whole number" if self.whole else "a finite number"
        of = "of " if self.range.startswith("at ") else ""
        return f"{'a whole number' if self.whole else 'a number'} {of}{self.range}"

    def _holds(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def refuses(self, value: Any) -> str | None:
        """What must be given instead of ``value``, in words; None if it is of this kind."""
        if isinstance(value, torch.SymInt):  # stands for an int in a program with dynamic shapes
            return None
        value = self._number(value)
        if value is None or not self._holds(value):
            return str(self)
        if self.whole:
            return None if INT64[0] <= value <= INT64[1] else f"{self}, at most {INT64[1]}"
        least, most = FLOAT32
        if abs(value) <= most and (abs(value) >= least or self._holds(0)):
            return None
        if abs(value) == math.inf:
            return str(self).replace("a number", "a finite number")
        return f"{self} that a float32 holds, {least:.3g} to {most:.3g}"

    def _number(self, value: Any) -> Any:
        """``value``, as an int if it is whole (of Python or NumPy, or a tensor); None if it is no such number."""
        if type(value) is int:  # first: its stand-in under torch.compile of PyTorch 2.6 cannot be asked for a dtype
            return value
        if isinstance(value, bool) or getattr(value, "dtype", None) in (bool, torch.bool):
            return None
        if not self.whole:
            if type(value) in (float, torch.SymFloat):
                return value
            # NumPy compares a number of few bits with few bits
            of_tensor = isinstance(value, torch.Tensor) and not value.dim() and not value.is_complex()
            return float(value) if of_tensor or isinstance(value, numbers.Real) else None
        try:
            return operator.index(value)
        except TypeError:
            return None

    def check(self, name: str, value: Any, of: str = "") -> Any:
        """``value``, as an int if it is whole; ValueError, naming it (``of`` something), unless of this kind."""
        wanted = self.refuses(value)
        if wanted:
            raise ValueError(f"{name}={value!r:.40}{of} must be {wanted}")
        return value if isinstance(value, torch.SymInt) else self._number(value)


#: a number of things: of at least one, of any
COUNT, WHOLE = Number(1, whole=True), Number(0, whole=True)
#: a number of neurons, which masks and kernels hold in 32 bits
SIZE = Number(1, INT32[1], whole=True)
PROBABILITY = Number(0, 1)
#: the sharpness α of a surrogate; the kernels multiply it by π/2
SHARPNESS = Number(0, 1e38, open_low=True)
