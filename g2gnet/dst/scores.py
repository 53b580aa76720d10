"""What the rules of DST know of a layer: one number per unit of the grid; no dense [out, in] matrix is formed."""

import torch

from g2g_kernels import BlockMask, g2g_linear
from g2g_kernels.mask.sides import UnitAxis
from g2g_kernels.ops.g2g_stack.layer import ProductObserver
from g2g_kernels.tracing import is_transformed
from g2gnet.base.distributed import ALONE, World

#: units of at least this many neurons on a side are summed by a matrix product: one pass over the samples, where
#: scaling, padding and reordering take several; but not of more units, whose product takes longer than that
PRODUCT_WIDTH, PRODUCT_UNITS = 4, 256
#: elements of the gradient that are formed at a time (at least a block row): a product of this size runs at full speed
BAND = 1 << 24


def unit_correlation(
    pre: torch.Tensor, post: torch.Tensor, mask: BlockMask, world: World = ALONE, units: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean pre/post correlation of ``units``, counted row by row, between −1 and 1: [units]; None: of every unit of
    the grid, [block rows, block columns].

    The correlation of input j and output i is the uncentred cosine Σ post_i·pre_j / (‖post_i‖·‖pre_j‖) over all T·B
    samples, 0 where either is silent. Its mean over a unit separates into sums over the unit's normalised outputs and
    inputs::

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
    the gradient of a layer that has these units, and takes as much time and memory."""
    with torch.inference_mode(False), torch.enable_grad():
        x, g = (train.clone() if train.is_inference() else train for train in (x, g))
        row, col = units // mask.grid[1], units % mask.grid[1]
        asked = BlockMask(mask.rows.layout, mask.cols.layout, row, col, mask.block_size).to(x.device)
        values = x.new_zeros(len(units), *mask.unit_shape, requires_grad=True)
        y = g2g_linear(x, values, asked)
    return torch.autograd.grad(y, values, g)[0]


def sizes_of(units: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """The number of weights of each of ``units``, counted row by row."""
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
    if axis.trivial:
        return samples
    if axis.ragged:
        samples = torch.cat([samples, samples.new_zeros(len(samples), 1)], 1)
    return samples.index_select(1, axis.neuron_at)


def _backward_pass() -> int:
    """The number of the backward pass that runs now; −1 outside of them."""
    return torch._C._current_graph_task_id()


def _is_batch(gradient: torch.Tensor) -> bool:
    """Whether it stands for several gradients."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(gradient):
        if functorch.is_batchedtensor(gradient):
            return True
        gradient = functorch.get_unwrapped(gradient)
    return functorch.is_legacy_batchedtensor(gradient)


_BATCHES = "gradients in batches (torch.func.vmap, is_grads_batched, jacobian(vectorize=True))"
_TWICE = "the gradient of a gradient (create_graph=True)"
#: what a layer received and the gradient of what it gave, [..., in] and [..., out]
Pair = tuple[torch.Tensor, torch.Tensor]


class UnitGradients:
    """The size of ∂L/∂W in every unit of a layer: the observer of a layer that is trained by several backward passes.
    Of what the layer received and the gradient of what it gave, ∂L/∂W = Σ over samples of g·xᵀ. They count where a
    backward pass forms the gradient of the layer's weights, not one for the inputs alone.
    """

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forgets everything, also what graphs of this step refer to."""
        #: of products; each adds Σ over samples of g·xᵀ to ∂L/∂W
        self.pairs: list[Pair] = []
        #: ∂L/∂W of reads of the dense weight, [out, in]
        self.dense: list[torch.Tensor] = []
        #: what the step had of which the gradient is not seen
        self.unseen: str | None = None
        #: inputs by the number of their product. Graphs that someone keeps refer to them through this object
        self._inputs: dict[int, torch.Tensor] = {}

    @property
    def has_seen(self) -> bool:
        """Whether a gradient of the weights was formed."""
        return bool(self.pairs or self.dense or self.unseen)

    def of_call(self, values: torch.Tensor) -> tuple[torch.Tensor, ProductObserver]:
        """The packed weights for the products of one call, and what these products are told to."""
        if not values.requires_grad:
            return values, lambda _, y: y
        called_in = _backward_pass()
        #: by product, with the backward pass, which may not go on to the weights
        reached: dict[int, tuple[int, Pair]] = {}

        def count(of_weights: torch.Tensor) -> None:
            this = _backward_pass()
            if _is_batch(of_weights):
                reached.clear()
                self.unseen = _BATCHES
            self.pairs.extend(pair for of, pair in reached.values() if of == this)
            reached.clear()

        def observe(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if not y.requires_grad:  # in the forward pass of chunks
                return y
            number = len(self._inputs)
            self._inputs[number] = x.detach().clone()  # the caller may use the memory for the next samples
            recomputed_in = _backward_pass()

            def reach(gradients: tuple[torch.Tensor | None, ...]) -> None:
                received, (gradient,) = self._inputs.get(number), gradients
                if received is None or gradient is None or _is_batch(gradient):
                    return
                # a chunk is computed again, and its gradients are formed, in a pass within that to the weights
                this = _backward_pass() if recomputed_in == called_in else recomputed_in
                reached[number] = this, (received, gradient.detach())
                if torch.is_grad_enabled() and not is_transformed():
                    self.unseen = _TWICE

            # a node of its own has the gradient after all hooks on y, also if y is changed in place
            y = y.clone()
            assert y.grad_fn is not None
            y.grad_fn.register_prehook(reach)
            return y

        values = values.view_as(values)
        values.register_hook(count)
        return values, observe

    def of_dense(self, weight: torch.Tensor) -> None:
        """Counts the gradient of a dense weight [out, in] that was read."""
        if weight.requires_grad:
            weight.register_hook(self._count_dense)

    def _count_dense(self, gradient: torch.Tensor) -> None:
        if _is_batch(gradient):
            self.unseen = _BATCHES
        else:
            self.dense.append(gradient.detach())

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer takes no part in the step

    def root_mean_squares(
        self, mask: BlockMask, world: World = ALONE, units: torch.Tensor | None = None
    ) -> torch.Tensor:
        """√ of the mean of (∂L/∂W)² over each of ``units``, counted row by row, of the samples of all processes:
        float32 [units]; None: over each unit of the grid. Raises RuntimeError if gradients of the weights were formed
        in batches, or one that has a gradient itself: that of the weights has more parts then.
        """
        if self.unseen is not None:
            raise RuntimeError(f"grow='gradient' does not see {self.unseen} of this step; use grow='random' or 'hebb'")
        rows, cols = mask.rows, mask.cols
        seen = [(x.reshape(-1, cols.size).float(), g.reshape(-1, rows.size).float()) for x, g in self.pairs]
        # that of a dense weight is its product with the identity
        seen += [(torch.eye(cols.size, device=weight.device), weight.T.float()) for weight in self.dense]
        x, g = map(torch.cat, zip(*seen, strict=True))
        if units is not None:
            sums = world.sum_(_packed(g, x, mask, units)).square().sum((1, 2))
            return (sums / sizes_of(units, mask)).sqrt()
        x, g = _padded(x, cols), _padded(g, rows)
        block_rows = max(1, BAND // (x.shape[1] * rows.width))  # at a time
        squares = (world.sum_(band.T @ x).square_() for band in g.split(block_rows * rows.width, 1))
        sums = torch.cat([band.view(-1, rows.width, cols.num_units, cols.width).sum((1, 3)) for band in squares])
        return sums.div_(rows.lengths[:, None] * cols.lengths).sqrt_().flatten()
