"""A stack in chunks of time steps: the backward pass recomputes one chunk at a time, from the states at its border.

Of a chunk, only the spikes and the states after it stay in memory. The forward pass keeps nothing else for the backward
pass, which runs each chunk again, with gradients, and finds the same spikes to the last bit.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.ops.derivatives import differentiable_once, for_each
from g2g_kernels.ops.g2g_stack.activity import Activity, Spikes
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.tracing import is_transformed, replaced

#: (x, layers, steps) -> their activity
Run = Callable[[torch.Tensor, Sequence[SpikingLayer], int | None], Activity]


class ChunkedSpikes:
    """Spikes of one layer, chunk after chunk.

    Attributes:
        chunks: the spikes of each.
    """

    def __init__(self, chunks: Sequence[Spikes]) -> None:
        self.chunks = chunks

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        return torch.cat([chunk.dense() for chunk in self.chunks])


def in_chunks(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, chunk: int, run: Run) -> Activity:
    """The activity of ``run`` over all steps, ``chunk`` of them at a time (the last may be shorter)."""
    total = len(x) if steps is None else steps
    recomputes = not is_transformed() and not torch.compiler.is_compiling()
    done: list[tuple[int, Activity]] = []
    for first in range(0, total, chunk):
        size = min(chunk, total - first)
        part, held = (x[first : first + size], None) if steps is None else (x, size)
        activity = _recomputed(part, layers, held, run) if recomputes else run(part, layers, held)
        assert activity.states is not None
        layers = [
            replaced(layer, state=state)
            for layer, state in zip(layers, activity.states)  # noqa: B905
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
    )


class _Chunk(NamedTuple):
    """How to run a chunk from its tensors: x, then those of each layer.

    Attributes:
        layers: their tensors are replaced by the given ones.
        steps: for which x is held, or None.
        run: of all layers.
        autocast: as the forward pass had it: device, dtype and whether it is on.
        spikes: of each layer, from the forward pass.
    """

    layers: Sequence[SpikingLayer]
    steps: int | None
    run: Run
    autocast: tuple[str, torch.dtype, bool]
    spikes: list[Spikes]

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor) -> Activity:
        given = iter(tensors)
        layers = [layer.with_tensors(given) for layer in self.layers]
        device, dtype, enabled = self.autocast
        if not torch.amp.is_autocast_available(device):
            return self.run(x, layers, self.steps)
        with torch.autocast(device, dtype, enabled):
            return self.run(x, layers, self.steps)


def _recomputed(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, run: Run) -> Activity:
    """``run(x, layers, steps)``, nothing of which is kept for the backward pass."""
    tensors = list(itertools.chain.from_iterable(layer.tensors() for layer in layers))
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors))):
        return run(x, layers, steps)
    device = x.device.type
    autocast = (device, torch.float32, False)
    if torch.amp.is_autocast_available(device):
        autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    spikes: list[Spikes] = []
    counts, *results = _Recomputed.apply(_Chunk(layers, steps, run, autocast, spikes), x, *tensors)
    return Activity(counts, tuple(results[: len(layers)]), tuple(spikes), states=tuple(results[len(layers) :]))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk, x, *tensors):
        ctx.chunk = replaced(chunk, spikes=[])
        # what has no gradient, too: PyTorch then refuses the others' if it has changed in place in the meantime
        indices = [index for layer in chunk.layers for _, mask in layer.connections() for index in mask.tensors()]
        dropped = [layer.dropped for layer in chunk.layers if layer.dropped is not None]
        ctx.save_for_backward(x, *tensors, *indices, *dropped)
        activity = chunk(x, *tensors)
        chunk.spikes.extend(activity.spikes)
        ctx.set_materialize_grads(False)
        return activity.counts, *activity.rates, *activity.states

    @staticmethod
    @for_each
    @differentiable_once
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]
        # the saved tensors end with those that have no gradient
        differentiated = ctx.saved_tensors[: len(needed)]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(differentiated, needed, strict=True)]
        with torch.enable_grad():
            activity = ctx.chunk(*inputs)
        outputs = activity.counts, *activity.rates, *activity.states
        # where operators run in turn, outputs of a frozen layer have no gradient
        reached = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        if not reached:
            return None, *[None] * len(needed)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in reached], wanted, [grad for _, grad in reached], allow_unused=True
            )
        )
        return None, *(next(found) if need else None for need in needed)
