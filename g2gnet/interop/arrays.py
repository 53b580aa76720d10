"""The one check of numbers from other people's files and models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from g2g_kernels import BlockMask
from g2g_kernels.numbers import Number
from g2gnet.base.messages import reason

#: the weights of a layer that exist, as :meth:`G2GLinear.from_linear` takes them
Mask = BlockMask | torch.Tensor
#: the default check: a number that a float32 holds
FINITE = Number().check


def numbers(
    name: str, values: Any, entries: int | None = None, check: Callable[[str, float], Any] = FINITE
) -> np.ndarray:
    """``values``, an array, a tensor on any device, a number or nested lists of numbers, as float64. Raises ValueError,
    with ``name``, for anything else.

    For ``entries`` neurons there is one number for all, or one for each, in any shape; the result is [1] or [entries].
    None: a matrix with at least one number. ``check`` raises ValueError, naming its first argument, unless the second
    one is in an interval."""
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            values = values if values.is_complex() else values.double()
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"of {array.dtype}")
    except (ValueError, TypeError, RuntimeError) as error:  # lists of different lengths; a tensor that is not plain
        kind = type(values).__name__
        raise ValueError(f"{name} is a {kind} ({reason(error)}); give an array of real numbers") from error
    array = array.astype(np.float64)
    if entries is not None and array.size not in (1, entries):
        raise ValueError(f"{name} has {array.size} numbers, of shape {list(array.shape)}; give one, or {entries}")
    if entries is None and (array.ndim != 2 or not array.size):
        raise ValueError(f"{name} has shape {list(array.shape)}; give a matrix [outputs, inputs]")
    for extreme in (array.min(), array.max()):
        check(name, float(extreme))
    return array if entries is None else array.flatten()
