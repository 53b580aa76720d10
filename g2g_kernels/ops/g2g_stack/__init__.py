"""``g2g_stack``: a stack of g2g linear layers, each followed by neurons, over all time steps in one call.

One operator for the whole stack lets a backend choose what passes between the layers (packed spikes, its own order of
neurons) and how long each tensor lives.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from g2g_kernels.dispatch import Operator
from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.numbers import COUNT
from g2g_kernels.ops.checks import check_connection, check_tensor
from g2g_kernels.ops.derivatives import has_tangent
from g2g_kernels.ops.g2g_linear import g2g_linear
from g2g_kernels.ops.g2g_stack import cpu, graph, recurrent_lists, reference
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, NeuronState, Spikes, StackState
from g2g_kernels.ops.g2g_stack.chunks import in_chunks
from g2g_kernels.ops.g2g_stack.delays import Delay, LateSpikes, Train, arrived, check_delay
from g2g_kernels.ops.g2g_stack.layer import Connection, Recurrent, SpikingLayer, is_chain
from g2g_kernels.ops.g2g_stack.reference import activity_of
from g2g_kernels.ops.g2g_stack.schedule import components_of
from g2g_kernels.ops.g2g_stack.synaptic_operations import Received, Synapses, SynapticOperations
from g2g_kernels.ops.neurons import run_neurons
from g2g_kernels.ops.neurons.checks import check_neurons, check_state, check_steps
from g2g_kernels.ops.record import Form, opened
from g2g_kernels.tracing import is_traced, is_transformed, replaced

__all__ = [
    "Activity", "Connection", "Delay", "DenseSpikes", "NeuronState", "Recurrent", "Spikes", "SpikingLayer",
    "StackState", "Synapses", "SynapticOperations", "activity_of", "check_dropped", "g2g_stack",
]  # fmt: skip


def _triton() -> ModuleType:
    from g2g_kernels.ops.g2g_stack import triton  # imports Triton, which is optional

    return triton


operator = Operator("g2g_stack")
operator.register_module("triton", _triton)
operator.register("cpu", cpu.g2g_stack, cpu.refuses)
operator.register("torch", reference.g2g_stack, reference.refuses)


def g2g_stack(
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None = None,
    backend: str | None = None,
    spikes: bool = False,
    chunk: int | None = None,
    before: torch.Tensor | None = None,
) -> Activity:
    """Runs ``neurons(g2g_linear(·))`` for each layer; differentiable in x and in every tensor of the layers.

    Layers are a stack, or any graph: ``source`` and ``more`` of a layer say what else it receives, and how much later.

    Args:
        x: [T, B, in], or with ``steps`` given [B, in], held for that many steps (the first product is then
            computed once).
        layers: the layers, each one's outputs the next one's inputs unless it says otherwise; the last is the output.
            Each layer has its own model, reset, surrogate and α.
        steps, backend: as for :func:`g2g_kernels.lif`.
        spikes: whether spikes over time need a gradient, for a loss on when neurons fire. Unless backend ``triton``
            serves the call, the operators then run one after the other, and spikes and currents of all layers are in
            memory. So they do if one of the ``layers`` is to give its membranes.
        chunk: for long runs: so many steps at a time are computed, and in the backward pass computed again. Gradients
            are the same, and memory grows with T by spikes and the states between chunks only. (Inside
            ``torch.compile`` and ``torch.func`` nothing is computed again, so that no memory is saved.)
        before: [D, B, in], the inputs of the D steps before the first, if a delay reads them; None: zeros.

    Raises:
        ValueError: for options out of range, or tensors that do not match.
        BackendError: if the forced backend cannot serve the call.

    Example:
        >>> mask = BlockMask.full(GroupLayout(4, 1), GroupLayout(8, 1), block_size=4)
        >>> population = Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0])))
        >>> layer = SpikingLayer(mask.pack(torch.ones(4, 8)), mask, None, population)
        >>> activity = g2g_stack(torch.rand(20, 2, 8), [layer])  # [T, B, in]
        >>> activity.counts.shape, activity.rates[0].shape
        (torch.Size([2, 4]), torch.Size([4]))
    """
    layers = tuple(layers or ())
    tensors, form = opened((x, before, *layers))
    plain = is_transformed() or has_tangent(tensors)
    call = None if is_traced() else _signature(tensors, form, steps, chunk, spikes, plain, backend)
    try:
        run = None if call is None else _runs.get(call)
    except TypeError:  # sizes that are symbols have no hash
        run = call = None
    if run is None:
        given = [parameter for layer in layers for parameter in layer.population.parameters]
        layers = _checked(x, layers, steps, spikes, chunk, before)
        steps = None if steps is None else int(steps)
        if chunk is None:
            run = _runner(x, layers, steps, backend, spikes, plain)
        else:
            run = partial(in_chunks, partial(_run_part, backend), chunk)
        # numbers are made tensors each time
        if call is not None and all(isinstance(parameter, torch.Tensor) for parameter in given):
            if len(_runs) > 1000:
                _runs.clear()
            _runs[call] = run
    activity = run(x, layers, steps) if before is None else run(x, layers, steps, before)
    if torch.compiler.is_compiling():
        return activity
    return activity._replace(synapses=_synapses(x, layers, steps, before, activity.spikes))


#: (x, layers, steps, inputs before the first step, if any) -> their activity
Run = Callable[..., Activity]
#: the types of what a signature keeps; that of TENSOR is the last
_PLAIN = {type(None), bool, int, float, str, tuple, object}
#: what runs calls of a signature that have passed :func:`_checked`, which looks at nothing but what that has
_runs: dict[Hashable, Run] = {}


def _signature(tensors: Sequence[torch.Tensor], form: Form, *options: Any) -> Hashable:
    """All that a check of a call and the choice of what runs it depend on: shapes, dtypes, devices, options, autocast
    and backends; None if there are others than plain values among them, which may change."""
    of_tensors = [(each.shape, each.dtype, each.device, each.layout, each.requires_grad) for each in tensors]
    others = [
        (part.shape, part.grid, part.unit_shape, part.unit_row.shape) if isinstance(part, BlockMask) else part
        for part in form
    ]
    types = [*map(type, others), *map(type, options)]  # True is 1, but no number of steps
    if not tensors or not _PLAIN.issuperset(types):
        return None
    device = tensors[0].device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    around = autocast and torch.get_autocast_dtype(device), *operator.candidates()
    return *of_tensors, *others, *options, *types, *around


def _checked(
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    spikes: bool,
    chunk: int | None,
    before: torch.Tensor | None,
) -> Sequence[SpikingLayer]:
    """The layers of a call with numbers as tensors; raises ValueError for a call that does not match."""
    steps = check_steps(steps)
    if chunk is not None:
        COUNT.check("chunk", chunk)
        if spikes:
            raise ValueError(
                f"chunk={chunk} does not keep the spikes over time that spikes=True gives a gradient; give one of them"
            )
        if any(layer.membranes for layer in layers):
            raise ValueError(f"chunk={chunk} does not keep the membranes that a layer is to give; leave it out")
        delays = [each.delay for number, layer in enumerate(layers) for each in layer.connections(number)]
        if any(delay is not None and delay.learned is not None and not delay.least for delay in delays):
            raise ValueError(
                f"chunk={chunk} does not know the spikes after a chunk, which the gradient of a learned delay of 0 "
                "reads; leave it out, or fix the delays"
            )
    check_tensor("x", x)
    if not layers:
        raise ValueError("layers is empty; give at least one SpikingLayer")
    expected = 2 if steps is not None else 3
    if x.dim() != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [T, B, in], or [B, in] with steps")
    if steps is None and len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there must be at least one time step")
    for number, layer in enumerate(layers):
        check_connection(f" of layer {number}", layer.values, layer.mask, layer.bias)
    sizes = [*(layer.mask.shape[0] for layer in layers), x.shape[-1]]
    checked = []
    for number, layer in enumerate(layers):
        suffix = f" of layer {number}"
        size = sizes[number]
        if layer.dropped is not None:
            check_dropped(suffix, layer.dropped, (x.shape[-2], size))
        population = check_neurons(suffix, layer.population, size, x)
        if layer.state is not None:
            check_state(suffix, layer.state, population, (x.shape[-2], size))
            _check_like(f"state{suffix}", layer.state, x)
        if layer.recurrent is not None:
            check_connection(f" of the recurrent connection of layer {number}", *layer.recurrent, None)
            if layer.recurrent.mask.shape != (size, size):
                raise ValueError(
                    f"the recurrent connection of layer {number} joins {layer.recurrent.mask.shape[1]} neurons to "
                    f"{layer.recurrent.mask.shape[0]}, but the layer has {size}"
                )
        for connection in layer.connections(number):
            _check_route(suffix, connection, sizes, size)
        _check_sent(f"sent{suffix}", layer.sent, x, size)
        checked.append(replaced(layer, population=population))
    _check_sent("before", before, x, x.shape[-1])
    if before is not None and not reference.reaches(checked)[-1]:
        raise ValueError("before is given, but no delay reads inputs of earlier steps; leave it out")
    components_of(reference.graph_of(checked))
    return checked


def _check_route(suffix: str, connection: Connection, sizes: Sequence[int], size: int) -> None:
    """Raises ValueError unless a connection joins its source to ``size`` neurons; sizes: of all, the inputs' last."""
    source, delay = connection.source, connection.delay
    if not -1 <= source < len(sizes) - 1:
        raise ValueError(
            f"a connection{suffix} has the source {source}; give a layer's number below {len(sizes) - 1}, or −1"
        )
    check_connection(suffix, connection.values, connection.mask, connection.bias)
    if connection.mask.shape != (size, sizes[source]):
        outputs, inputs = connection.mask.shape
        if outputs != size:
            raise ValueError(f"a connection{suffix} has {outputs} outputs, but there are {size} neurons")
        raise ValueError(f"{suffix[4:]} has {inputs} inputs but receives {sizes[source]}")
    if delay is not None:
        check_delay(suffix, delay, sizes[source])


