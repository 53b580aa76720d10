"""Populations, the connections to them, and a call that runs them: what modules, operators and backends know."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops.g2g_stack.delays import Delay, late_of, reaches_of
from g2g_kernels.ops.g2g_stack.images import Images, ends_of
from g2g_kernels.ops.g2g_stack.schedule import Component, Graph, components_of
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.step import spikes_of
from g2g_kernels.ops.record import TYPES, Expected

#: called with the inputs of a product and what it gives; returns that
ProductObserver = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Connection(NamedTuple):
    """What joins a source to the neurons of a population.

    Attributes:
        kind: ``"linear"``, ``"convolution"`` or ``"pool"``; or ``"module"``, which only modules called in turn take: it
            is what a module returns.
        values: packed weights [num_units, unit_rows, unit_cols]; of a convolution its dense weight; of a pool a number
            [] that what it gives is multiplied by, or None; the module.
        mask: the units that exist; inside operators its tensors; of others than linear ones None.
        source: the number of the population whose spikes it receives, which may be a later one or the target itself;
            −1: it receives the inputs of the whole network.
        delay: by how many steps they arrive later; None: in the same step.
        bias: [N], of a convolution [C], which acts at every step; or None. (A module is called before anything arrives
            unless this is None.)
        observer: called with x and W·x + b, in each step where populations take steps; returns the latter, perhaps by a
            node that finds its gradient; or None. Operators then run in turn; in chunks, it is called with gradients in
            the backward pass.
        onto: ``"membrane"``: it adds to that, though the model has a synaptic current; None: to the current.
        images: in which the source's neurons lie, of a convolution, a pool, or a linear connection that has pools
            before it; or None.

    Example:
        >>> mask = BlockMask.full(GroupLayout(4, 1), GroupLayout(8, 1), block_size=4)
        >>> Connection("linear", mask.pack(torch.ones(4, 8)), mask, source=-1).values.shape
        torch.Size([2, 4, 4])
    """

    kind: str
    values: Any
    mask: Any
    source: int
    delay: Delay | None = None
    bias: torch.Tensor | None = None
    observer: ProductObserver | None = None
    onto: str | None = None
    images: Images | None = None


class Population(NamedTuple):
    """Neurons, and all that reaches them.

    This record and :class:`Connection` are the only list of what a network has: operators take them
    (``ops/record.py``), structures of the C interface have fields of the same names, and a backend refuses a field that
    it does not read.

    Attributes:
        neurons: with their own model, reset, surrogate and α.
        connections: to them, at least one. A recurrent one has its own population as the source, and a delay of 1.
        dropped: bool [B, N], neurons that stay silent in a sample and pass no gradient; or None.
        state: float [states, B, N], the neurons' states before the first step, in the model's order; None: all 0.
        sent: float [D, B, N], what the neurons sent in the D steps before the first, if a delay of more than one step
            reads it, or any delay where a model is reset in the step of its spike; None: nothing. (The spikes of one
            step before follow from the ``state`` of other models.)
        membranes: whether the run gives the membranes over time, or the numbers of the neurons of which it does. The
            neurons then run step by step, except on Triton and by events.

    Example:
        >>> mask = BlockMask.full(GroupLayout(4, 1), GroupLayout(8, 1), block_size=4)
        >>> of_input = Connection("linear", mask.pack(torch.ones(4, 8)), mask, source=-1)
        >>> population = Population(Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0]))), (of_input,))
        >>> g2g_stack(torch.rand(2, 8), [population], steps=5).counts.shape
        torch.Size([2, 4])
    """

    neurons: Neurons
    connections: tuple[Connection, ...]
    dropped: torch.Tensor | None = None
    state: torch.Tensor | None = None
    sent: torch.Tensor | None = None
    membranes: bool | tuple[int, ...] = False


class Call(NamedTuple):
    """A call of ``g2g_stack``, as each way to run it takes it.

    Attributes:
        x: [T, B, in], or with ``steps`` given [B, in], held for that many steps.
        populations: from input to output.
        steps: for which x is held, or None.
        before: [D, B, in], the inputs of the D steps before the first; None: nothing.
        backend: the one that is asked for by name, or None.
        spikes: whether spikes over time need a gradient.
        plain: whether derivatives are wanted that only plain operations have.
        carried: whether what delays carry into the run has a gradient.
        repeated: whether the run is computed again for its gradients, and then needs the same spikes to the last bit.
        truncate: K, where states and delayed spikes are constants at steps K, 2·K, …; None: nowhere.
        modules: what calls the modules of a network instead, ``run(call)``, and ``why`` that is needed; None: nothing.
    """

    x: torch.Tensor
    populations: tuple[Population, ...]
    steps: int | None = None
    before: torch.Tensor | None = None
    backend: str | None = None
    spikes: bool = False
    plain: bool = False
    carried: bool = False
    repeated: bool = False
    truncate: int | None = None
    modules: Any = None


# not properties: the compiler of PyTorch 2.8 does not know those of a named tuple


def size_of(population: Population) -> int:
    """The number of its neurons."""
    return ends_of(population.connections[0])[0]


def state_shape(population: Population, batch: int) -> tuple[int, int, int]:
    """[states, B, N]."""
    return len(MODELS[population.neurons.model].states), batch, size_of(population)


def expected_of(populations: Sequence[Population], batch: int) -> Expected:
    """What kernels take for granted of the tensors of populations."""
    for number, population in enumerate(populations):
        of, shape, sent = f" of population {number}", state_shape(population, batch), population.sent
        yield f"dropped{of}", population.dropped, shape[1:], torch.bool
        yield f"state{of}", population.state, shape, torch.float32
        yield f"sent{of}", sent, () if sent is None else (len(sent), *shape[1:]), torch.float32
        yield from population.neurons.expected(shape[2], of)
        for each in population.connections:
            to, (outputs, inputs) = f" of a connection to population {number}", ends_of(each)
            yield f"values{to}", each.values, each.values.shape, torch.float32
            yield f"bias{to}", each.bias, (outputs,), torch.float32
            if each.delay is not None:
                yield f"delays{to}", each.delay.steps, (inputs,), torch.int64
                yield f"learned delays{to}", each.delay.learned, (inputs,), torch.float32


def total_steps(call: Call) -> int:
    """T."""
    return len(call.x) if call.steps is None else call.steps


def shown(population: Population, membranes: torch.Tensor) -> torch.Tensor:
    """The membranes that a population gives, of those of all its neurons, [..., N]."""
    wanted = population.membranes
    return membranes[..., list(wanted)] if isinstance(wanted, tuple) else membranes


#: the delay of a recurrent connection
ONE_STEP = Delay(1, 1)


def graph_of(populations: Sequence[Population]) -> Graph:
    """The connections to populations, and the least delay of each."""
    graph: Graph = ()
    for of in populations:
        joins = [(each.source, 0 if each.delay is None else each.delay.least) for each in of.connections]
        graph = *graph, tuple(joins)
    return graph


def components(populations: Sequence[Population]) -> Sequence[Component]:
    """:func:`g2g_kernels.ops.g2g_stack.schedule.components_of` these populations."""
    return components_of(graph_of(populations), late_of([getattr(of.neurons, "model", None) for of in populations]))


def reaches(populations: Sequence[Population]) -> list[int]:
    """:func:`g2g_kernels.ops.g2g_stack.delays.reaches_of` these populations."""
    connections = [(each.source, each.delay) for population in populations for each in population.connections]
    return reaches_of(connections, [getattr(of.neurons, "model", None) for of in populations])


def sent_before(population: Population, reach: int, dtype: torch.dtype) -> torch.Tensor | None:
    """[D, B, N], what a population sent in the D = ``reach`` steps before a run (:func:`reaches`); None: nothing."""
    if reach:  # a run under autocast has given fewer bits
        return None if population.sent is None else population.sent.to(dtype)
    if population.state is None:
        return None
    spikes = spikes_of(population.state[-1], population.neurons).to(dtype)
    return (spikes if population.dropped is None else spikes.masked_fill(population.dropped, 0))[None]


def refuses_kernels(call: Call, unread_fields: Sequence[str]) -> str | None:
    """Why no kernel for several populations that does not read these fields can serve a call, or None."""
    if call.modules is not None:
        return call.modules.why
    if call.plain:
        return "has no plain operations, which transforms of torch.func, tangents and torch.jit.trace need"
    return refuses_fields(unread_fields, call.populations)


def unread(read: Collection[str]) -> list[str]:
    """The fields of populations and connections that a backend which reads only these refuses where they are given."""
    return [name for name in (*Population._fields, *Connection._fields) if name not in read]


def refuses_fields(names: Sequence[str], populations: Sequence[Population]) -> str | None:
    """Why a backend that does not read the fields ``names`` cannot serve a call, or None."""
    for name in names:
        of_population = name in Population._fields
        default = (Population if of_population else Connection)._field_defaults.get(name)
        records = populations if of_population else [each for of in populations for each in of.connections]
        if any([getattr(each, name) is not default for each in records]):
            return f"does not read {name!r} of a {'population' if of_population else 'connection'}"
    return None


TYPES |= {"Population": Population, "Connection": Connection}
