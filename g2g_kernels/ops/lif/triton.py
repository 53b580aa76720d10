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
    checkpoint, into registers, and then walks the segment downwards. Membranes, and with them R and σ', are equal to the
    forward pass's to the last bit. Keeping the membranes in bfloat16 instead would move more (2 B an element written and
    2 B read, where the currents are kept alive by whoever computed them in no more memory) and would put an error of
    2⁻⁹·|U| into σ' and ∂L/∂β, thousands of times that of the reference, which keeps them in float32.

Bytes an element of [T, B, N], for currents of c bytes and spikes of s (1 inside a stack, else c)
    forward     c read (a held current: once, not T times), s written, 4/10 of checkpoints written
    backward    c read (held: once), c of ∂L/∂S read, 4/10 of checkpoints read, c of ∂L/∂I written (held: once)
    FLOPs are a handful an element: both kernels run at the speed of memory.

Gradients of β and θ, and firing rates, are summed in two stages: every program writes one partial sum (a neuron, or of
its whole tile for a parameter of the layer), and :func:`_sum_kernel` adds those in a fixed order. There are no atomics:
results are the same on every run.
"""

import torch
import triton
import triton.language as tl

from g2g_kernels.triton.neuron import EXACT, charge, decaying, fires, surrogate_derivative
from g2g_kernels.triton.runtime import launch

#: the longest segment: its membranes live in registers, four a thread and step
SEGMENT = 10
TILE = 512
NUM_WARPS = 4


@triton.jit
def _tile(batch, neurons, columns, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's samples and neurons, which of those exist, the column of each one's spikes, and if it has one."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = cols < neurons
    if columns is None:
        return rows, cols, exists, cols, exists
    else:
        column = tl.load(columns + cols, mask=exists, other=-1)
        return rows, cols, exists, column, column >= 0


@triton.jit
def _inside(rows, cols_exist, batch, t, steps):
    """Which elements of a tile there are at step t: none from T on."""
    return (rows < tl.where(t < steps, batch, 0))[:, None] & cols_exist[None, :]


@triton.jit
def _forward_kernel(
    current,
    beta,
    theta,
    columns,
    spikes,
    checkpoints,
    counts,
    rate_sums,
    steps,
    batch,
    neurons,
    spike_columns,
    beta_stride,
    theta_stride,
    HELD: tl.constexpr,
    RESET: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, exists, spike_cols, spike_exists = _tile(batch, neurons, columns, BLOCK_B, BLOCK_N)
    inside = (rows < batch)[:, None] & exists[None, :]
    offsets = rows[:, None] * neurons + cols[None, :]
    spike_offsets = rows[:, None] * spike_columns + spike_cols[None, :]
    step = tl.cast(batch, tl.int64) * neurons
    spike_step = tl.cast(batch, tl.int64) * spike_columns
    decay = tl.clamp(tl.load(beta + cols * beta_stride, mask=exists, other=0.0), 0.0, 1.0)[None, :]
    threshold = tl.load(theta + cols * theta_stride, mask=exists, other=0.0)[None, :]
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
                now = _inside(rows, exists, batch, t, steps)
                currents += (tl.load(current + t * step + offsets, mask=now, other=0.0),)
        for k in tl.static_range(SEGMENT):
            t = segment * SEGMENT + k
            fired = fires(membrane, threshold)
            membrane = charge(membrane, fired, currents[k].to(tl.float32), decay, threshold, RESET)
            spike = fires(membrane, threshold)
            now = _inside(rows, spike_exists, batch, t, steps)
            tl.store(spikes + t * spike_step + spike_offsets, spike.to(spikes.dtype.element_ty), mask=now)
            count += tl.where(t < steps, spike.to(tl.float32), 0.0)
    if counts is not None:
        tl.store(counts + offsets, count, mask=inside)
    if rate_sums is not None:
        total = tl.sum(tl.where(inside, count, 0.0), 0)
        tl.store(rate_sums + tl.program_id(0) * neurons + cols, total, mask=exists)


@triton.jit
def _store_partial(partial, tile, cols, neurons, PER_NEURON: tl.constexpr):
    """Writes this program's share of a parameter's gradient: [row tiles, N], or one number for the whole tile."""
    if PER_NEURON:
        tl.store(partial + tl.program_id(0) * neurons + cols, tl.sum(tile, 0), mask=cols < neurons)
    else:
        tl.store(partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(tile, 0), 0))


@triton.jit
def _backward_kernel(
    current,
    checkpoints,
    beta,
    theta,
    columns,
    grad_spikes,
    grad_counts,
    grad_rates,
    grad_current,
    beta_sums,
    theta_sums,
    steps,
    batch,
    neurons,
    spike_columns,
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
    rows, cols, exists, spike_cols, spike_exists = _tile(batch, neurons, columns, BLOCK_B, BLOCK_N)
    inside = (rows < batch)[:, None] & exists[None, :]
    offsets = rows[:, None] * neurons + cols[None, :]
    spike_offsets = rows[:, None] * spike_columns + spike_cols[None, :]
    step = tl.cast(batch, tl.int64) * neurons
    spike_step = tl.cast(batch, tl.int64) * spike_columns
    decay = tl.clamp(tl.load(beta + cols * beta_stride, mask=exists, other=0.0), 0.0, 1.0)[None, :]
    threshold = tl.load(theta + cols * theta_stride, mask=exists, other=0.0)[None, :]
    if HELD:
        held = tl.load(current + offsets, mask=inside, other=0.0).to(tl.float32)

    # the gradient that reaches every spike of a neuron alike, at all steps
    at_all_steps = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    if grad_counts is not None:
        at_all_steps += tl.load(grad_counts + offsets, mask=inside, other=0.0).to(tl.float32)
    if grad_rates is not None:
        at_all_steps += tl.load(grad_rates + cols, mask=exists, other=0.0).to(tl.float32)[None, :] * rate_scale

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
            if HELD:
                currents += (held,)
            else:
                now = _inside(rows, exists, batch, t, steps)
                currents += (tl.load(current + t * step + offsets, mask=now, other=0.0),)
            if grad_spikes is not None:
                now = _inside(rows, spike_exists, batch, t, steps)
                grads += (tl.load(grad_spikes + t * spike_step + spike_offsets, mask=now, other=0.0),)
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
                tl.store(grad_current + t * step + offsets, out, mask=_inside(rows, exists, batch, t, steps))
            grad_theta -= through_spike
            if RESET == "subtract":
                grad_theta -= tl.where(fired, grad_membrane, 0.0)
            grad_beta += grad_membrane * decaying(before, fired, RESET)
            grad_membrane = decaying(grad_membrane * decay, fired, RESET)
    if HELD and grad_current is not None:
        tl.store(grad_current + offsets, grad_held.to(grad_current.dtype.element_ty), mask=inside)
    if beta_sums is not None:
        _store_partial(beta_sums, tl.where(inside, grad_beta, 0.0), cols, neurons, BETA_PER_NEURON)
    if theta_sums is not None:
        _store_partial(theta_sums, tl.where(inside, grad_theta, 0.0), cols, neurons, THETA_PER_NEURON)


@triton.jit
def _sum_kernel(partial, beta, out, rows, cols, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
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
        _sum_kernel,
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
    columns: torch.Tensor | None = None,
) -> None:
    """Runs the neurons over all steps; everything is contiguous and on one device.

    Args:
        current: float32, float16 or bfloat16 [T, B, N]; [B, N] if ``held``.
        beta, theta: float32 [1] or [N].
        steps: T.
        spikes: written, [T, B, N] of any dtype (uint8 is the smallest); [T, B, M] with ``columns``.
        checkpoints: written if given, float32 of :func:`checkpoint_shape`; what the backward pass needs.
        counts: written if given, float32 [B, N], spikes over all steps.
        rates: written if given, float32 [N], the mean of the spikes over steps and samples.
        columns: int32 [N], the column of ``spikes`` that takes each neuron's (−1: none does), so that the next layer's
            order of neurons costs no pass of its own; columns that none goes to are not written.
    """
    batch, neurons = current.shape[-2:]
    block_b, block_n = _blocks(neurons)
    grid = triton.cdiv(batch, block_b), triton.cdiv(neurons, block_n)
    rate_sums = current.new_empty(grid[0], neurons, dtype=torch.float32) if rates is not None else None
    launch(
        _forward_kernel,
        grid,
        current,
        beta,
        theta,
        columns,
        spikes,
        checkpoints,
        counts,
        rate_sums,
        steps,
        batch,
        neurons,
        spikes.shape[-1],
        int(beta.numel() > 1),
        int(theta.numel() > 1),
        HELD=held,
        RESET=reset,
        SEGMENT=segment_of(steps),
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        num_warps=NUM_WARPS,
        **EXACT,
    )
    if rate_sums is not None:
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
    columns: torch.Tensor | None = None,
) -> None:
    """Writes the gradients that are given; everything is contiguous and on one device.

    Args:
        current, checkpoints, beta, theta, steps, held, reset, columns: as the forward pass had them.
        grad_spikes: ∂L/∂S [T, B, N] ([T, B, M] with ``columns``) of any floating-point dtype, or None for zeros.
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
        _backward_kernel,
        grid,
        current,
        checkpoints,
        beta,
        theta,
        columns,
        grad_spikes,
        grad_counts,
        grad_rates,
        grad_current,
        beta_sums,
        theta_sums,
        steps,
        batch,
        neurons,
        neurons if grad_spikes is None else grad_spikes.shape[-1],
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
    if beta_sums is not None:
        _sum(beta_sums, grad_beta, beta=beta)
    if theta_sums is not None:
        _sum(theta_sums, grad_theta)
