"""Evidence for the rules: what the layers do in the training step before an update, recorded or given by the caller."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from g2g_kernels import Activity
from g2g_kernels.ops.g2g_stack.layer import ProductObserver
from g2g_kernels.tracing import is_transformed
from g2gnet.base.distributed import World
from g2gnet.dst import rules
from g2gnet.dst.rules import ACTIVITY, GRADIENT, Evidence, Pair, Rule
from g2gnet.layers import G2GLinear
from g2gnet.recording import ActivityRecorder, Recording, Uncompiled, check_compiled, dense
from g2gnet.spiking_network import SpikeTrain, SpikingNetwork

#: what to do without spikes
_OTHERS = "give " + ", and ".join(
    f"{name}={' or '.join(repr(rule.name) for rule in of.values() if rule.needs != ACTIVITY)}"
    for name, of in (("prune", rules.PRUNE_RULES), ("grow", rules.GROW_RULES))
)


class StepRecorder:
    """Records in one training step, from :meth:`start` to :meth:`stop`, what the rules need: the activity of ``model``,
    or as given (:meth:`give`); ``grow`` is None if nothing grows. Raises ValueError for a network whose output does not
    spike, or a model that is compiled and cannot run uncompiled.
    """

    def __init__(
        self,
        model: nn.Module | None,
        layers: Sequence[G2GLinear],
        network: SpikingNetwork | None,
        prune: Rule,
        grow: Rule | None,
    ) -> None:
        self._layers, self._network = layers, network
        self.needs = {rule.needs for rule in (prune, grow) if rule and rule.needs}
        self._prunes_by_evidence = prune.needs is not None
        self._rules = f"prune={prune.name!r} with grow={grow.name if grow else 'random'!r}"
        self._model = model if ACTIVITY in self.needs else None
        for module in () if self._model is None else self._model.modules():
            if isinstance(module, SpikingNetwork) and module.readout != "counts":
                raise ValueError(f"a correlation needs output spikes; readout={module.readout!r} has none; {_OTHERS}")
        if model is not None and self.needs:
            check_compiled(model, " and ".join(sorted(self.needs)))
        self._activity: ActivityRecorder | None = None  # while it records
        self._recordings: list[Recording] | None = None
        self._gradients: dict[G2GLinear, UnitGradients] = {}
        self._overtaken = False  # by another scheduler, which records the gradient of the same layers now
        self._uncompiled: Uncompiled | None = None

    def start(self, layers: Sequence[G2GLinear]) -> None:
        """Starts recording; ``layers`` are those whose gradient may be needed."""
        if self._model is not None or GRADIENT in self.needs:
            self._uncompiled = Uncompiled()
        if self._model is not None:
            self._activity = ActivityRecorder(self._model, self._layers)
            self._activity.start()
        if GRADIENT in self.needs:
            for layer in layers:
                self._gradients[layer] = layer.observer = UnitGradients()

    def stop(self) -> None:
        """Stops recording, if it was started; what was recorded stays until :meth:`forget`."""
        self.run_compiled()
        mine = [layer for layer, gradients in self._gradients.items() if layer.observer is gradients]
        self._overtaken = len(mine) < len(self._gradients)
        for layer in mine:
            layer.observer = None
        if self._activity is not None:
            self._recordings, self._activity = self._activity.stop(), None

    def run_compiled(self) -> None:
        """Lets compiled code run again, which records nothing."""
        if self._uncompiled is not None:
            self._uncompiled.end()
            self._uncompiled = None

    def drop(self) -> None:
        """Stops recording, and forgets the step, also what graphs refer to."""
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
            to_output = [net.connections()[route.name] for route in net.routes() if route.target + 1 == net.depth]
            last_is_mine = any(layer in self._layers for layer in to_output)
        if last_is_mine:
            raise ValueError(
                f"a correlation needs output spikes, and this activity is a readout of membranes; {_OTHERS}"
            )

    def give(self, inputs: torch.Tensor, activity: Activity) -> None:
        """Takes what the first layer received and what the stack did; ValueError for the activity of other layers."""
        if self._network is not None:
            received = {layer: [(pre, post)] for layer, pre, post in self._network.received(inputs, activity)}
            self._recordings = [received[layer] for layer in self._layers]
            return
        mine, theirs = [layer.out_features for layer in self._layers], [len(rates) for rates in activity.rates]
        if mine != theirs[: len(mine)]:
            raise ValueError(
                f"the activity is of layers of {theirs} neurons, those of the scheduler have {mine}; give it the "
                "layers of the stack from its input on, or DSTScheduler(layers, optimizer, network=net)"
            )
        pres: list[SpikeTrain] = [inputs.detach(), *activity.spikes]
        self._recordings = [[(pres[number], pres[number + 1])] for number in range(len(mine))]

    def evidence(
        self, layers: Sequence[tuple[int, G2GLinear]], world: World, candidates: Mapping[int, torch.Tensor | None]
    ) -> Iterator[tuple[Evidence, Evidence]]:
        """What is known of each layer's units, and of those that may grow: the ``candidates`` by the layer's number,
        int64 counted row by row, or None for the whole grid. RuntimeError if it was not recorded."""
        unpacked: dict[int, torch.Tensor] = {}  # by the train's id; a layer's spikes are the next one's inputs
        for number, layer in layers:
            mask, drawn = layer.mask, candidates[number]
            exist = mask.flat_unit()[: mask.num_units if self._prunes_by_evidence else 0]
            units, known = None if drawn is None else torch.cat([exist, drawn]), {}
            if ACTIVITY in self.needs:
                if not self._recordings or not self._recordings[number]:
                    raise RuntimeError(self._nothing_seen("activity", number))
                pairs = self._recordings[number]
                trains = {id(train): train for pair in pairs for train in pair}
                unpacked = {key: unpacked[key] if key in unpacked else dense(train) for key, train in trains.items()}
                samples = _samples([(unpacked[id(pre)], unpacked[id(post)]) for pre, post in pairs])
                known["correlation"] = rules.unit_correlation(*samples, mask, world, units).flatten()
            if GRADIENT in self.needs:
                gradients = self._gradients.get(layer)
                if gradients is None or not (pairs_seen := gradients.seen()):
                    raise RuntimeError(self._nothing_seen("gradient", number))
                known["gradient"] = rules.unit_gradient(pairs_seen, mask, world, units)
                gradients.close()
            parts: tuple[Any, slice] = exist, slice(None)
            if drawn is not None:
                parts = slice(len(exist)), slice(len(exist), None)
            of_slots, of_grid = ({name: scores[part] for name, scores in known.items()} for part in parts)
            may_grow = math.prod(mask.grid) if drawn is None else len(drawn)
            yield Evidence(layer, mask.num_units, **of_slots), Evidence(layer, may_grow, **of_grid)

    def _nothing_seen(self, what: str, number: int) -> str:
        if what == GRADIENT and self._overtaken:
            return f"another DSTScheduler with grow='gradient' has taken over layer {number}; step the last one only"
        return (
            f"no {what} of layer {number} was recorded in this step, but {self._rules} needs it. Run the model forward "
            "and backward in training mode before each step(), not as a CUDA graph while next_is_due; or pass the "
            "inputs and the activity to step(); or use prune='set' or 'random' with grow='random'"
        )

    def __getstate__(self) -> dict[str, Any]:
        # a copy begins with the next step
        return {**self.__dict__, "_uncompiled": None, "_activity": None, "_recordings": None, "_gradients": {}}


def _samples(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pre- and postsynaptic samples of all calls of a layer, in the form that :func:`unit_correlation` takes."""
    if len(pairs) == 1 and pairs[0][1].dim() == 3:
        return pairs[0]
    # an input may have been held for all time steps
    pairs = [(pre.expand(len(post), *pre.shape) if pre.dim() < post.dim() else pre, post) for pre, post in pairs]
    trains = zip(*pairs, strict=True)
    pre, post = (torch.cat([each.reshape(-1, each.shape[-1]) for each in of_side])[None] for of_side in trains)
    return pre, post


#: the number of the backward pass that runs now; −1 outside of them
_backward_pass = torch._C._current_graph_task_id


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
        #: of reads of the dense weight, whose gradient is its product with the identity
        self.dense: list[Pair] = []
        #: what the step had of which the gradient is not seen
        self.unseen: str | None = None
        #: inputs by the number of their product. Graphs that someone keeps refer to them through this object
        self._inputs: dict[int, torch.Tensor] = {}

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
            self.dense.append((torch.eye(gradient.shape[1], device=gradient.device), gradient.detach().T))

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer takes no part in the step

    def seen(self) -> list[Pair]:
        """What :func:`~g2gnet.dst.rules.unit_gradient` takes. Raises RuntimeError if gradients of the weights were
        formed in batches, or one that has a gradient itself: that of the weights has more parts then."""
        if self.unseen is not None:
            raise RuntimeError(f"grow='gradient' does not see {self.unseen} of this step; use grow='random' or 'hebb'")
        return self.pairs + self.dense
