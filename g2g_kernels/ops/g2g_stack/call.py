"""A call of ``g2g_stack`` in the form of the compiled backends' operators, and their registration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from g2g_kernels.ops.flops import count_flops, product_flops
from g2g_kernels.ops.g2g_stack.checks import check_ends
from g2g_kernels.ops.g2g_stack.population import ONE_STEP, Call, Connection, Population, expected_of, total_steps
from g2g_kernels.ops.g2g_stack.reference import PRODUCTS, in_turn
from g2g_kernels.ops.neurons.step import in_steps
from g2g_kernels.ops.record import TYPES, Backward, Differentiable, Expected, Output
from g2g_kernels.tracing import replaced

_Each = list[torch.Tensor]
#: counts [B, N] of the last population; of each rates [N] and states after the last step [states, B, N]; membranes
#: [T, B, N] of those that give them, and the spikes [T, B, N] of all if these need a gradient; of each the spikes in
#: the backend's form; and what the backward pass needs
Outputs = tuple[torch.Tensor, _Each, _Each, _Each, _Each, _Each]


#: of each population the connection from the one before it, or from the inputs, and its recurrent one, or None
Chain = list[tuple[Connection, Connection | None]]


def chain_of(populations: Sequence[Population]) -> Chain | str:
    """Populations as a chain, in which each receives the spikes of the one before it, and nothing else but its own of
    the last step; or why they are none."""
    chain: Chain = []
    for number, population in enumerate(populations):
        feed = recurrent = None
        for each in population.connections:
            if each.source == number - 1 and feed is None:
                feed = each
            elif each.source == number and each.delay == ONE_STEP and each.bias is None and recurrent is None:
                recurrent = each
            else:
                come_from = "the inputs" if each.source < 0 else f"population {each.source}"
                late = "" if each.delay is None else f", up to {each.delay.most} steps later"
                return f"the populations are no chain: population {number} also receives {come_from}{late}"
        if feed is None:
            return f"the populations are no chain: population {number} does not receive the one before it"
        chain.append((feed, recurrent))
    return chain


def contiguous(
    population: Population,
    connections: Sequence[Connection],
    sent: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Population:
    """A population as kernels read it: its tensors contiguous, the parameters of its neurons [1] or [N], its states and
    what it sent of ``dtype``."""
    flat: tuple[torch.Tensor, ...] = ()
    for each in population.neurons.parameters:
        flat = *flat, (each if each.dim() == 1 else each.reshape(-1)).contiguous()
    dropped, state = population.dropped, population.state
    return Population(
        replaced(population.neurons, parameters=flat),
        tuple(connections),
        None if dropped is None else dropped.contiguous(),
        None if state is None else state.to(dtype).contiguous(),
        None if sent is None else sent.to(dtype).contiguous(),
        bool(population.membranes),
    )


class StackCall(NamedTuple):
    """What the forward pass takes: x, contiguous [T, B, in], or [B, in] held for ``steps`` steps (otherwise 0); the
    populations of a chain from input to output, each with the connection from the one before it and, behind that, its
    recurrent one, tensors contiguous, masks as tensors; the ``dtype`` of the factors of products, bfloat16 or float16
    under autocast; whether ``spikes`` over time need a gradient; and how many steps are a ``chunk``, 0: all.
    """

    x: torch.Tensor
    populations: tuple[Population, ...]
    steps: int
    dtype: torch.dtype
    spikes: bool = False
    chunk: int = 0

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype, chunk: int = 0) -> "StackCall":
        """The call of the public function, whose populations are a chain."""
        called, device, chain = [], call.x.device, chain_of(call.populations)
        assert not isinstance(chain, str)  # others are refused
        for (feed, recurrent), population in zip(chain, call.populations):  # noqa: B905
            delay = None if feed.delay is None else feed.delay.of_each(feed.mask.shape[1], device)
            bias = None if feed.bias is None else feed.bias.contiguous()
            connections = [
                Connection("linear", feed.values.contiguous(), feed.mask.tensors(), feed.source, delay, bias)
            ]
            # of one step without spikes before it the weights have no gradient
            before = population.state is not None or population.sent is not None
            if recurrent is not None and (before or total_steps(call) > 1):
                own = recurrent.values.contiguous(), recurrent.mask.tensors(), recurrent.source, recurrent.delay
                connections.append(Connection("linear", *own))
            called.append(contiguous(population, connections, population.sent))
        return cls(call.x.contiguous(), tuple(called), call.steps or 0, dtype, call.spikes, chunk)

    @property
    def chain(self) -> Chain:
        """Of each population the connection from the one before it, and its recurrent one, or None."""
        chain: Chain = []
        for population in self.populations:
            feed, *own = population.connections
            chain.append((feed, own[0] if own else None))
        return chain

    @property
    def held(self) -> bool:
        """Whether x is the same at all steps."""
        return self.steps > 0

    @property
    def num_steps(self) -> int:
        """T."""
        return self.steps or self.x.shape[0]

    @property
    def batch(self) -> int:
        """B."""
        return self.x.shape[-2]

    def expected(self) -> Expected:
        """What kernels take for granted."""
        if isinstance(reason := chain_of(self.populations), str):
            raise ValueError(reason)
        if self.chunk < 0:
            raise ValueError(f"chunk={self.chunk} is no number of steps; give 0 for all")
        inputs = self.x.shape[-1]
        check_ends(self.populations, inputs)
        shape = (self.batch, inputs) if self.held else (self.num_steps, self.batch, inputs)
        yield "x", self.x, shape, torch.float32
        yield from expected_of(self.populations, self.batch)


TYPES["StackCall"] = StackCall


def operator_of(
    prefix: str,
    keys: Sequence[str],
    forward: Callable[[StackCall, bool], Outputs],
    backward: Callable[[Backward], list[torch.Tensor | None]],
    shapes: Callable[[StackCall, bool], Sequence[Output | list[Output]]],
) -> Differentiable:
    """Registers ``g2g::{prefix}stack_forward`` and ``…_backward``, as those of
    :mod:`g2g_kernels.ops.g2g_linear.call`. ``backward`` is given the gradients of counts, rates, last states, membranes
    and spikes, and the kept spikes and other tensors.
    """
    results = "(Tensor counts, Tensor[] rates, Tensor[] last, Tensor[] shown, Tensor[] spikes, Tensor[] kept)"
    operator = Differentiable(f"{prefix}stack", results, 4, forward, backward, shapes, _plain, keys)
    count_flops(operator, lambda call: sum(_flops(call)) + _recurrent_flops(call))
    count_flops(operator.backward, _backward_flops)
    return operator


def _plain(call: StackCall) -> list[torch.Tensor]:
    """Counts, rates, last states, membranes and spikes by plain operations."""
    plain = Call(call.x, call.populations, call.steps or None, spikes=True)
    activity = in_turn(plain, PRODUCTS, in_steps)
    assert activity.states is not None
    membranes = [each for each in activity.membranes or () if each is not None]
    spikes = [each.dense() for each in activity.spikes] if call.spikes else []
    return [activity.counts, *activity.rates, *activity.states, *membranes, *spikes]


def _flops(call: StackCall) -> list[int]:
    """Of the product that feeds each population; a held x is multiplied once in each chunk."""
    times = len(range(0, call.num_steps, call.chunk or call.num_steps)) if call.held else call.num_steps
    samples = [call.batch * (call.num_steps if number else times) for number in range(len(call.chain))]
    return [product_flops(count, feed.values, feed.mask) for count, (feed, _) in zip(samples, call.chain, strict=True)]


def _recurrent_flops(call: StackCall) -> int:
    samples = call.batch * (call.num_steps - 1)  # before the first step there are no spikes
    return sum(product_flops(samples, own.values, own.mask) for _, own in call.chain if own is not None)


def _backward_flops(given: Backward) -> int:
    first, *rest = _flops(given.call)
    again = sum((first, *rest)) + _recurrent_flops(given.call) if given.call.chunk else 0
    return again + first * (1 + int(given.needed[0])) + 2 * (sum(rest) + _recurrent_flops(given.call))
