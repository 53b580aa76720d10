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
from g2g_kernels.ops.g2g_stack import cpu, reference
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, NeuronState, Spikes, StackState
from g2g_kernels.ops.g2g_stack.chunks import in_chunks
from g2g_kernels.ops.g2g_stack.layer import Recurrent, SpikingLayer
from g2g_kernels.ops.g2g_stack.reference import activity_of
from g2g_kernels.ops.g2g_stack.synapses import Border, Synapses, SynapticOperations
from g2g_kernels.ops.neurons import run_neurons
from g2g_kernels.ops.neurons.checks import check_neurons, check_state, check_steps
from g2g_kernels.ops.record import Form, opened
from g2g_kernels.tracing import is_traced, is_transformed, replaced

__all__ = [
    "Activity", "Border", "DenseSpikes", "NeuronState", "Recurrent", "Spikes", "SpikingLayer", "StackState", "Synapses",
    "SynapticOperations", "activity_of", "check_dropped", "g2g_stack",
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
) -> Activity:
    """Runs ``neurons(g2g_linear(·))`` for each layer in turn; differentiable in x and in every tensor of the layers.

    Args:
        x: [T, B, in], or with ``steps`` given [B, in], held for that many steps (the first product is then
            computed once).
        layers: the layers, each one's outputs the next one's inputs. Each layer has its own model, reset, surrogate and
            α.
        steps, backend: as for :func:`g2g_kernels.lif`.
        spikes: whether spikes over time need a gradient, for a loss on when neurons fire. Unless backend ``triton``
            serves the call, the operators then run one after the other, and spikes and currents of all layers are in
            memory. So they do if one of the ``layers`` is to give its membranes.
        chunk: for long runs: so many steps at a time are computed, and in the backward pass computed again. Gradients
            are the same, and memory grows with T by spikes and the states between chunks only. (Inside
            ``torch.compile`` and ``torch.func`` nothing is computed again, so that no memory is saved.)

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
    tensors, form = opened((x, *layers))
    if is_traced():
        layers = _checked(x, layers, steps, spikes, chunk)
    else:
        signature = _signature(tensors, form, steps, chunk, spikes)
        if signature not in _passed:
            given = [parameter for layer in layers for parameter in layer.population.parameters]
            layers = _checked(x, layers, steps, spikes, chunk)
            # numbers are made tensors each time
            if signature is not None and all(isinstance(parameter, torch.Tensor) for parameter in given):
                if len(_passed) > 1000:
                    _passed.clear()
                _passed.add(signature)
    steps = None if steps is None else int(steps)
    if chunk is None:
        activity = _chosen(x, layers, steps, tensors, backend, spikes)(x, layers, steps)
    else:
        activity = in_chunks(x, layers, steps, chunk, partial(_run, backend))
    if torch.compiler.is_compiling():
        return activity
    assert activity.states is not None
    borders = [
        None if layer.recurrent is None else _border(layer, state)
        for layer, state in zip(layers, activity.states)  # noqa: B905
    ]
    return activity._replace(synapses=Synapses(x, steps, [layer.connections() for layer in layers], borders))


#: the types of what a signature keeps; that of TENSOR is the last
_PLAIN = {type(None), bool, int, float, str, tuple, object}
#: calls that have passed :func:`_checked`, which looks at nothing but what a signature has
_passed: set[Hashable] = set()


def _signature(tensors: Sequence[torch.Tensor], form: Form, *options: Any) -> Hashable:
    """Shapes, dtypes, devices and options of a call; None if it has others than plain values, which may change."""
    of_tensors = [(tensor.shape, tensor.dtype, tensor.device, tensor.layout) for tensor in tensors]
    others = [
        (part.shape, part.unit_shape, part.unit_row.shape) if isinstance(part, BlockMask) else part for part in form
    ]
    types = [*map(type, others), *map(type, options)]  # True is 1, but no number of steps
    if not _PLAIN.issuperset(types):
        return None
    return *of_tensors, *others, *options, *types


def _checked(
    x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None, spikes: bool, chunk: int | None
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
    check_tensor("x", x)
    if not layers:
        raise ValueError("layers is empty; give at least one SpikingLayer")
    expected = 2 if steps is not None else 3
    if x.dim() != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [T, B, in], or [B, in] with steps")
    if steps is None and len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: there must be at least one time step")
    size = x.shape[-1]
    checked = []
    for number, layer in enumerate(layers):
        suffix = f" of layer {number}"
        check_connection(suffix, layer.values, layer.mask, layer.bias)
        out_size, in_size = layer.mask.shape
        if in_size != size:
            raise ValueError(f"layer {number} has {in_size} inputs but receives {size}")
        if layer.dropped is not None:
            check_dropped(suffix, layer.dropped, (x.shape[-2], out_size))
        population = check_neurons(suffix, layer.population, out_size, x)
        if layer.state is not None:
            check_state(suffix, layer.state, population, (x.shape[-2], out_size))
            _check_like(suffix, layer.state, x)
        if layer.recurrent is not None:
            check_connection(f" of the recurrent connection of layer {number}", *layer.recurrent, None)
            if layer.recurrent.mask.shape != (out_size, out_size):
                raise ValueError(
                    f"the recurrent connection of layer {number} joins {layer.recurrent.mask.shape[1]} neurons to "
                    f"{layer.recurrent.mask.shape[0]}, but the layer has {out_size}"
                )
        checked.append(replaced(layer, population=population))
        size = out_size
    return checked


def _border(layer: SpikingLayer, last: torch.Tensor) -> Border:
    """The ends of a run of a layer; ``last``: its states after it."""
    before = None if layer.state is None else layer.state.detach()[-1]
    return Border(before, last.detach()[-1], layer.population.parameters[-1].detach(), layer.dropped)


def _check_like(suffix: str, state: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError for a state on another device than x, or of more bits than this run's states."""
    if state.device != x.device:
        raise ValueError(f"state{suffix} is on {state.device}, x on {x.device}; give state.to(x.device)")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.promote_types(state.dtype, dtype) != dtype:
        raise ValueError(f"state{suffix} is {state.dtype}, those of x in {x.dtype} are {dtype}; give state.to({dtype})")


