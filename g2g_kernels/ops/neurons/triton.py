"""``lif`` on Triton: ``g2g::triton_lif_forward`` (with its autograd formula) and ``g2g::triton_lif_backward``.

Formula
    See README.md in this folder and ``g2g_kernels/triton/neuron.py``, whose rounding is the reference's.

Tiling
    A program owns a tile of [BLOCK_B samples, BLOCK_N neurons] and walks all T steps with its membranes in registers;
    tiles have 512 elements (four a thread), as many neurons wide as there are up to 128. Nothing passes between
    programs. Time is cut into *segments* of at most 10 steps, whose loads are all issued before the first membrane is
    charged, so that memory latency is met once a segment and not once a step.

What is kept for the backward pass
    The currents, which exist anyway, and the float32 membrane at the start of every segment but the first (a
    *checkpoint*: 0.32 B an element at T = 50). The backward pass charges a segment's membranes again from its
    checkpoint, into registers, and then walks the segment downwards. Membranes, and with them R and σ', are equal to
    those of the forward pass to the last bit. Membranes kept in 16 bits instead would move more bytes (2 an element
    written, for currents of 16 bits as many read) and cost accuracy: at T = 50 the gradients of β and θ came out
    4,400 to 5,000 (bfloat16) and 450 to 950 (float16) times as wrong as those of the reference, whose membranes are
    float32.

Bytes an element of [T, B, N], for currents of c bytes and spikes of s (1 inside a stack, else c)
    forward     c read (a held current: once, not T times), s written, 4/10 of checkpoints written
    backward    c read (held: once), c of ∂L/∂S read, 4/10 of checkpoints read, c of ∂L/∂I written (held: once)
    FLOPs are a handful an element: both kernels run at the speed of memory.

Gradients of β and θ, and firing rates, are summed in two stages: every program writes one partial sum (a neuron, or of
its whole tile for a parameter of the layer), and :func:`sum_kernel` adds those in a fixed order. There are no atomics:
results are the same on every run.
"""

import math

import torch
import triton
import triton.language as tl

from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.neurons.models import Neurons
from g2g_kernels.triton import runtime
from g2g_kernels.triton.neuron import EXACT, charge, decaying, fires, surrogate_derivative
from g2g_kernels.triton.runtime import launch

#: the longest segment: its membranes live in registers, four a thread and step
SEGMENT = 10
TILE = 512
NUM_WARPS = 4


