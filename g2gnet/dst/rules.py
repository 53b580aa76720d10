"""The rules of dynamic sparse training: scores, one per unit, by which units are pruned and grown. To add a rule, add
it to :data:`PRUNE_RULES` or :data:`GROW_RULES`: flags, checks, recording and messages follow."""

import itertools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from g2g_kernels import BlockMask, g2g_linear
from g2g_kernels.mask.sides import UnitAxis
from g2gnet.base.distributed import ALONE, World
from g2gnet.layers import SparseLayer

#: the kinds of evidence that a rule may need from the step before an update
ACTIVITY, GRADIENT = "activity", "gradient"
#: the inputs of a layer and the gradient of its outputs, [..., in] and [..., out]
Pair = tuple[torch.Tensor, torch.Tensor]
#: units of at least PRODUCT_WIDTH neurons on a side, up to PRODUCT_UNITS of them, are summed by a matrix product, which
#: passes over the samples once; scaling, padding and reordering pass several times
PRODUCT_WIDTH, PRODUCT_UNITS = 4, 256
#: elements of the gradient that are formed at a time (at least a block row): a product of this size runs at full speed
BAND = 1 << 24


class Evidence(NamedTuple):
    """What is known about units of a layer when they are scored: those of its slots, or those that may grow.

    Attributes:
        layer: the layer.
        number: how many units these are.
        correlation: the mean pre/post correlation of each unit, [number], if a rule needs it.
        gradient: the root mean square of ∂L/∂W over each unit, [number], if a rule needs it.
    """

    layer: SparseLayer
    number: int
    correlation: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class Rule(NamedTuple):
    """A rule that selects the units to prune or to grow.

    Attributes:
        name: as in ``prune=``, ``grow=`` and the flags.
        text: what it selects, in a few words.
        score: a number per unit: the lowest are pruned, or the highest grown. Ties are broken at random.
        needs: what must be recorded: :data:`ACTIVITY`, :data:`GRADIENT`, or None.
    """

    name: str
    text: str
    score: Callable[[Evidence], torch.Tensor]
    needs: str | None = None


def _weight(seen: Evidence) -> torch.Tensor:
    size, mask = seen.layer.values.abs(), seen.layer.mask
    size = torch.where(seen.layer.valid(), size, 0) if mask.has_padding else size  # padding holds no weights
    return size.sum(tuple(range(1, size.dim()))) / (mask.unit_sizes * seen.layer.weights_of_place)


def _chance(seen: Evidence) -> torch.Tensor:
    return torch.zeros(seen.number, device=seen.layer.values.device)  # ties, which are broken at random


_CORRELATION, _GRADIENT = attrgetter("correlation"), attrgetter("gradient")
PRUNE_RULES = {
    "set": Rule("set", "smallest weights", _weight),
    "random": Rule("random", "random", _chance),
    "hebb": Rule("hebb", "least correlated", _CORRELATION, ACTIVITY),
}
GROW_RULES = {
    "hebb": Rule("hebb", "most correlated", _CORRELATION, ACTIVITY),
    "random": Rule("random", "random", _chance),
    "gradient": Rule("gradient", "largest gradient", _GRADIENT, GRADIENT),
}


