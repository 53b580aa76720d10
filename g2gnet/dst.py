"""Dynamic sparse training: every so often the weakest units are pruned and as many new ones grown.

Works on :class:`G2GLinear` layers and any optimizer that keeps per-weight state in tensors of the weights' shape.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from g2g_kernels import Activity, BlockMask
from g2g_kernels.block_mask import UnitAxis
from g2gnet.distributed import ALONE, World
from g2gnet.layers import G2GLinear
from g2gnet.recording import ActivityRecorder, Recording, Train, dense
from g2gnet.seeding import draw_device, stream

#: units of this many neurons on a side, and wider ones, are added up by a product: one pass over the samples, where
#: scaling, padding and ordering them takes many
PRODUCT_WIDTH = 4
PRUNE_RULES = ("set", "random", "hebb")
GROW_RULES = ("hebb", "random")


def unit_correlation(pre: torch.Tensor, post: torch.Tensor, mask: BlockMask, world: World = ALONE) -> torch.Tensor:
    """The mean pre/post correlation of every unit of the grid, [block rows, block columns], between −1 and 1.

    The correlation of input j and output i is the uncentred cosine Σ post_i·pre_j / (‖post_i‖·‖pre_j‖) over all T·B
    samples, 0 where either is silent. Its mean over a unit separates into sums over the unit's normalised outputs and
    inputs, so that the dense [out, in] matrix is never formed::

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
    for samples in train.reshape(-1, train.shape[-1]).split(512):  # whose squares stay in a cache
        total += samples.square().sum(0)
    return total


def _unit_sums(samples: torch.Tensor, norm: torch.Tensor, axis: UnitAxis) -> torch.Tensor:
    """Σ over the neurons of each unit range of samples/norm (0 for silent neurons): [M, size] → [M, num_units]."""
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    if axis.width < PRODUCT_WIDTH:
        padded = torch.cat([samples * scale, samples.new_zeros(len(samples), 1)], 1).index_select(1, axis.padded)
        return padded.view(len(samples), axis.num_units, axis.width).sum(2)
    membership = scale.new_zeros(axis.size, axis.num_units)
    membership[torch.arange(axis.size, device=scale.device), axis.unit_of] = scale
    return samples @ membership


def _recorded(recordings: list[Recording] | None, number: int) -> Recording:
    """What was recorded of layer ``number``.

    Raises:
        RuntimeError: if that is nothing.
    """
    if not recordings or not recordings[number]:
        raise RuntimeError(
            f"no activity of layer {number} was seen in this step: give step() the inputs and the activity, or make "
            "the scheduler of the model (not of a compiled one) and run it in training mode before each step(). "
            "prune='set' or 'random' with grow='random' need none"
        )
    return recordings[number]


