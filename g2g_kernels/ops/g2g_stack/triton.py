"""``g2g_stack`` in Triton: the whole stack of layers. Operators ``g2g::triton_stack_forward`` (with its autograd
formula) and ``g2g::triton_stack_backward``.

README.md has the three ways of a layer (pair, fused, recurrent), what is kept and the bytes of each. Spikes travel
from layer to layer as bytes, in the order of places in which the next layer reads them (``read_by``); so do its
currents and their gradients. Only counts, rates and gradients of parameters return to the order of neurons.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from g2g_kernels.mask.packing import Units
from g2g_kernels.mask.sides import Side
from g2g_kernels.ops.g2g_linear.tiles import STAGES, fitted, product_tiles, tile_of
from g2g_kernels.ops.g2g_linear.triton import (
    arguments,
    columns,
    in_order,
    input_gradient,
    plus_units,
    product,
    read_by,
    too_large,
    units_of,
    weight_gradient,
)
from g2g_kernels.ops.g2g_stack.activity import Activity, DenseSpikes, Spikes
from g2g_kernels.ops.g2g_stack.call import Outputs, StackCall, chain_of, operator_of
from g2g_kernels.ops.g2g_stack.population import Call, refuses_kernels, shown, size_of, state_shape, unread
from g2g_kernels.ops.neurons.call import NeuronsCall
from g2g_kernels.ops.neurons.models import MODELS, Neurons
from g2g_kernels.ops.neurons.surrogates import SURROGATES
from g2g_kernels.ops.neurons.triton import (
    Upstream,
    checkpoint_shape,
    launch_backward,
    launch_forward,
    model_options,
    parameter_gradients,
    refuses_model,
)
from g2g_kernels.ops.record import Backward, Output, opened
from g2g_kernels.triton import runtime
from g2g_kernels.triton.neuron import (
    EXACT,
    charge,
    fires,
    load_at_all_steps,
    load_dropped,
    load_parameters,
    load_states,
    plus_last,
    step_backward,
    store_partials,
    store_states,
    to_keep,
    zeros,
)
from g2g_kernels.triton.products import in_memory
from g2g_kernels.triton.runtime import cdiv, launch, precision_of

# --- neurons and their product in one kernel --------------------------------------------------------------------
#
# One program computes BLOCK_M samples × one tile of BLOCK_N neurons, membranes in registers: all T steps of a fused
# layer, one step of a recurrent one. 2·T·B·U·R·C FLOPs. The weights of a fused layer's block row stay in shared memory
# for all T: the loop is unrolled over ON_CHIP units, so each step's loads are in flight during the step before. Rows
# with fewer units multiply zeros; those with more, which dynamic sparse training may make, read them in each step.


@triton.jit
def next_states(
    states, count, current, own, silent, spikes, margins, here, y_offset, inside,
    MODEL: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """The states and counts after one more step, whose spikes and margins are stored ``here``, at its first element."""
    threshold = own[len(own) - 1]
    states = charge(states, fires(states[len(states) - 1], threshold), current, own, MODEL, RESET)
    membrane = states[len(states) - 1]
    spike = tl.where(silent, 0.0, fires(membrane, threshold).to(tl.float32))
    tl.store(spikes + here + y_offset, spike.to(spikes.dtype.element_ty), mask=inside)
    if margins is not None:
        tl.store(margins + here + y_offset, to_keep(membrane, threshold, margins.dtype.element_ty), mask=inside)
    return states, count + spike


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


@triton.jit
def tile_of_program(num_n, batch, y_column, y_size, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The unit's row (or column) of this program; its samples and neurons; where these are in memory, and which exist:
    unit, tile of samples, b, n, column, n_ok, inside, offsets."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, of_samples = tl.program_id(0) % (num_n * TILES_N), tl.program_id(0) // (num_n * TILES_N)
    b = of_samples * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    column, n_ok = columns((tile // TILES_N) * N + n, y_column, n < N, y_size)
    inside = (b < batch)[:, None] & n_ok[None, :]
    return tile // TILES_N, of_samples, b, n, column, n_ok, inside, b[:, None] * y_size + column[None, :]


@triton.jit(do_not_specialize=["steps", "batch", "num_n"])
def fused_forward_kernel(
    x, x_column, x_bounds, values, ptr, slots, others, bias, currents, dropped, y_column, parameters, spikes,
    margins, counts, states_before, last, steps, batch, num_n, x_size, y_size,
    K: tl.constexpr, N: tl.constexpr, MODEL: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr,
    PER_NEURON: tl.constexpr, RESET: tl.constexpr, PRECISION: tl.constexpr, ON_CHIP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, _, b, n, column, n_ok, inside, y_offset = tile_of_program(num_n, batch, y_column, y_size, N, BLOCK_M, BLOCK_N)
    own = load_parameters(parameters, column, n_ok, DECAYS, PER_NEURON)
    start = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        start += tl.load(bias + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    silent = load_dropped(dropped, y_offset, inside)

    step = tl.cast(batch, tl.int64) * y_size
    states = load_states(states_before, step, y_offset, inside, STATES, BLOCK_M, BLOCK_N)
    count = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, end = tl.load(ptr + row), tl.load(ptr + row + 1)
    on_chip = end - first <= ON_CHIP
    if ON_CHIP:
        if on_chip:
            states, count = over_time_on_chip(
                states, count, start, own, silent, x, values, first, end, slots, others, spikes, margins,
                steps, batch, b, n, y_offset, inside, x_size, y_size, K, N, MODEL, RESET, BLOCK_K, ON_CHIP, STAGES,
            )  # fmt: skip
    if not ON_CHIP or not on_chip:
        for t in range(steps):
            current = start
            if currents is not None:
                current += tl.load(currents + y_offset, mask=inside, other=0.0).to(tl.float32)
            current = plus_units(
                current, x + tl.cast(t, tl.int64) * batch * x_size, x_column, x_bounds, x_size,
                values, ptr, slots, others, row, b, b < batch, n, n < N, K, N, True, PRECISION, BLOCK_K,
            )  # fmt: skip
            states, count = next_states(
                states, count, current, own, silent, spikes, margins, t * step, y_offset, inside, MODEL, RESET
            )
    store_states(last, step, y_offset, inside, states)
    if counts is not None:
        tl.store(counts + y_offset, count, mask=inside)


@triton.jit(do_not_specialize=["batch", "num_n"])
def recurrent_backward_kernel(
    grad_after, x_column, x_bounds, values, ptr, slots, others, y_column, parameters, states, states_before,
    grad_spikes, grad_counts, grad_rates, grad_membranes, grads, grad_current, partials, dropped, batch, num_n,
    x_size, y_size, alpha, rate_scale,
    K: tl.constexpr, N: tl.constexpr, MODEL: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr,
    PER_NEURON: tl.constexpr, RESET: tl.constexpr, SURROGATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step: ∂L/∂I_t from ∂L/∂I_{t+1}; adds to ``partials`` and replaces ``grads``, those of the states."""
    col, row_of_partials, b, n, column, n_ok, inside, offsets = tile_of_program(
        num_n, batch, y_column, y_size, N, BLOCK_M, BLOCK_N
    )
    own = load_parameters(parameters, column, n_ok, DECAYS, PER_NEURON)
    step = tl.cast(batch, tl.int64) * y_size
    grad_spike = load_at_all_steps(grad_counts, grad_rates, offsets, inside, column, n_ok, rate_scale, BLOCK_M, BLOCK_N)
    if grad_spikes is not None:
        grad_spike += tl.load(grad_spikes + offsets, mask=inside, other=0.0).to(tl.float32)
    if grad_after is not None:
        grad_spike = plus_units(
            grad_spike, grad_after, x_column, x_bounds, x_size, values, ptr, slots, others, col,
            b, b < batch, n, n < N, K, N, False, PRECISION, BLOCK_K,
        )  # fmt: skip
    reaching = load_states(grads, step, offsets, inside, STATES, BLOCK_M, BLOCK_N)
    silent = load_dropped(dropped, offsets, inside)
    grad_spike = tl.where(silent, 0.0, grad_spike)
    if grad_membranes is not None:
        grad_membrane = tl.load(grad_membranes + offsets, mask=inside, other=0.0).to(tl.float32)
        reaching = plus_last(reaching, tl.where(silent, 0.0, grad_membrane))
    before = load_states(states_before, step, offsets, inside, STATES, BLOCK_M, BLOCK_N)
    threshold = own[len(own) - 1]
    margin = tl.load(states + (STATES - 1) * step + offsets, mask=inside, other=0.0) - threshold
    fired = fires(before[STATES - 1], threshold)
    begins = tl.full((1, 1), states_before is None, tl.int1)
    to_current, moved, added = step_backward(
        reaching, zeros(len(own), BLOCK_M, BLOCK_N), before, fired, margin, grad_spike, begins, own, alpha,
        MODEL, RESET, SURROGATE,
    )  # fmt: skip
    store_states(grads, step, offsets, inside, moved)
    tl.store(grad_current + offsets, to_current.to(grad_current.dtype.element_ty), mask=inside)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    apart = tl.num_programs(0) // (num_n * TILES_N) * y_size  # below 2²⁸: 16 samples or more a tile, and too_large()
    here = partials + row_of_partials * y_size + column
    store_partials(here, apart, added, to_current, inside, parameters, column, n_ok, DECAYS, PER_NEURON, True)


