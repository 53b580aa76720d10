"""The gate: a contender that computes something different gets no time.

Rounding alone moves some membranes across their threshold, and one spike more or less changes the rest of its sample.
So a contender gives its spikes along with its results, and two questions are asked apart.

**Do the results follow from the spikes?** The float64 reference (:mod:`benchmarks.reference`) runs with the contender's
spikes in place of its own. With d the difference from the reference's e, a tensor has two errors: Σ|d| / Σ|e|, and as a
whole |Σ d·sign(e)| / Σ|e|, in which rounding cancels and a wrong factor does not. Where a contender has the sum over
all neurons (a shared β or θ), e are its terms, since terms of either sign may cancel to next to nothing.

**Do the spikes follow from the membranes?** A spike is wrong if the reference's membrane, which the spikes before it
decide, is on the other side of the threshold. None may be farther from it than rounding explains, and there may not be
many more than in a plain run of the same precision.

The limits come from such a plain run: the reference itself in the contender's precision, judged by its own spikes.
Contenders round at other places than it does, so each has ``FLOOR`` and ``ALLOWANCE`` times its error; a tensor as a
whole has ``WHOLE_FLOOR`` and ``SPREAD`` standard errors, taken from the plain run's output neurons. A layer may have
``ALLOWANCE`` times as many wrong spikes as the plain run and ``FEW``, up to ``MEMBRANE_FLOOR`` or
``MEMBRANE_ALLOWANCE`` times as far off as its farthest.

What this promises: in float32 an error of one in ten thousand is found anywhere. In bfloat16 a gradient of weights or
biases under ATan that is a hundredth too large or too small is found where rounding averages out over neurons: a test
plants it in a network of 512. The record has the error that is closest to its limit.
"""

import functools
import math
from typing import NamedTuple

import torch

from .reference import Results, Run, linear_results, network_results, neuron_results, update_results
from .registry import KERNELS
from .workload import Prepared

ALLOWANCE = 1.5
FLOOR = {"fp32": 1e-5, "bf16": 6e-3}
SPREAD = 4.0
WHOLE_FLOOR = {"fp32": 1e-5, "bf16": 4e-3}
MEMBRANE_ALLOWANCE = 3.0
MEMBRANE_FLOOR = {"fp32": 1e-5, "bf16": 1e-2}
FEW = 25
#: kernels whose results are those of whole networks, in which samples meet in sums alone
NETWORKS = ("step", "recurrent", "forward")


class Verdict(NamedTuple):
    """Errors by name, the largest allowed ones, and why the contender fails ("" if it passes)."""

    errors: dict[str, float]
    limits: dict[str, float]
    objection: str

    def closest(self) -> str:
        """The error that is closest to its limit."""
        if not self.errors:
            return ""
        name = max(self.errors, key=lambda name: self.errors[name] / self.limits[name])
        return f"{self.errors[name]:.1e} ≤ {self.limits[name]:.1e}, {name}"


class Errors(NamedTuple):
    """Of a tensor: Σ|d|, |Σ d·sign(e)| and √Σ (Σ d·sign(e) of a row)², over Σ|e|, d the difference from exact e."""

    single: float
    whole: float
    spread: float


def errors(actual: torch.Tensor, exact: torch.Tensor) -> Errors:
    """The relative errors as this module defines them; NaN if ``actual`` is not finite."""
    actual, exact = actual.cpu().double(), exact.double()
    scale, sign = exact.abs().sum(), exact.sign()
    if actual.numel() == 1:  # one for all neurons of a layer, of shape [] or [1]
        actual, exact, sign = actual.reshape(()), exact.sum(), exact.new_ones(())
    if actual.shape != exact.shape:
        return Errors(math.nan, math.nan, math.nan)
    difference = (actual - exact) / (scale if scale > 0 else 1.0)
    signed = difference * sign
    rows = signed.flatten(1).sum(1) if signed.dim() > 1 else signed
    return Errors(float(difference.abs().sum()), float(rows.sum().abs()), float(rows.norm()))


class Rounding(NamedTuple):
    """What rounding alone does: the reference itself, run in a contender's precision."""

    errors: dict[str, Errors]  # of each tensor
    wrong: dict[str, int]  # how many spikes of each layer are not on their membrane's side of the threshold
    membrane: float  # the largest distance of such a membrane from the threshold
    spikes: dict[str, torch.Size]  # the shapes of spike trains by name


