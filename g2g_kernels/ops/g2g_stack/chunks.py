"""A stack in chunks of time steps, of which only spikes and the states after each stay in memory: the backward pass
runs one chunk at a time again, with gradients, from the states at its border, and finds the same spikes to the last
bit.
"""

from collections.abc import Callable, Sequence

import torch

from g2g_kernels.ops.derivatives import autocast_of, gradients_of, has_tangent
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Spikes
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.record import Form, built, opened
from g2g_kernels.tracing import is_transformed, replaced

#: (x, layers, steps, inputs before the first step) -> their activity
RunLayers = Callable[[torch.Tensor, Sequence[SpikingLayer], int | None, torch.Tensor | None], Activity]


class ChunkedSpikes:
    """Spikes of one layer, chunk after chunk (``chunks``)."""

    def __init__(self, chunks: Sequence[Spikes]) -> None:
        self.chunks = chunks

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        return torch.cat([chunk.dense() for chunk in self.chunks])


def in_chunks(
    run: RunLayers,
    chunk: int,
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    before: torch.Tensor | None = None,
) -> Activity:
    """The activity of ``run`` over all steps, ``chunk`` of them at a time (the last may be shorter)."""
    total = len(x) if steps is None else steps
    plain = torch.compiler.is_compiling() or is_transformed() or has_tangent(opened((x, before, tuple(layers)))[0])
    done: list[tuple[int, Activity]] = []
    for first in range(0, total, chunk):
        size = min(chunk, total - first)
        part, held = (x[first : first + size], None) if steps is None else (x, size)
        activity = run(part, layers, held, before) if plain else _recomputed(part, layers, held, before, run)
        assert activity.states is not None
        *sent, of_inputs = activity.sent or (None,) * (len(layers) + 1)
        before = None if of_inputs is None else of_inputs.dense()
        layers = [
            replaced(layer, state=state, sent=of_layer and of_layer.dense())
            for layer, state, of_layer in zip(layers, activity.states, sent)  # noqa: B905
        ]
        done.append((size, activity))
    shares = [size / total for size, _ in done]
    activities = [activity for _, activity in done]
    return Activity(
        counts=torch.stack([activity.counts for activity in activities]).sum(0),
        rates=tuple(
            torch.stack([share * rates for share, rates in zip(shares, of_layer)]).sum(0)  # noqa: B905
            for of_layer in zip(*(activity.rates for activity in activities))  # noqa: B905
        ),
        spikes=tuple(ChunkedSpikes(of_layer) for of_layer in zip(*(each.spikes for each in activities))),  # noqa: B905
        states=activities[-1].states,
        sent=activities[-1].sent,
    )


def _recomputed(
    x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, before: torch.Tensor | None, run: RunLayers
) -> Activity:
    """``run(x, layers, steps, before)``, nothing of which is kept for the backward pass."""
    tensors, form = opened((x, before, tuple(layers)))
    if not (torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])):
        return run(x, layers, steps, before)
    spikes: list[Spikes] = []
    of_results: Form = []

    def again(*given: torch.Tensor) -> list[torch.Tensor]:
        x, before, layers = built(form, given)
        activity = run(x, layers, steps, before)
        sent = [each and each.dense() for each in activity.sent]
        spikes[:] = activity.spikes
        results, of_results[:] = opened((activity.counts, activity.rates, activity.states, sent))
        return results

    # what has no gradient, too: PyTorch then refuses the others' if it has changed in place in the meantime
    indices = [
        index
        for number, layer in enumerate(layers)
        for connection in layer.connections(number)
        for index in connection.mask.tensors()
    ]
    counts, rates, states, sent = built(of_results, _Recomputed.apply(again, indices, *tensors))
    made = tuple(spikes)
    spikes.clear()  # which the graph would keep alive
    of_delays = tuple([None if each is None else DenseSpikes(each) for each in sent])
    return Activity(counts, rates, made, states=states, sent=of_delays)


class _Recomputed(torch.autograd.Function):
    """The results of a function, which runs again in the backward pass."""

    @staticmethod
    def forward(ctx, function, more, *tensors):
        ctx.function, ctx.count, ctx.autocast = function, len(tensors), autocast_of(tensors[0])
        ctx.save_for_backward(*tensors, *more)
        ctx.set_materialize_grads(False)
        return tuple(function(*tensors))

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors[: ctx.count]
        return None, None, *gradients_of(ctx.function, tensors, grads, ctx.needs_input_grad[2:], ctx.autocast)
