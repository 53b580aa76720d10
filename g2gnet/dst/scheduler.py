"""Dynamic sparse training: at regular intervals the weakest units are pruned and new ones grown, as many or fewer."""

import contextlib
import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from g2g_kernels import Activity
from g2g_kernels.choices import check_choice
from g2g_kernels.numbers import COUNT, PROBABILITY, WHOLE, Number, share_of
from g2gnet.base.distributed import World
from g2gnet.base.schedules import SCHEDULES
from g2gnet.base.seeding import draw_device, stream
from g2gnet.dst.gradual_pruning import least_density, mean_density, possible_weights, unit_sizes, weights_after
from g2gnet.dst.lamp import layer_budgets
from g2gnet.dst.optimizer_state import Initial, OptimizerState
from g2gnet.dst.replacement import Scores, draw_candidates, plan_of_equal_number, plan_within, replace_units
from g2gnet.dst.rules import GROW_RULES, PRUNE_RULES, Evidence
from g2gnet.dst.step_evidence import StepEvidence
from g2gnet.layers import SparseLayer
from g2gnet.spiking_network import SpikingNetwork
from g2gnet.weights.tied_averages import rewire_averages, tie_wiring

logger = logging.getLogger("g2gnet")


class DSTScheduler:
    """Prunes and regrows units every ``interval`` optimizer steps; their number stays, or falls to ``final_density``.

    As with a learning-rate scheduler, call :meth:`step` after each ``optimizer.step()``. In an update, each layer loses
    the ``fraction`` of its units with the lowest prune score and gains as many, with the highest grow score, among
    those that were inactive before. Grown weights start at zero, here and in averages of the model, and their optimizer
    state is reset (:mod:`g2gnet.dst.optimizer_state`). Frozen layers do not change, nor do full ones without
    ``final_density``; the logger ``g2gnet`` names them at construction. It also names updates that were skipped because
    scores were not finite, when ``pruned`` or the state is next read. Copy and pickle a scheduler together with its
    model and optimizer.

    Args:
        model: all its :class:`G2GLinear` and masked :class:`G2GConv2d` layers are rewired (kernels as a whole), and its
            activity is recorded if a rule needs it
            (:class:`ActivityRecorder`). Or the layers, from input to output; :meth:`step` then takes their activity.
        optimizer: holds the layers' ``values``. A list of several, if each holds some layers, or one wraps another and
            each has a state.
        interval: optimizer steps between updates.
        fraction: share of the units replaced in an update, 0 to 1.
        prune: a name in ``g2gnet.dst.PRUNE_RULES``, such as ``"set"``: lowest mean ``|w|`` (Mocanu et al. 2018).
        grow: a name in ``g2gnet.dst.GROW_RULES``. ``"gradient"`` is the largest root mean square of ∂L/∂W over the
            unit, in the step of the update (Evci et al. 2020, for units). That step costs a dense layer's gradient, in
            memory a part of it at a time; it refuses ``create_graph=True`` and batches of gradients (``vmap``).
            Compiled code runs uncompiled before an update whose rules read spikes or gradients.
        seed: of the draws that break ties and drive the random rules.
        process_group: the processes of data-parallel training, each with such a scheduler, whole layers, and a part of
            the samples. They check that their networks are equal before and after an update. ``"world"``: all processes
            of ``torch.distributed``, if it is initialised. None: this process alone.
        schedule: ``"constant"``, or ``"cosine"``: in step s the fraction is multiplied by ½(1 + cos πs/S), S being the
            step of the last update.
        stop: the share of training, above 0 and at most 1, after which no unit is replaced.
        total_steps: the optimizer steps of the whole training, which ``"cosine"``, ``stop`` and ``final_density`` need.
        final_density: the share of all weights, above 0 and at most 1, that the last update leaves: gradual pruning
            (Zhu and Gupta 2017). Of W₀ weights at first and F in the end, F + (W₀ − F)·(1 − s/S)³ or up to a unit fewer
            are left after the update in step s. LAMP scores of all units decide how many of them each layer keeps, at
            least one; prune scores decide which. A layer then replaces ``fraction`` (0: none) of the units that it
            keeps by as many weights. Weights and their optimizer state become new, smaller tensors: make a new
            DistributedDataParallel after such an update. None: the number of units stays.
        averages: averages of the model (EMA, SWA), which are rewired with it (:func:`tie_wiring`). A copy that nobody
            tied stays as it is; if one exists during an update, the logger ``g2gnet`` warns once.
        network: if layers are given, the network that they are in, which knows the inputs and delays of each. None:
            each layer's outputs are the next one's inputs.
        reset_state: by the name of an optimizer's state, its initial value for new units, if
            :mod:`g2gnet.dst.optimizer_state` does not know it, or should not decide: a number; a function of the new
            units' weights [n, unit_rows, unit_cols] that returns their state; or None to leave it as it is.

    Attributes:
        pruned, grown: units pruned and grown so far, over all layers.

    Raises:
        ValueError: for an option out of range, no layer, layers that cannot be rewired (not held by the optimizer,
            sharded, computed by a parametrization, full), an optimizer whose states cannot be reset, a rule by
            correlation for a network whose output does not spike, or a ``final_density`` that leaves less than a unit
            in each layer, or is given with a DistributedDataParallel.

    Example:
        >>> net = G2GNet(64, 64, 10, block_size=8, T=5)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> dst = DSTScheduler(net, optimizer, interval=2, fraction=0.25)
        >>> for _ in range(4):
        ...     net(torch.rand(8, 64)).sum().backward()
        ...     optimizer.step()
        ...     rewired = dst.step()
        ...
        >>> rewired, dst.pruned == dst.grown > 0
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[SparseLayer],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        interval: int = 1000,
        fraction: float = 0.1,
        prune: str = "set",
        grow: str = "hebb",
        seed: int = 42,
        process_group: dist.ProcessGroup | str | None = "world",
        *,
        schedule: str = "constant",
        stop: float = 1.0,
        total_steps: int | None = None,
        final_density: float | None = None,
        network: SpikingNetwork | None = None,
        averages: Iterable[nn.Module] = (),
        reset_state: Mapping[str, Initial] | None = None,
    ) -> None:
        check_choice("prune", prune, PRUNE_RULES)
        check_choice("grow", grow, GROW_RULES)
        check_choice("schedule", schedule, SCHEDULES)
        if isinstance(process_group, str) and process_group != "world":
            raise ValueError(f"process_group={process_group!r} is unknown; give 'world', a process group or None")
        share = Number(0, 1, open_low=True)
        COUNT.check("interval", interval)
        WHOLE.check("seed", seed)
        (share if final_density is None else PROBABILITY).check("fraction", fraction)
        share.check("stop", stop)
        if final_density is not None:
            share.check("final_density", final_density)
        self._last: int | None = None  # the step of the last update
        if total_steps is not None:
            self._last = share_of(stop, COUNT.check("total_steps", total_steps)) // interval * interval
            if self._last == 0:
                raise ValueError(
                    f"interval={interval} leaves no update in the first {stop:.4g} of {total_steps} steps; lower it"
                )
        elif schedule != "constant" or stop != 1.0 or final_density is not None:
            raise ValueError(f"{schedule=}, {stop=} and {final_density=} need total_steps, those of the whole training")
        inside = {} if network is None else {module: name for name, module in network.named_modules()}
        named = (
            dict(model.named_modules())
            if isinstance(model, nn.Module)
            else {inside.get(layer, number): layer for number, layer in enumerate(model)}
        )
        self._model = model if isinstance(model, nn.Module) else None
        self.layers = [module for module in named.values() if isinstance(module, SparseLayer)]
        if self._model is None and len(self.layers) < len(named):
            other = next(each for each in named.values() if not isinstance(each, SparseLayer))
            raise TypeError(
                f"{type(other).__name__} is among the layers, which must be G2GLinear, or G2GConv2d with a mask; give "
                "the model"
            )
        if isinstance(averages, nn.Module):
            raise TypeError("averages is a module; give a list of them, averages=[average]")
        self._averages = list(averages)
        if self._averages and self._model is None:
            raise ValueError("averages= needs the model, not its layers; give it, or call tie_wiring(model, average)")
        if not self.layers:
            raise ValueError("there is no sparse layer to rewire; g2gnet.sparsify(model) creates them")
        self._check_weights()
        if final_density is None and all(layer.mask.is_full for layer in self.layers):
            raise ValueError("every unit of every layer is present, so none can grow; lower p_inter or p_intra")
        self.optimizer = optimizer
        self._state = OptimizerState(optimizer, reset_state, fewer=final_density is not None)
        self.interval, self.fraction, self.seed, self.schedule = interval, fraction, seed, schedule
        self.prune, self.grow = PRUNE_RULES[prune], GROW_RULES[grow]
        self._process_group, self.final_density = process_group, final_density
        if final_density is not None and any(isinstance(each, DistributedDataParallel) for each in named.values()):
            raise ValueError(
                "final_density= removes weights, and DistributedDataParallel keeps buffers of their first number; give "
                "the layers instead of the model, and wrap the model again after each update"
            )
        self._check_enough_is_left()
        self._checked_layers()
        for name, layer in named.items():
            if isinstance(layer, SparseLayer) and not self._changes(layer):
                why = "all of its units exist, so none can grow" if layer.values.requires_grad else "it is frozen"
                shape = _size(layer)
                logger.warning("layer %s, %s, is left out of dynamic sparse training: %s", name, shape, why)
        self.steps = self._pruned = self._grown = 0
        #: updates that are not counted there yet: the step, the numbers of its layers, whether the prune and the grow
        #: scores of each are finite (on the device), and the units pruned and grown if all are
        self._outcomes: list[tuple[int, list[int], torch.Tensor, int, int]] = []
        self._evidence = StepEvidence(self._model, self.layers, network, self.prune, self.grow if fraction else None)
        self._warned_of_copies = False
        self._begin()

    def _begin(self) -> None:
        for average in self._averages:
            assert self._model is not None
            tie_wiring(self._model, average)
        self._record_if_due()

    @property
    def next_is_due(self) -> bool:
        """Whether the next :meth:`step` will be an update."""
        step = self.steps + 1
        return step % self.interval == 0 and (self._last is None or step <= self._last)

    def _changes(self, layer: SparseLayer) -> bool:
        """Whether an update prunes or grows units of the layer."""
        return layer.values.requires_grad and (self.final_density is not None or not layer.mask.is_full)

    def _checked_layers(self) -> list[tuple[int, SparseLayer]]:
        """The layers that an update changes, with their numbers. Raises ValueError for weights that no optimizer holds,
        or whose states cannot be reset."""
        groups = [group for optimizer in self._state.optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        changing = [(number, layer) for number, layer in enumerate(self.layers) if self._changes(layer)]
        for number, layer in changing:
            if id(layer.values) not in held:
                raise ValueError(
                    f"the optimizer does not hold the weights of layer {number}, {_size(layer)}; create "
                    "it after the layers, or add them by optimizer.add_param_group"
                )
            self._state.check(layer.values)
        return changing

    def _check_enough_is_left(self) -> None:
        """Raises ValueError if ``final_density`` would leave less than a unit in a layer that exists now."""
        if self.final_density is None:
            return
        frozen = {layer for layer in self.layers if not layer.values.requires_grad}
        if len(frozen) == len(self.layers):
            raise ValueError(f"final_density={self.final_density} prunes nothing: all layers are frozen; leave it out")
        least = least_density(self.layers, frozen)
        if self.final_density < least:
            raise ValueError(
                f"final_density={self.final_density} is less than the {least:.4g} of one unit in each layer"
                f"{', and of all in frozen ones' if frozen else ''}; raise it"
            )

    def _record_if_due(self) -> None:
        if self.next_is_due:
            self._evidence.start([layer for layer in self.layers if self._changes(layer)])

    def _count(self) -> tuple[int, int]:
        """Units pruned and grown so far. Waits for the device, and logs the updates that were skipped."""
        outcomes, self._outcomes = self._outcomes, []
        for step, numbers, are_finite, pruned, grown in outcomes:
            finite = are_finite.tolist()
            if all(finite):
                self._pruned += pruned
                self._grown += grown
                continue
            bad = finite.index(False)
            rule = f"grow={self.grow.name!r}" if bad % 2 else f"prune={self.prune.name!r}"
            message = "step %d: no unit was replaced, because scores of %s in layer %d are not finite"
            logger.warning(message, step, rule, numbers[bad // 2])
        return self._pruned, self._grown

    @property
    def pruned(self) -> int:
        return self._count()[0]

    @property
    def grown(self) -> int:
        return self._count()[1]

    def state_dict(self) -> dict[str, int]:
        """The counters; masks and weights are in the layers' own state."""
        return {"steps": self.steps, "pruned": self.pruned, "grown": self.grown}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Loads the counters. Load the states of the network and of the optimizer with them: moments belong to the
        units that the network had when they were saved."""
        self._evidence.drop()
        self.steps, self._outcomes = state["steps"], []
        self._pruned, self._grown = state["pruned"], state["grown"]
        self._record_if_due()

    @torch.no_grad()
    def step(self, inputs: torch.Tensor | None = None, activity: Activity | None = None) -> bool:
        """Counts an optimizer step and, every ``interval`` of them, updates the layers; returns whether it did.

        Args:
            inputs: the inputs of the first layer in this step, [B, in] or, time first, [T, B, in].
            activity: the network's activity in this step; its spikes are the samples of the correlation. Omit both if
                the scheduler was created with a model, which it then observes itself.

        Raises:
            RuntimeError: if a rule needs something that was neither given nor recorded, or cannot be formed.
            ValueError: for what the constructor refuses, if it has become so since; if training begins with no more
                weights than ``final_density``; for the activity of other layers, or without spikes that a rule needs.
            DistributedError: if the processes do not all make this update, or their networks differ before or after it.

        After any other error than the last, also one in ``reset_state``, no layer and no state has changed.
        """
        if getattr(getattr(self._model, "_join_config", None), "enable", False):
            raise RuntimeError(
                "DSTScheduler does not work inside model.join(), where processes without batches take no part in "
                "updates; give all equally many batches (DistributedSampler, drop_last=True)"
            )
        if activity is not None:
            self._evidence.check(activity)
        if self.final_density is not None and self.steps == 0 and self.final_density >= mean_density(self.layers):
            self._evidence.drop()
            raise ValueError(
                f"final_density={self.final_density} is no less than the {mean_density(self.layers):.4g} that training "
                "begins with; lower it, leave it out, or load the state of the scheduler that pruned to it"
            )
        due = self.next_is_due
        self.steps += 1
        self._evidence.stop()
        try:
            if due:
                if inputs is not None and activity is not None:
                    self._evidence.give(inputs, activity)
                self._check_weights()
                if not all(layer.values.requires_grad for layer in self.layers):
                    self._check_enough_is_left()  # some may have been frozen since
                world = World(self._process_group)
                world.stage = f"the update of the units after step {self.steps}"
                world.assemble()
                world.check_same(f"the count of steps at {world.stage}", self.steps)
                world.check_same(f"the network after step {self.steps}", None, self._network())
                with torch.autocast(self.layers[0].values.device.type, enabled=False):  # it would round the scores
                    self._update(self._checked_layers(), world)
                world.check_same(f"the wiring after step {self.steps}", None, self._wiring())
        finally:  # a caller that catches an error can go on
            self._evidence.drop()
            self._record_if_due()
        return due

    def _wiring(self) -> list[torch.Tensor]:
        return [units for mask in [layer.mask for layer in self.layers] for units in (mask.unit_row, mask.unit_col)]

    def _network(self) -> Iterator[torch.Tensor]:
        """What must be the same in all processes: the wiring, and the parameters of the model, or of the layers."""
        yield from self._wiring()
        for layer in self.layers:
            yield torch.where(layer.valid(), layer.values.detach(), 0)  # without padding
        of_layers = {id(layer.values) for layer in self.layers}
        for module in [*self.layers] if self._model is None else [self._model]:
            ignored = getattr(module, "parameters_to_ignore", ())  # by DistributedDataParallel
            for name, parameter in module.named_parameters():
                if id(parameter) not in of_layers and name.removeprefix("module.") not in ignored:
                    yield parameter

    def _check_weights(self) -> None:
        """Raises ValueError unless each layer has a parameter of its own as weights, whole in this process."""
        numbers: dict[int, int] = {}
        for number, layer in enumerate(self.layers):
            if not layer.has_plain_values:
                raise ValueError(
                    f"the weights of layer {number}, {_size(layer)}, are computed by a "
                    "parametrization, pruning or a norm; remove that, or give DSTScheduler the other layers"
                )
            if (first := numbers.setdefault(id(layer.values), number)) != number:
                raise ValueError(
                    f"layers {first} and {number} have the same weights, which would be rewired twice; give each layer "
                    "once, and use one layer in both places"
                )
            values, packed = layer.values, (layer.mask.num_units, *layer.mask.unit_shape)
            if type(values.data) is not torch.Tensor or values.shape[:3] != packed:
                raise ValueError(
                    f"the weights of layer {number} are a {type(values.data).__name__} {list(values.shape)}, not a "
                    f"tensor {list(packed)}: they are sharded, as FSDP does; use DistributedDataParallel"
                )

    def _update(self, layers: list[tuple[int, SparseLayer]], world: World) -> None:
        """Prunes and grows in all layers, or in none if a score is not finite. While the number of units stays, nothing
        waits for the device: a unit that must stay is replaced by itself."""
        if not layers:  # every layer is frozen, or full
            return
        candidates = {
            number: draw_candidates(layer.mask, stream(self.seed, "candidates", self.steps, number))
            for number, layer in layers
        }
        grow = self.grow if self.fraction else GROW_RULES["random"]  # which needs no evidence, and nothing grows
        evidence = self._evidence.of_units(layers, world, candidates)
        scores = [(self.prune.score(of_slots), grow.score(of_grid)) for of_slots, of_grid in evidence]
        finite = torch.stack([_is_finite(score) for pair in scores for score in pair])
        apply = finite.all()
        budgets: Sequence[float | None] = [None] * len(layers)  # their number of units stays
        if self.final_density is not None and apply:
            budgets = self._budgets([layer for _, layer in layers], self.final_density)
        share = self.steps / self._last if self._last else 0.0
        fraction, pruned, grown, spare = self.fraction * SCHEDULES[self.schedule](share), 0, 0, 0.0
        with contextlib.ExitStack() as undo:  # an error in one layer undoes the layers before it; no average follows
            for (number, layer), pair, budget in zip(layers, scores, budgets, strict=True):
                draw = stream(self.seed, "dst", self.steps, number, device=draw_device(pair[0].device))
                of_layer = layer.mask, Scores(*pair, candidates[number]), fraction, draw
                if budget is None:
                    plan = plan_of_equal_number(*of_layer)
                else:
                    plan = plan_within((budget + spare) / layer.weights_of_place, *of_layer)
                undo.callback(replace_units(layer, plan, apply, self._state))
                pruned, grown = pruned + len(plan.pruned), grown + len(plan.grown)
                spare = plan.spare * layer.weights_of_place
            undo.pop_all()
        for _, layer in layers:
            layer.ties.end("it was rewired by itself")
            rewire_averages(layer)
        self._outcomes.append((self.steps, [number for number, _ in layers], finite, pruned, grown))
        copies = (copy for layer in self.layers for copy in layer.ties.copies)
        if not self._warned_of_copies and not all(copy.ties.declared for copy in copies):
            self._warned_of_copies = True
            logger.warning(
                "the network was rewired, and a copy keeps its units. If that is an average, give DSTScheduler("
                "averages=[average]) or call g2gnet.tie_wiring(network, average), else g2gnet.untie_wiring(copy)"
            )

    def _budgets(self, layers: list[SparseLayer], final_density: float) -> list[float]:
        """The weights that each layer may keep; waits for the device."""
        assert self._last is not None
        sizes = [unit_sizes(layer) for layer in layers]
        frozen = sum(int(unit_sizes(layer).sum()) for layer in self.layers if layer not in layers)
        final = final_density * possible_weights(self.layers) - frozen
        magnitudes = [PRUNE_RULES["set"].score(Evidence(layer, layer.mask.num_units)) for layer in layers]
        now = sum(int(of_layer.sum()) for of_layer in sizes)
        return layer_budgets(sizes, magnitudes, weights_after(now, final, self._last - self.steps, self.interval))

    def __del__(self) -> None:
        if "_evidence" in self.__dict__ and not sys.is_finalizing():  # else the constructor raised, or Python ends
            self._evidence.stop()  # removes its hooks from the model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DSTScheduler":
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self._process_group)] = self._process_group  # processes are not copied
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        twin._evidence.run_compiled()  # a copy that is never used must not keep compiled code from running
        return twin


def _size(layer: SparseLayer) -> str:
    """The numbers of outputs and inputs in a message."""
    return " × ".join(map(str, layer.mask.shape))


def _is_finite(scores: torch.Tensor) -> torch.Tensor:
    """Whether all scores are finite, a bool scalar, by one pass: NaN is the least and the largest of its tensor."""
    return (torch.stack(scores.aminmax()) if len(scores) else scores).isfinite().all()