def _check_sent(name: str, sent: torch.Tensor | None, x: torch.Tensor, size: int) -> None:
    """Raises ValueError unless ``sent`` is [D, B, N], or None."""
    if sent is None:
        return
    check_tensor(name, sent)
    if sent.dim() != 3 or tuple(sent.shape[1:]) != (x.shape[-2], size):
        raise ValueError(f"{name} has shape {tuple(sent.shape)}; expected [D, {x.shape[-2]}, {size}]")
    _check_like(name, sent, x)


def _check_like(name: str, state: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError for a state on another device than x, or of more bits than this run's states."""
    if state.device != x.device:
        raise ValueError(f"{name} is on {state.device}, x on {x.device}; give state.to(x.device)")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.promote_types(state.dtype, dtype) != dtype:
        raise ValueError(f"{name} is {state.dtype}, those of x in {x.dtype} are {dtype}; give state.to({dtype})")


def _runner(
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    backend: str | None,
    spikes: bool,
    plain: bool,
    carried: bool = False,
) -> Run:
    """What runs such calls: all layers at once, or the operators in turn if something of each layer is wanted, a
    derivative that no kernel computes (``plain``), or a graph that is no chain. ``carried``: what delays carry into the
    run has a gradient."""
    shown, late = spikes, False
    for layer in layers:
        shown, late = shown or layer.membranes, late or layer.delay is not None
        carried = carried or (layer.sent is not None and layer.sent.requires_grad)
    together = not is_chain(layers) or (late and (carried or _reads_states(layers)))
    in_turn = plain or together or any([layer.observers != (None, None) for layer in layers])
    if not in_turn and (shown or late):  # the Triton kernels show spikes and membranes, but know no delays
        in_turn = (shown and late) or shown != operator.prefers("triton", x, layers, steps, backend=backend)
    if together and not (plain or shown or is_traced()):
        run: Run = partial(_run_graph, backend)
    elif in_turn:
        run = partial(_run_in_turn, backend, spikes, plain)
    elif layers[0].delay is not None:
        run = partial(_run_late, backend)
    else:
        run = operator.choose(x, layers, steps, backend=backend)
        run = partial(run, spikes=True) if spikes else run
    return partial(_run_silenced, run) if any([layer.dropped is not None for layer in layers]) else run


def _run_part(
    backend: str | None,
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    before: torch.Tensor | None,
) -> Activity:
    """Runs a part of a call, where other derivatives may be wanted."""
    plain = is_transformed() or has_tangent(opened((x, before, *layers))[0])
    run = _runner(x, layers, steps, backend, spikes=False, plain=plain, carried=True)
    return run(x, layers, steps) if before is None else run(x, layers, steps, before)


def _run_graph(
    backend: str | None,
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    before: torch.Tensor | None = None,
) -> Activity:
    """Runs a graph by its kernels, if these can: that depends on the groups of its masks, which no signature has."""
    if graph.serves(x, layers, steps, backend):
        return graph.g2g_graph(x, layers, steps, before)
    return _run_in_turn(backend, False, False, x, layers, steps, before)


def _run_in_turn(
    backend: str | None,
    spikes: bool,
    plain: bool,
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    before: torch.Tensor | None = None,
) -> Activity:
    linear = partial(g2g_linear, backend=backend)
    population = partial(run_neurons, backend=backend)
    population = partial(cpu.in_float32, population) if backend == "cpu" else population
    loop_of = (lambda layer: None) if plain else partial(recurrent_lists.loop_of, backend=backend)
    turn = reference.in_turn(x, layers, steps, linear, population, before, loop_of)
    return activity_of(*turn, differentiable=spikes)


def _run_silenced(
    run: Run, x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, *before: torch.Tensor
) -> Activity:
    """Runs layers some of whose neurons are dropped: their states are 0, before and after."""
    silenced = [
        layer
        if layer.dropped is None or layer.state is None
        else replaced(layer, state=layer.state.masked_fill(layer.dropped, 0))
        for layer in layers
    ]
    activity = run(x, silenced, steps, *before)
    states = [
        state if layer.dropped is None else state.masked_fill(layer.dropped, 0)
        for state, layer in zip(activity.states or (), layers)  # noqa: B905
    ]
    return replaced(activity, states=tuple(states))


def _synapses(
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    before: torch.Tensor | None,
    spikes: Sequence[Spikes],
) -> Synapses:
    """What the synaptic operations of a run are counted from, in which the layers sent these spikes."""
    received: list[list[Received]] = []
    reach: list[int] = []
    for number, layer in enumerate(layers):
        received.append([])
        for values, mask, source, delay, *_ in layer.connections(number):
            late = None
            if delay is not None and source < 0:
                late = LateSpikes(x, delay, before, steps)
            elif delay is not None:
                reach = reach or reference.reaches(layers)
                train = spikes[source]
                with torch.no_grad():
                    earlier = reference.sent_before(layers[source], reach[source], x.dtype)
                late = LateSpikes(train.dense() if isinstance(train, DenseSpikes) else train, delay, earlier)
            received[-1].append(Received(values, mask, source, late))
    return Synapses(x, steps, received)


def _reads_states(layers: Sequence[SpikingLayer]) -> bool:
    """Whether a delay of one step in a chain reads the spikes of a state: the kernels read ``sent`` alone."""
    of_layers = zip(layers, layers[1:], reference.reaches(layers))  # noqa: B905  (each but the last, with the next)
    return any([layer.state is not None and above.delay is not None and not reach for layer, above, reach in of_layers])


def _run_late(
    backend: str | None,
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    before: torch.Tensor | None = None,
) -> Activity:
    """A run whose inputs arrive later: the first layer is given them as they do."""
    first = layers[0]
    assert first.delay is not None
    total = len(x) if steps is None else steps
    train = Train(x if steps is not None else x[0], before)
    train.append(x if steps is None else x.expand(steps, *x.shape))
    received = arrived(train, first.delay, 0, total)
    if received is None:
        received = train.nothing().expand(total, *x.shape[-2:])
    layers = (replaced(first, delay=None), *layers[1:])
    activity = operator.choose(received, layers, None, backend=backend)(received, layers, None)
    *of_layers, _ = activity.sent or (None,) * (len(layers) + 1)
    reach = first.delay.reach
    of_inputs = DenseSpikes(train.window(total - reach, total)) if reach else None
    return replaced(activity, sent=(*of_layers, of_inputs))


def check_dropped(suffix: str, dropped: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``dropped`` is bool [B, N], which is ``shape``."""
    if not isinstance(dropped, torch.Tensor) or dropped.dtype != torch.bool or tuple(dropped.shape) != shape:
        what = f"{dropped.dtype} {tuple(dropped.shape)}" if isinstance(dropped, torch.Tensor) else repr(dropped)
        raise ValueError(f"dropped{suffix} must be bool {shape}, one entry per sample and neuron, not {what}")