class Judge:
    """Judges the results of contenders for one workload and kernel."""

    def __init__(self, prepared: Prepared, kernel: str) -> None:
        self._prepared, self._kernel = prepared, kernel
        connections = prepared.network("torch").connections().items()
        self._masks = {f"{name}.weight": connection.mask for name, connection in connections}
        self._masks["weight"] = self._masks["fc2.weight"]
        self._rounding = functools.cache(self._compute_rounding)  # of this judge alone
        self._replays: dict[str, list[Run]] = {}

    def _run(self, reset: str, precision: str = "float64", given: Results | None = None) -> Run:
        inputs = KERNELS[self._kernel].inputs
        if self._kernel in ("lif", "synaptic"):
            return neuron_results(getattr(self._prepared, inputs), reset, precision, given)
        if self._kernel == "dst":
            return update_results(self._prepared, reset, precision, given)
        if inputs:
            return linear_results(self._prepared, inputs, precision)
        run = network_results(self._prepared, reset, precision, given)
        return run._replace(results={"counts": run.results["counts"]}) if self._kernel == "forward" else run

    def _replay(self, reset: str, spikes: Results) -> Run:
        """The float64 run with these spikes.

        Those of contenders in float32 differ in few samples, which meet in sums alone: only these are computed again.
        """
        known = self._replays.setdefault(reset, [])
        run = min(known, key=lambda run: len(_differing(spikes, run.spikes)), default=None)
        samples = torch.arange(len(self._prepared.labels)) if run is None else _differing(spikes, run.spikes)
        if run is not None and not len(samples):
            return run
        if run is None or self._kernel not in NETWORKS or 2 * len(samples) >= len(self._prepared.labels):
            known.append(self._run(reset, given=spikes))
            return known[-1]
        new, old = (network_results(self._prepared, reset, given=of, samples=samples) for of in (spikes, run.spikes))
        sums = {name: each for name, each in run.results.items() if name != "counts"}
        results = {name: each + new.results[name] - old.results[name] for name, each in sums.items()}
        results["counts"] = run.results["counts"].index_copy(0, samples, new.results["counts"])
        denied = {name: each.index_copy(0, samples, new.denied[name]) for name, each in run.denied.items()}
        return Run(results, spikes, denied)

    def _compute_rounding(self, reset: str, precision: str) -> Rounding:
        rounded = self._run(reset, precision)
        exact = self._replay(reset, rounded.spikes)
        return Rounding(
            {name: errors(rounded.results[name], tensor) for name, tensor in exact.results.items()},
            {name: int(denied[:, 0].sum()) for name, denied in exact.denied.items()},
            max((float(denied[:, 1].max()) for denied in exact.denied.values()), default=0.0),
            {name: spikes.shape for name, spikes in rounded.spikes.items()},
        )

    def verdict(self, results: Results, reset: str, precision: str, masked: bool, omits: tuple[str, ...]) -> Verdict:
        """Compares ``results``, spikes among them, with the reference of the contender's own formula, given its spikes.

        ``reset``, ``masked`` and ``omits`` are those of :class:`~benchmarks.contender.Contender`, ``precision`` is
        ``"fp32"`` or ``"bf16"``.
        """
        rounding = self._rounding(reset, precision)
        wanted = {*rounding.errors, *rounding.spikes} - {*omits}
        if results.keys() != wanted:
            missing, extra = sorted(wanted - results.keys()), sorted(results.keys() - wanted)
            return Verdict({}, {}, f"does not give {missing}, gives {extra} unasked")
        spikes = {name: results[name].cpu() for name in rounding.spikes}
        for name, shape in rounding.spikes.items():
            if spikes[name].shape != shape:
                return Verdict({}, {}, f"{name} is {list(spikes[name].shape)}, not {list(shape)}")
        exact, _, denied = self._replay(reset, spikes)
        found, limits = {}, {}
        for name, of_samples in denied.items():
            count, membrane = spikes[name].numel(), name.replace("spikes", "membrane")
            found[name] = float(of_samples[:, 0].sum()) / count
            limits[name] = (ALLOWANCE * rounding.wrong[name] + FEW) / count
            found[membrane] = float(of_samples[:, 1].max())
            limits[membrane] = max(MEMBRANE_FLOOR[precision], MEMBRANE_ALLOWANCE * rounding.membrane)
        for name in (name for name in exact if name in wanted):
            actual, right, mask = results[name], exact[name], self._masks.get(name)
            if mask is not None and right.dim() == 3:
                # of a wide network, where only the weights that exist are compared
                actual = mask.pack(actual) if actual.dim() == 2 else actual
            elif mask is not None and masked:
                right = right * mask.to_dense()
            whole = f"{name} as a whole"
            found[name], found[whole], _ = errors(actual, right)
            limits[name] = FLOOR[precision] + ALLOWANCE * rounding.errors[name].single
            floor = FLOOR if actual.numel() == 1 else WHOLE_FLOOR
            limits[whole] = floor[precision] + SPREAD * rounding.errors[name].spread
        wrong = [
            f"{name} is off by {value:.1e}, at most {limits[name]:.1e} is allowed"
            for name, value in found.items()
            if not value <= limits[name]
        ]
        return Verdict(found, limits, "; ".join(wrong))


def _differing(spikes: Results, others: Results) -> torch.Tensor:
    """The samples whose spikes are not the same in all layers."""
    differ = [(train != others[name]).any(0).any(-1) for name, train in spikes.items()]
    return torch.stack(differ).any(0).nonzero().flatten() if differ else torch.empty(0, dtype=torch.long)
