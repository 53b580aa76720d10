"""What the rules of dynamic sparse training know of a layer: one number for each unit of the grid, whether it exists or
not. The dense [out, in] matrix behind these numbers is never formed.
"""

from collections.abc import Iterator, Sequence

import torch

from g2g_kernels import BlockMask
from g2g_kernels.sides import UnitAxis
from g2gnet.distributed import ALONE, World

#: units of at least this many neurons on a side are summed by a matrix product: one pass over the samples, where
#: scaling, padding and reordering take several; but not of more units, whose product takes longer than that
PRODUCT_WIDTH, PRODUCT_UNITS = 4, 256
#: elements of the gradient that are formed at a time: a product of this size runs at full speed
BAND = 1 << 24


def unit_correlation(pre: torch.Tensor, post: torch.Tensor, mask: BlockMask, world: World = ALONE) -> torch.Tensor:
    """The mean pre/post correlation of every unit of the grid, [block rows, block columns], between −1 and 1.

    The correlation of input j and output i is the uncentred cosine Σ post_i·pre_j / (‖post_i‖·‖pre_j‖) over all T·B
    samples, 0 where either is silent. Its mean over a unit separates into sums over the unit's normalised outputs and
    inputs::

        mean over unit (r, c) = Σ_samples (Σ_{i∈r} post_i/‖post_i‖) · (Σ_{j∈c} pre_j/‖pre_j‖) / (|r|·|c|)

    Args:
        pre: inputs [T, B, in], or [B, in] held at every step.
        post: output spikes [T, B, out].
        world: processes, each of which has some of the samples; all get the correlation over all samples.
    """
    pre, post = pre.float(), post.float()
    norm_post = world.sum_(_squares(post)).sqrt()
    norm_pre = world.sum_(_squares(pre)).sqrt()
    if pre.dim() == 2:
        norm_pre = norm_pre * len(post) ** 0.5
        post = post.sum(0)
    post_sums = _unit_sums(post.reshape(-1, post.shape[-1]), norm_post, mask.rows)
    pre_sums = _unit_sums(pre.reshape(-1, pre.shape[-1]), norm_pre, mask.cols)
    return world.sum_(post_sums.T @ pre_sums) / (mask.rows.lengths[:, None] * mask.cols.lengths[None, :])


def _squares(train: torch.Tensor) -> torch.Tensor:
    """Σ x² over the samples of a train [..., N], for each neuron: [N]; exact for spikes."""
    total = train.new_zeros(train.shape[-1])
    for samples in train.reshape(-1, train.shape[-1]).split(512):  # their squares fit into the cache
        total += samples.square().sum(0)
    return total


def _unit_sums(samples: torch.Tensor, norm: torch.Tensor, axis: UnitAxis) -> torch.Tensor:
    """Σ over the neurons of each unit range of samples/norm (0 for silent neurons): [M, size] → [M, num_units]."""
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    if axis.width < PRODUCT_WIDTH or axis.num_units > PRODUCT_UNITS:
        return _padded(samples * scale, axis).view(len(samples), axis.num_units, axis.width).sum(2)
    membership = scale.new_zeros(axis.size, axis.num_units)
    membership[torch.arange(axis.size, device=scale.device), axis.unit_of] = scale
    return samples @ membership


def _padded(samples: torch.Tensor, axis: UnitAxis) -> torch.Tensor:
    """Samples [M, size] in the order of the axis' places, 0 at those without a neuron: [M, num_units · width]."""
    if axis.trivial:
        return samples
    if axis.ragged:
        samples = torch.cat([samples, samples.new_zeros(len(samples), 1)], 1)
    return samples.index_select(1, axis.neuron_at)


class UnitGradients:
    """The size of ∂L/∂W in every unit of a layer: the observer of a layer that is trained by several backward passes.

    It keeps what the layer received and the gradient of what it gave, of which ∂L/∂W = Σ over samples of g·xᵀ.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if y.requires_grad:
            received = x.detach()
            y.register_hook(lambda gradient: self._pairs.append((received, gradient.detach())))

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer takes no part in the step

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and gradients of outputs so far, [..., in] and [..., out]."""
        return list(self._pairs)

    def resume(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Goes on after what another one has seen."""
        self._pairs = list(pairs)

    def root_mean_squares(self, mask: BlockMask, world: World = ALONE) -> torch.Tensor:
        """√ of the mean of (∂L/∂W)² over each unit, float32 [block rows · block columns].

        Args:
            mask: the layer's.
            world: processes, each of which has some of the samples; the gradient is that of all samples.
        """
        rows, cols = mask.rows, mask.cols
        seen = [(x.reshape(-1, cols.size).float(), g.reshape(-1, rows.size).float()) for x, g in self._pairs]
        x = _padded(torch.cat([x for x, _ in seen]), cols)
        g = _padded(torch.cat([g for _, g in seen]), rows)
        squares = [
            world.sum_(band.T @ x).square_().view(-1, rows.width, cols.num_units, cols.width).sum((1, 3))
            for band in _bands(g, rows, x.shape[1])
        ]
        sizes = rows.lengths[:, None] * cols.lengths[None, :]
        return (torch.cat(squares) / sizes).sqrt().flatten()


def _bands(g: torch.Tensor, rows: UnitAxis, width: int) -> Iterator[torch.Tensor]:
    """The columns of g, some block rows at a time, whose gradient is not much larger than ``BAND``."""
    return iter(g.split(max(1, BAND // (width * rows.width)) * rows.width, 1))
