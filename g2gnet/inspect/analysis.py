"""The analysis of a whole network: every quantity of every layer, from one pass over labelled samples."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from g2g_kernels import Activity, GroupLayout
from g2g_kernels.mask.groups import partners
from g2g_kernels.ops.g2g_stack.chunks import ChunkedSpikes
from g2gnet.activity_recorder import SpikeTrain, dense
from g2gnet.inspect import spike_statistics
from g2gnet.inspect.connections import cross_group_share, group_density, input_group_entropy, of_pixels
from g2gnet.inspect.spike_statistics import CountCorrelation, SpikeSums, firing_rates, group_means, pearson
from g2gnet.network import G2GNet

#: default number of test images to analyse
ANALYSIS_SAMPLES = 1000


class Batch(NamedTuple):
    """A network's input ([B, D] held, or [T, B, D]), its activity, and the true classes [B].

    Example:
        >>> analyze_network(net, [batch], num_classes=10).samples
        30
    """

    inputs: torch.Tensor
    activity: Activity
    labels: torch.Tensor


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer: its connection and its neurons' activity, by group. Tensors are float64, NaN where not defined.

    Attributes:
        group_sizes: int64 [G], neurons in each group.
        neuron_rates, group_rates: [N] (:func:`firing_rates`), and [G], their mean in each group.
        synchrony, correlation: [G] and three [G, G] (:func:`temporal_synchrony`, :func:`count_correlation`).
        coherence, chance_coherence: [G, G] between the layer's groups, NaN on the diagonal (functions of these names).
        pathway_coherence: [G, G of the inputs] between the layer's groups and those of its inputs, if these are spikes.
        density, cross_group_share: [G, G of the inputs] and [G] (:func:`group_density`, :func:`cross_group_share`).
        input_entropy, weight_entropy: [G], by connections and by weight (:func:`input_group_entropy`).
        accumulates, multiplies, dense_operations: :class:`~g2g_kernels.ops.g2g_stack.SynapticOperations` per sample.

    Example:
        >>> layer = analysis.layers[0]
        >>> layer.group_rates.shape, layer.coherence.shape
        (torch.Size([8]), torch.Size([8, 8]))
    """

    name: str
    group_sizes: torch.Tensor
    neuron_rates: torch.Tensor
    group_rates: torch.Tensor
    synchrony: torch.Tensor
    correlation: CountCorrelation
    coherence: torch.Tensor
    chance_coherence: torch.Tensor
    pathway_coherence: torch.Tensor | None
    density: torch.Tensor
    cross_group_share: torch.Tensor
    input_entropy: torch.Tensor
    weight_entropy: torch.Tensor
    accumulates: float
    multiplies: float
    dense_operations: float

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and step, 0 to 1."""
        return float(self.neuron_rates.mean())

    @property
    def silent(self) -> float:
        """The share of neurons that never fired, 0 to 1."""
        return float((self.neuron_rates == 0).double().mean())

    @property
    def cross_group_coherence(self) -> torch.Tensor:
        """[G], the mean coherence of each group with the others of its layer."""
        return self.coherence.nanmean(1)

    @property
    def coherence_by_share(self) -> float:
        """Pearson's r over the G groups, of coherence with the layer's other groups against inputs from others. With
        eight groups, chance alone gives ``|r| > 0.7`` in one of twenty cases."""
        return pearson(self.cross_group_coherence, self.cross_group_share)

    @property
    def coherence_by_pathway(self) -> float:
        """Pearson's r over all pairs of a group and an input group other than its own, of coherence against density."""
        if self.pathway_coherence is None:
            return math.nan
        other = ~partners(*self.density.shape)
        return pearson(self.pathway_coherence[other], self.density[other])

    def as_dict(self) -> dict[str, Any]:
        """Everything except single neurons' rates as lists and numbers, None where not defined."""
        names = (
            "group_sizes", "firing_rate", "silent", "coherence", "chance_coherence", "pathway_coherence",
            "cross_group_coherence", "cross_group_share", "coherence_by_share", "coherence_by_pathway", "density",
            "input_entropy", "weight_entropy", "accumulates", "multiplies", "dense_operations",
        )  # fmt: skip
        values: dict[str, Any] = {
            "neurons": len(self.neuron_rates),
            "group_firing_rate": self.group_rates,
            "temporal_synchrony": self.synchrony,
            **{f"{name}_correlation": matrix for name, matrix in self.correlation._asdict().items()},
            **{name: getattr(self, name) for name in names},
        }
        return {name: _plain(value) for name, value in values.items()}


