"""The gate: a contender that computes something different gets no time.

The error of a tensor is Σ|actual − exact| / Σ|exact|, with the exact values from a float64 run of
:mod:`benchmarks.reference`; where the tensor is a sum over neurons (the gradient of a shared β or θ), its difference
is divided by the sum of the terms' magnitudes, since terms of either sign may cancel to next to nothing.

Rounding alone moves some membranes across their threshold, and one extra or missing spike changes the rest of that
sample. The size of the effect depends on the network and on T, so it is measured: the largest error of the reference
itself, run in the contender's precision. A contender may have ``ALLOWANCE`` times as much: in float32 few spikes flip,
at random; in bfloat16 thousands do, and their sum is steady. ``FLOOR`` is always allowed, in case the reference flipped
none.

At the default workload the float32 reference is off by 2e-4 to 8e-4, depending on the weights. One spike more or less
is worth up to 2e-3: SpikingJelly in float32, which is right to 3e-7 in float64, was off by 5e-7, 1.1e-3, or 2.0e-3 when
only the order of the pixels changed, and with it that of its sums. A mixer network was once off by 3e-3. Hence the
floor of 4e-3. In a smaller batch a spike is worth more: with 128 images of 20 steps our kernels were once off by 1.2e-2
and refused; without the four images whose spikes had moved they were right to 7e-7. A surrogate sharper by 1 % would be
off by 1e-2, a β larger by 0.001 by 8e-2, one missing unit of weights by 1e-1, a missing bias by 8e-1. In bfloat16
rounding alone is worth 6e-2 to 8e-2: there the gate tells a wrong formula from a right one (SpikingJelly's reset judged
by g2g's would be off by 3e-1), and the float32 run of the same code has to tell the rest.

A product alone has no thresholds to flip spikes at, so its floor in float32 is 1e-5.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from .reference import Results, linear_results, network_results, neuron_results, update_results
from .registry import KERNELS
from .workload import Prepared

ALLOWANCE = {"fp32": 3.0, "bf16": 1.5}
FLOOR = {"fp32": 4e-3, "bf16": 1e-2}
PRODUCT_FLOOR = {"fp32": 1e-5, "bf16": 1e-2}


class Verdict(NamedTuple):
    """Errors by tensor, their bound, and why the contender fails ("" if it passes)."""

    errors: dict[str, float]
    bound: float
    objection: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        errors = {name: value if math.isfinite(value) else str(value) for name, value in self.errors.items()}
        return {"errors": errors, "bound": self.bound, "objection": self.objection}


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error as this module defines it; NaN if ``actual`` is not finite."""
    actual, exact = actual.cpu().double(), exact.double()
    scale = exact.abs().sum()
    if actual.numel() == 1:  # one for all neurons of a layer, of shape [] or [1]
        actual, exact = actual.reshape(()), exact.sum()
    if actual.shape != exact.shape:
        return math.nan
    difference = (actual - exact).abs().sum()
    return float(difference / scale) if scale > 0 else float(difference)


class Judge:
    """Judges the results of contenders for one workload and kernel."""

    def __init__(self, prepared: Prepared, kernel: str) -> None:
        self._prepared = prepared
        self._kernel = kernel
        self._masks = {
            f"{name}.weight": connection.mask for name, connection in prepared.network("torch").connections().items()
        }
        self._masks["weight"] = self._masks["fc2.weight"]
        self._floor = PRODUCT_FLOOR if kernel.startswith("linear") else FLOOR
        self._reference = functools.cache(self._compute)  # of this judge alone

    def _compute(self, reset: str, precision: str) -> Results:
        if self._kernel in ("lif", "synaptic"):
            return neuron_results(getattr(self._prepared, KERNELS[self._kernel].options["inputs"]), reset, precision)
        if self._kernel == "dst":
            return update_results(self._prepared, reset, precision)
        if "inputs" in KERNELS[self._kernel].options:
            return linear_results(self._prepared, KERNELS[self._kernel].options["inputs"], precision)
        results = network_results(self._prepared, reset, precision)
        return {"counts": results["counts"]} if self._kernel == "forward" else results

    def bound(self, reset: str, precision: str) -> float:
        """The largest error explained by rounding."""
        exact, rounded = self._reference(reset, "float64"), self._reference(reset, precision)
        rounding = max(error(rounded[name], exact[name]) for name in exact)
        return max(self._floor[precision], ALLOWANCE[precision] * rounding)

    def verdict(self, results: Results, reset: str, precision: str, masked: bool, omits: tuple[str, ...]) -> Verdict:
        """Compares ``results`` with the reference of the contender's own formula.

        Args:
            results: by the reference's names.
            reset: the contender's reset formula, as in :mod:`benchmarks.reference`.
            precision: ``"fp32"`` or ``"bf16"``.
            masked: whether the contender has no weights outside the mask, so their gradient is zero.
            omits: the names of results that the contender does not compute.
        """
        exact = {name: tensor for name, tensor in self._reference(reset, "float64").items() if name not in omits}
        bound = self.bound(reset, precision)
        if results.keys() != exact.keys():
            missing, extra = sorted(exact.keys() - results.keys()), sorted(results.keys() - exact.keys())
            return Verdict({}, bound, f"does not give {missing}, gives {extra} unasked")
        for name, mask in self._masks.items():
            if name in exact and exact[name].dim() == 3:
                # of a wide network, where only the weights that exist are compared
                results = {**results, name: mask.pack(results[name]) if results[name].dim() == 2 else results[name]}
            elif name in exact and masked:
                exact[name] = exact[name] * mask.to_dense()
        errors = {name: error(results[name], tensor) for name, tensor in exact.items()}
        wrong = [f"{name} is off by {value:.1e}" for name, value in errors.items() if not value <= bound]
        return Verdict(errors, bound, f"{', '.join(wrong)}; at most {bound:.1e} is allowed" if wrong else "")
