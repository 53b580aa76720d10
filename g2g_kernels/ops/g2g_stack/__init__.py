"""``g2g_stack``: spiking populations and the connections between them, over all time steps in one call.

One operator for the whole network lets a backend choose what passes between populations (packed spikes, its own order
of neurons) and how long each tensor lives.
"""

from collections.abc import Sequence
from typing import Any

import torch

from g2g_kernels.dispatch import Choice
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, NeuronState, Spikes, StackState
from g2g_kernels.ops.g2g_stack.checks import check_dropped
from g2g_kernels.ops.g2g_stack.delays import Delay
from g2g_kernels.ops.g2g_stack.population import Call, Connection, Population
from g2g_kernels.ops.g2g_stack.reference import activity_of
from g2g_kernels.ops.g2g_stack.ways import WAYS, choose, run

__all__ = [
    "WAYS", "Activity", "Call", "Connection", "Delay", "DenseSpikes", "NeuronState", "Population", "Spikes",
    "StackState", "activity_of", "check_dropped", "choose", "explain", "g2g_stack", "run",
]  # fmt: skip


def g2g_stack(
    x: torch.Tensor,
    populations: Sequence[Population],
    steps: int | None = None,
    backend: str | None = None,
    spikes: bool = False,
    chunk: int | None = None,
    before: torch.Tensor | None = None,
    truncate: int | None = None,
) -> Activity:
    """Runs populations of spiking neurons; differentiable in x and in all their tensors.

    The current of a population is the sum over its connections of W·S + b, of the spikes S of a source, or of x.

    Args:
        x: [T, B, in], or with ``steps`` given [B, in], held for that many steps (the first product is then
            computed once).
        populations: a chain, or any graph; the last is the output. Each has its own model, reset, surrogate and α.
        steps, backend: as for :func:`g2g_kernels.lif`.
        spikes: whether spikes over time need a gradient, for a loss on when neurons fire. Except on Triton, operators
            then run one after the other, with spikes and currents of all populations in memory; so they do if one of
            the ``populations`` gives its membranes.
        chunk: the number of steps that are computed at a time, and computed again in the backward pass. Gradients are
            the same; memory grows with T only by spikes and the states between chunks. (It saves nothing inside
            ``torch.compile`` and ``torch.func``.)
        before: [D, B, in], the inputs of the D steps before the first, if a delay reads them; None: zeros.
        truncate: K: no gradient passes from steps K, 2·K, … on to states of the steps before, or to spikes that were
            sent there and arrive later (truncated backpropagation); inputs have theirs. None: all gradients.

    Raises:
        ValueError: for options out of range, or tensors that do not match.
        BackendError: if the forced backend cannot serve the call.

    Example:
        >>> mask = BlockMask.full(GroupLayout(4, 1), GroupLayout(8, 1), block_size=4)
        >>> of_input = Connection("linear", mask.pack(torch.ones(4, 8)), mask, source=-1)
        >>> population = Population(Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0]))), (of_input,))
        >>> activity = g2g_stack(torch.rand(20, 2, 8), [population])  # [T, B, in]
        >>> activity.counts.shape, activity.rates[0].shape
        (torch.Size([2, 4]), torch.Size([4]))
    """
    return run(Call(x, tuple(populations or ()), steps, before, backend, spikes, truncate=truncate), chunk)


def explain(
    x: torch.Tensor,
    populations: Sequence[Population],
    steps: int | None = None,
    backend: str | None = None,
    chunk: int | None = None,
    **options: Any,
) -> Choice:
    """Which way :func:`g2g_stack` runs with these arguments of its own, and why no way before it in the table does. It
    can be printed, and runs nothing.

    Example:
        >>> mask = BlockMask.full(GroupLayout(4, 1), GroupLayout(8, 1), block_size=4)
        >>> of_input = Connection("linear", mask.pack(torch.ones(4, 8)), mask, source=-1)
        >>> population = Population(Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0]))), (of_input,))
        >>> print(explain(torch.rand(20, 2, 8), [population], backend="cpu", spikes=True))
        g2g_stack runs by operators in turn
          not cpu chain, cpu graph, cpu images, cpu events, cpu lists: gives spikes over time no gradient
    """
    return choose(Call(x, tuple(populations or ()), steps, backend=backend, **options), chunk)