@triton.jit
def _tile(BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """The samples and the neurons of this program."""
    samples = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    return samples, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _inside(sample, neuron, batch, neurons, t, steps):
    """Which elements of a tile there are at step t: none from T on."""
    return (sample < tl.where(t < steps, batch, 0))[:, None] & (neuron < neurons)[None, :]


@triton.jit
def lif_forward_kernel(
    current,
    beta,
    theta,
    spikes,
    checkpoints,
    counts,
    rate_sums,
    steps,
    batch,
    neurons,
    beta_stride,
    theta_stride,
    HELD: tl.constexpr,
    RESET: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample, neuron = _tile(BLOCK_B, BLOCK_N)
    exists = neuron < neurons
    inside = (sample < batch)[:, None] & exists[None, :]
    offsets = sample[:, None] * neurons + neuron[None, :]
    step = tl.cast(batch, tl.int64) * neurons
    decay = tl.clamp(tl.load(beta + neuron * beta_stride, mask=exists, other=0.0), 0.0, 1.0)[None, :]
    threshold = tl.load(theta + neuron * theta_stride, mask=exists, other=0.0)[None, :]
    if HELD:
        held = tl.load(current + offsets, mask=inside, other=0.0).to(tl.float32)

    membrane = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for segment in range(tl.cdiv(steps, SEGMENT)):
        if checkpoints is not None:
            if segment > 0:
                tl.store(checkpoints + (segment - 1) * step + offsets, membrane, mask=inside)
        currents = ()
        for k in tl.static_range(SEGMENT):
            if HELD:
                currents += (held,)
            else:
                t = segment * SEGMENT + k
                now = _inside(sample, neuron, batch, neurons, t, steps)
                currents += (tl.load(current + t * step + offsets, mask=now, other=0.0),)
        for k in tl.static_range(SEGMENT):
            t = segment * SEGMENT + k
            fired = fires(membrane, threshold)
            membrane = charge(membrane, fired, currents[k].to(tl.float32), decay, threshold, RESET)
            spike = fires(membrane, threshold).to(tl.float32)
            now = _inside(sample, neuron, batch, neurons, t, steps)
            tl.store(spikes + t * step + offsets, spike.to(spikes.dtype.element_ty), mask=now)
            count += tl.where(t < steps, spike, 0.0)
    if counts is not None:
        tl.store(counts + offsets, count, mask=inside)
    if rate_sums is not None:
        total = tl.sum(tl.where(inside, count, 0.0), 0)
        tl.store(rate_sums + tl.program_id(0) * neurons + neuron, total, mask=exists)


@triton.jit
def _store_partial(partial, tile, neuron, neurons, PER_NEURON: tl.constexpr):
    """Writes this program's share of a parameter's gradient: [row tiles, N], or one number for the whole tile."""
    if PER_NEURON:
        tl.store(partial + tl.program_id(0) * neurons + neuron, tl.sum(tile, 0), mask=neuron < neurons)
    else:
        tl.store(partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(tile, 0), 0))


@triton.jit
def lif_backward_kernel(
    current,
    checkpoints,
    beta,
    theta,
    grad_spikes,
    grad_counts,
    grad_rates,
    grad_current,
    beta_sums,
    theta_sums,
    steps,
    batch,
    neurons,
    beta_stride,
    theta_stride,
    alpha,
    rate_scale,
    HELD: tl.constexpr,
    RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    BETA_PER_NEURON: tl.constexpr,
    THETA_PER_NEURON: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample, neuron = _tile(BLOCK_B, BLOCK_N)
    exists = neuron < neurons
    inside = (sample < batch)[:, None] & exists[None, :]
    offsets = sample[:, None] * neurons + neuron[None, :]
    step = tl.cast(batch, tl.int64) * neurons
    decay = tl.clamp(tl.load(beta + neuron * beta_stride, mask=exists, other=0.0), 0.0, 1.0)[None, :]
    threshold = tl.load(theta + neuron * theta_stride, mask=exists, other=0.0)[None, :]
    if HELD:
        held = tl.load(current + offsets, mask=inside, other=0.0).to(tl.float32)

    # the gradient that reaches every spike of a neuron alike, at all steps
    at_all_steps = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    if grad_counts is not None:
        at_all_steps += tl.load(grad_counts + offsets, mask=inside, other=0.0).to(tl.float32)
    if grad_rates is not None:
        at_all_steps += tl.load(grad_rates + neuron, mask=exists, other=0.0).to(tl.float32)[None, :] * rate_scale

    grad_membrane = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    grad_held = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    grad_beta = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    grad_theta = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    segments = tl.cdiv(steps, SEGMENT)
    for turn in range(segments):
        segment = segments - 1 - turn
        currents = ()
        grads = ()
        for k in tl.static_range(SEGMENT):
            t = segment * SEGMENT + k
            now = _inside(sample, neuron, batch, neurons, t, steps)
            if HELD:
                currents += (held,)
            else:
                currents += (tl.load(current + t * step + offsets, mask=now, other=0.0),)
            if grad_spikes is not None:
                grads += (tl.load(grad_spikes + t * step + offsets, mask=now, other=0.0),)
        membrane = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        if segment > 0:
            membrane = tl.load(checkpoints + (segment - 1) * step + offsets, mask=inside, other=0.0)
        membranes = (membrane,)
        for k in tl.static_range(SEGMENT):
            fired = fires(membrane, threshold)
            membrane = charge(membrane, fired, currents[k].to(tl.float32), decay, threshold, RESET)
            membranes += (membrane,)
        for k in tl.static_range(SEGMENT - 1, -1, -1):
            t = segment * SEGMENT + k
            # steps after the last one take part with gradients of 0, which leave all sums as they are
            grad_spike = tl.where(t < steps, at_all_steps, 0.0)
            if grad_spikes is not None:
                grad_spike += grads[k].to(tl.float32)
            before = membranes[k]
            fired = fires(before, threshold)
            through_spike = surrogate_derivative(membranes[k + 1] - threshold, alpha, SURROGATE) * grad_spike
            grad_membrane += through_spike
            if HELD:
                grad_held += grad_membrane
            elif grad_current is not None:
                out = grad_membrane.to(grad_current.dtype.element_ty)
                now = _inside(sample, neuron, batch, neurons, t, steps)
                tl.store(grad_current + t * step + offsets, out, mask=now)
            grad_theta -= through_spike
            if RESET == "subtract":
                grad_theta -= tl.where(fired, grad_membrane, 0.0)
            grad_beta += grad_membrane * decaying(before, fired, RESET)
            grad_membrane = decaying(grad_membrane * decay, fired, RESET)
    if HELD and grad_current is not None:
        tl.store(grad_current + offsets, grad_held.to(grad_current.dtype.element_ty), mask=inside)
    if beta_sums is not None:
        _store_partial(beta_sums, tl.where(inside, grad_beta, 0.0), neuron, neurons, BETA_PER_NEURON)
    if theta_sums is not None:
        _store_partial(theta_sums, tl.where(inside, grad_theta, 0.0), neuron, neurons, THETA_PER_NEURON)


@triton.jit
def sum_kernel(partial, beta, out, rows, cols, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[c] = scale·Σ_r partial[r][c], added in a fixed order; 0 where ``beta`` is given and its clamp has slope 0."""
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * cols + col[None, :], mask=inside, other=0.0), 0)
    total *= scale
    if beta is not None:
        value = tl.load(beta + col, mask=col < cols, other=0.0)
        total = tl.where((value >= 0) & (value <= 1), total, 0.0)
    tl.store(out + col, total.to(out.dtype.element_ty), mask=col < cols)


# --- launchers ----------------------------------------------------------------------------------------------------


def segment_of(steps: int) -> int:
    """The length of a segment: at most :data:`SEGMENT`, and such that the last one is nearly as long."""
    return triton.cdiv(steps, triton.cdiv(steps, SEGMENT))


def checkpoint_shape(steps: int, batch: int, neurons: int) -> tuple[int, int, int]:
    """The shape of the float32 membranes that the forward pass keeps: one [B, N] a segment but the first."""
    return triton.cdiv(steps, SEGMENT) - 1, batch, neurons


def _blocks(neurons: int) -> tuple[int, int]:
    """BLOCK_B, BLOCK_N."""
    block_n = min(128, triton.next_power_of_2(neurons))
    return TILE // block_n, block_n


def _sum(partial: torch.Tensor, out: torch.Tensor, scale: float = 1.0, beta: torch.Tensor | None = None) -> None:
    rows, cols = partial.shape
    block_c = min(64, triton.next_power_of_2(cols))
    launch(
        sum_kernel,
        (triton.cdiv(cols, block_c),),
        partial,
        beta,
        out,
        rows,
        cols,
        scale,
        BLOCK_R=1024 // block_c,
        BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )


def launch_forward(
    current: torch.Tensor,
    beta: torch.Tensor,
    theta: torch.Tensor,
    steps: int,
    held: bool,
    reset: str,
    spikes: torch.Tensor,
    checkpoints: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    rates: torch.Tensor | None = None,
) -> None:
    """Runs the neurons over all steps; everything is contiguous and on one device.

    Args:
        current: float32, float16 or bfloat16 [T, B, N]; [B, N] if ``held``.
        beta, theta: float32 [1] or [N].
        steps: T.
        spikes: written, [T, B, N] of any dtype (uint8 is the smallest).
        checkpoints: written if given, float32 of :func:`checkpoint_shape`; what the backward pass needs.
        counts: written if given, float32 [B, N], spikes over all steps.
        rates: written if given, float32 [N], the mean of the spikes over steps and samples.
    """
    batch, neurons = current.shape[-2:]
    block_b, block_n = _blocks(neurons)
    grid = triton.cdiv(batch, block_b), triton.cdiv(neurons, block_n)
    rate_sums = current.new_empty(grid[0], neurons, dtype=torch.float32) if rates is not None else None
    launch(
        lif_forward_kernel,
        grid,
        current,
        beta,
        theta,
        spikes,
        checkpoints,
        counts,
        rate_sums,
        steps,
        batch,
        neurons,
        int(beta.numel() > 1),
        int(theta.numel() > 1),
        HELD=held,
        RESET=reset,
        SEGMENT=segment_of(steps),
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        # rows that are not whole tiles wide take a mask an element: two a thread, or registers run out on sm_80
        num_warps=NUM_WARPS if neurons % block_n == 0 else 2 * NUM_WARPS,
        **EXACT,
    )
    if rates is not None and rate_sums is not None:
        _sum(rate_sums, rates, 1 / (steps * batch))


def launch_backward(
    current: torch.Tensor,
    checkpoints: torch.Tensor,
    beta: torch.Tensor,
    theta: torch.Tensor,
    grad_spikes: torch.Tensor | None,
    steps: int,
    held: bool,
    reset: str,
    surrogate: str,
    alpha: float,
    grad_current: torch.Tensor | None,
    grad_beta: torch.Tensor | None,
    grad_theta: torch.Tensor | None,
    grad_counts: torch.Tensor | None = None,
    grad_rates: torch.Tensor | None = None,
) -> None:
    """Writes the gradients that are given; everything is contiguous and on one device.

    Args:
        current, checkpoints, beta, theta, steps, held, reset: as the forward pass had them.
        grad_spikes: ∂L/∂S [T, B, N] of any floating-point dtype, or None for zeros.
        surrogate, alpha: the stand-in for dS/dU.
        grad_current: written if given, of the shape of ``current`` (summed over time if ``held``), of any dtype.
        grad_beta, grad_theta: written if given, of the shapes of ``beta`` and ``theta``, of any dtype.
        grad_counts: ∂L/∂counts [B, N], added to ∂L/∂S of every step.
        grad_rates: ∂L/∂rates [N], of which 1/(T·B) is added to ∂L/∂S of every step and sample.
    """
    batch, neurons = current.shape[-2:]
    block_b, block_n = _blocks(neurons)
    grid = triton.cdiv(batch, block_b), triton.cdiv(neurons, block_n)

    def partial(parameter: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
        if grad is None:
            return None
        shape = (grid[0], neurons) if parameter.numel() > 1 else (grid[0] * grid[1], 1)
        return current.new_empty(shape, dtype=torch.float32)

    beta_sums, theta_sums = partial(beta, grad_beta), partial(theta, grad_theta)
    launch(
        lif_backward_kernel,
        grid,
        current,
        checkpoints,
        beta,
        theta,
        grad_spikes,
        grad_counts,
        grad_rates,
        grad_current,
        beta_sums,
        theta_sums,
        steps,
        batch,
        neurons,
        int(beta.numel() > 1),
        int(theta.numel() > 1),
        alpha,
        1 / (steps * batch),
        HELD=held,
        RESET=reset,
        SURROGATE=surrogate,
        BETA_PER_NEURON=beta.numel() > 1,
        THETA_PER_NEURON=theta.numel() > 1,
        SEGMENT=segment_of(steps),
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        num_warps=NUM_WARPS,
        **EXACT,
    )
    if beta_sums is not None and grad_beta is not None:
        _sum(beta_sums, grad_beta, beta=beta)
    if theta_sums is not None and grad_theta is not None:
        _sum(theta_sums, grad_theta)


# --- operators ----------------------------------------------------------------------------------------------------


def refuses(current: torch.Tensor, population: Neurons, steps: int | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if population.model != "lif":
        return "serves LIF neurons"
    if current.numel() == 0:
        return "needs currents that are not empty"
    if math.prod(current.shape[0 if steps else 1 :]) >= 1 << 31:
        return "serves less than 2³¹ neurons and samples a step"
    return runtime.refuses(current, *population.parameters)


def neurons(current: torch.Tensor, population: Neurons, steps: int | None) -> torch.Tensor:
    _, (beta, threshold), reset, surrogate, alpha = population
    tensors = current.contiguous(), beta.contiguous(), threshold.contiguous()
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return torch.ops.g2g.triton_lif_forward(*tensors, steps or 0, reset, surrogate, alpha, keep)[0]


_library = torch.library.Library("g2g", "FRAGMENT")
_library.define(
    "triton_lif_forward(Tensor current, Tensor beta, Tensor threshold, int steps, str reset, str surrogate, "
    "float alpha, bool keep) -> (Tensor, Tensor)"
)
_library.define(
    "triton_lif_backward(Tensor grad_spikes, Tensor current, Tensor checkpoints, Tensor beta, Tensor threshold, "
    "int steps, str reset, str surrogate, float alpha, bool grad_current, bool grad_beta, bool grad_threshold) "
    "-> (Tensor, Tensor, Tensor)"
)


def _sizes(current: torch.Tensor, steps: int) -> tuple[int, int, int]:
    """T, B and N."""
    shape = current.shape if steps else current.shape[1:]
    return steps or current.shape[0], math.prod(shape[:-1]), shape[-1]


def _flat(current: torch.Tensor, steps: int) -> torch.Tensor:
    """The currents as [T, B, N], or [B, N] held for ``steps`` steps."""
    num_steps, batch, neurons = _sizes(current, steps)
    return current.view(batch, neurons) if steps else current.view(num_steps, batch, neurons)


def _parameter(name: str, parameter: torch.Tensor, neurons: int) -> torch.Tensor:
    """``parameter`` in float32, [1] or [N]."""
    if parameter.numel() not in (1, neurons):
        raise ValueError(f"{name} has {parameter.numel()} entries, expected 1 or {neurons}")
    return parameter.reshape(-1).to(torch.float32)


def _forward(
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    spikes, checkpoints = _forward_fake(current, beta, threshold, steps, reset, surrogate, alpha, keep)
    num_steps, batch, neurons = _sizes(current, steps)
    launch_forward(
        _flat(current, steps),
        _parameter("beta", beta, neurons),
        _parameter("threshold", threshold, neurons),
        num_steps,
        steps > 0,
        reset,
        spikes.view(num_steps, batch, neurons),
        checkpoints if keep else None,
    )
    return spikes, checkpoints


def _forward_fake(
    current: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    spikes = current.new_empty((steps, *current.shape) if steps else current.shape)
    shape = checkpoint_shape(*_sizes(current, steps)) if keep else (0,)
    return spikes, current.new_empty(shape, dtype=torch.float32)


def _backward(
    grad_spikes: torch.Tensor,
    current: torch.Tensor,
    checkpoints: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    grad_current: bool,
    grad_beta: bool,
    grad_threshold: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_steps, batch, neurons = _sizes(current, steps)
    if checkpoints.shape != checkpoint_shape(num_steps, batch, neurons):
        raise ValueError("checkpoints are not those of a forward pass over these currents")
    wanted = grad_current, grad_beta, grad_threshold
    grads = _wanted((current, beta, threshold), wanted)
    launch_backward(
        _flat(current, steps),
        checkpoints,
        _parameter("beta", beta, neurons),
        _parameter("threshold", threshold, neurons),
        grad_spikes.view(num_steps, batch, neurons),
        num_steps,
        steps > 0,
        reset,
        surrogate,
        alpha,
        *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
    )
    return grads


def _backward_fake(
    grad_spikes: torch.Tensor,
    current: torch.Tensor,
    checkpoints: torch.Tensor,
    beta: torch.Tensor,
    threshold: torch.Tensor,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    grad_current: bool,
    grad_beta: bool,
    grad_threshold: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _wanted((current, beta, threshold), (grad_current, grad_beta, grad_threshold))


def _wanted(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], wanted: tuple[bool, bool, bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the gradients of ``tensors``, nothing for those that are not wanted."""
    current, beta, threshold = (
        tensor.new_empty(tensor.shape if want else 0) for tensor, want in zip(tensors, wanted, strict=True)
    )
    return current, beta, threshold


def _setup_context(ctx, inputs, output):
    current, beta, threshold, *options, _ = inputs
    _, checkpoints = output
    ctx.options = options
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(current, checkpoints, beta, threshold)


def _autograd(ctx, grad_spikes, _):
    needed = ctx.needs_input_grad[:3]
    grads = torch.ops.g2g.triton_lif_backward(grad_spikes.contiguous(), *ctx.saved_tensors, *ctx.options, *needed)
    return (*(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), *(None,) * 5)


for _name, _function, _fake in (
    ("triton_lif_forward", _forward, _forward_fake),
    ("triton_lif_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):  # the CPU for Triton's interpreter
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"g2g::{_name}", _fake, lib=_library)
torch.library.register_autograd("g2g::triton_lif_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("g2g::triton_lif_backward", refuse_backward, lib=_library)
