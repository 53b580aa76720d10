"""Statistics of the spikes of a population in groups: rates, synchrony, correlation, coherence.

Neurons that see the same image fire alike even if they are not connected. So the mean over the images of a class, the
*signal*, is kept apart from an image's deviation from it, the *noise*. Subtracting the mean of a class at each time
step (the shift predictor of neuroscience) removes activity that is locked to the onset.

Three sums over the spikes [T, B, N] are computed exactly on their device (:meth:`SpikeSums.of`), and all quantities
from these in float64 on the CPU. No neurons × neurons matrix is formed: a sum over pairs of two groups is the product
of the groups' sums.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from g2g_kernels import GroupLayout
from g2g_kernels.mask.sides import UnitAxis

#: the rest after subtracting means counts as zero, which is rounding, below this share of a sum of squares
ROUNDING = 1e-12


class SpikeSums(NamedTuple):
    """Sums over the spikes of one population from which every quantity follows, on the CPU.

    Attributes:
        layout, labels: the groups of the N neurons, and the class of each sample, int64 [B].
        counts: float64 [B, N], spikes in each sample.
        class_sums: float64 [T, C, N], spikes at each step over the samples of a class.
        activity: float64 [T, B, G], spikes of each group at each step.

    Example:
        >>> spikes = activity.spikes[0].dense()  # [T, B, N]
        >>> SpikeSums.of(spikes, labels, num_classes=10, layout=net.fc1.mask.rows.layout).steps
        20
    """

    layout: GroupLayout
    labels: torch.Tensor
    counts: torch.Tensor
    class_sums: torch.Tensor
    activity: torch.Tensor

    @classmethod
    def of(cls, spikes: torch.Tensor, labels: torch.Tensor, num_classes: int, layout: GroupLayout) -> "SpikeSums":
        """The sums of ``spikes`` [T, B, N], each 0 or 1; ``labels`` are int64 [B], 0 to ``num_classes`` − 1."""
        spikes = spikes.float()
        label = F.one_hot(labels.cpu(), num_classes).to(spikes)
        sums = (spikes.sum(0), label.T @ spikes, _group_sums(spikes, layout))
        return cls(layout, labels.cpu(), *[each.cpu().double() for each in sums])

    @classmethod
    def join(cls, parts: Sequence["SpikeSums"]) -> "SpikeSums":
        """The sums over all samples of ``parts``."""
        layouts, labels, counts, class_sums, activity = zip(*parts, strict=True)
        return cls(
            layouts[0], torch.cat(labels), torch.cat(counts), torch.stack(class_sums).sum(0), torch.cat(activity, 1)
        )

    @classmethod
    def of_chunks(cls, parts: Sequence["SpikeSums"]) -> "SpikeSums":
        """The sums over all steps of ``parts``, which have the same samples."""
        layouts, labels, counts, class_sums, activity = zip(*parts, strict=True)
        return cls(layouts[0], labels[0], torch.stack(counts).sum(0), torch.cat(class_sums), torch.cat(activity))

    @property
    def steps(self) -> int:
        """T."""
        return len(self.activity)


def firing_rates(sums: SpikeSums) -> torch.Tensor:
    """Spikes of each neuron per step and sample: float64 [N], 0 to 1.

    Example:
        >>> spikes = torch.ones(10, 4, 8)
        >>> firing_rates(SpikeSums.of(spikes, torch.arange(4) % 2, 2, GroupLayout(8, 2)))[:3]
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    return sums.counts.mean(0) / sums.steps