def fused_tiles(batch: int, units: Units, outer: Side, x: torch.dtype, products: torch.dtype) -> dict[str, Any]:
    """As for the product of ``units`` for the neurons ``outer``, with 64 samples at most: 128 would leave half of an
    H100 without work. Four warps, since eight would multiply 64 samples twice. Parts need a second sum: half the
    neurons, with which two programs fit an SM."""
    device = units.row_ptr.device
    precision = precision_of(products, device)
    inner = units.cols if outer is units.rows else units.rows
    tiles = product_tiles(batch, tile_of(inner), x, products, precision)
    block_n = min(32, tile_of(outer)) if precision == "parts" else tile_of(outer)
    tiles |= {"BLOCK_M": min(64, tiles["BLOCK_M"]), "BLOCK_N": block_n, "num_warps": 4}
    return fitted(tiles, device) | {"PRECISION": precision}


#: the most units over which the loop is unrolled
MOST_ON_CHIP = 16
#: cards whose matrix instructions read their factors from shared memory; on others they are registers, too, which spill
ON_CHIP_CARDS = "sm_90", "sm_100", "sm_103"


def units_on_chip(units: Units, x: torch.dtype, products: torch.dtype) -> int:
    """The units of a block row whose weights stay on chip: as many as rows have on average, rounded up. 0 where they do
    not fit into shared memory, where the loop is not made for it (32 bits, inputs that are no spikes or not in the
    order of places, units wider than a tile), and where registers would spill: for neurons out of order, whose
    addresses take 32 per thread, and on cards that are not :data:`ON_CHIP_CARDS`.
    """
    rows, cols, card = units.rows, units.cols, runtime.card_of(units.row_ptr.device)
    if x != torch.uint8 or products.itemsize != 2 or card.architecture not in ON_CHIP_CARDS or cols.bounds is not None:
        return 0
    if cols.neuron_at is not None or rows.neuron_at is not None or max(rows.width, cols.width) > 64:
        return 0
    number = cdiv(units.unit_row.shape[0], rows.num_units)
    fits = number <= MOST_ON_CHIP and on_chip_bytes(number, tile_of(rows), tile_of(cols)) <= card.shared
    return number if fits else 0


