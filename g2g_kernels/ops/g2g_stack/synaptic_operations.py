"""Synaptic operations, as NeuroBench defines them (Yik et al. 2025): one for each input that is not zero and each
weight that it meets and that is not zero, at every time step. An input held for all steps meets the weights once, since
its product is computed once. Biases and neurons count as nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.ops.g2g_stack.delays import LateSpikes


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


class Received(NamedTuple):
    """A connection of a run, and what it received.

    Attributes:
        values, mask: its packed weights, detached, and the units that exist.
        source: the number of the layer whose spikes it receives; −1: the inputs.
        late: these, where they arrive later than they are sent; else None.
    """

    values: torch.Tensor
    mask: BlockMask
    source: int
    late: LateSpikes | None = None


class Synapses:
    """The inputs and the weights of a run, from which its synaptic operations can be counted afterwards.

    Args:
        x: [T, B, in], or [B, in] held at every step.
        steps: for which x is held, or None.
        layers: the connections to each layer.
    """

    def __init__(self, x: torch.Tensor, steps: int | None, layers: Sequence[Sequence[Received]]) -> None:
        self._x, self._steps, self._layers = x.detach(), steps, layers
        self._then = self._now()

    def _now(self) -> list[object]:
        """What differs after something that is counted has changed."""
        tensors, masks = [self._x], []
        for layer in self._layers:
            for each in layer:
                tensors += [each.values] if each.late is None else [each.values, *each.late.tensors]
                masks.append(each.mask.changes)
        # those of inference mode have no version
        return [*masks, *[tensor._version for tensor in tensors if not tensor.is_inference()]]

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        """Of each layer, all connections to it included, given the firing rates of each, [N]; waits for the device.
        Exact up to 2²³ spikes per neuron. Raises RuntimeError if inputs, weights or masks have changed in the meantime.
        """
        if self._now() != self._then:
            raise RuntimeError(
                "the inputs, weights or masks of this run have changed since, so its synaptic operations are unknown; "
                "call synaptic_operations() right after the run, before optimizer and scheduler step"
            )
        x = self._x.reshape(-1, self._x.shape[-1])
        # a held input that arrives later is another one at each step
        vectors = len(x) * (self._steps or 1)
        sent = [(of.detach().double() * vectors).nan_to_num().round().long() for of in rates]
        sent.append((x != 0).sum(0))
        spiking = bool(((x == 0) | (x.abs() == 1)).all())
        counted = []
        for layer in self._layers:
            totals = [0, 0, 0]
            for values, mask, source, late in layer:
                received = sent[source] if late is None else (late.dense() != 0).sum((0, 1))
                totals[int(source < 0 and not spiking)] += int((received * _fan_out(values, mask)).sum())
                rows = len(x) if source < 0 and late is None else vectors
                totals[2] += rows * mask.shape[0] * mask.shape[1]
            counted.append(SynapticOperations(*totals))
        return tuple(counted)


def _fan_out(values: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """int64 [in], the number of weights other than zero of each input neuron."""
    per_unit = ((values != 0) & mask.valid()).sum(1)
    per_place = per_unit.new_zeros(mask.cols.num_units, mask.cols.width)
    per_place.index_add_(0, mask.unit_col.long(), per_unit)
    return per_place.flatten()[mask.cols.place_of]
