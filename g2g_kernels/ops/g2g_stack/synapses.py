"""Synaptic operations, as NeuroBench defines them (Yik et al. 2025): one for each input that is not zero and each
weight that it meets and that is not zero, at every time step. An input held for all steps meets the weights once, since
its product is computed once. Biases and neurons count as nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.ops.g2g_stack.delays import Delay
from g2g_kernels.ops.g2g_stack.layer import Connection, SpikingLayer


class SynapticOperations(NamedTuple):
    """The operations of one layer, over all steps and samples of a run.

    Attributes:
        accumulates: additions of a weight, if all inputs of the layer are −1, 0 or 1 (spikes).
        multiplies: multiplications with an addition, if they are not.
        dense: what a dense layer would do if no input were zero.
    """

    accumulates: int
    multiplies: int
    dense: int


class Border(NamedTuple):
    """The ends of a run of a source that delays are read from: there, what arrives is not what it sends in the run.

    Attributes:
        before, after: [D, B, N], what was sent in the last steps before the run (None: nothing), and in its last ones,
            which may be an object whose ``dense()`` is that. No gradients.
        threshold: None; or they are membranes [1, B, N], and exceed it in a spike.
        dropped: bool [B, N], the neurons that are silent; or None.
    """

    before: torch.Tensor | None
    after: Any
    threshold: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def sent_beyond(self, delay: Delay) -> torch.Tensor:
        """int64 [N], the spikes that arrive from before the run, less those that arrive after it, over all samples."""
        first = 0 if self.before is None else self._late(self.before, delay)
        return first - self._late(self.after, delay)

    def _late(self, train: Any, delay: Delay) -> torch.Tensor:
        """How many arrive after the last step of ``train``."""
        train = train.detach() if isinstance(train, torch.Tensor) else train.dense().detach()
        spikes = train != 0 if self.threshold is None else train > self.threshold
        if self.dropped is not None:
            spikes = spikes & ~self.dropped
        left = torch.arange(len(train), 0, -1, device=train.device)[:, None]  # steps from here to the end
        return (spikes.sum(1) * (left <= (delay.most if delay.steps is None else delay.steps))).sum(0)


class Synapses:
    """The inputs and the weights of a run, from which its synaptic operations can be counted afterwards.

    Args:
        x: [T, B, in], or [B, in] held at every step.
        steps: for which x is held, or None.
        layers: the connections to each layer.
        borders: of each layer, and at the end of the inputs, where delays are read from it; else None.
    """

    def __init__(
        self,
        x: torch.Tensor,
        steps: int | None,
        layers: Sequence[Sequence[Connection]],
        borders: Sequence[Border | None],
    ) -> None:
        self._x, self._steps, self._borders = x.detach(), steps, borders
        self._layers: list[list[Connection]] = []
        #: what is counted, and the numbers that differ after it has changed
        self._counted = [self._x]
        for connections in layers:
            self._layers.append([])
            for each in connections:
                self._counted.append(each.values.detach())
                self._layers[-1].append(Connection(self._counted[-1], each.mask, each.source, each.delay))
        for border in borders:
            if border is not None:
                self._counted += [tensor for tensor in border if isinstance(tensor, torch.Tensor)]
        self._then = self._now()

    @classmethod
    def of_run(
        cls,
        x: torch.Tensor,
        layers: Sequence[SpikingLayer],
        steps: int | None,
        before: torch.Tensor | None,
        states: Sequence[torch.Tensor],
        sent: Sequence[Any],
    ) -> "Synapses":
        """Those of a run with these layers and ``before``, after which they have these states and have sent this."""
        connections = []
        borders: list[Border | None] = [None] * (len(layers) + 1)
        for number, layer in enumerate(layers):
            connections.append(layer.connections(number))
            for each in connections[-1]:
                if each.delay is not None and borders[each.source] is None:
                    known = sent[each.source] if sent else None
                    source = None if each.source < 0 else layers[each.source]
                    if known is not None:
                        earlier = before if source is None else source.sent
                        borders[each.source] = Border(None if earlier is None else earlier.detach(), known)
                    elif source is not None:
                        borders[each.source] = _membranes(source, states[each.source])
        return cls(x, steps, connections, borders)

    def _now(self) -> list[int]:
        versions = [tensor._version for tensor in self._counted if not tensor.is_inference()]  # which have none
        return versions + [each.mask.changes for connections in self._layers for each in connections]

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        """Of each layer, all connections to it included, given the firing rates of each, [N]; waits for the device.
        Exact up to 2²³ spikes per neuron. Raises RuntimeError if inputs, weights or masks have changed in the meantime,
        or where delays are read the thresholds, states or spikes at both ends of the run.
        """
        if self._now() != self._then:
            raise RuntimeError(
                "the inputs, weights, thresholds or states of this run have changed since, so its synaptic operations "
                "are unknown; call synaptic_operations() right after the run, before optimizer and scheduler step"
            )
        x = self._x.reshape(-1, self._x.shape[-1])
        # a held input that arrives later is another one at each step
        of_input = 1 if self._steps is None else self._steps
        vectors = len(x) * of_input
        sent = [(of.detach().double() * vectors).nan_to_num().round().long() for of in rates]
        sent.append((x != 0).sum(0))
        spiking = bool(((x == 0) | (x.abs() == 1)).all())
        counted = []
        for connections in self._layers:
            totals = [0, 0, 0]
            for values, mask, source, delay, *_ in connections:
                received, border, rows = sent[source], self._borders[source], vectors
                if source < 0 and delay is None:
                    rows = len(x)
                elif source < 0:
                    received = received * of_input
                if delay is not None and border is not None:
                    received = received + border.sent_beyond(delay)
                totals[int(source < 0 and not spiking)] += int((received * _fan_out(values, mask)).sum())
                totals[2] += rows * mask.shape[0] * mask.shape[1]
            counted.append(SynapticOperations(*totals))
        return tuple(counted)


def _membranes(layer: SpikingLayer, after: torch.Tensor) -> Border:
    """The ends of a run of a layer with the states ``after`` it, of whose last spikes nothing else is known."""
    before, threshold = layer.state, layer.population.parameters[-1].detach()
    before = None if before is None else before.detach()[-1:]
    return Border(before, after.detach()[-1:], threshold, layer.dropped)


def _fan_out(values: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """int64 [in], the number of weights other than zero of each input neuron."""
    per_unit = ((values != 0) & mask.valid()).sum(1)
    per_place = per_unit.new_zeros(mask.cols.num_units, mask.cols.width)
    per_place.index_add_(0, mask.unit_col.long(), per_unit)
    return per_place.flatten()[mask.cols.place_of]