def unit_correlation(
    pre: torch.Tensor, post: torch.Tensor, mask: BlockMask, world: World = ALONE, units: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean pre/post correlation, −1 to 1, of ``units``, counted row by row: [units]; None: of every unit of the
    grid, [block rows, block columns].

    The correlation of input j and output i is the uncentred cosine Σ post_i·pre_j / (‖post_i‖·‖pre_j‖) over all T·B
    samples, 0 where either is silent. Its mean over a unit is a product of sums over the unit's outputs and inputs::

        mean over unit (r, c) = Σ_samples (Σ_{i∈r} post_i/‖post_i‖) · (Σ_{j∈c} pre_j/‖pre_j‖) / (|r|·|c|)

    Inputs are [T, B, in], or [B, in] held at every step, output spikes [T, B, out]. Each process of the ``world`` has
    some of the samples; all get the correlation over all of them.
    """
    pre, post = pre.float(), post.float()
    norm_post = world.sum_(_squares(post)).sqrt()
    norm_pre = world.sum_(_squares(pre)).sqrt()
    if pre.dim() == 2:
        norm_pre = norm_pre * len(post) ** 0.5
        post = post.sum(0)
    post, pre = post.reshape(-1, post.shape[-1]), pre.reshape(-1, pre.shape[-1])
    if units is not None:
        sums = _packed(post * _inverse(norm_post), pre * _inverse(norm_pre), mask, units).sum((1, 2))
        return world.sum_(sums) / sizes_of(units, mask)
    sums = _unit_sums(post, norm_post, mask.rows).T @ _unit_sums(pre, norm_pre, mask.cols)
    return world.sum_(sums) / (mask.rows.lengths[:, None] * mask.cols.lengths[None, :])


def _packed(g: torch.Tensor, x: torch.Tensor, mask: BlockMask, units: torch.Tensor) -> torch.Tensor:
    """Σ over the samples of g·xᵀ, g [M, out] and x [M, in], in each of ``units``: [units, unit_rows, unit_cols]. It is
    the gradient of a layer with these units, and takes as much time and memory."""
    with torch.inference_mode(False), torch.enable_grad():
        x, g = (train.clone() if train.is_inference() else train for train in (x, g))
        row, col = units // mask.grid[1], units % mask.grid[1]
        asked = BlockMask(mask.rows.layout, mask.cols.layout, row, col, mask.block_size).to(x.device)
        values = x.new_zeros(len(units), *mask.unit_shape, requires_grad=True)
        y = g2g_linear(x, values, asked)
    return torch.autograd.grad(y, values, g)[0]


def sizes_of(units: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """The weights in each of ``units``, counted row by row."""
    return mask.rows.lengths[units // mask.grid[1]] * mask.cols.lengths[units % mask.grid[1]]


def _squares(train: torch.Tensor) -> torch.Tensor:
    """Σ x² over the samples of a train [..., N], for each neuron: [N]; exact for spikes."""
    total = train.new_zeros(train.shape[-1])
    for samples in train.reshape(-1, train.shape[-1]).split(512):  # their squares fit into the cache
        total += samples.square().sum(0)
    return total


def _unit_sums(samples: torch.Tensor, norm: torch.Tensor, axis: UnitAxis) -> torch.Tensor:
    """Σ over the neurons of each unit range of samples/norm (0 for silent neurons): [M, size] → [M, num_units]."""
    scale = _inverse(norm)
    if axis.width < PRODUCT_WIDTH or axis.num_units > PRODUCT_UNITS:
        return _padded(samples * scale, axis).view(len(samples), axis.num_units, axis.width).sum(2)
    membership = scale.new_zeros(axis.size, axis.num_units)
    membership[torch.arange(axis.size, device=scale.device), axis.unit_of] = scale
    return samples @ membership


def _inverse(norm: torch.Tensor) -> torch.Tensor:
    return torch.where(norm > 0, 1 / norm, 0.0)


def _padded(samples: torch.Tensor, axis: UnitAxis) -> torch.Tensor:
    """Samples [M, size] in the order of the axis' places, 0 at those without a neuron: [M, num_units · width]."""
    if axis.in_order:
        return samples
    if axis.ragged:
        samples = torch.cat([samples, samples.new_zeros(len(samples), 1)], 1)
    return samples.index_select(1, axis.neuron_at)


def kernel_gradient(
    pairs: Sequence[Pair], layer: SparseLayer, world: World = ALONE, units: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`unit_gradient` of a layer. Where its weights are kernels, the gradients of the ``pairs`` have the
    dimensions of a kernel last, and the mean is over kernels, too."""
    kernel = layer.values.shape[3:]
    if not kernel:
        return unit_gradient(pairs, layer.mask, world, units)
    places: Any = itertools.product(*map(range, kernel))
    at_place = ([(x, g[(..., *place)]) for x, g in pairs] for place in places)
    return torch.stack([unit_gradient(each, layer.mask, world, units).square() for each in at_place]).mean(0).sqrt()


def unit_gradient(
    pairs: Sequence[Pair], mask: BlockMask, world: World = ALONE, units: torch.Tensor | None = None
) -> torch.Tensor:
    """√ of the mean of (∂L/∂W)² over each of ``units``, counted row by row: float32 [units]; None: over each unit of
    the grid. ∂L/∂W is Σ g·xᵀ over the samples of all ``pairs`` (x, g). Each process of the ``world`` has some."""
    rows, cols = mask.rows, mask.cols
    flat = ((x.reshape(-1, cols.size).float(), g.reshape(-1, rows.size).float()) for x, g in pairs)
    x, g = map(torch.cat, zip(*flat, strict=True))
    if units is not None:
        sums = world.sum_(_packed(g, x, mask, units)).square().sum((1, 2))
        return (sums / sizes_of(units, mask)).sqrt()
    x, g = _padded(x, cols), _padded(g, rows)
    block_rows = max(1, BAND // (x.shape[1] * rows.width))  # at a time
    squares = (world.sum_(band.T @ x).square_() for band in g.split(block_rows * rows.width, 1))
    sums = torch.cat([band.view(-1, rows.width, cols.num_units, cols.width).sum((1, 3)) for band in squares])
    return sums.div_(rows.lengths[:, None] * cols.lengths).sqrt_().flatten()
