"""Sparse, modular spiking networks on top of :mod:`g2g_kernels`: models, dynamic sparse training, data, training."""

from g2gnet.base.version import __version__ as __version__
from g2gnet.convolution import G2GConv2d
from g2gnet.dst.scheduler import DSTScheduler
from g2gnet.images import SumPool2d
from g2gnet.layers import G2GLinear
from g2gnet.network import G2GNet
from g2gnet.neurons import LIF, AdLIF, CubaLIF, SpikingNeurons, Synaptic
from g2gnet.sparsify import sparsify
from g2gnet.spiking_network import Projection, SpikingNetwork
from g2gnet.stack import SpikingStack
from g2gnet.training.saved_run import load
from g2gnet.training.signs import keep_signs
from g2gnet.weights.tied_averages import sync_wiring, tie_wiring, untie_wiring

__all__ = [
    "LIF", "AdLIF", "CubaLIF", "DSTScheduler", "G2GConv2d", "G2GLinear", "G2GNet", "Projection", "SpikingNetwork",
    "SpikingNeurons", "SpikingStack", "SumPool2d", "Synaptic", "keep_signs", "load", "sparsify", "sync_wiring",
    "tie_wiring", "untie_wiring",
]  # fmt: skip
