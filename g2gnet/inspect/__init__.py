"""Analysis of trained networks: how groups are connected, and how their neurons fire together.

All examples in this package begin with this one.

Example:
    >>> from g2g_kernels import BlockMask, GroupLayout
    >>> from g2gnet import G2GNet
    >>> net = G2GNet(64, 64, 10, block_size=8, T=20)
    >>> inputs, labels = net.encode(3 * torch.rand(30, 64)), torch.arange(30) % 10
    >>> activity = net.simulate(inputs)
    >>> batch = Batch(inputs, activity, labels)
    >>> analysis = analyze_network(net, [batch], num_classes=10)
    >>> sums = SpikeSums.of(activity.spikes[0].dense(), labels, 10, net.fc1.mask.rows.layout)
"""

from g2gnet.inspect.analysis import ANALYSIS_SAMPLES, Batch, LayerAnalysis, NetworkAnalysis, analyze_network
from g2gnet.inspect.connections import cross_group_share, group_density, input_group_entropy
from g2gnet.inspect.spike_statistics import (
    CountCorrelation,
    SpikeSums,
    chance_coherence,
    coherence,
    count_correlation,
    firing_rates,
    group_means,
    temporal_synchrony,
)
from g2gnet.inspect.summaries import Table, groups_table, headline, layers_table, summary_table

__all__ = [
    "ANALYSIS_SAMPLES", "Batch", "CountCorrelation", "LayerAnalysis", "NetworkAnalysis", "SpikeSums", "Table",
    "analyze_network", "chance_coherence", "coherence", "count_correlation", "cross_group_share", "firing_rates",
    "group_density", "group_means", "groups_table", "headline", "input_group_entropy", "layers_table", "summary_table",
    "temporal_synchrony",
]  # fmt: skip