def on_chip_bytes(number: int, height: int, width: int) -> int:
    """The shared memory of the fused kernel with the weights of ``number`` units on chip, at most: these in 16 bits,
    the spikes of two steps, 64 samples of 8 bits for each unit, and of one unit in 16; 1 KiB that Triton 3.4 adds."""
    return number * width * 2 * (height + 64) + 2 * width * 64 + 1024


def fused_pays(units: Units, population: Neurons, batch: int, x: torch.dtype, products: torch.dtype) -> bool:
    """True where one kernel for product and neurons is expected to be faster than the pair; a rule, not measured.

    Fusing saves 2.6 bytes per element of [T, B, N] in 16 bits. But its programs cannot be split over time: there are
    B/64 per block row, one on each multiprocessor, which are to be busy for three quarters of the time. Only for models
    whose one state is the membrane, since the backward pass recovers no other from the margins. ``x`` is the dtype of
    the layer's inputs, uint8 for spikes, ``products`` that of the factors.
    """
    if len(MODELS[population.model].states) > 1 or not units_on_chip(units, x, products):
        return False
    if runtime.assumed.fused is not None:
        return runtime.assumed.fused
    programs, most = units.rows.num_units * cdiv(int(batch), 64), runtime.card_of(units.row_ptr.device).multiprocessors
    return 4 * programs >= 3 * most * cdiv(programs, most)


