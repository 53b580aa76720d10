"""SparseLab's linear layer: single weights in padded CSR, compiled for the CPU."""

import torch
from sparselab import PaddedCSR, SparseLinear
from torch import nn

from g2gnet import G2GLinear

from ..contender import LinearContender

PEERS = (("sparselab", "PaddedRows", ("linear", "linear-dense")),)
NEEDS = ("sparselab",)


class _Layer(nn.Module):
    """A SparseLinear with a layer's weights, for inputs with a time axis."""

    def __init__(self, connection: G2GLinear) -> None:
        super().__init__()
        dense = connection.dense_weight().detach()
        self.linear = SparseLinear(connection.in_features, connection.out_features, sparsity=0.5)
        self.linear._csr = PaddedCSR.from_dense(dense)
        self.linear._values = nn.Parameter(torch.as_tensor(self.linear._csr.values).clone())
        bias = torch.zeros(connection.out_features) if connection.bias is None else connection.bias.detach()
        self.linear.bias = self.bias = nn.Parameter(bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(0, -2)).view(*x.shape[:-1], self.linear.out_features)


class PaddedRows(LinearContender):
    """Rows of weights with room to grow."""

    layer: _Layer

    def build(self, connection: G2GLinear) -> nn.Module:
        if self.precision != "fp32":
            raise ValueError(f"SparseLab multiplies in fp32 only, not in {self.precision}")
        return _Layer(connection)

    def weight_gradient(self) -> torch.Tensor:
        csr, grad = self.layer.linear._csr, self.layer.linear._values.grad
        count, first = (torch.as_tensor(each).long() for each in (csr.row_nnz, csr.row_start))
        row = torch.repeat_interleave(torch.arange(csr.nrows), count)
        place = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + first[row]
        dense = grad.new_zeros(csr.nrows, csr.ncols)
        dense[row, torch.as_tensor(csr.col_indices).long()[place]] = grad[place]
        return dense