def group_means(values: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """The mean of ``values`` [N] over the neurons of each group, [G].

    Example:
        >>> group_means(torch.tensor([1.0, 3.0, 5.0, 7.0]), GroupLayout(4, 2))
        tensor([2., 6.])
    """
    return _group_sums(values, layout) / layout.sizes


def _group_sums(values: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """The sum of ``values`` [..., N] over the neurons of each group, [..., G]; no neurons × groups matrix is formed."""
    axis = UnitAxis(layout, layout.size)  # a range for each group
    if not axis.in_order:
        values = F.pad(values, (0, 1)).index_select(-1, axis.neuron_at.to(values.device))
    return values.unflatten(-1, (axis.num_units, axis.width)).sum(-1)


def temporal_synchrony(sums: SpikeSums) -> torch.Tensor:
    """How much the neurons of a group fire at the same steps: float64 [G], from −1/(N_g − 1) to 1, about 0 by chance.

    synchrony_g = mean over pairs i ≠ j of ⟨e_i·e_j⟩ / mean over i of ⟨e_i²⟩, with ⟨·⟩ over steps and samples and
    e_i(t, b) = s_i(t, b) − mean over steps − mean over the samples of b's class + mean over both, which excludes the
    rate of a sample and activity locked to its onset.

    It is (N_g·χ² − 1)/(N_g − 1), with Golomb's synchrony measure χ² (variance of the group's mean over mean variance;
    Golomb & Rinzel 1993), which is 1/N_g for independent neurons. It is 1 only if all neurons fire identically; NaN for
    a group of one neuron, or where e = 0 throughout: silent neurons, T = 1, one sample per class.

    Example:
        >>> same = (torch.rand(100, 20, 1) < 0.3).float().expand(-1, -1, 8).contiguous()  # all neurons do the same
        >>> sums = SpikeSums.of(same, torch.zeros(20, dtype=torch.int64), 1, GroupLayout(8, 2))
        >>> temporal_synchrony(sums).round(decimals=3)
        tensor([1., 1.], dtype=torch.float64)
    """
    size = sums.layout.sizes
    variance = _noise_power(sums)
    together = _group_noise(sums).square().sum((0, 1))
    return _defined(together - variance, (size - 1) * variance)


def coherence(first: SpikeSums, second: SpikeSums) -> torch.Tensor:
    """How much groups fluctuate in the same rhythms, at any delay: float64 [G of first, G of second], 0 to 1.

    Over all frequencies but 0, with e as in :func:`temporal_synchrony`::

        coherence_gh = Σ_f |S_gh(f)| / √(Σ_f P_g(f) · Σ_f P_h(f))

    S_gh is the cross-spectrum ``⟨E_i(f)·E_j(f)*⟩`` averaged over samples and pairs i ∈ g, j ∈ h, and P_g the power
    ``⟨|E_i(f)|²⟩`` of single neurons i ∈ g, averaged alike. (With the groups' *summed* spikes, large groups would near
    1 even if pairs correlate weakly.) Independent neurons give :func:`chance_coherence`, not 0. The diagonal of a
    population with itself includes the pairs i = j: use :func:`temporal_synchrony` there. NaN where e = 0 throughout a
    group.

    Example:
        >>> coherence(sums, sums).shape
        torch.Size([8, 8])
    """
    steps = first.steps
    # the real transform omits frequencies above one half, equal to those below: these count twice
    frequency = torch.arange(1, steps // 2 + 1)
    weight = torch.where(2 * frequency == steps, 1.0, 2.0).double()
    spectrum = [torch.fft.rfft(_group_noise(sums), dim=0)[1:] for sums in (first, second)]
    cross = torch.einsum("fbg,fbh->fgh", spectrum[0], spectrum[1].conj()).abs()
    shared = torch.einsum("f,fgh->gh", weight, cross) / (first.layout.sizes[:, None] * second.layout.sizes)
    power = [steps * _noise_power(sums) / sums.layout.sizes for sums in (first, second)]
    return _defined(shared, (power[0][:, None] * power[1]).sqrt())


def chance_coherence(first: SpikeSums, second: SpikeSums) -> torch.Tensor:
    """The approximate :func:`coherence` of independent neurons: float64 [G of first, G of second].

    √(π/4 / (n·N_g·N_h)): the mean length of a sum of n·N_g·N_h unit steps in random directions, over their number.
    n = B − classes, since means were subtracted; NaN for one sample per class.

    Example:
        >>> chance_coherence(sums, sums).shape
        torch.Size([8, 8])
    """
    free = len(first.labels) - len(first.labels.unique())
    pairs = (first.layout.sizes[:, None] * second.layout.sizes).double()
    return _defined(torch.full_like(pairs, math.pi / 4), free * pairs).sqrt()


class CountCorrelation(NamedTuple):
    """Mean Pearson correlations of spike counts over pairs of two groups, each float64 [G, G], −1 to 1.

    Example:
        >>> count_correlation(sums).signal.shape
        torch.Size([8, 8])
    """

    total: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor


def count_correlation(sums: SpikeSums) -> CountCorrelation:
    """The mean correlation of spike counts over pairs i ∈ g, j ∈ h, i ≠ j; the diagonal is that within groups.

    total: over all samples. signal: between the mean counts in each class, that is, how alike two neurons are tuned; at
    least three classes are needed. noise: over samples, each minus the mean of its class. Neurons whose count never
    changes (silent ones) are skipped; NaN where no pair is left.

    Example:
        >>> count_correlation(sums).noise.shape  # by pairs of groups
        torch.Size([8, 8])
    """
    labels, counts = sums.labels, sums.counts
    per_class = torch.bincount(labels, minlength=sums.class_sums.shape[1])
    present = per_class > 0
    means = sums.class_sums.sum(0) / per_class[:, None]
    signal = means[present] if present.sum() >= 3 else means[:0]
    return CountCorrelation(
        _mean_correlation(counts - counts.mean(0), counts, sums.layout),
        _mean_correlation(signal - signal.mean(0), signal, sums.layout),
        _mean_correlation(counts - means[labels], counts, sums.layout),
    )


def _mean_correlation(deviations: torch.Tensor, counts: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """The mean cosine of pairs of columns of ``deviations`` [M, N] of counts, by group."""
    power = deviations.square().sum(0)
    active = power > ROUNDING * counts.square().sum(0)
    scaled = _group_sums(torch.where(active, deviations / power.sqrt(), 0.0), layout)
    number = _group_sums(active.double(), layout)
    pairs = number[:, None] * number - number.diag()
    return _defined(scaled.T @ scaled - number.diag(), pairs)


def _noise_power(sums: SpikeSums) -> torch.Tensor:
    """Σ over steps, samples and the group's neurons of e² (see :func:`temporal_synchrony`), [G]: the rest of Σ s² = Σ s
    after subtracting both sets of means."""
    total = sums.counts.sum(0)
    per_class = torch.bincount(sums.labels, minlength=sums.class_sums.shape[1]).clamp(min=1)
    of_samples = sums.counts.square().sum(0) / sums.steps
    locked = sums.class_sums.square().sum(0) - sums.class_sums.sum(0).square() / sums.steps
    power = total - of_samples - (locked / per_class[:, None]).sum(0)
    power = torch.where(power > ROUNDING * total, power, 0.0)
    return _group_sums(power, sums.layout)


def _group_noise(sums: SpikeSums) -> torch.Tensor:
    """Σ of e over the neurons of each group, [T, B, G]."""
    label = F.one_hot(sums.labels, sums.class_sums.shape[1]).double()
    means = (label / label.sum(0).clamp(min=1)).T @ sums.activity
    noise = sums.activity - means[:, sums.labels]
    return noise - noise.mean(0)


def _defined(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """The quotient, NaN where the denominator is zero."""
    return torch.where(denominator > 0, numerator / denominator, torch.nan)


def pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's r of the pairs (x, y) where both are numbers, −1 to 1; NaN for fewer than three, or a constant."""
    both = ~(x.isnan() | y.isnan())
    if both.sum() < 3:
        return torch.nan
    x, y = x[both].double(), y[both].double()
    deviation_x, deviation_y = x - x.mean(), y - y.mean()
    power_x, power_y = deviation_x.square().sum(), deviation_y.square().sum()
    if power_x <= ROUNDING * x.square().sum() or power_y <= ROUNDING * y.square().sum():
        return torch.nan
    return float(deviation_x @ deviation_y / (power_x * power_y).sqrt())