def _samples(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pre- and postsynaptic samples of all calls of a layer, in the form that :func:`unit_correlation` takes."""
    if len(pairs) == 1 and pairs[0][1].dim() == 3:
        return pairs[0]
    flat_pre, flat_post = [], []
    for pre, post in pairs:
        if pre.dim() < post.dim():  # an input that was held for all time steps
            pre = pre.expand(len(post), *pre.shape)
        flat_pre.append(pre.reshape(-1, pre.shape[-1]))
        flat_post.append(post.reshape(-1, post.shape[-1]))
    return torch.cat(flat_pre)[None], torch.cat(flat_post)[None]


def _lowest(scores: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of the ``count`` lowest scores [n], ties broken by a uniform draw: shuffle, then sort stably."""
    shuffle = torch.randperm(len(scores), generator=generator, device=generator.device).to(scores.device)
    return shuffle[torch.argsort(scores[shuffle], stable=True)[:count]]


class DSTScheduler:
    """Prunes and regrows units every ``interval`` optimizer steps; the number of units never changes.

    As with a learning-rate scheduler, call :meth:`step` after each ``optimizer.step()``. In an update, each layer loses
    the ``fraction`` of its units with the lowest prune score and gains as many, with the highest grow score, among
    those that were inactive before. A unit's score is the mean over its weights. Grown weights and their optimizer
    state start at zero. Frozen layers stay as they are.

    Args:
        model: a model, all of whose :class:`G2GLinear` layers are rewired and whose activity is recorded where a rule
            needs it (:class:`ActivityRecorder`); or the layers, from input to output, whose activity :meth:`step` gets.
        optimizer: holds the layers' ``values``.
        interval: optimizer steps between updates.
        fraction: share of the units replaced in an update, 0 to 1.
        prune: ``"set"`` lowest mean ``|w|`` (Mocanu et al. 2018); ``"random"``; ``"hebb"`` lowest correlation.
        grow: ``"hebb"`` highest correlation; ``"random"``.
        seed: of the draws that break ties and make the random rules.
        process_group: the processes of data-parallel training, each of which has a scheduler like this one and sees a
            part of the samples: correlations are those over all samples, and after every update the processes make
            sure that they have the same units. None: this process is alone.

    Attributes:
        pruned, grown: units pruned and grown so far, over all layers.

    Raises:
        ValueError: for an option out of range, no layer, a layer that the optimizer does not hold, or if every unit is
            present, so that nothing could grow.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[G2GLinear],
        optimizer: torch.optim.Optimizer,
        interval: int = 1000,
        fraction: float = 0.1,
        prune: str = "set",
        grow: str = "hebb",
        seed: int = 42,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if prune not in PRUNE_RULES:
            raise ValueError(f"prune={prune!r} is unknown; choose one of {', '.join(PRUNE_RULES)}")
        if grow not in GROW_RULES:
            raise ValueError(f"grow={grow!r} is unknown; choose one of {', '.join(GROW_RULES)}")
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1 step")
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction={fraction} must be above 0 and at most 1")
        if isinstance(model, nn.Module):
            self.layers = [module for module in model.modules() if isinstance(module, G2GLinear)]
        else:
            self.layers = list(model)
        if not self.layers:
            raise ValueError("there is no G2GLinear layer to rewire; g2gnet.sparsify(model) makes them")
        if all(layer.mask.is_full for layer in self.layers):
            raise ValueError("every unit of every layer is present, so none can grow; lower p_inter or p_intra")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for number, layer in enumerate(self.layers):
            if layer.values.requires_grad and id(layer.values) not in held:
                raise ValueError(
                    f"the optimizer does not hold the weights of layer {number}, {layer.out_features} × "
                    f"{layer.in_features}; make the optimizer after the layers, of model.parameters()"
                )
        self.optimizer = optimizer
        self.interval = interval
        self.fraction = fraction
        self.prune = prune
        self.grow = grow
        self.seed = seed
        self._world = World(process_group)
        self.steps = 0
        self.pruned = 0
        self.grown = 0
        self._needs_activity = "hebb" in (prune, grow)
        self._recorder = ActivityRecorder(model, self.layers) if isinstance(model, nn.Module) else None
        self._record_if_due()

    def _record_if_due(self) -> None:
        """Has the model's activity recorded through the optimizer step after which the next update comes, if any."""
        if self._recorder is not None and self._needs_activity and (self.steps + 1) % self.interval == 0:
            self._recorder.start()

    def state_dict(self) -> dict[str, int]:
        """The counters; masks and weights are in the layers' own state."""
        return {"steps": self.steps, "pruned": self.pruned, "grown": self.grown}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.pruned, self.grown = state["steps"], state["pruned"], state["grown"]
        if self._recorder is not None:
            self._recorder.stop()
        self._record_if_due()

    def step(self, inputs: torch.Tensor | None = None, activity: Activity | None = None) -> bool:
        """Counts an optimizer step and, every ``interval`` of them, updates the layers; returns whether it did.

        Args:
            inputs: what the first layer received in this step, [B, in] or [T, B, in].
            activity: what the stack of these layers did in this step; its spikes are the samples of the correlation.
                Both are left out where the scheduler was given a model, which it then watches by itself.

        Raises:
            RuntimeError: if a rule needs activity, and none was given or recorded.
            DistributedError: if the processes of the group have different units after an update.
        """
        self.steps += 1
        recorded = self._recorder.stop() if self._recorder is not None else None
        due = self.steps % self.interval == 0
        if due:
            if inputs is not None and activity is not None:
                pre: list[Train] = [inputs.detach(), *activity.spikes]
                recorded = [[pair] for pair in itertools.pairwise(pre)]
            unpacked: dict[int, torch.Tensor] = {}  # by the train's id; what a layer fires, the next one receives
            for number, layer in enumerate(self.layers):
                if not layer.values.requires_grad:
                    continue
                correlation = None
                if self._needs_activity:
                    pairs = _recorded(recorded, number)
                    trains = {id(train): train for pair in pairs for train in pair}
                    unpacked = {
                        key: unpacked[key] if key in unpacked else dense(train) for key, train in trains.items()
                    }
                    samples = _samples([(unpacked[id(pre)], unpacked[id(post)]) for pre, post in pairs])
                    correlation = unit_correlation(*samples, layer.mask, self._world).flatten()
                device = draw_device(layer.values.device)
                self._update(layer, correlation, stream(self.seed, "dst", self.steps, number, device=device))
            units = [units for layer in self.layers for units in (layer.mask.unit_row, layer.mask.unit_col)]
            self._world.check_same(f"the wiring after step {self.steps}", self.pruned, units)
        self._record_if_due()
        return due

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
