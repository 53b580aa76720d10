"""An update of dynamic sparse training as people write it: dense weights and masks, the full correlation matrix.

Scores of single weights first, the dense [out, in] matrix of all pre/post correlations among them, then their means
over units. Improvements for the peer: everything stays on the device, a held input is multiplied with the sum of the
spikes over time instead of at every step, and if all units are equal blocks their means are a reshape.
"""

import torch

from g2g_kernels import BlockMask

from ..contender import UpdateContender
from ..reference import UPDATE_FRACTION
from ..workload import Prepared

PEERS = (("dense-correlation", "Update", ("dst",)),)


class _Layer:
    """Dense weights with their mask and their optimizer's two moments."""

    def __init__(self, weight: torch.Tensor, mask: BlockMask) -> None:
        self.blocks = mask
        self.start = weight, mask.to_dense()
        self.row_of, self.col_of = mask.rows.unit_of, mask.cols.unit_of
        self.size = mask.rows.lengths[:, None] * mask.cols.lengths[None, :]
        self.reset()

    def reset(self) -> None:
        self.weight, self.mask = (tensor.clone() for tensor in self.start)
        self.moments = torch.ones(2, *self.weight.shape, device=self.weight.device)

    def unit_means(self, matrix: torch.Tensor) -> torch.Tensor:
        blocks = self.blocks
        if blocks.rows.in_order and blocks.cols.in_order:
            (rows, cols), (height, width) = blocks.grid, blocks.unit_shape
            return matrix.view(rows, height, cols, width).mean((1, 3))
        by_row = matrix.new_zeros(blocks.grid[0], matrix.shape[1]).index_add_(0, self.row_of, matrix)
        return matrix.new_zeros(blocks.grid).index_add_(1, self.col_of, by_row) / self.size

    def units(self) -> torch.Tensor:
        return self.unit_means(self.mask.float()) > 0.5

    def update(self, correlation: torch.Tensor) -> None:
        present = self.units()
        count = min(int(UPDATE_FRACTION * int(present.sum())), int((~present).sum()))
        weights = self.unit_means(self.weight.abs()).masked_fill(~present, torch.inf)
        lost = weights.flatten().topk(count, largest=False).indices
        gained = correlation.masked_fill(present, -torch.inf).flatten().topk(count).indices
        units = present.flatten()
        units[lost] = False
        units[gained] = True
        was = self.mask
        self.mask = units.view_as(present)[self.row_of][:, self.col_of]
        kept = was & self.mask
        self.weight *= kept
        self.moments *= kept


class Update(UpdateContender):
    """The update on dense tensors."""

    def make(self, prepared: Prepared) -> None:
        super().make(prepared)
        net = prepared.network("torch").to(self.device)
        with torch.no_grad():
            activity = net.simulate(self.images)
            self.layers = [_Layer(connection.dense_weight(), connection.mask) for connection, _ in net.layers()]
        self._spikes = [spikes.dense() for spikes in activity.spikes]

    def before_turn(self) -> None:
        for layer in self.layers:
            layer.reset()

    def spikes(self) -> list[torch.Tensor]:
        return self._spikes

    def correlations(self) -> list[torch.Tensor]:
        correlations = []
        pre = self.images
        for number, (spikes, layer) in enumerate(zip(self._spikes, self.layers, strict=True)):
            post = spikes.flatten(0, 1)
            norm_post, norm_pre = post.norm(dim=0), pre.norm(dim=0)
            if number == 0:
                steps = len(post) // len(pre)
                norm_pre = norm_pre * steps**0.5
                products = post.view(steps, len(pre), -1).sum(0).T @ pre
            else:
                products = post.T @ pre
            norms = norm_post[:, None] * norm_pre[None, :]
            correlations.append(layer.unit_means(torch.where(norms > 0, products / norms, 0.0)))
            pre = post
        return correlations

    def step(self) -> None:
        for layer, correlation in zip(self.layers, self.correlations(), strict=True):
            layer.update(correlation)

    def units(self) -> list[torch.Tensor]:
        return [layer.units() for layer in self.layers]
