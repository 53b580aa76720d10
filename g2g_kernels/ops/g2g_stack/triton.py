"""``g2g_stack`` in Triton: the whole stack of layers. Operators ``g2g::triton_stack_forward`` (with its autograd
formula) and ``g2g::triton_stack_backward``.

Spikes travel from layer to layer as bytes, in the order of places in which the next layer reads them (see
``read_by``); so do its currents and their gradients. Only counts, rates and gradients of parameters are put back
into the order of neurons: at most B·N numbers each.

A layer runs in one of two ways, which :func:`fused_pays` chooses between:

    pair    the product of ``g2g_linear``, its currents [T, B, N] in memory, then the kernel of ``neurons``. For a held
            input (the first layer under ``current`` encoding) the product is [B, N], computed once.
    fused   one kernel for both; the currents stay in registers. For the backward pass it keeps the margins U − θ.

Bytes per element of [T, B, N] in a training step, with c the size of the products' dtype (2 under autocast, else 4):

                 forward                                      backward
    pair         c + c currents, 1 spikes, 0.3 checkpoints    c currents, 0.3 checkpoints, c + c gradients
    fused        1 spikes, c margins                          c margins, c + c gradients

    that is 11.6 for the pair and 9 fused in 16 bits. Keeping nothing and recomputing the currents in the backward pass
    would write and read them, and cost another product. Margins are kept rather than membranes because rounding keeps
    their sign, so every R is exact (but for float16, where margins below 3e-8 become 0), and because they are most
    precise where σ' is steep. They have the products' dtype, like the gradients of currents and spikes.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from g2g_kernels.ops.g2g_linear.tiles import STAGES, Call, Shape, fitted, parts_work, product_tiles, side_of
from g2g_kernels.ops.g2g_linear.tiles import seconds as product_seconds
from g2g_kernels.ops.g2g_linear.triton import (
    Units,
    columns,
    g2g_linear,
    in_order,
    input_gradient,
    product,
    read_by,
    tile_at,
    units_of,
    weight_gradient,
)
from g2g_kernels.ops.g2g_stack.activity import Activity
from g2g_kernels.ops.g2g_stack.call import Outputs, StackCall, operators
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer, refuses_fields, unread
from g2g_kernels.ops.g2g_stack.reference import activity_of, in_turn
from g2g_kernels.ops.neurons import triton as neurons_alone
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.triton import (
    NUM_WARPS,
    SEGMENT,
    Run,
    Upstream,
    blocks,
    checkpoint_shape,
    launch_backward,
    launch_forward,
    model_options,
    segment_of,
)
from g2g_kernels.ops.record import Backward, opened
from g2g_kernels.triton import costs, runtime
from g2g_kernels.triton.neuron import (
    EXACT,
    charge,
    fires,
    load_parameters,
    load_states,
    plus,
    select,
    step_backward,
    store_states,
    unless,
    zeros,
)
from g2g_kernels.triton.products import in_parts, load_factors, plus_product, precision_of
from g2g_kernels.triton.runtime import cdiv, launch

# --- the fused kernel -------------------------------------------------------------------------------------------
#
# One program computes BLOCK_M samples × one tile of BLOCK_N neurons for all T steps, membranes in registers. Its loop
# runs over (t, unit of the block row) flattened into one and carries the next tile, as that of the product does, so the
# loads of step t + 1 are in flight while step t finishes. 2·T·B·U·R·C FLOPs; the weights of a block row (67 KB by
# default, in 16 bits) are read T times, from L2.
#
# If they fit into shared memory beside two steps of x, they are read once and stay for all T: the loop runs over t
# and is unrolled over ON_CHIP units, so each step's loads are in flight during the step before. Rows with fewer units
# multiply zeros; those with more, which dynamic sparse training may make, take the other loop.


@triton.jit
def next_states(
    states, count, current, own, silent, spikes, margins, here, y_offset, inside,
    MODEL: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """The states and counts after one more step, whose spikes and margins are stored ``here``, at its first element."""
    threshold = own[len(own) - 1]
    states = charge(states, fires(states[len(states) - 1], threshold), current, own, MODEL, RESET)
    membrane = states[len(states) - 1]
    spike = unless(silent, fires(membrane, threshold).to(tl.float32))
    tl.store(spikes + here + y_offset, spike.to(spikes.dtype.element_ty), mask=inside)
    if margins is not None:
        margin = membrane - threshold
        if margins.dtype.element_ty == tl.float16:
            # a margin of −∞ would make NaN in the backward pass
            margin = tl.clamp(margin, -65504.0, 65504.0)
        tl.store(margins + here + y_offset, margin.to(margins.dtype.element_ty), mask=inside)
    return states, count + spike


@triton.jit
def over_time(
    states, count, start, own, silent, x, x_column, x_bounds, values, first, end, row_slot, unit_col, spikes, margins,
    steps, batch, b, n, y_offset, inside, x_size, y_size,
    K: tl.constexpr, N: tl.constexpr, MODEL: tl.constexpr, RESET: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All steps; the weights are read anew in each."""
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = 3 if PRECISION == "parts" else 1  # of a unit, in memory
    tiles_of_step = tl.maximum((end - first) * TILES_K, 1)  # a row without units still has neurons that decay
    current = start
    x_offset = b[:, None] * x_size
    # a row without units multiplies nothing
    b_ok = (b < tl.where(first < end, batch, 0))[:, None]
    n_inside = (n < tl.where(first < end, N, 0))[None, :]
    slot, weighs, x_col, x_ok = tile_at(
        first * TILES_K, end, row_slot, unit_col, x_column, x_bounds, x_size, K, TILES_K, BLOCK_K
    )
    for turn in range(steps * tiles_of_step):
        t = (turn // tiles_of_step).to(tl.int64)
        k = (turn % tiles_of_step % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + t * batch * x_size + (x_offset + x_col[None, :]), mask=b_ok & x_ok[None, :], other=0)
        address = values + slot * (TILES * N * K) + k[:, None] + n[None, :] * K
        weights = load_factors(address, weighs[:, None] & n_inside, N * K, PRECISION)
        current = plus_product(current, x_tile, weights, PRECISION)
        i = first * TILES_K + (turn + 1) % tiles_of_step
        slot, weighs, x_col, x_ok = tile_at(i, end, row_slot, unit_col, x_column, x_bounds, x_size, K, TILES_K, BLOCK_K)
        if turn % tiles_of_step == tiles_of_step - 1:
            here = t * batch * y_size
            states, count = next_states(
                states, count, current, own, silent, spikes, margins, here, y_offset, inside, MODEL, RESET
            )
            current = start
    return states, count


@triton.jit
def over_time_on_chip(
    states, count, start, own, silent, x, values, first, end, row_slot, unit_col, spikes, margins,
    steps, batch, b, n, y_offset, inside, x_size, y_size,
    K: tl.constexpr, N: tl.constexpr, MODEL: tl.constexpr, RESET: tl.constexpr, BLOCK_K: tl.constexpr,
    ON_CHIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps, with the weights of at most ON_CHIP units, read before; x is in the order of places, without holes."""
    k = tl.arange(0, BLOCK_K)
    weights, columns_before = (), ()
    for j in tl.static_range(ON_CHIP):
        exists = first + j < end
        slot = tl.load(row_slot + first + j, mask=exists, other=0)
        inside_unit = (k < tl.where(exists, K, 0))[:, None] & (n < N)[None, :]
        address = values + slot.to(tl.int64) * (N * K) + k[:, None] + n[None, :] * K
        weights += (tl.load(address, mask=inside_unit, other=0),)
        columns_before += (tl.load(unit_col + slot, mask=exists, other=0) * K,)
    x_offset = b[:, None] * x_size + k[None, :]
    x_ok = (b < batch)[:, None] & (k < K)[None, :]
    for t in tl.range(steps, num_stages=STAGES):
        step = tl.cast(t, tl.int64) * batch
        current = start
        for j in tl.static_range(ON_CHIP):
            x_tile = tl.load(x + step * x_size + columns_before[j] + x_offset, mask=x_ok, other=0)
            current = tl.dot(x_tile.to(weights[j].dtype), weights[j], current)
        here = step * y_size
        states, count = next_states(
            states, count, current, own, silent, spikes, margins, here, y_offset, inside, MODEL, RESET
        )
    return states, count


@triton.jit(do_not_specialize=["steps", "batch", "num_rows"])
def fused_forward_kernel(
    x,
    x_column,
    x_bounds,
    values,
    row_ptr,
    row_slot,
    unit_col,
    bias,
    dropped,
    y_column,
    parameters,
    spikes,
    margins,
    counts,
    states_before,
    last,
    steps,
    batch,
    num_rows,
    x_size,
    y_size,
    K: tl.constexpr,
    N: tl.constexpr,
    MODEL: tl.constexpr,
    STATES: tl.constexpr,
    DECAYS: tl.constexpr,
    PER_NEURON: tl.constexpr,
    RESET: tl.constexpr,
    PRECISION: tl.constexpr,
    ON_CHIP: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (num_rows * TILES_N)
    row = tile // TILES_N
    b = (tl.program_id(0) // (num_rows * TILES_N)) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    column, n_ok = columns(row * N + n, y_column, n < N, y_size)
    inside = (b < batch)[:, None] & n_ok[None, :]
    y_offset = b[:, None] * y_size + column[None, :]

    own = load_parameters(parameters, column, n_ok, DECAYS, PER_NEURON)
    start = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        start += tl.load(bias + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    silent = dropped
    if dropped is not None:
        silent = tl.load(dropped + y_offset, mask=inside, other=0) != 0

    first, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    step = tl.cast(batch, tl.int64) * y_size
    states = load_states(states_before, step, y_offset, inside, STATES, BLOCK_M, BLOCK_N)
    count = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    on_chip = end - first <= ON_CHIP
    if ON_CHIP:
        if on_chip:
            states, count = over_time_on_chip(
                states, count, start, own, silent, x, values, first, end, row_slot, unit_col, spikes, margins,
                steps, batch, b, n, y_offset, inside, x_size, y_size, K, N, MODEL, RESET, BLOCK_K, ON_CHIP, STAGES,
            )  # fmt: skip
    if not ON_CHIP or not on_chip:
        states, count = over_time(
            states, count, start, own, silent, x, x_column, x_bounds, values, first, end, row_slot, unit_col, spikes,
            margins, steps, batch, b, n, y_offset, inside, x_size, y_size, K, N, MODEL, RESET, PRECISION, BLOCK_K,
        )  # fmt: skip
    store_states(last, step, y_offset, inside, states)
    tl.store(counts + y_offset, count, mask=inside)


def fused_tiles(batch: int, shape: Shape, x: torch.dtype, products: torch.dtype, precision: str) -> dict[str, int]:
    """As for the product, with 64 samples at most: two row tiles of a batch of 256 times 32 block rows would leave half
    of an H100's 132 SMs without work. Membranes and counts are registers too, so 8 warps share a tile. Parts need a
    second sum: half the neurons, with which two programs of 4 warps fit an SM and none uses the stack."""
    tiles = product_tiles(batch, side_of(shape.col_width), x, products, precision) | {"num_warps": 8}
    block_n = side_of(shape.row_width)
    if precision == "parts" and block_n > 32:
        tiles, block_n = tiles | {"num_warps": 4}, 32
    return {"BLOCK_N": block_n} | tiles | {"BLOCK_M": min(64, tiles["BLOCK_M"])}


#: the most units over which the loop is unrolled
MOST_ON_CHIP = 16


def units_on_chip(units: Units, x: torch.dtype, products: torch.dtype, device: torch.device) -> int:
    """The units of a block row whose weights stay on chip: as many as rows have on average, rounded up, or 0.

    0 where they do not fit into shared memory (:func:`on_chip_bytes`), and where the loop is not made for it:
    for weights of 32 bits, inputs that are no spikes or not in the order of places, and units wider than a tile. Nor
    where registers would spill to the stack: for neurons out of order, whose addresses take 32 per thread, and on AMD's
    cards, where Triton keeps what it loads in registers.
    """
    if x != torch.uint8 or products.itemsize != 2 or runtime.amd(device):
        return 0
    if units.cols.neuron_at is not None or units.rows.neuron_at is not None:
        return 0
    shape = units.shape
    number, sides = cdiv(shape.units, shape.row_ranges), (side_of(shape.row_width), side_of(shape.col_width))
    if max(shape.row_width, shape.col_width) > 64 or number > MOST_ON_CHIP or units.cols.bounds is not None:
        return 0
    return number if on_chip_bytes(number, *sides) <= costs.card_of(device).shared_bytes else 0


def on_chip_bytes(number: int, height: int, width: int) -> int:
    """The shared memory of the fused kernel with the weights of ``number`` units, 16 bits each, on chip, at most.

    Beside them, the spikes of two steps, 64 samples of 8 bits for each unit, and of one unit in 16 bits; and 1 KiB that
    Triton 3.4 adds.
    """
    samples = 64
    return number * width * (2 * height + 2 * samples) + 2 * width * samples + 1024


@functools.lru_cache(maxsize=4096)
def layer_seconds(call: Call, steps: int, fused: bool, on_chip: int = 0) -> float:
    """The modelled time of the forward product of a layer with its neurons, and of their backward pass, fused (with
    the weights of ``on_chip`` units on chip) or as a pair."""
    shape, batch = call.shape, call.samples // steps
    elements, size = call.samples * shape.outputs, call.products.itemsize
    neurons = costs.Work(bytes=3 * size * elements)  # the backward pass
    if not fused:
        checkpoints = 4 * (cdiv(steps, SEGMENT) - 1) * batch * shape.outputs
        passes = (
            costs.Work(bytes=(size + 1) * elements + checkpoints),
            neurons._replace(bytes=neurons.bytes + checkpoints),
        )
        product = min(product_seconds(call, dense) for dense in (False, True))
        return product + sum(costs.seconds(each, call.card) for each in passes)
    tiles = fused_tiles(batch, shape, call.x, call.products, call.precision)
    block = costs.Block(tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"])
    columns, of_m = cdiv(shape.row_width, block.n), cdiv(batch, block.m)
    units = shape.row_ranges * on_chip or shape.units
    pairs = steps * units * columns * cdiv(shape.col_width, block.k) * of_m
    kind, times = call.factors
    own = costs.Work(
        times * block.flop(pairs),
        kind,
        call.samples * shape.inputs * call.x.itemsize + shape.weights * call.weight_bytes + (1 + size) * elements,
        block.l2_bytes(pairs, call.x.itemsize, 0 if on_chip else call.weight_bytes),
        shape.row_ranges * columns * of_m,
        tiles["num_warps"],
    )
    parts = [parts_work(shape)] if call.precision == "parts" else []
    return sum(costs.seconds(each, call.card) for each in (*parts, own, neurons))


def fused_pays(
    units: Units,
    population: Neurons,
    steps: int,
    batch: int,
    x: torch.dtype,
    products: torch.dtype,
    device: torch.device,
) -> bool:
    """True where one kernel for product and neurons is expected to be faster than the pair; a cost model, not measured.

    Only for models whose one state is the membrane: the backward pass can recover only that from the margins.

    Fusing saves 2.6 bytes per element of [T, B, N] in 16 bits (the table above). But its programs loop over time and
    cannot be split over it, so there are only B/64 of them per block row, which may leave SMs without work; and each of
    its tiles of 64 samples reads the weights anew at every step, from L2. The dense product is cuBLAS's, which cannot
    be fused.

    Args:
        units, population: of the layer.
        steps, batch: of the input.
        x: the dtype of the layer's inputs, uint8 for spikes.
        products: of the factors.
        device: whose card decides.
    """
    if len(MODELS[population.model].states) > 1:
        return False
    if _chosen is not None:
        return _chosen
    if units.rows.neuron_at is not None and side_of(units.shape.row_width) == 64:  # registers spill on some cards
        return False
    # of a graph with dynamic shapes: one for each size, since what is kept depends on it
    steps, batch = int(steps), int(batch)
    precision, card = precision_of(products, device), costs.card_of(device)
    call = Call("forward", units.shape, steps * batch, x, products, products, precision, card)
    on_chip = units_on_chip(units, x, products, device)
    return layer_seconds(call, steps, True, on_chip) < layer_seconds(call, steps, False)


_chosen: bool | None = None


@contextlib.contextmanager
def choose(fused: bool) -> Iterator[None]:
    """Inside, every layer that can be fused is, or none is, whatever :func:`fused_pays` says; to compare the two."""
    global _chosen
    _chosen = fused
    try:
        yield
    finally:
        _chosen = None


# The backward pass of the neurons of a fused layer: one program per tile of samples × neurons, t in reverse, in
# segments whose loads are issued together. Sums for bias, β and θ are added over a segment, then over the segments
# (twice four registers per thread each), written once per program, and added in a fixed order.


@triton.jit
def _if(condition, b, batch, n_ok):
    """Which elements of a tile exist; none unless ``condition``, a scalar, is true."""
    return (b < tl.where(condition, batch, 0))[:, None] & n_ok[None, :]


@triton.jit(do_not_specialize=["steps", "batch"])
def fused_backward_kernel(
    margins,
    parameters,
    grad_spikes,
    grad_counts,
    grad_rates,
    grad_current,
    bias_sums,
    partials,
    states_before,
    grad_last,
    grad_first,
    dropped,
    steps,
    batch,
    neurons,
    alpha,
    rate_scale,
    MODEL: tl.constexpr,
    STATES: tl.constexpr,
    DECAYS: tl.constexpr,
    PER_NEURON: tl.constexpr,
    RESET: tl.constexpr,
    SURROGATE: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < neurons
    inside = (b < batch)[:, None] & n_ok[None, :]
    offset = b[:, None] * neurons + n[None, :]
    step = tl.cast(batch, tl.int64) * neurons
    own = load_parameters(parameters, n, n_ok, DECAYS, PER_NEURON)
    threshold = own[len(own) - 1]

    # the part of the spikes' gradient that is the same at all steps
    at_all_steps = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if grad_counts is not None:
        at_all_steps += tl.load(grad_counts + offset, mask=inside, other=0.0).to(tl.float32)
    if grad_rates is not None:
        at_all_steps += tl.load(grad_rates + n, mask=n_ok, other=0.0).to(tl.float32)[None, :] * rate_scale
    at_all_steps = tl.where(inside, at_all_steps, 0.0)  # elements that do not exist add nothing to any sum

    tl.static_assert(STATES == 1)
    silent = dropped
    if dropped is not None:
        silent = tl.load(dropped + offset, mask=inside, other=0) != 0
    grads = load_states(grad_last, step, offset, inside, STATES, BLOCK_B, BLOCK_N)
    at_first = load_states(states_before, step, offset, inside, STATES, BLOCK_B, BLOCK_N)[0] - threshold
    totals = zeros(len(own), BLOCK_B, BLOCK_N)
    grad_bias = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    segments = tl.cdiv(steps, SEGMENT)
    # steps after the last have margins and gradients of 0, which change no sum
    last = segments * SEGMENT - 1
    margin = tl.load(margins + last * step + offset, mask=_if(last < steps, b, batch, n_ok), other=0.0).to(tl.float32)
    for turn in range(segments):
        first = (segments - 1 - turn) * SEGMENT
        earlier = ()
        upstream = ()
        for k in tl.static_range(SEGMENT):
            t = first + k
            exists = _if((t > 0) & (t <= steps), b, batch, n_ok)
            earlier += (tl.load(margins + (t - 1) * step + offset, mask=exists, other=0.0),)
            if grad_spikes is not None:
                upstream += (tl.load(grad_spikes + t * step + offset, mask=_if(t < steps, b, batch, n_ok), other=0.0),)
        sums = zeros(len(own), BLOCK_B, BLOCK_N)
        bias_sum = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        for k in tl.static_range(SEGMENT - 1, -1, -1):
            t = first + k
            grad_spike = tl.where(t < steps, at_all_steps, 0.0)
            if grad_spikes is not None:
                grad_spike += upstream[k].to(tl.float32)
            grad_spike = unless(silent, grad_spike)
            before = tl.where(t > 0, earlier[k].to(tl.float32), at_first)  # U_{t−1} − θ
            states = (before + threshold,)
            begins = (t == 0) & (states_before is None)
            to_current, moved, added = step_backward(
                grads, sums, states, before > 0, margin, grad_spike, begins, own, alpha, MODEL, RESET, SURROGATE
            )
            if grad_last is not None:  # which does not reach steps after the last
                to_current = tl.where(t < steps, to_current, 0.0)
                moved, added = select(t < steps, moved, grads), select(t < steps, added, sums)
            grads, sums = moved, added
            out = to_current.to(grad_current.dtype.element_ty)
            tl.store(grad_current + t * step + offset, out, mask=_if(t < steps, b, batch, n_ok))
            bias_sum += to_current
            margin = before
        totals = plus(totals, sums)
        grad_bias += bias_sum
    if grad_first is not None:
        store_states(grad_first, step, offset, inside, grads)
    here = tl.program_id(0) * neurons + n
    tl.store(bias_sums + here, tl.sum(grad_bias, 0), mask=n_ok)
    for i in tl.static_range(len(partials)):
        tl.store(partials[i] + here, tl.sum(totals[i], 0), mask=n_ok)


# --- one layer in memory ----------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """A layer of the stack as it is in memory, vectors in the order of its currents' columns."""

    values: torch.Tensor
    units: Units
    bias: torch.Tensor | None  # [N'], N' columns
    population: Neurons  # parameters float32, [1] or [N']
    neuron: torch.Tensor | None  # int64 [N'], the neuron of each column, N where there is none; None if they are equal
    column: torch.Tensor | None  # int64 [N], the column of each neuron
    held: bool
    fused: bool
    dropped: torch.Tensor | None = None  # uint8 [B, N']
    first: torch.Tensor | None = None  # the states before the first step, float32 [states, B, N']

    def current_dtype(self, products: torch.dtype) -> torch.dtype:
        """A held current is small, and the same rounding error at every step would add up."""
        return torch.float32 if self.held else products

    def to_columns(self, vector: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """A tensor [..., N], one entry per neuron, in the order of columns; a single entry applies to all."""
        if self.neuron is None or vector.shape == (1,):
            return vector
        return torch.cat([vector, vector.new_full((*vector.shape[:-1], 1), fill)], -1)[..., self.neuron]

    def to_neurons(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [..., N'] in the order of neurons, [..., N]."""
        return tensor if self.column is None else tensor.index_select(-1, self.column)

    def like(self, parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of a parameter, a scalar or one per neuron, from its sum or its values per column."""
        if grad.numel() > 1:
            grad = self.to_neurons(grad) if parameter.numel() > 1 else self.to_neurons(grad).sum()
        return grad.reshape(parameter.shape).to(parameter.dtype)

    def bias_gradient(self, bias: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of the bias from its values per column; None if there is no bias."""
        return None if bias is None or grad is None else self.like(bias, grad)


def _layers(call: StackCall) -> list[_Layer]:
    graphs = [units_of(layer.mask, layer.values) for layer in call.layers]
    layers = []
    for i, (graph, (values, _, bias, population, dropped, state, *_)) in enumerate(
        zip(graphs, call.layers, strict=True)
    ):
        neuron = column = None
        rows, cols = graph.rows, graph.cols
        if i + 1 < len(graphs):
            readers = graphs[i + 1].cols
            rows, neuron, column = read_by(rows, readers), readers.neuron_at, readers.place_of
        if i > 0:
            cols = in_order(cols)
        units = graph._replace(rows=rows, cols=cols)
        held = call.held and i == 0
        fused = not held and fused_pays(
            units, population, call.num_steps, call.batch, torch.uint8 if i else call.x.dtype, call.dtype, call.x.device
        )
        layer = _Layer(values, units, None, population, neuron, column, held, fused)
        # a column without a neuron gets one that never fires
        *decays, threshold = (parameter.float() for parameter in population.parameters)
        parameters = *map(layer.to_columns, decays), layer.to_columns(threshold, 1.0)
        layers.append(
            layer._replace(
                bias=None if bias is None else layer.to_columns(bias),
                population=population._replace(parameters=parameters),
                dropped=None if dropped is None else layer.to_columns(dropped.to(torch.uint8)),
                first=None if state is None else layer.to_columns(state).contiguous(),
            )
        )
    return layers


def _launch_fused(
    x: torch.Tensor,
    values: torch.Tensor,
    layer: _Layer,
    spikes: torch.Tensor,
    margins: torch.Tensor | None,
    counts: torch.Tensor,
    last: torch.Tensor,
) -> None:
    """Writes spikes [T, B, N'], margins of the same shape if given, and counts [B, N'], from x [T·B, in]."""
    units = layer.units
    steps, batch, _ = spikes.shape
    precision = precision_of(values.dtype, x.device)
    on_chip = units_on_chip(units, x.dtype, values.dtype, x.device)
    options = fitted(fused_tiles(batch, units.shape, x.dtype, values.dtype, precision), x.device)
    tiles_of_row = cdiv(units.rows.width, options["BLOCK_N"])
    launch(
        fused_forward_kernel,
        (units.rows.num_units * tiles_of_row * cdiv(batch, options["BLOCK_M"]),),
        x=x,
        x_column=units.cols.neuron_at,
        x_bounds=units.cols.bounds,
        values=in_parts(values) if precision == "parts" else values,
        row_ptr=units.row_ptr,
        row_slot=units.row_slot,
        unit_col=units.unit_col,
        bias=layer.bias,
        dropped=layer.dropped,
        y_column=units.rows.neuron_at,
        parameters=layer.population.parameters,
        spikes=spikes,
        margins=margins,
        counts=counts,
        states_before=layer.first,
        last=last,
        steps=steps,
        batch=batch,
        num_rows=units.rows.num_units,
        x_size=units.cols.size,
        y_size=units.rows.size,
        K=units.cols.width,
        N=units.rows.width,
        PRECISION=precision,
        ON_CHIP=on_chip,
        STAGES=STAGES,
        **model_options(layer.population),
        **options,
        **EXACT,
    )


class _NeuronGradients(NamedTuple):
    """∂L/∂I [T·B, N'], and the gradients of bias (None: not computed yet) and parameters, in the order of columns."""

    current: torch.Tensor
    bias: torch.Tensor | None
    parameters: Sequence[torch.Tensor]
    first: torch.Tensor | None  # of the states before the first step, if there are any


def _fused_backward(margins: torch.Tensor, layer: _Layer, upstream: Upstream) -> _NeuronGradients:
    """The backward pass of the neurons of a fused layer."""
    steps, batch, neurons = margins.shape
    block_b, block_n = blocks(neurons)
    grid = cdiv(batch, block_b), cdiv(neurons, block_n)
    parameters = layer.population.parameters
    grad_current = torch.empty_like(margins)
    grad_first = None if layer.first is None else torch.empty_like(layer.first)
    bias_sums, *partials = (
        torch.empty((grid[0], neurons), dtype=torch.float32, device=margins.device) for _ in (None, *parameters)
    )
    launch(
        fused_backward_kernel,
        grid,
        margins=margins,
        parameters=parameters,
        grad_spikes=upstream.spikes,
        grad_counts=upstream.counts,
        grad_rates=upstream.rates,
        grad_current=grad_current,
        bias_sums=bias_sums,
        partials=tuple(partials),
        states_before=layer.first,
        grad_last=upstream.last,
        grad_first=grad_first,
        dropped=layer.dropped,
        steps=steps,
        batch=batch,
        neurons=neurons,
        alpha=float(layer.population.alpha),
        rate_scale=1 / (steps * batch),
        SURROGATE=layer.population.surrogate,
        SEGMENT=segment_of(steps),
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        num_warps=NUM_WARPS,
        **model_options(layer.population),
    )
    grads = [partial.sum(0) for partial in partials]
    for i in range(len(MODELS[layer.population.model].decays)):
        # the clamp's own derivative
        grads[i] = grads[i].masked_fill((parameters[i] < 0) | (parameters[i] > 1), 0)
    return _NeuronGradients(grad_current, bias_sums.sum(0), grads, grad_first)


def _pair_backward(run: Run, checkpoints: torch.Tensor, upstream: Upstream, dtype: torch.dtype) -> _NeuronGradients:
    """The backward pass of the neurons of a layer whose currents are in memory."""
    grad_current = torch.empty_like(run.current, dtype=dtype)
    grads = [torch.empty_like(parameter) for parameter in run.population.parameters]
    grad_first = None if run.first is None else torch.empty_like(run.first)
    launch_backward(run, checkpoints, upstream, grad_current, grads, grad_first)
    return _NeuronGradients(grad_current, None, grads, grad_first)


#: fields of a layer that the kernels do not read
READ = "values", "mask", "bias", "population", "dropped", "state", "recurrent", "membranes", "observers", "source"
UNREAD = unread([*READ, "delay", "sent"])  # which go step by step


# --- operators --------------------------------------------------------------------------------------------------


def refuses(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    tensors, _ = opened((x, *layers))
    if UNREAD and (unread_field := refuses_fields(UNREAD, layers)):
        return unread_field
    reason = runtime.refuses(*[tensor for tensor in tensors if tensor.is_floating_point()])
    if reason is None and runtime.autocast_dtype(x.device.type) is None:
        dtypes = {x.dtype, *(values.dtype for layer in layers for values, *_ in layer.connections(0))}
        if len(dtypes) > 1:
            reason = f"needs x and values of one dtype (or autocast), not {', '.join(sorted(map(str, dtypes)))}"
    if reason is None and x.numel() == 0:
        reason = "needs a batch that is not empty"
    if reason is None and x.shape[-2] * max(map(_widest, layers)) >= 1 << 31:
        reason = "serves fewer than 2³¹ neurons × samples per step"
    return reason


def _widest(layer: SpikingLayer) -> int:
    """The most columns that a layer's inputs or outputs can have in memory."""
    axes = [axis for _, mask, *_ in layer.connections(0) for axis in (mask.rows, mask.cols)]
    return max(axis.num_units * axis.width for axis in axes)


def g2g_stack(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    if any(layer.recurrent is not None or layer.delay is not None for layer in layers):
        return activity_of(*in_turn(x, layers, steps, g2g_linear, neurons_alone.neurons), differentiable=False)
    call = StackCall.of(x, layers, steps, runtime.autocast_dtype(x.device.type) or x.dtype)
    counts, rates, last, spikes, _ = FORWARD(call)
    readers = [None if layer.mask.cols.trivial else layer.mask.cols.place_of for layer in layers[1:]]
    all_spikes = tuple(map(ByteSpikes, spikes, [*readers, None]))
    return Activity(counts, tuple(rates), all_spikes, states=tuple(last))


class ByteSpikes:
    """Spikes of one layer, one byte each, in the order in which the next layer reads them."""

    def __init__(self, spikes: torch.Tensor, column: torch.Tensor | None) -> None:
        self._spikes, self._column = spikes, column

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        spikes = self._spikes if self._column is None else self._spikes.index_select(-1, self._column)
        return spikes.float()


def _forward(call: StackCall, keep: bool) -> Outputs:
    """Keeps two tensors per layer: currents and checkpoints, or margins and an empty one."""
    num_steps, batch, device = call.num_steps, call.batch, call.x.device
    all_spikes: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    rates: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    received = call.x
    for layer in _layers(call):
        shape = (num_steps, batch, layer.units.rows.size)
        # columns without a neuron are never stored to, but the next layer multiplies them by zeros
        allocate = torch.zeros if layer.units.rows.holes and layer.fused else torch.empty
        spikes = allocate(shape, dtype=torch.uint8, device=device)
        counts = allocate(shape[1:], dtype=torch.float32, device=device)
        received = received.reshape(-1, received.shape[-1])
        factors = layer.values.to(call.dtype)
        if layer.fused:
            margins = allocate(shape, dtype=call.dtype, device=device) if keep else None
            last = allocate((1, *shape[1:]), dtype=torch.float32, device=device)
            _launch_fused(received, factors, layer, spikes, margins, counts, last)
            to_keep = [margins, counts.new_empty(0)]
        else:
            current = product(received, factors, layer.units, layer.bias, layer.current_dtype(call.dtype))
            current = current.view(shape[1:] if layer.held else shape)
            checkpoints = None
            if keep:
                of = checkpoint_shape(MODELS[layer.population.model], *shape)
                checkpoints = torch.empty(of, dtype=torch.float32, device=device)
            run = Run(current, layer.population, num_steps, layer.first, layer.dropped)
            last = launch_forward(run, spikes, checkpoints, counts)
            to_keep = [current, checkpoints]
        kept += [tensor for tensor in to_keep if keep and tensor is not None]
        rates.append(layer.to_neurons(counts.sum(0) / (num_steps * batch)))
        states.append(layer.to_neurons(last))
        all_spikes.append(spikes)
        received = spikes
    return counts, rates, states, all_spikes, kept


def _forward_fake(call: StackCall, keep: bool) -> Outputs:
    spikes, kept = [], []
    for layer in _layers(call):
        shape = (call.num_steps, call.batch, layer.units.rows.size)
        spikes.append(call.x.new_empty(shape, dtype=torch.uint8))
        if keep:
            of = (0,) if layer.fused else checkpoint_shape(MODELS[layer.population.model], *shape)
            state = shape[1:] if layer.held else shape
            kept += [
                call.x.new_empty(state, dtype=layer.current_dtype(call.dtype)),
                call.x.new_empty(of, dtype=torch.float32),
            ]
    counts = call.x.new_empty((call.batch, call.layers[-1].size), dtype=torch.float32)
    rates = [call.x.new_empty(layer.size, dtype=torch.float32) for layer in call.layers]
    last = [call.x.new_empty(call.state_shape(layer), dtype=torch.float32) for layer in call.layers]
    return counts, rates, last, spikes, kept


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, kept, (grad_counts, *grads), (grad_x_needed, *_) = given
    layers, count = _layers(call), len(call.layers)
    all_spikes, kept = kept[:count], kept[count:]
    grad_x, grad_spikes = None, None
    found = []  # the gradients of the layers, the last one first
    for i in reversed(range(count)):
        layer, own, (state, checkpoints) = layers[i], call.layers[i], kept[2 * i : 2 * i + 2]
        rates, last = (
            None if grad is None else layer.to_columns(grad).contiguous() for grad in (grads[i], grads[count + i])
        )
        upstream = Upstream(grad_spikes, grad_counts, rates, last)
        if layer.fused:
            through = _fused_backward(state, layer, upstream)
        else:
            run = Run(state, layer.population, call.num_steps, layer.first, layer.dropped)
            through = _pair_backward(run, checkpoints, upstream, call.dtype)
        grad_current = through.current.view(-1, through.current.shape[-1])
        received = (all_spikes[i - 1] if i else call.x).view(-1, layer.units.cols.size)
        want_bias = layer.bias is not None and through.bias is None
        grad_values, summed = weight_gradient(grad_current, received, layer.units, own.values.dtype, want_bias)
        parameters = [layer.like(*pair) for pair in zip(own.population.parameters, through.parameters, strict=True)]
        found.append(
            own._replace(
                values=grad_values,
                bias=layer.bias_gradient(own.bias, summed if want_bias else through.bias),
                population=own.population._replace(parameters=tuple(parameters)),
                state=None if through.first is None else layer.to_neurons(through.first),
            )
        )
        grad_counts = None
        if i > 0:
            grad_spikes = input_gradient(grad_current, layer.values.to(call.dtype), layer.units, call.dtype)
            grad_spikes = grad_spikes.view(all_spikes[i - 1].shape)
        elif grad_x_needed:
            grad_x = input_gradient(grad_current, layer.values.to(call.dtype), layer.units, call.x.dtype)
            grad_x = grad_x.view(call.x.shape)
    return given.aligned(call._replace(x=grad_x, layers=tuple(found[::-1])))


FORWARD, BACKWARD = operators("triton_", ("CPU", "CUDA"), _forward, _forward_fake, _backward)  # CPU: the interpreter
