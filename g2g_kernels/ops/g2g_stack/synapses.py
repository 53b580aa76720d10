"""Synaptic operations: what the inputs of each layer made its weights add and multiply.

The definition is NeuroBench's (Yik et al. 2025): one operation for each input that is not zero and each weight that it
meets and that is not zero, at every time step. An input held for all steps meets the weights once, since its product
is computed once. Biases and neurons count as nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from g2g_kernels.mask.block_mask import BlockMask


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
    """The ends of a run: where the spikes that a recurrent connection receives are not those of the run. No gradients.

    Attributes:
        before, after: [B, N] membranes before the first step (None: no spikes) and after the last.
        threshold: that a membrane exceeds in a spike.
        dropped: bool [B, N], the neurons that are silent; or None.
    """

    before: torch.Tensor | None
    after: torch.Tensor
    threshold: torch.Tensor
    dropped: torch.Tensor | None = None

    def sent_beyond(self) -> torch.Tensor:
        """int64 [N], the spikes that enter from before the run, less those of its last step, over all samples."""
        first = 0 if self.before is None else self._spikes(self.before)
        return first - self._spikes(self.after)

    def _spikes(self, membrane: torch.Tensor) -> torch.Tensor:
        spikes = membrane > self.threshold
        return (spikes if self.dropped is None else spikes & ~self.dropped).sum(0)


class Synapses:
    """The inputs and the weights of a run, from which its synaptic operations can be counted afterwards.

    Args:
        x: [T, B, in], or [B, in] held at every step.
        steps: for which x is held, or None.
        weights: for each layer, packed values and mask of its connections: what comes from the layer before, and the
            recurrent one where there is one.
        borders: for each layer, both ends of the run where it has a recurrent connection, else None.
    """

    def __init__(
        self,
        x: torch.Tensor,
        steps: int | None,
        weights: Sequence[Sequence[tuple[torch.Tensor, BlockMask]]],
        borders: Sequence[Border | None],
    ) -> None:
        self._x = x.detach()
        self._samples = x.shape[-2]
        self._steps = len(x) if steps is None else steps
        self._borders = borders
        self._weights: list[list[tuple[torch.Tensor, BlockMask]]] = []
        #: what is counted, and the numbers that differ after it has changed
        self._counted = [self._x]
        for connections in weights:
            self._weights.append([])
            for values, mask in connections:
                self._weights[-1].append((values.detach(), mask))
                self._counted.append(self._weights[-1][-1][0])
        for border in borders:
            if border is not None:
                self._counted += [tensor for tensor in border if tensor is not None]
        self._then = self._now()

    def _now(self) -> list[int]:
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in self._counted]
        return versions + [mask.changes for connections in self._weights for _, mask in connections]

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        """Of each layer, its recurrent connection included, given the firing rates of each, [N]; waits for the device.
        Exact up to 2²³ spikes per neuron.

        Raises:
            RuntimeError: if inputs, weights or masks have changed in the meantime, or of a recurrent layer its
                thresholds or its states at both ends of the run.
        """
        if self._now() != self._then:
            raise RuntimeError(
                "the inputs, weights, thresholds or states of this run have changed since, so its synaptic operations "
                "are unknown; call synaptic_operations() right after the run, before the optimizer's step and the "
                "scheduler's"
            )
        x = self._x.reshape(-1, self._x.shape[-1])
        received = [(x != 0).sum(0)]
        vectors = self._steps * self._samples
        received += [(of.detach().double() * vectors).nan_to_num().round().long() for of in rates]
        spiking = bool(((x == 0) | (x.abs() == 1)).all())
        counted = []
        for number, ((values, mask), *recurrent) in enumerate(self._weights):
            operations = int((received[number] * _fan_out(values, mask)).sum())
            accumulates = operations if spiking or number else 0
            multiplies = operations - accumulates
            dense = (vectors if number else len(x)) * mask.shape[0] * mask.shape[1]
            for values, mask in recurrent:
                border = self._borders[number]
                assert border is not None
                sent = received[number + 1] + border.sent_beyond()
                accumulates += int((sent * _fan_out(values, mask)).sum())
                dense += vectors * mask.shape[0] * mask.shape[1]
            counted.append(SynapticOperations(accumulates, multiplies, dense))
        return tuple(counted)


def _fan_out(values: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """int64 [in], the number of weights other than zero of each input neuron."""
    per_unit = ((values != 0) & mask.valid()).sum(1)
    per_place = per_unit.new_zeros(mask.cols.num_units, mask.cols.width)
    per_place.index_add_(0, mask.unit_col.long(), per_unit)
    return per_place.flatten()[mask.cols.place_of]