def _chosen(
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
    tensors: Sequence[torch.Tensor],
    backend: str | None,
    spikes: bool = False,
) -> Callable[[torch.Tensor, Sequence[SpikingLayer], int | None], Activity]:
    """What runs a call with these ``tensors``: all layers at once, or the operators in turn if something of each layer
    is wanted, or a derivative that no kernel computes."""
    observed, shown, drops = is_transformed() or has_tangent(tensors), spikes, False
    for layer in layers:
        observed = observed or layer.observers != (None, None)
        shown = shown or layer.membranes
        drops = drops or layer.dropped is not None
    run: Callable[..., Activity]
    if observed or (shown and not operator.prefers("triton", x, layers, steps, backend=backend)):
        linear = partial(g2g_linear, backend=backend)
        population = partial(_neurons_in_float32 if backend == "cpu" else run_neurons, backend=backend)
        run = partial(_in_turn, linear, population, spikes)
    else:
        run = operator.choose(x, layers, steps, backend=backend)
        run = partial(run, spikes=True) if spikes else run
    return partial(_silent, run) if drops else run


def _run(backend: str | None, x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    """A part of a run, which is chosen anew: where it runs again, other derivatives may be wanted."""
    return _chosen(x, layers, steps, opened((x, *layers))[0], backend)(x, layers, steps)


def _in_turn(
    linear: Callable,
    population: Callable,
    spikes: bool,
    x: torch.Tensor,
    layers: Sequence[SpikingLayer],
    steps: int | None,
) -> Activity:
    return activity_of(*reference.in_turn(x, layers, steps, linear, population), differentiable=spikes)


def _silent(run: Callable, x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    """A run in which the states of dropped neurons are 0."""
    started = [
        layer
        if layer.dropped is None or layer.state is None
        else replaced(layer, state=layer.state.masked_fill(layer.dropped, 0))
        for layer in layers
    ]
    activity = run(x, started, steps)
    if activity.states is None:
        return activity
    states = [
        state if layer.dropped is None else state.masked_fill(layer.dropped, 0)
        for state, layer in zip(activity.states, layers)  # noqa: B905
    ]
    return replaced(activity, states=tuple(states))


def _neurons_in_float32(current: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons on currents of fewer bits, which the CPU kernels do not take alone: they keep their states in float32."""
    spikes, state = run_neurons(current.to(torch.promote_types(current.dtype, torch.float32)), *arguments, **options)
    return spikes.to(current.dtype), state


def check_dropped(suffix: str, dropped: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``dropped`` is bool [B, N], which is ``shape``."""
    if not isinstance(dropped, torch.Tensor) or dropped.dtype != torch.bool or tuple(dropped.shape) != shape:
        what = f"{dropped.dtype} {tuple(dropped.shape)}" if isinstance(dropped, torch.Tensor) else repr(dropped)
        raise ValueError(f"dropped{suffix} must be bool {shape}, one entry per sample and neuron, not {what}")