@dataclass(frozen=True)
class NetworkAnalysis:
    """The result of :func:`analyze_network`: numbers of samples and steps, the share of samples that are classified
    correctly, and the layers from input to output.

    Example:
        >>> 0 < analysis.firing_rate < 1, analysis.steps
        (True, 20)
    """

    samples: int
    steps: int
    accuracy: float
    layers: tuple[LayerAnalysis, ...]

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and step over all layers, 0 to 1."""
        return float(torch.cat([layer.neuron_rates for layer in self.layers]).mean())

    @property
    def synaptic_operations(self) -> float:
        """Additions and multiplications per sample, over all layers."""
        return sum(layer.accumulates + layer.multiplies for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, lists and strings only, None where a quantity is not defined."""
        names = ("samples", "steps", "accuracy", "firing_rate", "synaptic_operations")
        layers = {layer.name: layer.as_dict() for layer in self.layers}
        return {**{name: getattr(self, name) for name in names}, "layers": layers}


@torch.no_grad()
def analyze_network(net: G2GNet, batches: Iterable[Batch], num_classes: int) -> NetworkAnalysis:
    """Analyses the activity of ``net`` in ``batches``; spikes are summed batch by batch on the device and not kept.

    A layer's neurons have the groups of its connection's outputs (those of an image the groups of their channels). Its
    inputs have those of the connection's inputs, which may group the same neurons differently.

    Example:
        >>> analysis = analyze_network(net, [batch], num_classes=10)
        >>> [layer.name for layer in analysis.layers]
        ['lif1', 'lif2', 'lif3']
    """
    first = {each.target: each for each in net.projections()[::-1]}
    projections = [first[number] for number in range(net.depth)]
    connections = [connection for connection, _ in net.layers()]
    outputs: list[list[SpikeSums]] = [[] for _ in connections]
    inputs: list[list[SpikeSums]] = [[] for _ in connections]
    correct = 0
    operations = torch.zeros(len(connections), 3, dtype=torch.float64)
    for received, activity, labels in batches:
        over_time = received.dim() == 3 and bool(((received == 0) | (received == 1)).all())
        pre: SpikeTrain | None = received if over_time else None
        correct += int((activity.output.argmax(1) == labels).sum())
        operations += torch.tensor(activity.synaptic_operations())
        for number, connection in enumerate(connections):
            if pre is not None:
                train = net.behind_pools(projections[number], pre)
                size = train.shape[-1] if isinstance(train, torch.Tensor) else net.sizes[projections[number].source]
                layout = of_pixels(connection.mask.cols.layout, size)
                inputs[number].append(_sums(train, labels, num_classes, layout))
            pre, layout = activity.spikes[number], of_pixels(connection.mask.rows.layout, net.sizes[number])
            outputs[number].append(_sums(pre, labels, num_classes, layout))

    samples = sum(len(sums.labels) for sums in outputs[0])
    layers = []
    for number, connection in enumerate(connections):
        accumulates, multiplies, dense_operations = (operations[number] / samples).tolist()
        sums, mask = SpikeSums.join(outputs[number]), connection.mask
        pre_sums = SpikeSums.join(inputs[number]) if len(inputs[number]) == len(outputs[number]) else None
        rates = firing_rates(sums)
        layer = LayerAnalysis(
            name=f"lif{number + 1}",
            group_sizes=sums.layout.sizes,
            neuron_rates=rates,
            group_rates=group_means(rates, sums.layout),
            synchrony=spike_statistics.temporal_synchrony(sums),
            correlation=spike_statistics.count_correlation(sums),
            coherence=spike_statistics.coherence(sums, sums).fill_diagonal_(math.nan),
            chance_coherence=spike_statistics.chance_coherence(sums, sums).fill_diagonal_(math.nan),
            pathway_coherence=None if pre_sums is None else spike_statistics.coherence(sums, pre_sums),
            density=group_density(mask),
            cross_group_share=cross_group_share(mask),
            input_entropy=input_group_entropy(mask),
            weight_entropy=input_group_entropy(mask, connection.values),
            accumulates=accumulates,
            multiplies=multiplies,
            dense_operations=dense_operations,
        )
        layers.append(layer)
    return NetworkAnalysis(samples, sums.steps, correct / samples, tuple(layers))


def _sums(train: SpikeTrain, labels: torch.Tensor, num_classes: int, layout: GroupLayout) -> SpikeSums:
    """The sums over spikes. A long sequence comes in chunks, which become float tensors one at a time."""
    if isinstance(train, ChunkedSpikes):
        return SpikeSums.of_chunks([_sums(part, labels, num_classes, layout) for part in train.chunks])
    return SpikeSums.of(dense(train), labels, num_classes, layout)


def _plain(value: Any) -> Any:
    """Tensors as lists, NaN as None (JSON has no NaN)."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
