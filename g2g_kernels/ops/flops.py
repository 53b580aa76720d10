"""FLOPs of the compiled operators for PyTorch's counter (``torch.utils.flop_counter.FlopCounterMode``).

One multiplication and one addition per existing weight and sample, once forward, once for the gradient of the input and
once for that of the weights: the cost of a dense product, times the density. Event-driven kernels do less, depending on
the spikes. Neurons count as nothing, like all pointwise operations there. Backend ``torch`` multiplies dense weights,
and PyTorch counts that.

A counter takes the formulas that are registered when it is made, so ours must be there as soon as someone can make one.
Registering them when g2g is imported would import the counter, and with it Triton where it is installed: 0.08 s beside
the 0.10 s of ``import g2gnet`` (PyTorch 2.15). Registering them at the first call of an operator is too late for a
counter around that call, which would then say 0 without a word. So they are registered when the counter's module is
imported, by a finder in ``sys.meta_path``.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from g2g_kernels.ops.record import RecordOperator
from g2g_kernels.unit_grid import MaskTensors

COUNTER = "torch.utils.flop_counter"
_formulas: dict[torch._ops.OpOverload, Callable[..., int]] = {}


def count_flops(operator: RecordOperator, formula: Callable[..., int]) -> None:
    """Makes the counter count ``formula(record)`` for a call of ``operator`` with that record."""

    def count(*arguments: object, out_val: object = None, **_: object) -> int:
        return formula(operator.record.of_flat(*arguments))

    _formulas[operator.overload] = count
    if COUNTER in sys.modules:
        _register(operator.overload)


def product_flops(samples: int, values: torch.Tensor, mask: MaskTensors) -> int:
    """FLOPs of the product of the weights of ``mask`` with ``samples`` vectors."""
    try:
        rows, cols = mask.row_bounds.diff(), mask.col_bounds.diff()
        weights = int((rows[mask.unit_row] * cols[mask.unit_col]).sum())
    except RuntimeError:  # tensors without data, of a model that is only traced
        weights = values.numel()  # includes the padding of shorter units
    return 2 * samples * weights


def _register(overload: torch._ops.OpOverload) -> None:
    # what its register_flop_formula does, but for that of PyTorch 2.4: it registers overloads, which nobody looks up
    sys.modules[COUNTER].flop_registry[overload.overloadpacket] = _formulas[overload]


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter is imported, and is gone then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                for overload in _formulas:
                    _register(overload)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