# --- one layer in memory ----------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """A layer of the stack as it is in memory, vectors in the order of its currents' columns."""

    values: torch.Tensor  # of the products' dtype
    units: Units
    bias: torch.Tensor | None  # [N'], N' columns
    population: Neurons  # parameters float32, [1] or [N']
    neuron: torch.Tensor | None  # int64 [N'], the neuron of each column, N where there is none; None if they are equal
    column: torch.Tensor | None  # int64 [N], the column of each neuron
    held: bool
    fused: bool
    membranes: bool
    dropped: torch.Tensor | None = None  # uint8 [B, N']
    first: torch.Tensor | None = None  # the states before the first step, float32 [states, B, N']
    recurrent: "tuple[torch.Tensor, Units] | None" = None  # weights of the products' dtype

    def current_dtype(self) -> torch.dtype:
        """A held current is small, and the same rounding error at every step would add up."""
        return torch.float32 if self.held else self.values.dtype

    def to_columns(self, vector: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """A tensor [..., N], one entry per neuron, in the order of columns; a single entry applies to all."""
        if self.neuron is None or vector.shape == (1,):
            return vector
        return torch.cat([vector, vector.new_full((*vector.shape[:-1], 1), fill)], -1)[..., self.neuron]

    def to_neurons(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [..., N'] in the order of neurons, [..., N]."""
        return tensor if self.column is None else tensor.index_select(-1, self.column)

    def kept_shapes(self, steps: int, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what the backward pass needs: currents and checkpoints; margins, or states of all steps, and nothing."""
        size, model = self.units.rows.size, MODELS[self.population.model]
        if self.recurrent is not None:
            return (steps, len(model.states), batch, size), (0,)
        current = (batch, size) if self.held else (steps, batch, size)
        return current, (0,) if self.fused else checkpoint_shape(model, steps, batch, size)

    def allocate(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory for columns; those without a neuron are not stored to, and the next layer multiplies them by zeros."""
        allocate = torch.zeros if self.units.rows.holes else torch.empty
        return allocate(shape, dtype=dtype, device=self.values.device)

    def sent_before(self, batch: int) -> torch.Tensor:
        """The spikes that a recurrent connection receives in the first step, uint8 [B, N']: of the states before it."""
        if self.first is None:
            return torch.zeros(batch, self.units.rows.size, dtype=torch.uint8, device=self.values.device)
        sent = self.first[-1] > self.population.parameters[-1]
        return (sent if self.dropped is None else sent & (self.dropped == 0)).to(torch.uint8)


def _layers(call: StackCall) -> list[_Layer]:
    graphs = [units_of(feed.mask, feed.values) for feed, _ in call.chain]
    layers = []
    for i, (graph, (feed, recurrent), own) in enumerate(zip(graphs, call.chain, call.populations, strict=True)):
        neuron = column = readers = None
        rows, cols, population = graph.rows, graph.cols, own.neurons
        if i + 1 < len(graphs):
            readers = graphs[i + 1].cols
            rows, neuron, column = read_by(rows, readers), readers.neuron_at, readers.place_of
        if i > 0:
            cols = in_order(cols)
        units = graph._replace(rows=rows, cols=cols)
        held = call.held and i == 0
        fused = (
            not held
            and recurrent is None
            and not own.membranes
            and fused_pays(units, population, call.batch, torch.uint8 if i else call.x.dtype, call.dtype)
        )
        given = bool(own.membranes)
        layer = _Layer(feed.values.to(call.dtype), units, None, population, neuron, column, held, fused, given)
        if recurrent is not None:
            joined = units_of(recurrent.mask, recurrent.values)
            if readers is not None:
                joined = joined._replace(rows=read_by(joined.rows, readers), cols=read_by(joined.cols, readers))
            layer = layer._replace(recurrent=(recurrent.values.to(call.dtype), joined))
        *decays, threshold = (parameter.float() for parameter in population.parameters)
        if rows.holes:  # a column without a neuron never fires, whatever the others' threshold
            threshold = threshold.expand(size_of(own))
        parameters = *map(layer.to_columns, decays), layer.to_columns(threshold, 1.0)
        layers.append(
            layer._replace(
                bias=None if feed.bias is None else layer.to_columns(feed.bias),
                population=population._replace(parameters=parameters),
                dropped=None if own.dropped is None else layer.to_columns(own.dropped.to(torch.uint8)),
                first=None if own.state is None else layer.to_columns(own.state).contiguous(),
            )
        )
    return layers


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    units: Units,
    layer: _Layer,
    spikes: torch.Tensor,
    last: torch.Tensor,
    steps: int,
    on_chip: int = 0,
    **others: torch.Tensor | None,
) -> None:
    """Writes spikes [steps, B, N'] and the states after them from x [steps · B, in] and ``values`` as in memory."""
    tiles = fused_tiles(spikes.shape[-2], units, units.rows, x.dtype, layer.values.dtype)
    batch, of_row = spikes.shape[-2], cdiv(units.rows.width, tiles["BLOCK_N"])
    launch(
        fused_forward_kernel,
        (units.rows.num_units * of_row * cdiv(batch, tiles["BLOCK_M"]),),
        x=x,
        values=values,
        dropped=layer.dropped,
        parameters=layer.population.parameters,
        spikes=spikes,
        last=last,
        steps=steps,
        batch=batch,
        ON_CHIP=on_chip,
        STAGES=STAGES,
        **arguments(units, by_rows=True),
        **{name: others.get(name) for name in ("bias", "currents", "margins", "counts", "states_before")},
        **model_options(layer.population),
        **tiles,
        **EXACT,
    )


def _recur(layer: _Layer, current: torch.Tensor, spikes: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Runs a recurrent layer step by step; writes spikes [T, B, N'] and the last ``states``, as many as there is memory
    for. Returns those of the last step, float32 [states, B, N']."""
    assert layer.recurrent is not None
    values, units = in_memory(layer.recurrent[0]), layer.recurrent[1]
    sent, before = layer.sent_before(spikes.shape[1]), layer.first
    for t in range(len(spikes)):
        after = states[t % len(states)]
        now = current if layer.held else current[t]
        _launch(sent, values, units, layer, spikes[t], after, 1, currents=now, states_before=before)
        sent, before = spikes[t], after
    return after.clone()


class _Through(NamedTuple):
    """The gradients of a layer's neurons: ∂L/∂I [T·B, N'], those of the parameters and the bias, float32
    [parameters + 1, N'], of the states before the first step, and of a recurrent connection's weights."""

    current: torch.Tensor
    sums: torch.Tensor
    first: torch.Tensor | None
    recurrent: torch.Tensor | None = None


def _recur_backward(
    layer: _Layer, spikes: torch.Tensor, states: torch.Tensor, upstream: Upstream, dtype: torch.dtype
) -> _Through:
    """The backward pass of a recurrent layer; its weights' gradient is of ``dtype``."""
    assert layer.recurrent is not None
    weights, units = layer.recurrent
    values, (steps, batch, size), population = in_memory(weights), spikes.shape, layer.population
    grad_current = layer.allocate(*spikes.shape, dtype=weights.dtype)
    grads = layer.allocate(*states.shape[1:]).zero_() if upstream.last is None else upstream.last.clone()
    tiles = fused_tiles(batch, units, units.cols, weights.dtype, weights.dtype)
    rows, of_col = cdiv(batch, tiles["BLOCK_M"]), cdiv(units.cols.width, tiles["BLOCK_N"])
    partials = spikes.new_zeros((len(population.parameters) + 1, rows, size), dtype=torch.float32)
    of_steps = upstream.spikes, upstream.membranes
    for t in range(steps - 1, -1, -1):
        to_spikes, to_membranes = (None if grad is None else grad[t] for grad in of_steps)
        launch(
            recurrent_backward_kernel,
            (units.cols.num_units * of_col * rows,),
            grad_after=grad_current[t + 1] if t + 1 < steps else None,
            values=values,
            parameters=population.parameters,
            states=states[t],
            states_before=states[t - 1] if t else layer.first,
            grads=grads,
            grad_current=grad_current[t],
            partials=partials,
            dropped=layer.dropped,
            batch=batch,
            alpha=float(population.alpha),
            rate_scale=1 / (steps * batch),
            SURROGATE=population.surrogate,
            **upstream._replace(spikes=to_spikes, membranes=to_membranes).arguments(),
            **arguments(units, by_rows=False),
            **model_options(population),
            **tiles,
        )
    sums = partials.sum(1)
    to_weights = weight_gradient(grad_current[1:].flatten(0, 1), spikes[:-1].flatten(0, 1), units, dtype)
    if layer.first is not None:  # whose spikes the first step received
        to_weights += weight_gradient(grad_current[0], layer.sent_before(batch), units, dtype)
        to_sent = input_gradient(grad_current[0], weights, units, torch.float32)
        if layer.dropped is not None:
            to_sent = to_sent.masked_fill(layer.dropped != 0, 0)
        margin = layer.first[-1] - population.parameters[-1]
        to_sent *= SURROGATES[population.surrogate].derivative(margin, population.alpha)
        grads[-1] += to_sent
        sums[-2] -= to_sent.sum(0)
    return _Through(grad_current, sums, None if layer.first is None else grads, to_weights)


def _neurons_backward(
    layer: _Layer, state: torch.Tensor, checkpoints: torch.Tensor, upstream: Upstream, steps: int
) -> _Through:
    """The backward pass of the neurons of a layer whose currents or margins are in memory."""
    call = NeuronsCall(state, layer.population, steps if layer.held else 0, layer.first)
    grad_current = torch.empty_like(state, dtype=layer.values.dtype)
    grad_first = None if layer.first is None else torch.empty_like(layer.first)
    fused = checkpoints.dim() == 1  # by what was kept, and not by what would be chosen now
    sums = launch_backward(call, checkpoints, upstream, grad_current, grad_first, layer.dropped, fused)
    return _Through(grad_current, sums, grad_first)


#: fields that the kernels do not read
UNREAD = unread(
    ["neurons", "connections", "dropped", "state", "membranes", "kind", "values", "mask", "source", "delay", "bias"]
)


# --- operators --------------------------------------------------------------------------------------------------


def refuses(call: Call) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if reason := refuses_kernels(call, UNREAD):
        return reason
    feeds = chain_of(call.populations)
    if isinstance(feeds, str):
        return feeds
    if any(feed.delay is not None for feed, _ in feeds):
        return "knows no delays"
    for population in call.populations:
        if reason := refuses_model(population.neurons):
            return reason
    tensors, _ = opened((call.x, call.populations))
    reason = runtime.refuses("g2g_stack", *[tensor for tensor in tensors if tensor.is_floating_point()])
    connections = [each for population in call.populations for each in population.connections]
    if reason is None and runtime.autocast_dtype(call.x.device.type) is None:
        dtypes = {call.x.dtype, *(each.values.dtype for each in connections)}
        if len(dtypes) > 1:
            reason = f"needs x and values of one dtype (or autocast), not {', '.join(sorted(map(str, dtypes)))}"
    if reason is None and call.x.numel() == 0:
        reason = "needs a batch that is not empty"
    for each in connections:
        reason = reason or too_large(each.mask, call.x.shape[-2])
    return reason


def g2g_stack(call: Call) -> Activity:
    of_kernels = StackCall.of(call, runtime.autocast_dtype(call.x.device.type) or call.x.dtype)
    counts, rates, last, of_steps, of_layers, _ = FORWARD(of_kernels)
    given = iter(of_steps)
    membranes = tuple([shown(each, next(given)) if each.membranes else None for each in call.populations])
    chain = chain_of(call.populations)
    assert not isinstance(chain, str)  # others are refused
    feeds = [feed for feed, _ in chain]
    readers = [None if feed.mask.cols.in_order else feed.mask.cols.place_of for feed in feeds[1:]]
    trains: Iterable[Spikes] = map(DenseSpikes, given) if call.spikes else map(ByteSpikes, of_layers, [*readers, None])
    known = membranes if any(population.membranes for population in call.populations) else None
    return Activity(counts, tuple(rates), tuple(trains), states=tuple(last), membranes=known)


class ByteSpikes(Spikes):
    """Spikes of one layer, one byte each, in the order in which the next layer reads them."""

    def __init__(self, spikes: torch.Tensor, column: torch.Tensor | None) -> None:
        self._spikes, self._column = spikes, column

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order, without gradient."""
        spikes = self._spikes if self._column is None else self._spikes.index_select(-1, self._column)
        return spikes.float()


def _forward(call: StackCall, keep: bool) -> Outputs:
    """Keeps two tensors per layer, of :meth:`_Layer.kept_shapes`."""
    steps, batch = call.num_steps, call.batch
    all_spikes: list[torch.Tensor] = []
    kept: list[Any] = []
    rates: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    received, layers = call.x, _layers(call)
    for layer in layers:
        shape = (steps, batch, layer.units.rows.size)
        # the kernels of a pair store to all columns
        received = received.reshape(-1, received.shape[-1])
        spikes = layer.allocate(*shape, dtype=torch.uint8)
        counts = layer.allocate(*shape[1:])
        membranes = layer.allocate(*shape) if layer.membranes and layer.recurrent is None else None
        of_state, of_checkpoints = layer.kept_shapes(steps, batch)
        checkpoints = counts.new_empty(of_checkpoints) if keep else None
        if layer.fused:
            state = layer.allocate(*of_state, dtype=call.dtype) if keep else None
            last = layer.allocate(1, *shape[1:])
            on_chip = units_on_chip(layer.units, torch.uint8, call.dtype)
            _launch(
                received, layer.values, layer.units, layer, spikes, last, steps, on_chip,
                bias=layer.bias, margins=state, counts=counts, states_before=layer.first,
            )  # fmt: skip
        else:
            current = product(received, layer.values, layer.units, layer.bias, layer.current_dtype())
            current = current.view(shape[1:] if layer.held else shape)
            if layer.recurrent is None:
                state = current
                of_neurons = NeuronsCall(current, layer.population, steps if layer.held else 0, layer.first)
                last = launch_forward(of_neurons, spikes, checkpoints, counts, membranes, layer.dropped)
            else:
                state = layer.allocate(*(of_state if keep or layer.membranes else (2, *of_state[1:])))
                last = _recur(layer, current, spikes, state)
                counts = spikes.sum(0, dtype=torch.float32)
                if layer.membranes:
                    membranes = state[:, -1]
        kept += [state, checkpoints] if keep else []
        rates.append(layer.to_neurons(counts.sum(0) / (steps * batch)))
        states.append(layer.to_neurons(last))
        if membranes is not None:
            if layer.dropped is not None:
                membranes = membranes.masked_fill(layer.dropped != 0, 0)
            shown.append(layer.to_neurons(membranes).clone())
        all_spikes.append(spikes)
        received = spikes
    if call.spikes:
        shown += [layer.to_neurons(each).to(call.x.dtype) for layer, each in zip(layers, all_spikes, strict=True)]
    return counts, rates, states, shown, all_spikes, kept


def _outputs(call: StackCall, keep: bool) -> list[Output | list[Output]]:
    layers, populations, kept = _layers(call), call.populations, []
    over_time = [(call.num_steps, call.batch, size_of(own)) for own in populations]
    shown = [Output(shape) for shape, own in zip(over_time, populations, strict=True) if own.membranes]
    shown += [Output(shape, call.x.dtype) for shape in over_time if call.spikes]
    spikes = [Output((call.num_steps, call.batch, layer.units.rows.size), torch.uint8) for layer in layers]
    for layer in layers if keep else ():
        state, checkpoints = layer.kept_shapes(call.num_steps, call.batch)
        dtype = torch.float32 if layer.recurrent is not None else layer.current_dtype()
        kept += [Output(state, dtype), Output(checkpoints)]
    last = [Output(state_shape(own, call.batch)) for own in populations]
    rates = [Output(of.shape[2:]) for of in last]
    return [Output(last[-1].shape[1:]), rates, last, shown, spikes, kept]


def _backward(given: Backward) -> list[torch.Tensor | None]:
    call, kept, (grad_counts, *grads), (grad_x_needed, *_) = given
    layers, count = _layers(call), len(call.populations)
    all_spikes, kept = kept[:count], kept[count:]
    to_shown = iter(grads[2 * count :])
    to_membranes = [next(to_shown) if layer.membranes else None for layer in layers]
    to_spikes = list(to_shown) if call.spikes else [None] * count
    grad_x, grad_spikes = None, None
    found = []  # the gradients of the layers, the last one first
    for i in reversed(range(count)):
        layer, own, (feed, recurrent) = layers[i], call.populations[i], call.chain[i]
        (state, checkpoints), spikes = kept[2 * i : 2 * i + 2], all_spikes[i]
        rates, last, membranes, shown = (
            None if grad is None else layer.to_columns(grad).contiguous()
            for grad in (grads[i], grads[count + i], to_membranes[i], to_spikes[i])
        )
        if shown is not None:
            grad_spikes = shown if grad_spikes is None else grad_spikes + shown
        upstream = Upstream(grad_spikes, grad_counts, rates, last, membranes)
        if recurrent is None:
            through = _neurons_backward(layer, state, checkpoints, upstream, call.num_steps)
        else:
            through = _recur_backward(layer, spikes, state, upstream, recurrent.values.dtype)
            if layer.held:
                through = through._replace(current=through.current.sum(0))
        grad_current = through.current.view(-1, through.current.shape[-1])
        received = (all_spikes[i - 1] if i else call.x).view(-1, layer.units.cols.size)
        sums = layer.to_neurons(through.sums)
        parameters = parameter_gradients(own.neurons, sums)
        to_values = weight_gradient(grad_current, received, layer.units, feed.values.dtype)
        to_bias = None if feed.bias is None else sums[-1].to(feed.bias.dtype, copy=True)
        to_recurrent = () if recurrent is None else (recurrent._replace(values=through.recurrent),)
        found.append(
            own._replace(
                neurons=own.neurons._replace(parameters=parameters),
                connections=(feed._replace(values=to_values, bias=to_bias), *to_recurrent),
                state=None if through.first is None else layer.to_neurons(through.first),
            )
        )
        grad_counts = None
        if i or grad_x_needed:
            dtype = call.dtype if i else call.x.dtype
            grad_x = input_gradient(grad_current, layer.values, layer.units, dtype)
            grad_x = grad_x.view(all_spikes[i - 1].shape if i else call.x.shape)
            grad_spikes = grad_x
    return given.aligned(call._replace(x=grad_x if grad_x_needed else None, populations=tuple(found[::-1])))


FORWARD = operator_of("triton_", ("CPU", "CUDA"), _forward, _backward, _outputs)  # CPU: the interpreter
