"""Dynamic sparse training: every so often the weakest units are pruned and as many new ones grown.

Works on :class:`G2GLinear` layers and any optimizer that keeps per-weight state in tensors of the weights' shape.
"""

from collections.abc import Sequence

import torch

from g2g_kernels import Activity, BlockMask
from g2g_kernels.block_mask import UnitAxis
from g2gnet.layers import G2GLinear
from g2gnet.seeding import draw_device, stream

PRUNE_RULES = ("set", "random", "hebb")
GROW_RULES = ("hebb", "random")


def unit_correlation(pre: torch.Tensor, post: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """The mean pre/post correlation of every unit of the grid, [block rows, block columns], between −1 and 1.

    The correlation of input j and output i is the uncentred cosine Σ post_i·pre_j / (‖post_i‖·‖pre_j‖) over all T·B
    samples, 0 where either is silent. Its mean over a unit separates into sums over the unit's normalised outputs and
    inputs, so that the dense [out, in] matrix is never formed:

        mean over unit (r, c) = Σ_samples (Σ_{i∈r} post_i/‖post_i‖) · (Σ_{j∈c} pre_j/‖pre_j‖) / (|r|·|c|)

    Args:
        pre: inputs [T, B, in], or [B, in] held at every step.
        post: output spikes [T, B, out].
    """
    post = post.float()
    norm_post = post.square().sum((0, 1)).sqrt()
    norm_pre = pre.float().square().sum(tuple(range(pre.dim() - 1))).sqrt()
    if pre.dim() == 2:
        norm_pre = norm_pre * len(post) ** 0.5
        post = post.sum(0)
    post_sums = _unit_sums(post.reshape(-1, post.shape[-1]), norm_post, mask.rows)
    pre_sums = _unit_sums(pre.reshape(-1, pre.shape[-1]).float(), norm_pre, mask.cols)
    return post_sums.T @ pre_sums / (mask.rows.lengths[:, None] * mask.cols.lengths[None, :])


def _unit_sums(samples: torch.Tensor, norm: torch.Tensor, axis: UnitAxis) -> torch.Tensor:
    """Σ over the neurons of each unit range of samples/norm (0 for silent neurons): [M, size] → [M, num_units]."""
    normalised = samples * torch.where(norm > 0, 1 / norm, 0.0)
    padded = torch.cat([normalised, normalised.new_zeros(len(normalised), 1)], 1).index_select(1, axis.padded)
    return padded.view(len(samples), axis.num_units, axis.width).sum(2)


def _lowest(scores: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of the ``count`` lowest scores [n], ties broken by a uniform draw: shuffle, then sort stably."""
    shuffle = torch.randperm(len(scores), generator=generator, device=generator.device).to(scores.device)
    return shuffle[torch.argsort(scores[shuffle], stable=True)[:count]]


class DSTScheduler:
    """Prunes and regrows units every ``interval`` optimizer steps; the number of units never changes.

    Call :meth:`step` after each ``optimizer.step()``. In an update, each layer loses the ``fraction`` of its units with
    the lowest prune score and gains as many, with the highest grow score, among those that were inactive before.
    A unit's score is the mean over its weights. Grown weights and their optimizer state start at zero.

    Args:
        layers: the sparse layers, from input to output.
        optimizer: holds the layers' ``values``.
        interval: optimizer steps between updates.
        fraction: share of the units replaced in an update, 0 to 1.
        prune: ``"set"`` lowest mean |w| (Mocanu et al. 2018); ``"random"``; ``"hebb"`` lowest correlation.
        grow: ``"hebb"`` highest correlation; ``"random"``.
        seed: of the draws that break ties and make the random rules.

    Attributes:
        pruned, grown: units pruned and grown so far, over all layers.

    Raises:
        ValueError: for an option out of range, or if every unit is present, so that nothing could grow.
    """

    def __init__(
        self,
        layers: Sequence[G2GLinear],
        optimizer: torch.optim.Optimizer,
        interval: int = 1000,
        fraction: float = 0.1,
        prune: str = "set",
        grow: str = "hebb",
        seed: int = 42,
    ) -> None:
        if prune not in PRUNE_RULES:
            raise ValueError(f"prune={prune!r} is unknown; choose one of {', '.join(PRUNE_RULES)}")
        if grow not in GROW_RULES:
            raise ValueError(f"grow={grow!r} is unknown; choose one of {', '.join(GROW_RULES)}")
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1 step")
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction={fraction} must be above 0 and at most 1")
        if all(layer.mask.is_full for layer in layers):
            raise ValueError("every unit of every layer is present, so none can grow; lower p_inter or p_intra")
        self.layers = list(layers)
        self.optimizer = optimizer
        self.interval = interval
        self.fraction = fraction
        self.prune = prune
        self.grow = grow
        self.seed = seed
        self.steps = 0
        self.pruned = 0
        self.grown = 0

    def state_dict(self) -> dict[str, int]:
        """The counters; masks and weights are in the layers' own state."""
        return {"steps": self.steps, "pruned": self.pruned, "grown": self.grown}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.pruned, self.grown = state["steps"], state["pruned"], state["grown"]

    def step(self, inputs: torch.Tensor, activity: Activity) -> bool:
        """Counts an optimizer step and, every ``interval`` of them, updates the layers; returns whether it did.

        Args:
            inputs: what the first layer received in this step, [B, in] or [T, B, in].
            activity: what the stack did in this step; its spikes are the samples of the correlation.
        """
        self.steps += 1
        if self.steps % self.interval:
            return False
        pre = inputs.detach()
        needs_spikes = "hebb" in (self.prune, self.grow)
        for number, layer in enumerate(self.layers):
            correlation = None
            if needs_spikes:
                post = activity.spikes[number].dense()
                correlation = unit_correlation(pre, post, layer.mask).flatten()
                pre = post
            device = draw_device(layer.values.device)
            self._update(layer, correlation, stream(self.seed, "dst", self.steps, number, device=device))
        return True

    @torch.no_grad()
    def _update(self, layer: G2GLinear, correlation: torch.Tensor | None, generator: torch.Generator) -> None:
        mask = layer.mask
        grid_size = mask.grid[0] * mask.grid[1]
        count = min(int(self.fraction * mask.num_units), grid_size - mask.num_units)
        active = mask.unit_row.long() * mask.grid[1] + mask.unit_col.long()

        if self.prune == "set":
            prune_score = layer.values.abs().sum((1, 2)) / mask.unit_sizes
        elif self.prune == "hebb":
            assert correlation is not None
            prune_score = correlation[active]
        else:
            prune_score = torch.zeros(mask.num_units, device=active.device)

        if self.grow == "hebb":
            assert correlation is not None
            grow_cost = -correlation
        else:
            grow_cost = torch.zeros(grid_size, device=active.device)
        grow_cost[active] = torch.inf

        slots = _lowest(prune_score, count, generator)
        units = _lowest(grow_cost, count, generator)
        mask.relabel_(slots, units // mask.grid[1], units % mask.grid[1])
        layer.values[slots] = 0.0
        if layer.values.grad is not None:
            layer.values.grad[slots] = 0.0
        for state in self.optimizer.state.get(layer.values, {}).values():
            if isinstance(state, torch.Tensor) and state.shape == layer.values.shape:
                state[slots] = 0.0
        self.pruned += count
        self.grown += count
