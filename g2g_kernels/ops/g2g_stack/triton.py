"""``g2g_stack`` in Triton: the whole stack of layers. Operators ``g2g::triton_stack_forward`` (with its autograd
formula) and ``g2g::triton_stack_backward``.

Spikes travel from layer to layer as bytes, in the order of places in which the next layer reads them (see
``Places.read_by``); so do its currents and their gradients. Only counts, rates and gradients of parameters are put back
into the order of neurons: at most B·N numbers each.

A layer runs in one of two ways, which :func:`fused_pays` chooses between:

    pair    the product of ``g2g_linear``, its currents [T, B, N] in memory, then the kernel of ``neurons``. For a held
            input (the first layer under ``current`` encoding) the product is [B, N], computed once.
    fused   one kernel for both; the currents stay in registers. For the backward pass it keeps the margins U − θ.

Bytes an element of [T, B, N] in a training step, with c the size of the products' dtype (2 under autocast, else 4):

                 forward                                      backward
    pair         c + c currents, 1 spikes, 0.3 checkpoints    c currents, 0.3 checkpoints, c + c gradients
    fused        1 spikes, c margins                          c margins, c + c gradients

    that is 11.6 for the pair and 9 fused in 16 bits. Keeping nothing and computing the currents again in the backward
    pass would write them, read them, and cost another product. Margins are kept rather than membranes since rounding
    never changes their sign, so that every R is exact, and since they are most precise where σ' is steep; the products'
    dtype is what every other number of the backward pass is rounded to as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from g2g_kernels.ops.derivatives import refuse_backward
from g2g_kernels.ops.g2g_linear.triton import (
    INDICES,
    Tensors,
    Units,
    columns,
    indices,
    input_gradient,
    product,
    product_tiles,
    units_of,
    weight_gradient,
)
from g2g_kernels.ops.g2g_stack.activity import Activity
from g2g_kernels.ops.g2g_stack.layer import SpikingLayer
from g2g_kernels.ops.neurons.triton import (
    NUM_WARPS,
    TILE,
    checkpoint_shape,
    launch_backward,
    launch_forward,
    segment_of,
)
from g2g_kernels.triton import runtime
from g2g_kernels.triton.neuron import EXACT, charge, decaying, fires, surrogate_derivative
from g2g_kernels.triton.runtime import launch

# --- the fused kernel -------------------------------------------------------------------------------------------
#
# One program computes BLOCK_B samples × one tile of BLOCK_N neurons for all T steps, membranes in registers. Its loop
# runs over (t, unit of the block row) flattened into one, so that the loads of step t + 1 are under way while step t is
# finished. 2·T·B·U·R·C FLOPs; the weights of a block row (67 KB by default, in 16 bits) are read T times, from L2.


@triton.jit
def fused_forward_kernel(
    x,
    x_column,
    values,
    row_ptr,
    row_slot,
    unit_col,
    bias,
    y_column,
    beta,
    theta,
    spikes,
    margins,
    counts,
    steps,
    batch,
    num_rows,
    x_size,
    y_size,
    beta_stride,
    theta_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    RESET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (num_rows * TILES_N)
    row = tile // TILES_N
    b = (tl.program_id(0) // (num_rows * TILES_N)) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    column, n_ok = columns(row * N + n, y_column, n < N, y_size)
    inside = (b < batch)[:, None] & n_ok[None, :]
    y_offset = b[:, None] * y_size + column[None, :]
    x_offset = b[:, None] * x_size

    decay = tl.clamp(tl.load(beta + column * beta_stride, mask=n_ok, other=0.0), 0.0, 1.0)[None, :]
    threshold = tl.load(theta + column * theta_stride, mask=n_ok, other=0.0)[None, :]
    start = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        start += tl.load(bias + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]

    first = tl.load(row_ptr + row) * TILES_K
    end = tl.load(row_ptr + row + 1) * TILES_K
    tiles_of_step = tl.maximum(end - first, 1)  # a row without units still has neurons that decay
    current = start
    membrane = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for turn in range(steps * tiles_of_step):
        t = (turn // tiles_of_step).to(tl.int64)
        i = first + turn % tiles_of_step
        slot = tl.load(row_slot + i // TILES_K, mask=i < end, other=0).to(tl.int64)
        k = (i % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        k_ok = k < tl.where(i < end, K, 0)
        other = tl.load(unit_col + slot, mask=i < end, other=0)
        x_col, x_ok = columns(other * K + k, x_column, k_ok, x_size)
        x_tile = tl.load(
            x + t * batch * x_size + (x_offset + x_col[None, :]), mask=(b < batch)[:, None] & x_ok[None, :], other=0
        )
        weights = tl.load(
            values + slot * (N * K) + k[:, None] + n[None, :] * K, mask=k_ok[:, None] & (n < N)[None, :], other=0
        )
        current = tl.dot(x_tile.to(weights.dtype), weights, current, input_precision=PRECISION)
        if turn % tiles_of_step == tiles_of_step - 1:
            membrane = charge(membrane, fires(membrane, threshold), current, decay, threshold, RESET)
            spike = fires(membrane, threshold)
            count += spike.to(tl.float32)
            here = t * batch * y_size
            tl.store(spikes + here + y_offset, spike.to(spikes.dtype.element_ty), mask=inside)
            if margins is not None:
                tl.store(margins + here + y_offset, (membrane - threshold).to(margins.dtype.element_ty), mask=inside)
            current = start
    tl.store(counts + y_offset, count, mask=inside)


def fused_tiles(batch: int, width: int, x: torch.dtype, products: torch.dtype) -> dict[str, int]:
    """As for the product, with 64 samples at most: two row tiles of a batch of 256 times 32 block rows would leave half
    of an H100's 132 SMs without work. Membranes and counts are registers too, so 8 warps share a tile."""
    tiles = product_tiles(batch, width, x, products)
    return tiles | {"BLOCK_M": min(64, tiles["BLOCK_M"]), "num_warps": 8}


