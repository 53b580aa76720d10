"""A look inside trained networks: how groups are connected and what their neurons do together."""

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
    "ANALYSIS_SAMPLES",
    "Batch",
    "CountCorrelation",
    "LayerAnalysis",
    "NetworkAnalysis",
    "SpikeSums",
    "Table",
    "analyze_network",
    "chance_coherence",
    "coherence",
    "count_correlation",
    "cross_group_share",
    "firing_rates",
    "group_density",
    "group_means",
    "groups_table",
    "headline",
    "input_group_entropy",
    "layers_table",
    "summary_table",
    "temporal_synchrony",
]
