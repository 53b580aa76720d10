"""FLOPs of the compiled operators for PyTorch's counter (``torch.utils.flop_counter.FlopCounterMode``): one
multiplication and one addition per existing weight and sample, once forward, once for the gradient of the input and
once for that of the weights. Event-driven kernels do less, depending on the spikes. Neurons count as nothing, like all
pointwise operations; on backend ``torch`` PyTorch counts dense products.

Importing g2g does not register the formulas. That would import the counter and with it Triton, which takes as long as
``import g2gnet`` itself; it prints a warning where PyTorch has CUDA and Triton is missing. A counter keeps the formulas
that there are when it is made, so the first call of an operator would be too late.
"""

from collections.abc import Callable
from typing import Any

import torch

from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.record import RecordOperator, of_arguments

_formulas: dict[torch._ops.OpOverload, Callable[[Any], int]] = {}


def count_flops(operator: RecordOperator, formula: Callable[[Any], int]) -> None:
    """Declares ``formula(record)`` as the FLOPs of a call of ``operator`` with that record."""
    _formulas[operator.overload] = formula


def register_flop_formulas() -> None:
    """Makes PyTorch's FLOP counters (``FlopCounterMode``) that are made after this call include the operators.

    Others count 0 for operators of the backends ``cpu`` and ``triton``.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> from g2g_kernels import BlockMask, GroupLayout, g2g_linear, register_flop_formulas
        >>> register_flop_formulas()
        >>> mask = BlockMask.full(GroupLayout(16), GroupLayout(8))
        >>> with FlopCounterMode(display=False) as counter:
        ...     y = g2g_linear(torch.rand(5, 8), mask.pack(torch.rand(16, 8)), mask)
        ...
        >>> counter.get_total_flops()
        1280
    """
    from torch.utils.flop_counter import flop_registry

    for overload, formula in _formulas.items():
        # what register_flop_formula does, but for that of PyTorch 2.4: it registers overloads, which nobody looks up
        flop_registry[overload.overloadpacket] = lambda *given, of=formula, **_: of(of_arguments(*given[:5]))


def product_flops(samples: int, values: torch.Tensor, mask: MaskTensors) -> int:
    """FLOPs of the product of the weights of ``mask`` with ``samples`` vectors."""
    try:
        rows, cols = mask.row_bounds.diff(), mask.col_bounds.diff()
        weights = int((rows[mask.unit_row] * cols[mask.unit_col]).sum())
    except RuntimeError:  # tensors without data, of a model that is only traced
        weights = values.numel()  # includes the padding of shorter units
    return 2 * samples * weights
