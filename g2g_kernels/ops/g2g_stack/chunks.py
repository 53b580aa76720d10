"""A run in chunks of time steps. Only spikes, the states after each chunk and membranes that are wanted stay in memory:
the backward pass runs one chunk at a time again, with gradients, from the states at its border, and finds the same
spikes to the last bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from g2g_kernels.ops.derivatives import Recomputed
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Spikes
from g2g_kernels.ops.g2g_stack.population import Call, total_steps
from g2g_kernels.ops.record import Form, built, opened
from g2g_kernels.tracing import replaced


class ChunkedSpikes(Spikes):
    """Spikes of one population, chunk after chunk (``chunks``)."""

    def __init__(self, chunks: Sequence[Spikes], chunk: int) -> None:
        self.chunks, self._chunk = chunks, chunk

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        return torch.cat([chunk.dense() for chunk in self.chunks])

    def events(self) -> torch.Tensor:
        """int64 [spikes, 3], as :meth:`Spikes.events`."""
        parts = [chunk.events() for chunk in self.chunks]
        return torch.cat([part + part.new_tensor([n * self._chunk, 0, 0]) for n, part in enumerate(parts)])


class SparseSteps:
    """Inputs [T, B, in] of which most are 0, as coalesced sparse COO tensor: a slice of steps is made dense."""

    def __init__(self, x: torch.Tensor) -> None:
        self.shape = x.shape
        self._indices, self._numbers = x.indices(), x.values()
        self._first = torch.searchsorted(self._indices[0].contiguous(), torch.arange(len(x) + 1, device=x.device))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, steps: slice) -> torch.Tensor:
        first, last, _ = steps.indices(len(self))
        dense = self._numbers.new_zeros(last - first, *self.shape[1:])
        own = slice(int(self._first[first]), int(self._first[last]))
        step, *place = self._indices[:, own]
        dense[(step - first, *place)] = self._numbers[own]
        return dense


def in_chunks(run: Callable[[Call], Activity], chunk: int, call: Call, truncated: bool = False) -> Activity:
    """The activity of ``run`` over all steps, ``chunk`` of them at a time (the last may be shorter); ``truncated``: no
    gradient passes from one to the one before it, and none is computed again."""
    spikes: list[tuple[Spikes, ...]] = []
    membranes: list[tuple[torch.Tensor | None, ...] | None] = []
    populations, before, total = call.populations, call.before, total_steps(call)
    counts: Any = 0
    rates: list[Any] = [0] * len(populations)
    for first in range(0, total, chunk):
        size = min(chunk, total - first)
        part, held = (call.x[first : first + size], None) if call.steps is None else (call.x, size)
        of_part = replaced(call, x=part, populations=populations, steps=held, before=before, carried=True)
        # what the last chunk keeps is used first, and would be computed again at once; others follow those of a part
        ends = first + size == total and not call.carried
        again = not (ends or truncated or call.plain or torch.compiler.is_compiling())
        activity = _recomputed(of_part, run) if again else run(of_part)
        assert activity.states is not None
        *sent, of_inputs = activity.sent or (None,) * (len(populations) + 1)
        before = None if of_inputs is None else of_inputs.dense()
        states, trains = list(activity.states), [None if each is None else each.dense() for each in sent]
        if truncated:
            states = [each.detach() for each in states]
            trains = [None if each is None else each.detach() for each in trains]
        populations = tuple(
            [
                replaced(population, state=state, sent=train)
                for population, state, train in zip(populations, states, trains)  # noqa: B905
            ]
        )
        counts = counts + activity.counts  # chunk by chunk, since of a wide network all of them would be large
        rates = [of_all + size / total * each for of_all, each in zip(rates, activity.rates, strict=True)]
        spikes.append(activity.spikes)
        membranes.append(activity.membranes)
    return Activity(
        counts=counts,
        rates=tuple(rates),
        spikes=tuple([ChunkedSpikes(of_population, chunk) for of_population in zip(*spikes, strict=True)]),
        states=activity.states,
        membranes=_joined(membranes),
        sent=activity.sent,
    )


def _joined(parts: Sequence[tuple[torch.Tensor | None, ...] | None]) -> tuple[torch.Tensor | None, ...] | None:
    """The membranes of all steps of each population, from those of chunks."""
    if parts[0] is None:
        return None
    of_populations = zip(*[part or () for part in parts])  # noqa: B905
    return tuple([None if each[0] is None else torch.cat(each) for each in of_populations])


#: neurons and numbers of spikes [D, B, N] that are kept for the backward pass as a sparse copy, at least, and numbers
#: for each one that is not 0
WIDE, LARGE, SPARSE = 1 << 10, 1 << 18, 32


def _packed(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, int]:
    """What is kept of a tensor: of spikes that delays carry out of a chunk a sparse copy."""
    large = tensor.dim() == 3 and tensor.shape[2] >= WIDE and tensor.numel() >= LARGE
    if large and tensor.is_cpu and int(tensor.count_nonzero()) * SPARSE <= tensor.numel():
        return tensor.detach().to_sparse()
    return tensor, tensor._version


def _unpacked(kept: torch.Tensor | tuple[torch.Tensor, int]) -> torch.Tensor:
    """The tensor. Raises RuntimeError if it has changed, which PyTorch does not notice where hooks keep it."""
    if isinstance(kept, torch.Tensor):
        return kept.to_dense()
    tensor, then = kept
    if tensor._version != then:
        raise RuntimeError(
            f"a tensor {list(tensor.shape)} of a run in chunks has been modified by an inplace operation before its "
            "backward pass; change weights and inputs after it"
        )
    return tensor


def _recomputed(call: Call, run: Callable[[Call], Activity]) -> Activity:
    """``run(call)``, which keeps nothing for the backward pass."""
    tensors, form = opened((call.x, call.before, call.populations))
    if not (torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])):
        return run(call)
    of_results: Form = []
    settings: Any = replaced(call, x=None, before=None, populations=())  # without tensors, which the graph would keep

    def again(*given: torch.Tensor, note: Callable[[Spikes], None] = lambda of_population: None) -> list[torch.Tensor]:
        x, before, populations = built(form, given)
        activity = run(replaced(settings, x=x, before=before, populations=populations, repeated=True))
        for of_population in activity.spikes:
            note(of_population)
        sent = [each and each.dense().clone() for each in activity.sent]  # a view would keep the spikes of all steps
        results, of_results[:] = opened((activity.counts, activity.rates, activity.states, sent, activity.membranes))
        return results

    indices = [
        index
        for population in call.populations
        for connection in population.connections
        if connection.mask is not None
        for index in connection.mask.tensors()
    ]
    spikes: list[Spikes] = []
    with torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
        results = Recomputed.apply(partial(again, note=spikes.append), again, indices, *tensors)
    counts, rates, states, sent, membranes = built(of_results, results)
    of_delays = tuple([None if each is None else DenseSpikes(each) for each in sent])
    return Activity(counts, rates, tuple(spikes), states=states, membranes=membranes, sent=of_delays)
