"""The one check of all numbers that other people's files and models bring in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from g2g_kernels import BlockMask
from g2g_kernels.numbers import Number

#: the weights of a layer that exist, as :meth:`G2GLinear.from_linear` takes them
Mask = BlockMask | torch.Tensor
#: by default, what a float32 holds
FINITE = Number().check


def numbers(
    name: str, values: Any, entries: int | None = None, check: Callable[[str, float], Any] = FINITE
) -> np.ndarray:
    """``values``, an array, a tensor on any device, a number or nested lists of them, as float64.

    Args:
        entries: how many neurons the values are of: one for all, or one each, whatever their shape. The result is [1]
            or [entries]. None: a matrix, which has a number at least.
        check: raises ValueError, naming its first argument, unless the second one is in an interval.

    Raises:
        ValueError: with ``name``, for anything else.

    Example:
        >>> numbers("node lif1: tau", np.full((4, 1), 0.5), entries=4)
        array([0.5, 0.5, 0.5, 0.5])
    """
    if isinstance(values, torch.Tensor):
        plain = values.layout == torch.strided and not (values.is_meta or values.is_quantized or values.is_complex())
        array = values.detach().cpu().double().numpy() if plain else np.array(str(values.dtype))
        what = f"a tensor of {values.dtype}{'' if values.layout == torch.strided else f' and {values.layout}'}"
        what += " without numbers" if values.is_meta else ""
    else:
        try:
            array = np.asarray(values)
        except ValueError:  # lists of different lengths
            array = np.array("")
        what = f"{array.dtype} {list(array.shape)}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {what}; give an array of real numbers")
    array = array.astype(np.float64)
    if entries is not None and array.size not in (1, entries):
        raise ValueError(f"{name} has {array.size} numbers, of shape {list(array.shape)}; give one, or {entries}")
    if entries is None and (array.ndim != 2 or not array.size):
        raise ValueError(f"{name} has shape {list(array.shape)}; give a matrix [outputs, inputs]")
    for extreme in (array.min(), array.max()):
        check(name, float(extreme))
    return array if entries is None else array.flatten()
