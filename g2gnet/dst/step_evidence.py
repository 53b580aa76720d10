"""Evidence for the rules: activity and gradients in the step before an update, recorded or given by the caller."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from g2g_kernels import Activity
from g2gnet.activity_recorder import ActivityRecorder, Recording, Uncompiled, check_compiled, dense, received_in
from g2gnet.base.distributed import World
from g2gnet.dst import rules
from g2gnet.dst.rules import ACTIVITY, GRADIENT, Evidence, Rule
from g2gnet.dst.unit_gradients import UnitGradients
from g2gnet.layers import G2GLinear, SparseLayer
from g2gnet.spiking_network import SpikeTrain, SpikingNetwork

#: what to do without spikes
_OTHERS = "give " + ", and ".join(
    f"{name}={' or '.join(repr(rule.name) for rule in of.values() if rule.needs != ACTIVITY)}"
    for name, of in (("prune", rules.PRUNE_RULES), ("grow", rules.GROW_RULES))
)


class StepEvidence:
    """Collects the evidence of one training step, from :meth:`start` to :meth:`stop`: the gradients of layers, and the
    activity of ``model``, unless the caller gives it (:meth:`give`). ``grow`` is None if nothing grows. Raises
    ValueError for a network whose output does not spike, or a compiled model that cannot run uncompiled."""

    def __init__(
        self,
        model: nn.Module | None,
        layers: Sequence[SparseLayer],
        network: SpikingNetwork | None,
        prune: Rule,
        grow: Rule | None,
    ) -> None:
        self._layers, self._network = layers, network
        self.needs = {rule.needs for rule in (prune, grow) if rule and rule.needs}
        self._prunes_by_evidence = prune.needs is not None
        self._rules = f"prune={prune.name!r} with grow={grow.name if grow else 'random'!r}"
        self._model = model if ACTIVITY in self.needs else None
        for number, layer in enumerate(layers) if ACTIVITY in self.needs else ():
            if not isinstance(layer, G2GLinear):
                raise ValueError(f"a correlation is of neurons, and layer {number} joins channels; {_OTHERS}")
        for module in () if self._model is None else self._model.modules():
            if isinstance(module, SpikingNetwork) and module.readout != "counts":
                raise ValueError(f"a correlation needs output spikes; readout={module.readout!r} has none; {_OTHERS}")
        if model is not None and self.needs:
            check_compiled(model, " and ".join(sorted(self.needs)))
        self._activity: ActivityRecorder | None = None  # while it records
        self._recordings: list[Recording] | None = None
        self._gradients: dict[SparseLayer, UnitGradients] = {}
        self._overtaken = False  # another scheduler records the gradient of the same layers now
        self._uncompiled: Uncompiled | None = None

    def start(self, layers: Sequence[SparseLayer]) -> None:
        """Starts recording; ``layers`` are those whose gradient may be needed."""
        if self._model is not None or GRADIENT in self.needs:
            self._uncompiled = Uncompiled()
        if self._model is not None:
            self._activity = ActivityRecorder(self._model, cast("Sequence[G2GLinear]", self._layers))
            self._activity.start()
        if GRADIENT in self.needs:
            for layer in layers:
                self._gradients[layer] = layer.observer = UnitGradients()

    def stop(self) -> None:
        """Stops recording, if it was started; what was recorded stays until :meth:`drop`."""
        self.run_compiled()
        mine = [layer for layer, gradients in self._gradients.items() if layer.observer is gradients]
        self._overtaken = len(mine) < len(self._gradients)
        for layer in mine:
            layer.observer = None
        if self._activity is not None:
            self._recordings, self._activity = self._activity.stop(), None

    def run_compiled(self) -> None:
        """Lets compiled code run again."""
        if self._uncompiled is not None:
            self._uncompiled.end()
            self._uncompiled = None

    def drop(self) -> None:
        """Stops recording, and forgets the step. Graphs that someone keeps refer to nothing of it either."""
        self.stop()
        for gradients in self._gradients.values():
            gradients.close()
        self._gradients, self._recordings = {}, None

    def check(self, activity: Activity) -> None:
        """Raises ValueError for an activity without the spikes that a rule needs."""
        net = self._network
        if ACTIVITY not in self.needs or activity.readout is None:
            return
        if net is None:
            last_is_mine = len(self._layers) >= len(activity.spikes)
        else:
            to_output = [net.connections()[each.name] for each in net.projections() if each.target + 1 == net.depth]
            last_is_mine = any(layer in self._layers for layer in to_output)
        if last_is_mine:
            raise ValueError(f"a correlation needs output spikes; this activity is a readout of membranes; {_OTHERS}")

    def give(self, inputs: torch.Tensor, activity: Activity) -> None:
        """Takes the first layer's inputs and the activity of the network. Raises ValueError for the activity of other
        layers, or inputs of other samples."""
        if inputs.shape[-2] != len(activity.counts):
            raise ValueError(
                f"inputs are {list(inputs.shape)}, and the activity is of {len(activity.counts)} samples; give what "
                "the first layer received, [B, in] or, time first, [T, B, in]"
            )
        if self._network is not None:
            received: dict[nn.Module, Recording] = defaultdict(list)
            for layer, pre, post in received_in(self._network, inputs, activity):
                received[layer].append((pre, post))  # several if several projections share a connection
            self._recordings = [received[layer] for layer in self._layers]
            return
        mine, theirs = [layer.mask.shape[0] for layer in self._layers], [len(rates) for rates in activity.rates]
        if mine != theirs[: len(mine)]:
            raise ValueError(
                f"the activity is of layers of {theirs} neurons, those of the scheduler have {mine}; give it the "
                "layers of the stack from its input on, or DSTScheduler(layers, optimizer, network=net)"
            )
        pres: list[SpikeTrain] = [inputs.detach(), *activity.spikes]
        self._recordings = [[(pres[number], pres[number + 1])] for number in range(len(mine))]

    def of_units(
        self, layers: Sequence[tuple[int, SparseLayer]], world: World, candidates: Mapping[int, torch.Tensor | None]
    ) -> Iterator[tuple[Evidence, Evidence]]:
        """The evidence of each layer's slots, and of its units that may grow: the ``candidates`` by the layer's number,
        int64 counted row by row, or None for the whole grid. Raises RuntimeError if it was not recorded."""
        unpacked: dict[int, torch.Tensor] = {}  # by the train's id; a layer's spikes are the next one's inputs
        for number, layer in layers:
            mask, drawn, scores = layer.mask, candidates[number], {}
            slots = mask.flat_unit()[: mask.num_units if self._prunes_by_evidence else 0]
            units: torch.Tensor | None = None  # those to score; None: the whole grid, in which slots have their places
            parts: tuple[Any, slice] = slots, slice(None)
            if drawn is not None:
                units, parts = torch.cat([slots, drawn]), (slice(len(slots)), slice(len(slots), None))
            if ACTIVITY in self.needs:
                if not self._recordings or not self._recordings[number]:
                    raise RuntimeError(self._nothing_seen("activity", number))
                pairs = self._recordings[number]
                trains = {id(train): train for pair in pairs for train in pair}
                unpacked = {key: unpacked[key] if key in unpacked else dense(train) for key, train in trains.items()}
                samples = _samples([(unpacked[id(pre)], unpacked[id(post)]) for pre, post in pairs])
                scores["correlation"] = rules.unit_correlation(*samples, mask, world, units).flatten()
            if GRADIENT in self.needs:
                gradients = self._gradients.get(layer)
                if gradients is None or not (pairs_seen := gradients.seen()):
                    raise RuntimeError(self._nothing_seen("gradient", number))
                scores["gradient"] = rules.kernel_gradient(pairs_seen, layer, world, units)
                gradients.close()
            of_slots, of_growing = ({name: score[part] for name, score in scores.items()} for part in parts)
            may_grow = math.prod(mask.grid) if drawn is None else len(drawn)
            yield Evidence(layer, mask.num_units, **of_slots), Evidence(layer, may_grow, **of_growing)

    def _nothing_seen(self, what: str, number: int) -> str:
        if what == GRADIENT and self._overtaken:
            return f"another DSTScheduler that reads gradients has taken over layer {number}; step the last one only"
        return (
            f"no {what} of layer {number} was recorded in this step, but {self._rules} needs it. Run the model forward "
            "and backward in training mode before each step(), not as a CUDA graph while next_is_due; or pass the "
            "inputs and the activity to step(); or use prune='set' or 'random' with grow='random'"
        )

    def __getstate__(self) -> dict[str, Any]:  # a copy begins with the next step
        return {**self.__dict__, "_uncompiled": None, "_activity": None, "_recordings": None, "_gradients": {}}


def _samples(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pre- and postsynaptic samples of all calls of a layer, as :func:`unit_correlation` takes them."""
    if len(pairs) == 1 and pairs[0][1].dim() == 3:
        return pairs[0]
    pairs = [(pre.expand(len(post), *pre.shape) if pre.dim() < post.dim() else pre, post) for pre, post in pairs]
    pre, post = (
        torch.cat([each.reshape(-1, each.shape[-1]) for each in side])[None] for side in zip(*pairs, strict=True)
    )
    return pre, post
