"""Synaptic operations, as NeuroBench defines them (Yik et al. 2025): one for each input that is not zero and each
weight that it meets and that is not zero, at every time step. An input held for all steps meets the weights once, since
its product is computed once. Biases and neurons count as nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.wiring import versions
from g2g_kernels.ops.g2g_stack.delays import Delay
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.record import Form, built


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
    """What a run's synaptic operations can be counted from afterwards.

    Args:
        run: x, what came before it, and the layers, as :func:`g2g_kernels.ops.record.opened` gives them.
        steps: for which x is held, or None.
        states: [states, B, N] of each layer after the run.
        sent: of each layer, and at the end of the inputs, what delays need of it, in the form of a :class:`Border`;
            None where no delay reads it, or (all of them) where it is in ``states``.
    """

    def __init__(
        self,
        run: tuple[Sequence[torch.Tensor], Form],
        steps: int | None,
        states: Sequence[torch.Tensor],
        sent: Sequence[Any],
    ) -> None:
        tensors, self._form = run
        self._tensors, self._states = [tensor.detach() for tensor in tensors], states
        self._steps, self._sent = steps, sent
        self._then = self._now()

    def _now(self) -> list[int]:
        """Numbers that differ after something of the run has changed."""
        masks = [part.changes for part in self._form if isinstance(part, BlockMask)]
        return masks + versions((*self._tensors, *self._states))

    def _borders(self, layers: Sequence[SpikingLayer], before: torch.Tensor | None) -> list[Border | None]:
        """Of each layer, and at the end of the inputs, where delays are read from it; else None."""
        borders: list[Border | None] = [None] * (len(layers) + 1)
        for source in {each.source for n, layer in enumerate(layers) for each in layer.connections(n) if each.delay}:
            known = self._sent[source] if self._sent else None
            if known is not None:
                borders[source] = Border(before if source < 0 else layers[source].sent, known)
                continue
            layer = layers[source]
            state = None if layer.state is None else layer.state[-1:]
            borders[source] = Border(
                state, self._states[source].detach()[-1:], layer.population.parameters[-1], layer.dropped
            )
        return borders

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        """Of each layer, all connections to it included, given the firing rates of each, [N]; waits for the device.
        Exact up to 2²³ spikes per neuron. Raises RuntimeError if a tensor or a mask of the run has changed since.
        """
        if self._now() != self._then:
            raise RuntimeError(
                "the inputs, weights, thresholds or states of this run have changed since, so its synaptic operations "
                "are unknown; call synaptic_operations() right after the run, before optimizer and scheduler step"
            )
        x, before, *layers = built(self._form, self._tensors)
        borders = self._borders(layers, before)
        vectors = x.shape[-2] * (len(x) if self._steps is None else self._steps)
        x = x.reshape(-1, x.shape[-1])
        sent = [(of.detach().double() * vectors).nan_to_num().round().long() for of in rates]
        sent.append((x != 0).sum(0))
        spiking = bool(((x == 0) | (x.abs() == 1)).all())
        counted = []
        for number, layer in enumerate(layers):
            totals = [0, 0, 0]
            for values, mask, source, delay, *_ in layer.connections(number):
                received, border, rows = sent[source], borders[source], vectors
                if source < 0 and delay is None:
                    rows = len(x)
                elif source < 0:  # a held input that arrives later is another one at each step
                    received = received * (vectors // len(x))
                if delay is not None and border is not None:
                    received = received + border.sent_beyond(delay)
                totals[int(source < 0 and not spiking)] += int((received * _fan_out(values, mask)).sum())
                totals[2] += rows * mask.shape[0] * mask.shape[1]
            counted.append(SynapticOperations(*totals))
        return tuple(counted)


def _fan_out(values: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """int64 [in], the number of weights other than zero of each input neuron."""
    per_unit = ((values != 0) & mask.valid()).sum(1)
    per_place = per_unit.new_zeros(mask.cols.num_units, mask.cols.width)
    per_place.index_add_(0, mask.unit_col.long(), per_unit)
    return per_place.flatten()[mask.cols.place_of]
