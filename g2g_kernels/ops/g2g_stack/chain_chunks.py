"""A chain in chunks of time steps, inside of its operator: as ``chunks``, but autograd sees one node, and between the
kernels of two chunks next to no Python runs, while OpenMP's threads wait at a core's full price.

What is kept for the backward pass are the states at the borders, layer by layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from g2g_kernels.ops.g2g_stack.call import Outputs, StackCall
from g2g_kernels.ops.record import Backward, Output, opened
from g2g_kernels.tracing import replaced

Forward = Callable[[StackCall, bool], Outputs]
Gradients = list[torch.Tensor | None]


def _starts(call: StackCall) -> range:
    """The first steps of its chunks."""
    return range(0, call.num_steps, call.chunk)


def _part(call: StackCall, first: int, states: Sequence[torch.Tensor] | None) -> StackCall:
    """The chunk that begins at step ``first``, with these states before it (None: those of the call)."""
    size, populations = min(call.chunk, call.num_steps - first), call.populations
    if states is not None:
        populations = tuple([replaced(each, state=state) for each, state in zip(populations, states, strict=True)])
    x = call.x if call.held else call.x[first : first + size]
    return replaced(call, x=x, populations=populations, steps=size if call.held else 0, chunk=0)


def forward_in_chunks(forward: Forward, call: StackCall, keep: bool) -> Outputs:
    """What ``forward`` returns for all steps."""
    counts: Any = 0
    rates: list[Any] = [0] * len(call.populations)
    states: list[torch.Tensor] | None = None
    borders: list[list[torch.Tensor]] = []
    words: list[torch.Tensor] = []
    for first in _starts(call):
        part = _part(call, first, states)
        of_part, own_rates, states, _, own_spikes, _ = forward(part, False)
        counts = counts + of_part
        rates = [of_all + part.num_steps / call.num_steps * own for of_all, own in zip(rates, own_rates, strict=True)]
        words += own_spikes
        borders.append(states)
    *earlier, last = borders
    return counts, rates, last, [], words, [each for of_border in earlier for each in of_border] if keep else []


def shapes_in_chunks(
    shapes: Callable[[StackCall, bool], Sequence[Output | list[Output]]], call: StackCall, keep: bool
) -> list[Output | list[Output]]:
    """Those of what :func:`forward_in_chunks` returns."""
    parts: list[Any] = [shapes(_part(call, first, None), False) for first in _starts(call)]
    *results, _, _ = parts[-1]
    borders = results[2] * (len(parts) - 1) if keep else []
    return [*results, [words for *_, of_part, _ in parts for words in of_part], borders]


def _added(sums: Gradients, grads: Gradients) -> Gradients:
    return [
        None if total is None or grad is None else total.add_(grad) for total, grad in zip(sums, grads, strict=True)
    ]


def backward_in_chunks(forward: Forward, backward: Callable[[Backward], Gradients], given: Backward) -> Gradients:
    """The gradients of the call's tensors; each chunk runs forward again."""
    call, needed, (grad_counts, *grads) = given.call, given.needed, given.grads
    count, starts = len(call.populations), _starts(call)
    borders = given.kept[count * len(starts) :]

    def gradients_of(part: StackCall, of_states: Gradients) -> Gradients:
        *_, words, of_part = forward(part, True)
        share = part.num_steps / call.num_steps
        of_rates = [None if each is None else share * each for each in grads[:count]]
        wanted = needed[0], *[True] * (len(opened(part)[0]) - 1)
        return backward(Backward(part, (*words, *of_part), (grad_counts, *of_rates, *of_states), wanted))

    of_x: torch.Tensor | None = None
    sums: Gradients = []
    of_states = grads[count : 2 * count]
    for number, first in reversed([*enumerate(starts)]):
        part = _part(call, first, borders[count * (number - 1) : count * number] if number else None)
        tensors, before = opened(part)[0], {id(population.state) for population in part.populations}
        found = gradients_of(part, of_states)  # which frees what the part has kept
        of_states = [grad for tensor, grad in zip(tensors, found, strict=True) if id(tensor) in before]
        others = [grad for tensor, grad in zip(tensors, found, strict=True) if id(tensor) not in before]
        if not call.held:  # the part's own steps, at their place
            of_part, others[0] = others[0], None
            if of_part is not None:
                of_x = of_part.new_empty(call.x.shape) if of_x is None else of_x
                of_x[first : first + len(of_part)] = of_part
        sums = _added(sums, others) if sums else others
    of_all = sums if call.held else [of_x, *sums[1:]]
    left, states = iter(of_all), iter(of_states)
    found = [next(states if id(tensor) in before else left) for tensor in tensors]
    return [grad if need else None for grad, need in zip(found, needed, strict=True)]
