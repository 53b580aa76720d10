"""Neurons on Triton: ``g2g::triton_neurons_forward`` (with its autograd formula), ``g2g::triton_neurons_backward``.

README.md has the formula, what is kept, and the bytes; ``g2g_kernels/triton/neuron.py`` one step, whose rounding is the
reference's. A program owns a tile of [BLOCK_B samples, BLOCK_N neurons] and runs through all T steps. Time is cut into
*segments*, whose loads are all issued before the first membrane is charged, so memory latency is paid once per segment.
Gradients of parameters, and of a bias in the currents, are summed over the steps of a segment and then over segments,
so no chain of additions is as long as T; PyTorch adds the partial sums of programs. There are no atomics.

For a fused layer (``g2g_stack``) the margins θ − U_t were kept instead of currents and checkpoints: the margin is what
σ' needs, its sign is R, and with θ it is the membrane (``from_kept``).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from g2g_kernels.ops.neurons.call import NeuronsCall, operator_of
from g2g_kernels.ops.neurons.models import MODELS, NeuronModel, Neurons
from g2g_kernels.ops.record import Backward
from g2g_kernels.triton import runtime
from g2g_kernels.triton.neuron import (
    EXACT,
    charge,
    fires,
    from_kept,
    load_at_all_steps,
    load_dropped,
    load_parameters,
    load_states,
    plus,
    plus_last,
    select,
    step_backward,
    store_partials,
    store_states,
    zeros,
)
from g2g_kernels.triton.runtime import cdiv, launch, next_power_of_2

#: the longest segment, of one state: its states live in registers, four per thread and step
SEGMENT = 10
TILE = 512
NUM_WARPS = 4


@triton.jit
def _tile(batch, neurons, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's samples and neurons, and which neurons exist; which elements of its tile exist, their offsets in a
    step, and the elements of a step."""
    sample = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    neuron = (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, step = neuron < neurons, tl.cast(batch, tl.int64) * neurons
    inside = (sample < batch)[:, None] & exists[None, :]
    return sample, neuron, exists, inside, sample[:, None] * neurons + neuron[None, :], step


@triton.jit
def _inside(sample, exists, batch, t, steps):
    """Which elements of a tile exist at step t; none from T on."""
    return (sample < tl.where(t < steps, batch, 0))[:, None] & exists[None, :]


@triton.jit
def load_steps(pointer, first, steps, step, offsets, sample, exists, batch, SEGMENT: tl.constexpr):
    """The tiles of SEGMENT steps from ``first`` on, zeros from T on; none if ``pointer`` is None."""
    tiles = ()
    if pointer is not None:
        for k in tl.static_range(SEGMENT):
            t = first + k
            now = _inside(sample, exists, batch, t, steps)
            tiles += (tl.load(pointer + t * step + offsets, mask=now, other=0.0),)
    return tiles


@triton.jit(do_not_specialize=["steps", "batch"])
def neurons_forward_kernel(
    current, parameters, spikes, checkpoints, membranes, counts, first, last, dropped, steps, batch, neurons,
    HELD: tl.constexpr, MODEL: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr, PER_NEURON: tl.constexpr,
    RESET: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample, neuron, exists, inside, offsets, step = _tile(batch, neurons, BLOCK_B, BLOCK_N)
    values = load_parameters(parameters, neuron, exists, DECAYS, PER_NEURON)
    threshold = values[len(values) - 1]
    if HELD:
        same = tl.load(current + offsets, mask=inside, other=0.0).to(tl.float32)

    silent = load_dropped(dropped, offsets, inside)
    states = load_states(first, step, offsets, inside, STATES, BLOCK_B, BLOCK_N)
    count = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for segment in range(tl.cdiv(steps, SEGMENT)):
        if checkpoints is not None:
            if segment > 0:
                for i in tl.static_range(STATES):
                    tl.store(checkpoints + ((segment - 1) * STATES + i) * step + offsets, states[i], mask=inside)
        at = segment * SEGMENT
        currents = load_steps(None if HELD else current, at, steps, step, offsets, sample, exists, batch, SEGMENT)
        for k in tl.static_range(SEGMENT):
            t = at + k
            fired = fires(states[STATES - 1], threshold)
            charged = charge(states, fired, same if HELD else currents[k].to(tl.float32), values, MODEL, RESET)
            states = select(t < steps, charged, states)  # those of the last step remain
            spike = tl.where(silent, 0.0, fires(states[STATES - 1], threshold).to(tl.float32))
            now = _inside(sample, exists, batch, t, steps)
            tl.store(spikes + t * step + offsets, spike.to(spikes.dtype.element_ty), mask=now)
            if membranes is not None:
                tl.store(membranes + t * step + offsets, states[STATES - 1], mask=now)
            count += tl.where(t < steps, spike, 0.0)
    store_states(last, step, offsets, inside, states)
    if counts is not None:
        tl.store(counts + offsets, count, mask=inside)


@triton.jit(do_not_specialize=["steps", "batch"])
def neurons_backward_kernel(
    current, checkpoints, margins, parameters, grad_spikes, grad_counts, grad_rates, grad_membranes, grad_current,
    partials, first, grad_last, grad_first, dropped, steps, batch, neurons, alpha, rate_scale,
    HELD: tl.constexpr, MODEL: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr, PER_NEURON: tl.constexpr,
    RESET: tl.constexpr, SURROGATE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample, neuron, exists, inside, offsets, step = _tile(batch, neurons, BLOCK_B, BLOCK_N)
    values = load_parameters(parameters, neuron, exists, DECAYS, PER_NEURON)
    threshold = values[len(values) - 1]
    if HELD:
        same = tl.load(current + offsets, mask=inside, other=0.0).to(tl.float32)

    at_all_steps = load_at_all_steps(
        grad_counts, grad_rates, offsets, inside, neuron, exists, rate_scale, BLOCK_B, BLOCK_N
    )
    silent = load_dropped(dropped, offsets, inside)
    grads = load_states(grad_last, step, offsets, inside, STATES, BLOCK_B, BLOCK_N)
    at_first = load_states(first, step, offsets, inside, STATES, BLOCK_B, BLOCK_N)
    totals = zeros(len(values), BLOCK_B, BLOCK_N)
    grad_total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)  # of the current
    segments = tl.cdiv(steps, SEGMENT)
    margin = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)  # U_t − θ of the step that is gone through
    if margins is not None:
        tl.static_assert(STATES == 1)
        end = load_steps(margins, segments * SEGMENT - 1, steps, step, offsets, sample, exists, batch, 1)
        margin = from_kept(end[0], threshold)[1]
    for turn in range(segments):
        segment = segments - 1 - turn
        at = segment * SEGMENT
        upstream = load_steps(grad_spikes, at, steps, step, offsets, sample, exists, batch, SEGMENT)
        at_membranes = load_steps(grad_membranes, at, steps, step, offsets, sample, exists, batch, SEGMENT)
        history = ()  # the states before each step, or the margin
        if margins is not None:
            for k in tl.static_range(SEGMENT):
                t = at + k
                now = _inside(sample, exists, tl.where(t > 0, batch, 0), t - 1, steps)
                history += (tl.load(margins + (t - 1) * step + offsets, mask=now, other=0.0),)
        else:
            currents = load_steps(None if HELD else current, at, steps, step, offsets, sample, exists, batch, SEGMENT)
            states = at_first
            if segment > 0:
                kept = checkpoints + (segment - 1) * STATES * step
                states = load_states(kept, step, offsets, inside, STATES, BLOCK_B, BLOCK_N)
            for k in tl.static_range(SEGMENT):
                history += (states,)
                fired = fires(states[STATES - 1], threshold)
                states = charge(states, fired, same if HELD else currents[k].to(tl.float32), values, MODEL, RESET)
            margin = states[STATES - 1] - threshold
        sums = zeros(len(values), BLOCK_B, BLOCK_N)
        grad_sum = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for k in tl.static_range(SEGMENT - 1, -1, -1):
            t = at + k
            grad_spike = tl.where(t < steps, at_all_steps, 0.0)
            if grad_spikes is not None:
                grad_spike += upstream[k].to(tl.float32)
            grad_spike = tl.where(silent, 0.0, grad_spike)
            if grad_membranes is not None:
                grads = plus_last(grads, tl.where(silent, 0.0, at_membranes[k].to(tl.float32)))
            if margins is None:
                states = history[k]
                before = states[STATES - 1] - threshold
            else:
                membrane, before = from_kept(history[k], threshold)
                states = (tl.where(t > 0, membrane, at_first[0]),)
                before = tl.where(t > 0, before, at_first[0] - threshold)
            begins = (t == 0) & (first is None)
            to_current, moved, added = step_backward(
                grads, sums, states, before > 0, margin, grad_spike, begins, values, alpha, MODEL, RESET, SURROGATE
            )
            # steps after the last have no spikes' gradients, but last states', and 0 times an infinite one would be NaN
            if grad_last is not None or margins is None:
                to_current = tl.where(t < steps, to_current, 0.0)
                moved, added = select(t < steps, moved, grads), select(t < steps, added, sums)
            grads, sums = moved, added
            grad_sum += to_current
            margin = before
            if not HELD and grad_current is not None:
                out = to_current.to(grad_current.dtype.element_ty)
                tl.store(grad_current + t * step + offsets, out, mask=_inside(sample, exists, batch, t, steps))
        totals = plus(totals, sums)
        grad_total += grad_sum
    if grad_first is not None:
        store_states(grad_first, step, offsets, inside, grads)
    if HELD and grad_current is not None:
        tl.store(grad_current + offsets, grad_total.to(grad_current.dtype.element_ty), mask=inside)
    here = partials + tl.program_id(0) * neurons + neuron
    apart = tl.num_programs(0).to(tl.int64) * neurons
    store_partials(here, apart, totals, grad_total, inside, parameters, neuron, exists, DECAYS, PER_NEURON, False)


# --- launchers ----------------------------------------------------------------------------------------------------


class Upstream(NamedTuple):
    """Gradients of the ``spikes``, ∂L/∂S [T, B, N] of any floating-point dtype; of their ``counts`` [B, N] and their
    ``rates`` [N] (times 1/(T·B)), both added at every step; of the ``last`` states, float32 [states, B, N]; and of the
    ``membranes``, ∂L/∂U [T, B, N]. None: zeros."""

    spikes: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    rates: torch.Tensor | None = None
    last: torch.Tensor | None = None
    membranes: torch.Tensor | None = None

    def arguments(self) -> dict[str, torch.Tensor | None]:
        """The arguments of a backward kernel, except the last states."""
        return {f"grad_{name}": getattr(self, name) for name in ("spikes", "counts", "rates", "membranes")}


def model_options(population: Neurons) -> dict[str, Any]:
    """The compile-time options of kernels that describe the neurons."""
    model = MODELS[population.model]
    return {
        "MODEL": model.name,
        "STATES": len(model.states),
        "DECAYS": len(model.decays),
        "PER_NEURON": sum((p.numel() > 1) << i for i, p in enumerate(population.parameters)),
        "RESET": population.reset,
    }


def segments_of(model: NeuronModel, steps: int) -> int:
    """The number of segments, of at most :data:`SEGMENT` states: two programs with two states then fit an SM."""
    return cdiv(steps, SEGMENT // len(model.states))


def segment_of(model: NeuronModel, steps: int) -> int:
    """The length of a segment; the last one is nearly as long."""
    return cdiv(steps, segments_of(model, steps))


def checkpoint_shape(model: NeuronModel, steps: int, batch: int, neurons: int) -> tuple[int, int, int, int]:
    """The shape of the float32 states that the forward pass keeps for each segment but the first."""
    return segments_of(model, steps) - 1, len(model.states), batch, neurons


def _launch(kernel: Any, call: NeuronsCall, **arguments: Any) -> None:
    """Launches one of the two kernels with its own arguments and those of both."""
    steps, batch, neurons = call.flat_shape
    block_n = min(128, next_power_of_2(neurons))
    arguments |= {
        "first": call.state,
        "parameters": call.population.parameters,
        "steps": steps,
        "batch": batch,
        "neurons": neurons,
        "HELD": call.held,
        "SEGMENT": segment_of(call.model, steps),
        "BLOCK_B": TILE // block_n,
        "BLOCK_N": block_n,
        # rows that do not fill whole tiles need a mask per element: two per thread, or sm_80 runs out of registers
        "num_warps": NUM_WARPS * len(call.model.states) * (1 if neurons % block_n == 0 else 2),
        **model_options(call.population),
        **EXACT,
    }
    tiles, most = cdiv(neurons, block_n), 1 << 15  # CUDA's grids have 65,535 programs along the second axis
    launch(kernel, (cdiv(batch, TILE // block_n), min(tiles, most), cdiv(tiles, most)), **arguments)


def launch_forward(
    call: NeuronsCall,
    spikes: torch.Tensor,
    checkpoints: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    membranes: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs neurons over all steps, and returns the states after the last. All tensors are contiguous and on one device;
    parameters of ``call`` are float32, [1] or [N]; ``dropped`` is uint8 [B, N], 1 where spikes are removed. It writes
    spikes [T, B, N] of any dtype (uint8 is the smallest) and, where given, checkpoints for the backward pass, float32
    of :func:`checkpoint_shape`, counts, float32 [B, N], and membranes, float32 [T, B, N].
    """
    last = call.current.new_empty(call.state_shape, dtype=torch.float32)
    _launch(
        neurons_forward_kernel, call, spikes=spikes, checkpoints=checkpoints, membranes=membranes, counts=counts,
        last=last, current=call.current, dropped=dropped,
    )  # fmt: skip
    return last


def launch_backward(
    call: NeuronsCall,
    checkpoints: torch.Tensor | None,
    upstream: Upstream,
    grad_current: torch.Tensor | None,
    grad_first: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
    margins: bool = False,
) -> torch.Tensor:
    """Writes the gradients of the currents, of their shape (summed over time if they are held) and any dtype, and of
    the states before the first step, float32, where given. Returns those of the parameters and of a bias, float32
    [parameters + 1, N]. ``call`` and ``checkpoints`` are those of the forward pass; with ``margins`` the current of
    ``call`` is what ``to_keep`` gave.
    """
    steps, batch, neurons = call.flat_shape
    rows = cdiv(batch, TILE // min(128, next_power_of_2(neurons)))
    shape = (len(call.population.parameters) + 1, rows, neurons)
    partials = call.current.new_empty(shape, dtype=torch.float32)
    _launch(
        neurons_backward_kernel,
        call,
        checkpoints=checkpoints,
        margins=call.current if margins else None,
        grad_current=grad_current,
        partials=partials,
        grad_last=upstream.last,
        grad_first=grad_first,
        dropped=dropped,
        alpha=float(call.population.alpha),
        rate_scale=1 / (steps * batch),
        SURROGATE=call.population.surrogate,
        **upstream.arguments(),
        current=None if margins else call.current,
    )
    return partials.sum(1)


def parameter_gradients(population: Neurons, sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of scalars and of parameters per neuron, in their dtypes, from :func:`launch_backward`'s result."""
    found = []
    for parameter, of_neurons in zip(population.parameters, sums[: len(population.parameters)], strict=True):
        grad = of_neurons if parameter.numel() > 1 else of_neurons.sum()
        found.append(grad.reshape(parameter.shape).to(parameter.dtype, copy=True))  # outputs may share no memory
    return tuple(found)


# --- operators ----------------------------------------------------------------------------------------------------


def refuses_model(population: Neurons) -> str | None:
    """Why no Triton kernel runs these neurons, or None."""
    model = MODELS[population.model]
    if model.at_once:
        return f"resets neurons one step after their spike, and {model.name!r} resets them at once"
    return f"has no refractory periods, as {model.name!r} has" if model.compared is not None else None


def refuses(
    current: torch.Tensor,
    population: Neurons,
    steps: int | None,
    state: torch.Tensor | None = None,
    to_membrane: torch.Tensor | None = None,
) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if to_membrane is not None:
        return "takes no currents onto the membrane"
    if reason := refuses_model(population):
        return reason
    if current.numel() == 0:
        return "needs currents that are not empty"
    if math.prod(current.shape[0 if steps else 1 :]) >= 1 << 31:
        return "serves fewer than 2³¹ neurons × samples per step"
    return runtime.refuses("neurons", current, *population.parameters, state)


def neurons(
    current: torch.Tensor, population: Neurons, steps: int | None, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return FORWARD(NeuronsCall.of(current, population, steps, state))[:2]


def _as_launched(call: NeuronsCall) -> NeuronsCall:
    parameters = tuple(parameter.reshape(-1).to(torch.float32) for parameter in call.population.parameters)
    return call._replace(population=call.population._replace(parameters=parameters))


def _kept_shape(call: NeuronsCall) -> tuple[int, ...]:
    return checkpoint_shape(call.model, *call.flat_shape)


def _forward(call: NeuronsCall, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spikes = call.current.new_empty(call.shape)
    checkpoints = call.current.new_empty(_kept_shape(call) if keep else 0, dtype=torch.float32)
    last = launch_forward(_as_launched(call), spikes, checkpoints if keep else None)
    return spikes, last, checkpoints


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, (kept,), (grad_spikes, last), _ = given
    to_current = torch.empty_like(call.current) if given.needed[0] else None
    to_state = None if call.state is None else torch.empty_like(call.state)
    sums = launch_backward(_as_launched(call), kept, Upstream(grad_spikes, last=last), to_current, to_state)
    population = call.population._replace(parameters=parameter_gradients(call.population, sums))
    return given.aligned(call._replace(current=to_current, population=population, state=to_state))


FORWARD = operator_of("triton_", ("CPU", "CUDA"), _forward, _backward, _kept_shape)  # CPU: the interpreter
