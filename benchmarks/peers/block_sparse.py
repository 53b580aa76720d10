"""PyTorch's own block-sparse (BSR) matrix product in place of g2g's, with g2g's LIF.

``weight @ xᵀ`` with a ``torch.sparse_bsr_tensor``, forward and for the input gradient. PyTorch differentiates such a
product through the dense gradient. Here the input gradient is a block-sparse product with the transposed weight, and
the weight gradient a dense product from which the blocks are taken (faster on the CPU than a product for each row of
blocks, which would need copies of its inputs; PyTorch has no sampled product for blocks).

On a CPU the product is MKL's: float32, square blocks. It needs xᵀ contiguous, so inputs and gradients are copied into
that order (without the copy it takes twice as long). Layers whose units are not square are dense products with a mask.
"""

import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from g2g_kernels import BlockMask
from g2gnet import G2GLinear

from ..contender import Contender, LayerByLayer, LinearContender, NetworkContender
from ..workload import Prepared

PEERS = (("bsr-lif", "BlockSparseLIF", ("step", "forward")), ("bsr", "BlockSparse", ("linear", "linear-dense")))

warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta state")


class _Product(torch.autograd.Function):
    """Y [out, M] = W·X for packed values of W and X [in, M], both in padded group order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, mask: BlockMask) -> torch.Tensor:
        ctx.save_for_backward(x, values)
        ctx.mask = mask
        (rows, cols), (height, width) = mask.grid, mask.unit_shape
        slot = mask.row_slot.long()
        weight = torch.sparse_bsr_tensor(
            mask.row_ptr, mask.unit_col[slot], values[slot], (rows * height, cols * width), check_invariants=False
        )
        return weight @ x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (grad_y,) = gradients
        x, values = ctx.saved_tensors
        mask = ctx.mask
        (rows, cols), (height, width) = mask.grid, mask.unit_shape
        grad_x = None
        if ctx.needs_input_grad[0]:
            slot = mask.col_slot.long()
            weight = torch.sparse_bsr_tensor(
                mask.col_ptr,
                mask.unit_row[slot],
                values[slot].transpose(1, 2).contiguous(),
                (cols * width, rows * height),
                check_invariants=False,
            )
            grad_x = weight @ grad_y.contiguous()
        tiles = (grad_y @ x.T).view(rows, height, cols, width)
        return grad_x, tiles[mask.unit_row.long(), :, mask.unit_col.long(), :], None


class _BlockSparseLinear(nn.Module):
    """A :class:`G2GLinear` of square units with PyTorch's product; [..., in] → [..., out]."""

    def __init__(self, connection: G2GLinear) -> None:
        super().__init__()
        self.mask, self.values, self.bias = connection.mask, connection.values, connection.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, cols = self.mask.rows, self.mask.cols
        columns = x.reshape(-1, x.shape[-1]).T
        if not cols.in_order:
            columns = F.pad(columns, (0, 0, 0, 1)).index_select(0, cols.neuron_at)
        columns = columns.contiguous()
        y = _Product.apply(columns, self.values, self.mask)
        y = y.T if rows.in_order else y.index_select(0, rows.place_of).T
        return (y + self.bias).view(*x.shape[:-1], -1)


def _block_sparse(contender: Contender, connection: G2GLinear) -> nn.Module:
    """PyTorch's product for this layer."""
    if contender.device.type == "cpu" and contender.precision != "fp32":
        raise ValueError("PyTorch's block-sparse product on a CPU is in float32 only")
    height, width = connection.mask.unit_shape
    if height == width:
        return _BlockSparseLinear(connection)
    connection.backend = "torch"  # unpacked, then a dense product
    return connection


class BlockSparseLIF(NetworkContender):
    """The network over all time steps at once, with block-sparse products."""

    def build(self, prepared: Prepared) -> nn.Module:
        return LayerByLayer(prepared, functools.partial(_block_sparse, self))


class BlockSparse(LinearContender):
    """The second layer's product alone."""

    def build(self, connection: G2GLinear) -> nn.Module:
        return _block_sparse(self, connection)
