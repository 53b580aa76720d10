"""Sparse group-to-group ("g2g") linear layers and fused leaky integrate-and-fire loops for PyTorch."""

from g2g_kernels.block_mask import BlockMask
from g2g_kernels.device import select_device
from g2g_kernels.dispatch import BackendError, available_backends, backend_status
from g2g_kernels.groups import GroupLayout
from g2g_kernels.ops.g2g_lif import Activity, LIFLayer, g2g_lif
from g2g_kernels.ops.g2g_linear import g2g_linear
from g2g_kernels.ops.lif import lif
from g2g_kernels.ops.lif.step import lif_step

__all__ = [
    "Activity",
    "BackendError",
    "BlockMask",
    "GroupLayout",
    "LIFLayer",
    "available_backends",
    "backend_status",
    "g2g_lif",
    "g2g_linear",
    "lif",
    "lif_step",
    "select_device",
]
