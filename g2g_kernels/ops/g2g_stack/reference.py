"""Plain PyTorch ``g2g_stack``: two operators, population by population. The oracle for every backend. Populations that
reach one another take turns, as many steps at a time as their delays allow: a recurrent one takes one step after the
other, its product with the inputs excepted. So do the neurons of a population whose membranes are wanted.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops.checks import mixed_dtypes
from g2g_kernels.ops.g2g_conv2d.reference import g2g_conv2d
from g2g_kernels.ops.g2g_linear.reference import g2g_linear
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes
from g2g_kernels.ops.g2g_stack.delays import Train, arrived
from g2g_kernels.ops.g2g_stack.images import through
from g2g_kernels.ops.g2g_stack.population import (
    Call,
    Connection,
    Population,
    components,
    reaches,
    sent_before,
    shown,
    size_of,
    total_steps,
)
from g2g_kernels.ops.g2g_stack.schedule import Component
from g2g_kernels.ops.neurons.reference import neurons


def refuses(call: Call) -> str | None:
    """Why even these operations cannot serve a call, or None."""
    for population in call.populations:
        for each in population.connections:
            if each.kind != "pool" and (reason := mixed_dtypes(call.x, each.values, each.bias)):
                return reason
    return None


def g2g_stack(call: Call) -> Activity:
    return in_turn(call, PRODUCTS, neurons)


#: the operator of each kind of connection with weights
Products = Mapping[str, Callable]
#: by plain operations
PRODUCTS: Products = {"linear": g2g_linear, "convolution": g2g_conv2d}


class PopulationFunctions(NamedTuple):
    """A population of ``size`` neurons as functions, which are called one after the other.

    Attributes:
        products: of each connection in order: of what it receives [..., in], gives what it adds to the current
            [..., N], its bias included.
        neurons: of the current [T, B, N], or [B, N] held for a number of steps, that number or None, the states
            before, and a current onto the membrane of the same shape, if there is one, gives spikes [T, B, N] and the
            states after.
        loop: the same with the recurrent connection, of whose delay of D steps it also takes the spikes of the D steps
            before the first, [D, B, N], or None; it is always given the number of steps, and either current may be
            held. None where there is nothing but ``neurons``.
    """

    size: int
    products: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    neurons: Callable[..., tuple[torch.Tensor, Any]]
    loop: Callable[..., tuple[torch.Tensor, Any]] | None = None


class Turn(NamedTuple):
    """What populations did one after the other: of each the spikes [T, B, N], the last states, the membranes [T, B, N]
    if it is to give them (or [T, B, n]), and ``sent`` [D, B, N], what each, and at the end the inputs, sent in the last
    D steps; None where no delay reads it.
    """

    spikes: list[torch.Tensor]
    states: list[Any]
    membranes: list[torch.Tensor | None]
    sent: list[torch.Tensor | None]


def in_turn(call: Call, operators: Products, neurons: Callable, loop_of: Callable | None = None) -> Activity:
    """A run by operators, or by what ``loop_of(number, population)`` gives, unless that is None."""
    turn = GraphRun(call, functions_of(call.populations, operators, neurons, loop_of)).turn()
    return activity_of(*turn, differentiable=call.spikes)


def functions_of(
    populations: Sequence[Population], operators: Products, neurons: Callable, loop_of: Callable | None = None
) -> list[PopulationFunctions]:
    """Populations as functions of these operators."""
    functions = []
    for number, population in enumerate(populations):
        products = [partial(_product, operators, connection) for connection in population.connections]
        loop, run = None if loop_of is None else loop_of(number, population), partial(_neurons, neurons, population)
        functions.append(PopulationFunctions(size_of(population), products, run, loop))
    return functions


def _product(operators: Products, connection: Connection, x: torch.Tensor) -> torch.Tensor:
    values, images = connection.values, connection.images
    if images is None:
        return _linear(operators, connection, x)
    if connection.kind == "linear":
        return through(images, x, partial(_linear, operators, connection), flat=True)
    if images.convolution is not None:
        convolution = operators["convolution"]
        return through(
            images, x, lambda x: convolution(x, values, connection.bias, *images.convolution or ()), flat=False
        )
    return through(images, x, lambda x: x if values is None else x * values, flat=False)


def _linear(operators: Products, connection: Connection, x: torch.Tensor) -> torch.Tensor:
    y = operators["linear"](x, connection.values, connection.mask, connection.bias)
    return y if connection.observer is None else connection.observer(x, y)


def _neurons(neurons: Callable, population: Population, current: torch.Tensor, *rest: Any, **own: torch.Tensor) -> Any:
    steps, state = rest
    return neurons(current, population.neurons, steps, state=state, **own)


class GraphRun:
    """A run of populations by their ``functions``; those that reach one another take turns
    (:mod:`g2g_kernels.ops.g2g_stack.schedule`). It reads of a call what is not in these."""

    def __init__(self, call: Call, functions: Sequence[PopulationFunctions]) -> None:
        x, populations = call.x, call.populations
        self.x, self.populations, self.functions, self.held = x, populations, functions, call.steps is not None
        self.steps = total_steps(call)
        self.reaches = reaches(populations)
        inputs = Train(x if self.held else x[0], call.before)
        inputs.append(x.expand(self.steps, *x.shape) if self.held else x)
        #: what each population sends, and at the end the inputs
        self.trains: list[Any] = [*[None] * len(populations), inputs]
        self.spikes: list[list[torch.Tensor]] = [[] for _ in populations]
        self.states: list[Any] = [population.state for population in populations]
        self.membranes: list[list[torch.Tensor]] = [[] for _ in populations]
        #: of each what its connections add to, the current first
        self.onto = [(None, *{each.onto for each in of.connections if each.onto}) for of in populations]

    def before(self, number: int, dtype: torch.dtype) -> torch.Tensor | None:
        """:func:`sent_before` the run, where that is read."""
        if any([each.source == number and each.delay for of in self.populations for each in of.connections]):
            return sent_before(self.populations[number], self.reaches[number], dtype)
        return None

    def run(self, component: Component) -> None:
        """Runs populations that reach one another, or one that does not reach itself."""
        if self._loop(component):
            return
        received, inside = list(self._received(component)), set(component.members)
        pieces: dict[int, list[Iterator[torch.Tensor | None]]] = {}
        for number in component.members:
            currents = self.currents(number, 0, self.steps, lambda source: source not in inside)
            self.begin(number, currents[0])
            if not component.period:
                return self._advance(number, currents, self.steps)
            sizes = [last - first for which, first, last in received if which == number]
            pieces[number] = [
                # the same at all steps
                itertools.repeat(each) if each is None or each.dim() == 2 else iter(each.split(sizes))
                for each in currents
            ]
        for number in component.late:
            self._send_next(number)
        for number, first, last in received:
            currents = [next(of_blocks) for of_blocks in pieces[number]]
            for place, own in enumerate(self.currents(number, first, last, inside.__contains__)):
                current = currents[place]
                if own is not None:
                    current = own if current is None else current + own
                if current is not None and current.dim() == 2:
                    current = current.expand(last - first, *current.shape)
                currents[place] = current
            is_late = number in component.late
            self._advance(number, currents, last - first, known=int(is_late))
            if is_late and last < self.steps:
                self._send_next(number)

    def _received(self, component: Component) -> Iterator[tuple[int, int, int]]:
        """(population, first step, step after the last) of what arrives before each block; in ``late`` populations what
        arrives in a step is not needed for its spikes, so the next step's are sent, too."""
        for number, first, last in component.blocks(self.steps):
            if number in component.late:
                first, last = max(first - 1, 0), last - 1
            if first < last:
                yield number, first, last
        for number in component.late:
            yield number, self.steps - 1, self.steps

    def _send_next(self, number: int) -> None:
        """Sends the spikes of the next step, which follow from the states of a population that is ``late``."""
        spikes, _ = self.functions[number].neurons(self.trains[number].nothing()[None], None, self.states[number])
        self._send(number, spikes)

    def begin(self, number: int, current: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Begins the train of a population; a step in which it sends nothing, and what it sent before the run."""
        nothing = self.x.new_zeros(self.x.shape[-2], self.functions[number].size)
        before = self.before(number, (nothing if current is None else current).dtype)
        self.trains[number] = Train(nothing, before)
        return nothing, before

    def _loop(self, component: Component) -> bool:
        """Runs a population whose only way to itself is its recurrent connection, if it has an operator for that."""
        number, loop = component.members[0], self.functions[component.members[0]].loop
        if loop is None or len(component.members) > 1:
            return False
        current, *onto = self.currents(number, 0, self.steps, lambda source: source != number)
        nothing, before = self.begin(number, current)
        current = nothing if current is None else current
        to_membrane = onto[0] if onto else None
        (delay,) = [each.delay for each in self.populations[number].connections if each.source == number]
        sent = None if before is None or delay is None else before[-delay.least :]
        spikes, self.states[number] = loop(current, self.steps, self.states[number], sent, to_membrane)
        self._send(number, spikes)
        return True

    def currents(self, number: int, first: int, last: int, chosen: Callable[[int], bool]) -> list[torch.Tensor | None]:
        """:meth:`current` of all that the connections to a population add to."""
        return [self.current(number, first, last, chosen, onto) for onto in self.onto[number]]

    def current(
        self, number: int, first: int, last: int, chosen: Callable[[int], bool], onto: str | None = None
    ) -> torch.Tensor | None:
        """What the connections from the chosen sources add to the current of a population, or to its membrane,
        [n, B, N], or [B, N] if it is the same at all steps; None: nothing."""
        current, connections = None, self.populations[number].connections
        for connection, product in zip(connections, self.functions[number].products, strict=True):
            source, delay = connection.source, connection.delay
            if connection.onto != onto or not chosen(source):
                continue
            if source < 0 and self.held and delay is None:
                added = product(self.x)
            elif (received := arrived(self.trains[source], delay, first, last)) is not None:
                # where populations take single steps, what they receive has no time axis
                added = product(received) if delay is None or len(received) > 1 else product(received[0])[None]
            elif connection.bias is not None or (connection.images is not None and connection.images.norm):
                added = product(self.trains[source].nothing())
            else:
                continue
            current = added if current is None else current + added
        return current

    def _advance(self, number: int, currents: Sequence[torch.Tensor | None], count: int, known: int = 0) -> None:
        """Runs a population for ``count`` steps; the spikes of the first ``known`` have been sent."""
        population, functions = self.populations[number], self.functions[number]
        current, to_membrane = (*currents, None)[:2]
        if current is None and to_membrane is not None:
            current = torch.zeros_like(to_membrane)
        elif current is None:
            current = functions.products[0](self.trains[population.connections[0].source].nothing())
        own: dict[str, torch.Tensor] = {}
        if to_membrane is not None:
            current, own["to_membrane"] = torch.broadcast_tensors(current, to_membrane)
        held = count if current.dim() == 2 else None
        if not population.membranes:
            spikes, self.states[number] = functions.neurons(current, held, self.states[number], **own)
            if known < count:
                # a slice of everything would be an operator more for devices without kernels
                self._send(number, spikes[known:] if known else spikes)
            return
        for t in range(count):
            now, *onto = [each[None] if held else each[t : t + 1] for each in (current, *own.values())]
            spikes, self.states[number] = functions.neurons(
                now, None, self.states[number], **dict(zip(own, onto, strict=True))
            )
            if t >= known:
                self._send(number, spikes)
            membrane = self.states[number][-1]
            dropped = population.dropped
            membrane = membrane if dropped is None else membrane.masked_fill(dropped, 0)
            self.membranes[number].append(shown(population, membrane))

    def _send(self, number: int, spikes: torch.Tensor) -> None:
        dropped = self.populations[number].dropped
        if dropped is not None:
            spikes = spikes.masked_fill(dropped, 0)
        self.trains[number].append(spikes)
        self.spikes[number].append(spikes)

    def turn(self) -> Turn:
        """Runs all populations; what they have done."""
        for together in components(self.populations):
            self.run(together)
        return Turn(
            [each[0] if len(each) == 1 else torch.cat(each) for each in self.spikes],
            self.states,
            [torch.stack(each) if each else None for each in self.membranes],
            [
                train.window(self.steps - reach, self.steps) if reach else None
                for train, reach in zip(self.trains, self.reaches, strict=True)
            ],
        )


def activity_of(
    spikes: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor] | None,
    membranes: Sequence[torch.Tensor | None] = (None,),
    sent: Sequence[torch.Tensor | None] = (),
    *,
    differentiable: bool,
) -> Activity:
    """The activity with these spikes, last states and membranes; ``dense()`` has a gradient if requested."""
    return Activity(
        counts=spikes[-1].float().sum(0) if spikes[-1].dtype.itemsize < 4 else spikes[-1].sum(0),
        rates=tuple(s.mean((0, 1), dtype=torch.promote_types(s.dtype, torch.float32)) for s in spikes),
        spikes=tuple(DenseSpikes(each if differentiable else each.detach()) for each in spikes),
        states=None if states is None else tuple(states),
        membranes=None if all(each is None for each in membranes) else tuple(membranes),
        sent=tuple([None if each is None else DenseSpikes(each) for each in sent]),
    )