#: SMs of an H100, where no device can be asked
_H100_SMS = 132


def fused_pays(units: Units, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """True where one kernel for product and neurons is expected to be faster than the pair; a cost model, not measured.

    Fusing saves c bytes written and c read of [T, B, N], about a third of the time of the default product at its rate
    on an H100. But its programs walk through time and cannot be split over it, so there are only B/64 of them for each
    block row. With less than three quarters of the SMs at work, the product loses more than the currents' trip costs.
    The dense product is cuBLAS's, which has no neurons in it.
    """
    if units.dense_pays:
        return False
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _H100_SMS
    block_m = fused_tiles(batch, units.cols.tile, torch.uint8, dtype)["BLOCK_M"]
    programs = units.rows.num_units * units.rows.tiles * triton.cdiv(batch, block_m)
    return 4 * programs >= 3 * sms


# The backward pass of the neurons of a fused layer: one program a tile of samples × neurons, t downwards in segments
# whose loads are issued together. Sums for bias, β and θ go to memory once a program and are added in a fixed order.


@triton.jit
def _if(there, b, batch, n_ok):
    """Which elements of a tile there are: none unless ``there``, a scalar."""
    return (b < tl.where(there, batch, 0))[:, None] & n_ok[None, :]


@triton.jit
def fused_backward_kernel(
    margins,
    beta,
    theta,
    grad_spikes,
    grad_counts,
    grad_rates,
    grad_current,
    bias_sums,
    beta_sums,
    theta_sums,
    steps,
    batch,
    neurons,
    beta_stride,
    theta_stride,
    alpha,
    rate_scale,
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
    decay = tl.clamp(tl.load(beta + n * beta_stride, mask=n_ok, other=0.0), 0.0, 1.0)[None, :]
    threshold = tl.load(theta + n * theta_stride, mask=n_ok, other=0.0)[None, :]

    # the gradient that reaches every spike of a neuron alike, at all steps
    at_all_steps = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if grad_counts is not None:
        at_all_steps += tl.load(grad_counts + offset, mask=inside, other=0.0).to(tl.float32)
    if grad_rates is not None:
        at_all_steps += tl.load(grad_rates + n, mask=n_ok, other=0.0).to(tl.float32)[None, :] * rate_scale
    at_all_steps = tl.where(inside, at_all_steps, 0.0)  # elements that do not exist add nothing to any sum

    grad_membrane = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    grad_bias = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    grad_beta = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    grad_theta = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    segments = tl.cdiv(steps, SEGMENT)
    # steps after the last one take part with margins and gradients of 0, which leave all sums as they are
    last = segments * SEGMENT - 1
    margin = tl.load(margins + last * step + offset, mask=_if(last < steps, b, batch, n_ok), other=0.0).to(tl.float32)
    for turn in range(segments):
        first = (segments - 1 - turn) * SEGMENT
        earlier = ()
        grads = ()
        for k in tl.static_range(SEGMENT):
            t = first + k
            there = _if((t > 0) & (t <= steps), b, batch, n_ok)
            earlier += (tl.load(margins + (t - 1) * step + offset, mask=there, other=0.0),)
            if grad_spikes is not None:
                grads += (tl.load(grad_spikes + t * step + offset, mask=_if(t < steps, b, batch, n_ok), other=0.0),)
        for k in tl.static_range(SEGMENT - 1, -1, -1):
            t = first + k
            grad_spike = tl.where(t < steps, at_all_steps, 0.0)
            if grad_spikes is not None:
                grad_spike += grads[k].to(tl.float32)
            before = tl.where(t > 0, earlier[k].to(tl.float32), -threshold)  # U_{t−1} − θ, with U_0 = 0
            fired = before > 0
            through_spike = surrogate_derivative(margin, alpha, SURROGATE) * grad_spike
            grad_membrane += through_spike
            out = grad_membrane.to(grad_current.dtype.element_ty)
            tl.store(grad_current + t * step + offset, out, mask=_if(t < steps, b, batch, n_ok))
            grad_bias += grad_membrane
            grad_theta -= through_spike
            if RESET == "subtract":
                grad_theta -= tl.where(fired, grad_membrane, 0.0)
            grad_beta += grad_membrane * decaying(before + threshold, fired, RESET)
            grad_membrane = decaying(grad_membrane * decay, fired, RESET)
            margin = before
    here = tl.program_id(0) * neurons + n
    tl.store(bias_sums + here, tl.sum(grad_bias, 0), mask=n_ok)
    tl.store(beta_sums + here, tl.sum(grad_beta, 0), mask=n_ok)
    tl.store(theta_sums + here, tl.sum(grad_theta, 0), mask=n_ok)


# --- one layer in memory ----------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """A layer of the stack as it is in memory, vectors in the order of its currents' columns."""

    units: Units
    bias: torch.Tensor | None  # [N'], N' columns
    beta: torch.Tensor  # float32, [1] or [N']
    theta: torch.Tensor  # float32, [1] or [N']
    neuron: torch.Tensor | None  # int64 [N'], the neuron of each column, N where there is none; None if they are equal
    column: torch.Tensor | None  # int64 [N], the column of each neuron
    held: bool
    fused: bool

    def to_columns(self, vector: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """A vector [N], one entry a neuron, in the order of columns."""
        if self.neuron is None or vector.numel() == 1:
            return vector
        return torch.cat([vector, vector.new_full((1,), fill)])[self.neuron]

    def to_neurons(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [..., N'] in the order of neurons, [..., N]."""
        return tensor if self.column is None else tensor.index_select(-1, self.column)

    def like(self, parameter: torch.Tensor, per_column: torch.Tensor) -> torch.Tensor:
        """The gradient of a parameter, a scalar or one a neuron, from one a column."""
        grad = self.to_neurons(per_column)
        return (grad if parameter.numel() > 1 else grad.sum()).reshape(parameter.shape).to(parameter.dtype)


def _layers(
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    trivial: Sequence[bool],
    steps: int,
    dtype: torch.dtype,
) -> list[_Layer]:
    count = len(values)
    if not (len(biases) == len(betas) == len(thresholds) == count and len(all_indices) == INDICES * count):
        raise ValueError("a stack needs as many biases, betas, thresholds and masks as values")
    graphs = [
        units_of(all_indices[i * INDICES : (i + 1) * INDICES], trivial[2 * i : 2 * i + 2], values[i])
        for i in range(count)
    ]
    layers = []
    for i, graph in enumerate(graphs):
        neuron = column = None
        rows, cols = graph.rows, graph.cols
        if i + 1 < count:
            readers = graphs[i + 1].cols
            rows, neuron, column = rows.read_by(readers), readers.column, readers.place
        if i > 0:
            cols = cols.in_order()
        units = graph._replace(rows=rows, cols=cols)
        held = steps > 0 and i == 0
        fused = not held and fused_pays(units, x.shape[-2], dtype, x.device)
        layer = _Layer(units, None, betas[i].float(), thresholds[i].float(), neuron, column, held, fused)
        bias = layer.to_columns(biases[i]) if biases[i].numel() else None
        # where there is no neuron, one that never fires
        layers.append(
            layer._replace(bias=bias, beta=layer.to_columns(layer.beta), theta=layer.to_columns(layer.theta, 1.0))
        )
    return layers


def _launch_fused(
    x: torch.Tensor,
    values: torch.Tensor,
    layer: _Layer,
    reset: str,
    spikes: torch.Tensor,
    margins: torch.Tensor | None,
    counts: torch.Tensor,
) -> None:
    """Writes spikes [T, B, N'], margins of the same shape if given, and counts [B, N'], from x [T·B, in]."""
    units = layer.units
    steps, batch, _ = spikes.shape
    options = fused_tiles(batch, units.cols.tile, x.dtype, values.dtype)
    launch(
        fused_forward_kernel,
        (units.rows.num_units * units.rows.tiles * triton.cdiv(batch, options["BLOCK_M"]),),
        x,
        units.cols.column,
        values,
        units.row_ptr,
        units.row_slot,
        units.unit_col,
        layer.bias,
        units.rows.column,
        layer.beta,
        layer.theta,
        spikes,
        margins,
        counts,
        steps,
        batch,
        units.rows.num_units,
        units.cols.size,
        units.rows.size,
        int(layer.beta.numel() > 1),
        int(layer.theta.numel() > 1),
        K=units.cols.width,
        N=units.rows.width,
        RESET=reset,
        PRECISION=runtime.input_precision(),
        BLOCK_N=units.rows.tile,
        **(options | EXACT),
    )


def _launch_fused_backward(
    margins: torch.Tensor,
    layer: _Layer,
    grad_spikes: torch.Tensor | None,
    grad_counts: torch.Tensor | None,
    grad_rates: torch.Tensor | None,
    reset: str,
    surrogate: str,
    alpha: float,
    grad_current: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes ∂L/∂I [T, B, N'] and returns the gradients of bias, β and θ, float32 [N']."""
    steps, batch, neurons = margins.shape
    block_n = min(128, triton.next_power_of_2(neurons))
    block_b = TILE // block_n
    grid = triton.cdiv(batch, block_b), triton.cdiv(neurons, block_n)
    sums = [torch.empty((grid[0], neurons), dtype=torch.float32, device=margins.device) for _ in range(3)]
    launch(
        fused_backward_kernel,
        grid,
        margins,
        layer.beta,
        layer.theta,
        grad_spikes,
        grad_counts,
        grad_rates,
        grad_current,
        *sums,
        steps,
        batch,
        neurons,
        int(layer.beta.numel() > 1),
        int(layer.theta.numel() > 1),
        alpha,
        1 / (steps * batch),
        RESET=reset,
        SURROGATE=surrogate,
        SEGMENT=segment_of(steps),
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        num_warps=NUM_WARPS,
    )
    grad_bias, grad_beta, grad_theta = (part.sum(0) for part in sums)
    slope = (layer.beta >= 0) & (layer.beta <= 1)  # the clamp's own derivative
    return grad_bias, grad_beta * slope, grad_theta


# --- operators --------------------------------------------------------------------------------------------------


def refuses(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    first = layers[0].neurons
    for layer in layers:
        if layer.neurons.model != "lif":
            return "serves LIF neurons"
        if layer.neurons[2:] != first[2:]:
            return "needs one reset, surrogate and alpha for all layers"
    reason = runtime.refuses(x, *(tensor for layer in layers for tensor in layer.tensors()))
    if reason is None and runtime.autocast_dtype(x.device.type) is None:
        dtypes = {x.dtype, *(values.dtype for values, *_ in layers)}
        if len(dtypes) > 1:
            reason = f"needs x and values of one dtype (or autocast), not {', '.join(sorted(map(str, dtypes)))}"
    if reason is None and x.numel() == 0:
        reason = "needs a batch that is not empty"
    return reason


def g2g_stack(x: torch.Tensor, layers: Sequence[SpikingLayer], steps: int | None) -> Activity:
    _, _, reset, surrogate, alpha = layers[0].neurons
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))
    described = [indices(layer.mask) for layer in layers]
    counts, rates, spikes, _ = torch.ops.g2g.triton_stack_forward(
        x.contiguous(),
        [layer.values.contiguous() for layer in layers],
        [layer.values.new_empty(0) if layer.bias is None else layer.bias.contiguous() for layer in layers],
        [layer.neurons.parameters[0].reshape(-1).contiguous() for layer in layers],
        [layer.neurons.parameters[1].reshape(-1).contiguous() for layer in layers],
        [tensor for tensors, _ in described for tensor in tensors],
        [whole for _, trivial in described for whole in trivial],
        steps or 0,
        reset,
        surrogate,
        alpha,
        runtime.autocast_dtype(x.device.type) or x.dtype,
        keep,
    )
    readers = [None if layer.mask.cols.trivial else layer.mask.cols.position for layer in layers[1:]]
    return Activity(
        counts,
        tuple(rates.split([layer.mask.shape[0] for layer in layers])),
        tuple(map(ByteSpikes, spikes, [*readers, None])),
    )


class ByteSpikes:
    """Spikes of one layer, one byte each, in the order in which the next layer reads them."""

    def __init__(self, spikes: torch.Tensor, column: torch.Tensor | None) -> None:
        self._spikes, self._column = spikes, column

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        spikes = self._spikes if self._column is None else self._spikes.index_select(-1, self._column)
        return spikes.float()


_library = torch.library.Library("g2g", "FRAGMENT")
_library.define(
    "triton_stack_forward(Tensor x, Tensor[] values, Tensor[] biases, Tensor[] betas, Tensor[] thresholds, "
    "Tensor[] indices, bool[] trivial, int steps, str reset, str surrogate, float alpha, ScalarType dtype, bool keep) "
    "-> (Tensor, Tensor, Tensor[], Tensor[])"
)
_library.define(
    "triton_stack_backward(Tensor? grad_counts, Tensor? grad_rates, Tensor x, Tensor[] values, Tensor[] biases, "
    "Tensor[] betas, Tensor[] thresholds, Tensor[] indices, bool[] trivial, Tensor[] spikes, Tensor[] kept, int steps, "
    "str reset, str surrogate, float alpha, ScalarType dtype, bool grad_x) -> Tensor[]"
)


def _sizes(x: torch.Tensor, steps: int) -> tuple[int, int]:
    """T and B."""
    return (steps or x.shape[0]), x.shape[-2]


def _forward(
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    trivial: Sequence[bool],
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Counts [B, N] of the last layer, rates of all neurons, spikes of each layer, and two tensors a layer that the
    backward pass needs: currents and checkpoints, or margins and nothing."""
    num_steps, batch = _sizes(x, steps)
    layers = _layers(x, values, biases, betas, thresholds, all_indices, trivial, steps, dtype)
    all_spikes: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    rates = []
    received = x
    for layer, packed in zip(layers, values, strict=True):
        shape = (num_steps, batch, layer.units.rows.size)
        # columns without a neuron are never stored to, but the next layer multiplies them by zeros
        allocate = torch.zeros if layer.units.rows.holes and layer.fused else torch.empty
        spikes = allocate(shape, dtype=torch.uint8, device=x.device)
        counts = allocate(shape[1:], dtype=torch.float32, device=x.device)
        received = received.reshape(-1, received.shape[-1])
        if layer.fused:
            margins = allocate(shape, dtype=dtype, device=x.device) if keep else None
            _launch_fused(received, packed.to(dtype), layer, reset, spikes, margins, counts)
            kept += [counts.new_empty(0) if margins is None else margins, counts.new_empty(0)]
        else:
            # a held current is small, and the same rounding error at every step would add up
            of = torch.float32 if layer.held else dtype
            current = product(received, packed.to(dtype), layer.units, layer.bias, of)
            current = current.view(*(shape[1:] if layer.held else shape))
            checkpoints = None
            if keep:
                checkpoints = torch.empty(checkpoint_shape(*shape), dtype=torch.float32, device=x.device)
            launch_forward(current, layer.beta, layer.theta, num_steps, layer.held, reset, spikes, checkpoints, counts)
            kept += [counts.new_empty(0), counts.new_empty(0)] if checkpoints is None else [current, checkpoints]
        rates.append(layer.to_neurons(counts.sum(0) / (num_steps * batch)))
        all_spikes.append(spikes)
        received = spikes
    return counts, torch.cat(rates), all_spikes, kept


def _forward_fake(
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    trivial: Sequence[bool],
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    num_steps, batch = _sizes(x, steps)
    layers = _layers(x, values, biases, betas, thresholds, all_indices, trivial, steps, dtype)
    spikes, kept = [], []
    for layer in layers:
        shape = (num_steps, batch, layer.units.rows.size)
        spikes.append(x.new_empty(shape, dtype=torch.uint8))
        of = torch.float32 if layer.held else dtype
        of_checkpoints = (0,) if layer.fused or not keep else checkpoint_shape(*shape)
        first = shape[1:] if layer.held else shape
        kept += [
            x.new_empty(first if keep else 0, dtype=of if keep else torch.float32),
            x.new_empty(of_checkpoints, dtype=torch.float32),
        ]
    neurons = [all_indices[i * INDICES + 7].shape[0] for i in range(len(values))]
    counts = x.new_empty((batch, neurons[-1]), dtype=torch.float32)
    return counts, x.new_empty(sum(neurons), dtype=torch.float32), spikes, kept


def _backward(
    grad_counts: torch.Tensor | None,
    grad_rates: torch.Tensor | None,
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    trivial: Sequence[bool],
    all_spikes: Tensors,
    kept: Tensors,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    dtype: torch.dtype,
    grad_x: bool,
) -> list[torch.Tensor]:
    """∂L/∂x (empty unless wanted), then the gradients of all values, biases, betas and thresholds."""
    num_steps, _ = _sizes(x, steps)
    layers = _layers(x, values, biases, betas, thresholds, all_indices, trivial, steps, dtype)
    neurons = [all_indices[i * INDICES + 7].shape[0] for i in range(len(values))]
    rates_of: Sequence[torch.Tensor | None] = [None] * len(layers)
    if grad_rates is not None:
        rates_of = grad_rates.split(neurons)
    grads: list[list[torch.Tensor]] = []
    grad_spikes = None
    for i in reversed(range(len(layers))):
        layer, (state, checkpoints) = layers[i], kept[2 * i : 2 * i + 2]
        to_rates = rates_of[i]
        if to_rates is not None:
            to_rates = layer.to_columns(to_rates)
        grad_current = torch.empty_like(state, dtype=dtype)
        if layer.fused:
            grad_bias, grad_beta, grad_theta = _launch_fused_backward(
                state, layer, grad_spikes, grad_counts, to_rates, reset, surrogate, alpha, grad_current
            )
            grad_beta, grad_theta = layer.like(betas[i], grad_beta), layer.like(thresholds[i], grad_theta)
        else:
            grad_beta, grad_theta = torch.empty_like(layer.beta), torch.empty_like(layer.theta)
            launch_backward(
                state, checkpoints, layer.beta, layer.theta, grad_spikes, num_steps, layer.held, reset, surrogate,
                alpha, grad_current, grad_beta, grad_theta, grad_counts, to_rates,
            )  # fmt: skip
            grad_bias = None
            grad_beta, grad_theta = (
                grad if grad.numel() == 1 else layer.to_neurons(grad) for grad in (grad_beta, grad_theta)
            )
            grad_beta, grad_theta = grad_beta.to(betas[i].dtype), grad_theta.to(thresholds[i].dtype)
        grad_current = grad_current.view(-1, grad_current.shape[-1])
        received = (all_spikes[i - 1] if i else x).view(-1, layer.units.cols.size)
        want_bias = layer.bias is not None and grad_bias is None
        grad_values, summed = weight_gradient(grad_current, received, layer.units, values[i].dtype, want_bias)
        grad_bias = summed if grad_bias is None else grad_bias
        if layer.bias is None or grad_bias is None:
            grad_bias = torch.empty_like(biases[i])
        else:
            grad_bias = layer.to_neurons(grad_bias).to(biases[i].dtype)
        grads.insert(0, [grad_values, grad_bias, grad_beta, grad_theta])
        grad_counts = None
        if i > 0:
            shape = all_spikes[i - 1].shape
            grad_spikes = input_gradient(grad_current, values[i].to(dtype), layer.units, dtype).view(shape)
        elif grad_x:
            to_x = input_gradient(grad_current, values[i].to(dtype), layer.units, x.dtype).view(x.shape)
    return [to_x if grad_x else x.new_empty(0), *(grad for kind in zip(*grads, strict=True) for grad in kind)]


def _backward_fake(
    grad_counts: torch.Tensor | None,
    grad_rates: torch.Tensor | None,
    x: torch.Tensor,
    values: Tensors,
    biases: Tensors,
    betas: Tensors,
    thresholds: Tensors,
    all_indices: Tensors,
    trivial: Sequence[bool],
    all_spikes: Tensors,
    kept: Tensors,
    steps: int,
    reset: str,
    surrogate: str,
    alpha: float,
    dtype: torch.dtype,
    grad_x: bool,
) -> list[torch.Tensor]:
    groups = (values, biases, betas, thresholds)
    return [x.new_empty(x.shape if grad_x else 0), *(t.new_empty(t.shape) for group in groups for t in group)]


def _setup_context(ctx, inputs, output):
    x, values, biases, betas, thresholds, all_indices, ctx.trivial, *ctx.options, _ = inputs
    _, _, spikes, kept = output
    ctx.set_materialize_grads(False)
    ctx.number = len(values)
    ctx.save_for_backward(x, *values, *biases, *betas, *thresholds, *all_indices, *spikes, *kept)


def _autograd(ctx, grad_counts, grad_rates, _spikes, _kept):
    number = ctx.number
    if grad_counts is None and grad_rates is None:
        return (None,) * 13
    x, *rest = ctx.saved_tensors
    groups = [rest[i * number : (i + 1) * number] for i in range(4)]
    all_indices, rest = rest[4 * number : (4 + INDICES) * number], rest[(4 + INDICES) * number :]
    to_x, *grads = torch.ops.g2g.triton_stack_backward(
        None if grad_counts is None else grad_counts.contiguous(),
        None if grad_rates is None else grad_rates.contiguous(),
        x, *groups, all_indices, ctx.trivial, rest[:number], rest[number:], *ctx.options, ctx.needs_input_grad[0],
    )  # fmt: skip
    parts = [grads[i * number : (i + 1) * number] for i in range(4)]
    return (to_x if ctx.needs_input_grad[0] else None, *parts, [None] * len(all_indices), *(None,) * 7)


for _name, _function, _fake in (
    ("triton_stack_forward", _forward, _forward_fake),
    ("triton_stack_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):  # the CPU for Triton's interpreter
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"g2g::{_name}", _fake, lib=_library)
torch.library.register_autograd("g2g::triton_stack_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("g2g::triton_stack_backward", refuse_backward, lib=_library)
