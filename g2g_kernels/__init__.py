"""Sparse group-to-group ("g2g") linear layers and fused loops over spiking neurons for PyTorch."""

from g2g_kernels import first_use as first_use  # puts its check where Triton kernels ask for it
from g2g_kernels.device import select_device
from g2g_kernels.dispatch import BackendError, available_backends, backend_status
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.groups import GroupLayout
from g2g_kernels.ops.flops import register_flop_formulas
from g2g_kernels.ops.g2g_conv2d import g2g_conv2d
from g2g_kernels.ops.g2g_linear import g2g_linear
from g2g_kernels.ops.g2g_stack import Activity, Connection, Population, explain, g2g_stack
from g2g_kernels.ops.neurons import Neurons, adlif, cubalif, lif, neurons, synaptic
from g2g_kernels.ops.neurons.step import adlif_step, lif_step, neurons_step, synaptic_step

__all__ = [
    "Activity", "BackendError", "BlockMask", "Connection", "GroupLayout", "Neurons", "Population", "adlif",
    "adlif_step", "available_backends", "backend_status", "cubalif", "explain", "g2g_conv2d", "g2g_linear", "g2g_stack",
    "lif", "lif_step", "neurons", "neurons_step", "register_flop_formulas", "select_device", "synaptic",
    "synaptic_step",
]  # fmt: skip
