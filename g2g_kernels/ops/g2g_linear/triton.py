"""``g2g_linear`` in Triton: operators ``g2g::triton_linear_forward`` (with its autograd formula) and
``g2g::triton_linear_backward``. README.md has the formulas, tiles, bytes and FLOPs.

The forward pass is ``product_kernel`` by rows of units; the input gradient is the same kernel by columns, with the
transposed index and the same packed values; the weight gradient is ``weight_gradient_kernel``. Neurons are read and
written at their columns in memory: neuron n of a :class:`Side` is column n, which loads and stores translate from the
padded group order of a mask (*places*), without a separate pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.mask.packing import Units, assembled, no_tiles, packed
from g2g_kernels.mask.sides import Side
from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.g2g_linear.call import LinearCall, operator_of
from g2g_kernels.ops.g2g_linear.call import product as product_of
from g2g_kernels.ops.g2g_linear.tiles import (
    dense_pays,
    fitted,
    groups_and_parts,
    product_tiles,
    tile_of,
    tiles_of,
    weight_gradient_tiles,
)
from g2g_kernels.ops.record import Backward
from g2g_kernels.triton import runtime
from g2g_kernels.triton.products import (
    in_memory,
    load_factors,
    part_ty,
    plus_product,
    plus_product_over_rows,
)
from g2g_kernels.triton.runtime import cdiv, launch, next_power_of_2, precision_of

# --- the mask as kernels read it --------------------------------------------------------------------------------


def in_order(side: Side) -> Side:
    """The same places, contiguous and in order in memory; those without a neuron are holes."""
    size = side.num_units * side.width
    if side.bounds is None:
        return Side(side.num_units, side.width, size)
    assert side.neuron_at is not None
    place = torch.arange(size, device=side.neuron_at.device)
    place = torch.where(side.neuron_at < side.size, place, size)
    return Side(side.num_units, side.width, size, None, place, side.bounds, holes=True)


def read_by(side: Side, readers: Side) -> Side:
    """These neurons at the places of ``readers``, in the order in which the next layer reads them."""
    mapped = next((each.neuron_at for each in (side, readers) if each.neuron_at is not None), None)
    if mapped is None:
        return side
    neurons = torch.arange(side.size, device=mapped.device)
    neuron_at, place_of, reader_neuron_at, reader_place_of = (
        neurons if index is None else index
        for index in (side.neuron_at, side.place_of, readers.neuron_at, readers.place_of)
    )
    size = readers.num_units * readers.width
    return Side(
        side.num_units,
        side.width,
        size,
        torch.cat([reader_place_of, reader_place_of.new_full((1,), size)])[neuron_at],
        torch.cat([place_of, place_of.new_full((1,), side.num_units * side.width)])[reader_neuron_at],
        side.bounds,
        holes=size > side.size,
    )


def arguments(units: Units, by_rows: bool) -> dict[str, Any]:
    """The arguments of kernels that go through the units of each row, or (transposed) of each column."""
    inner, outer = (units.cols, units.rows) if by_rows else (units.rows, units.cols)
    return {
        "x_column": inner.neuron_at,
        "x_bounds": inner.bounds,
        "ptr": units.row_ptr if by_rows else units.col_ptr,
        "slots": units.row_slot if by_rows else units.col_slot,
        "others": units.unit_col if by_rows else units.unit_row,
        "y_column": outer.neuron_at,
        "num_n": outer.num_units,
        "x_size": inner.size,
        "y_size": outer.size,
        "K": inner.width,
        "N": outer.width,
    }


def units_of(mask: MaskTensors, values: torch.Tensor) -> Units:
    """The units of a mask with packed weights ``values``. Raises ValueError for values that are not the mask's."""
    known = vars(mask)
    units: Units = known.get("units") or known.setdefault("units", mask.units)
    packed_shape = units.unit_row.shape[0], units.rows.width, units.cols.width
    if values.shape != packed_shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, this mask's packed weights {packed_shape}")
    return units


# --- forward and input gradient ---------------------------------------------------------------------------------
#
# One program computes BLOCK_M samples × one tile of BLOCK_N outputs; it loops over the units of its block row, each a
# [BLOCK_M, BLOCK_K] tile of x times a [BLOCK_K, BLOCK_N] tile of weights. Programs of one sample tile are neighbours in
# the grid, so its x is read from memory once, then from L2: 2·M·K + 2·U·R·C + 2·M·N bytes in 16 bits (M·K for spikes).
#
# A tile is found through row_slot and unit_col. If a turn of the loop followed this chain for its own tile, the chain
# would take up the stages of the compiler's pipeline: one buffer for x, and a wait for all loads before each product.
# So each turn finds the next one's tile, and the loop carries its slot and columns: two or three buffers of x and of
# weights, whose loads are in flight during the product before (benchmarks/results/aot.md has them for each kernel).


@triton.jit
def columns(place, column_of, ok, size):
    """The memory columns of some places, and which of them exist."""
    if column_of is not None:
        column = tl.load(column_of + place, mask=ok, other=size).to(tl.int32)
        return column, ok & (column < size)
    else:
        return place, ok


@triton.jit
def length(bounds, unit, width):
    """The length of a range; weights beyond it are padding."""
    if bounds is not None:
        return tl.load(bounds + unit + 1) - tl.load(bounds + unit)
    else:
        return width


@triton.jit
def tile_at(
    i, end, slots, others, x_column, x_bounds, x_size, K: tl.constexpr, TILES_K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Tile ``i`` of the units of a row, counted over all rows: its unit's slot; of its BLOCK_K places whether they hold
    weights, their columns of x, and whether these exist. From the row's ``end`` on, those of slot 0."""
    exists = i < end * TILES_K
    slot = tl.load(slots + i // TILES_K, mask=exists, other=0)
    other = tl.load(others + slot, mask=exists, other=0)
    k = (i % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    weighs = k < length(x_bounds, other, K)
    column, x_ok = columns(other * K + k, x_column, weighs, x_size)
    return slot.to(tl.int64), weighs, column, x_ok


@triton.jit
def plus_units(
    total, x, x_column, x_bounds, x_size, values, ptr, slots, others, unit, m, m_ok, n, n_inside,
    K: tl.constexpr, N: tl.constexpr, BY_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + the product of rows ``m`` of x with columns ``n`` of the units in row (or column) ``unit``."""
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = 3 if PRECISION == "parts" else 1  # of a unit, in memory
    first, end = tl.load(ptr + unit), tl.load(ptr + unit + 1)
    slot, weighs, x_col, x_ok = tile_at(
        first * TILES_K, end, slots, others, x_column, x_bounds, x_size, K, TILES_K, BLOCK_K
    )
    for i in range(first * TILES_K, end * TILES_K):
        k = (i % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + (m[:, None] * x_size + x_col[None, :]), mask=m_ok[:, None] & x_ok[None, :], other=0)
        if BY_ROWS:  # values are [slot, N, K]
            address = values + slot * (TILES * N * K) + k[:, None] + n[None, :] * K
        else:  # [slot, K, N]
            address = values + slot * (TILES * N * K) + k[:, None] * N + n[None, :]
        weights = load_factors(address, weighs[:, None] & n_inside[None, :], N * K, PRECISION)
        total = plus_product(total, x_tile, weights, PRECISION)
        slot, weighs, x_col, x_ok = tile_at(i + 1, end, slots, others, x_column, x_bounds, x_size, K, TILES_K, BLOCK_K)
    return total


@triton.jit(do_not_specialize=["samples", "num_n"])
def product_kernel(
    x, x_column, x_bounds, values, ptr, slots, others, bias, y, y_column, y_bounds, samples, num_n, x_size, y_size,
    K: tl.constexpr, N: tl.constexpr, BY_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) % (num_n * TILES_N)
    unit = tile // TILES_N
    first_m = (tl.program_id(0) // (num_n * TILES_N)).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    m_ok = m < samples - first_m
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < length(y_bounds, unit, N)

    total = plus_units(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x + first_m * x_size, x_column, x_bounds, x_size,
        values, ptr, slots, others, unit, m, m_ok, n, n_inside, K, N, BY_ROWS, PRECISION, BLOCK_K,
    )  # fmt: skip
    column, n_ok = columns(unit * N + n, y_column, n < N, y_size)
    if bias is not None:
        total += tl.load(bias + column, mask=n_ok, other=0).to(tl.float32)[None, :]
    y_address = y + first_m * y_size + (m[:, None] * y_size + column[None, :])
    tl.store(y_address, total.to(y.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


def _launch_product(
    x: torch.Tensor, values: torch.Tensor, units: Units, bias: torch.Tensor | None, y: torch.Tensor, by_rows: bool
) -> None:
    if not y.numel():
        return
    inner, outer = (units.cols, units.rows) if by_rows else (units.rows, units.cols)
    samples, precision = x.shape[0], precision_of(values.dtype, x.device)
    options = fitted(product_tiles(samples, tile_of(inner), x.dtype, values.dtype, precision), x.device)
    launch(
        product_kernel,
        (outer.num_units * tiles_of(outer) * cdiv(samples, options["BLOCK_M"]),),
        x=x,
        values=in_memory(values),
        bias=bias,
        y=y,
        y_bounds=outer.bounds,
        samples=samples,
        BY_ROWS=by_rows,
        PRECISION=precision,
        BLOCK_N=tile_of(outer),
        **arguments(units, by_rows),
        **options,
    )


def product(
    x: torch.Tensor, values: torch.Tensor, units: Units, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """y [M, out] of ``dtype``: x [M, in] (floats, or spikes in uint8), ``bias`` [out] in the order of y's columns."""
    if dense_pays(units, x, units.rows, values.dtype):  # cuBLAS, with the zeros stored
        weight, x = dense_weight(values, units), x.to(values.dtype)
        if dtype.itemsize > values.dtype.itemsize:  # a held current: factors are rounded, their sum is not
            weight, x = weight.to(dtype), x.to(dtype)
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype)).to(dtype)
    # nothing is stored to columns without a neuron
    allocate = torch.zeros if units.rows.holes else torch.empty
    y = allocate((x.shape[0], units.rows.size), dtype=dtype, device=x.device)
    _launch_product(x, values, units, bias, y, by_rows=True)
    return y


def input_gradient(grad_y: torch.Tensor, values: torch.Tensor, units: Units, dtype: torch.dtype) -> torch.Tensor:
    """dx [M, in] of ``dtype``, from dy [M, out] of the dtype of ``values``."""
    if dense_pays(units, grad_y, units.cols, values.dtype):
        return (grad_y @ dense_weight(values, units)).to(dtype)
    grad_x = torch.empty((grad_y.shape[0], units.cols.size), dtype=dtype, device=grad_y.device)
    _launch_product(grad_y, values, units, None, grad_x, by_rows=False)
    return grad_x


# --- the dense weight -------------------------------------------------------------------------------------------
#
# PyTorch's index_copy_ sorts its indices at every call under deterministic algorithms: a million keys for single
# weights. No two slots hold the same unit, so a plain store is deterministic.


@triton.jit(do_not_specialize=["count"])
def place_kernel(values, unit_row, unit_col, every, count, num_cols, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """every[unit of the slot] = values[slot], for tiles of SIZE weights: BLOCK of all ``count`` weights per program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = i // SIZE
    row, col = tl.load(unit_row + slot, mask=i < count, other=0), tl.load(unit_col + slot, mask=i < count, other=0)
    place = (row.to(tl.int64) * num_cols + col) * SIZE + i % SIZE
    tl.store(every + place, tl.load(values + i, mask=i < count, other=0), mask=i < count)


def dense_weight(values: torch.Tensor, units: Units) -> torch.Tensor:
    """The dense [out, in] matrix of packed values in the order of columns, zero where there is no unit."""
    every = no_tiles(values, units)
    if values.numel():
        launch(
            place_kernel,
            (cdiv(values.numel(), 1024),),
            values=values,
            unit_row=units.unit_row,
            unit_col=units.unit_col,
            every=every,
            count=values.numel(),
            num_cols=units.cols.num_units,
            SIZE=units.rows.width * units.cols.width,
            BLOCK=1024,
            num_warps=4,
        )
    return assembled(every, units)


# --- weight gradient --------------------------------------------------------------------------------------------
#
# One program computes [R, GROUP · C] weights: GROUP units of one block row side by side, which share the tiles of dy,
# over one part of the samples. Per step it reads a [BLOCK_S, R] tile of dy and a [BLOCK_S, GROUP · C] tile of x. The
# parts go to memory in float32 and are added by a second launch, always in the same order: no atomics. Bytes from L2
# for 16-bit dy and uint8 x: U·M·(2·R/GROUP + C); memory: 2·4·PARTS·U·R·C for the parts.
#
# In float32 one chain of additions can be too long: over 12,800 samples weight gradients had 5.2 times PyTorch's error
# on the ordinary cores, 2.3 times with parts (emulated). So each chain of CHAIN samples is added to a total, and the
# next begins at zero (0.8; 1.0 times). The rounding of 16-bit and tf32 factors outweighs that of the sums: one chain.
#
# Rows have different numbers of units, which dynamic sparse training changes on the device. The grid is therefore sized
# for an upper bound on the number of groups. Each program finds its own row; programs without work return at once.


@triton.jit(do_not_specialize=["samples", "samples_of_part", "num_rows", "num_units"])
def weight_gradient_kernel(
    grad_y, y_column, x, x_column, row_ptr, row_slot, unit_col, grad_values, samples, samples_of_part, num_rows,
    num_units, y_size, x_size,
    R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(1)
    tile_r, tile_c = tl.program_id(2) // TILES_C, tl.program_id(2) % TILES_C

    # the row of this program and its group of units
    rows = tl.arange(0, ROWS)
    first = tl.load(row_ptr + rows, mask=rows < num_rows, other=0)
    end = tl.load(row_ptr + rows + 1, mask=rows < num_rows, other=0)
    groups = (end - first + GROUP - 1) // GROUP
    groups_before = tl.cumsum(groups, 0)
    row = tl.sum((groups_before <= tl.program_id(0)).to(tl.int32), 0)
    if row >= num_rows:
        return
    group = tl.program_id(0) - tl.sum(tl.where(rows == row, groups_before - groups, 0), 0)

    lane = tl.arange(0, GROUP * BLOCK_C)
    position = tl.load(row_ptr + row) + group * GROUP + lane // BLOCK_C
    c = tile_c * BLOCK_C + lane % BLOCK_C
    c_ok = (position < tl.load(row_ptr + row + 1)) & (c < C)
    slot = tl.load(row_slot + position, mask=c_ok, other=0).to(tl.int64)
    # BLOCK_C neighbouring lanes share a unit, so their columns are neighbours: loads can be wide
    place = tl.max_contiguous(tl.load(unit_col + slot, mask=c_ok, other=0) * C + c, BLOCK_C)
    if C % BLOCK_C == 0:
        place = tl.multiple_of(place, BLOCK_C)
    column, column_ok = columns(place, x_column, c_ok, x_size)
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    y_col, y_ok = columns(row * R + r, y_column, r < R, y_size)

    # the left factor is dy where a unit has 64 rows, and x where it has less or 8 warps need 128
    X_LEFT: tl.constexpr = BLOCK_R < 64 or PRECISION == "parts"
    total = tl.zeros((GROUP * BLOCK_C, BLOCK_R) if X_LEFT else (BLOCK_R, GROUP * BLOCK_C), tl.float32)
    chain = total  # not yet added to it
    for start in range(part * samples_of_part, tl.minimum((part + 1) * samples_of_part, samples), BLOCK_S):
        s = tl.arange(0, BLOCK_S)
        s_ok = (s < samples - start)[:, None]
        row_start = tl.cast(start, tl.int64)
        y_address = grad_y + row_start * y_size + (s[:, None] * y_size + y_col[None, :])
        y_tile = tl.load(y_address, mask=s_ok & y_ok[None, :], other=0)
        x_address = x + row_start * x_size + (s[:, None] * x_size + column[None, :])
        x_tile = tl.load(x_address, mask=s_ok & column_ok[None, :], other=0)
        if X_LEFT:
            chain = plus_product_over_rows(chain, x_tile, y_tile, y_tile.dtype, PRECISION, PART)
        else:
            chain = plus_product_over_rows(chain, y_tile, x_tile, y_tile.dtype, PRECISION, PART)
        if CHAIN:
            if (start // BLOCK_S) % (CHAIN // BLOCK_S) == CHAIN // BLOCK_S - 1:
                total += chain
                chain = tl.zeros_like(chain)
    total = total + chain if CHAIN else chain

    address = grad_values + (part * num_units + slot)[None, :] * (R * C) + r[:, None] * C + c[None, :]
    if X_LEFT:
        total = tl.trans(total)
    tl.store(address, total, mask=(r < R)[:, None] & c_ok[None, :])


def weight_gradient(grad_y: torch.Tensor, x: torch.Tensor, units: Units, dtype: torch.dtype) -> torch.Tensor:
    """dW, packed, of ``dtype``, from ``grad_y`` [M, out] and ``x`` [M, in], floats or spikes in uint8."""
    rows, cols = units.rows, units.cols
    num_units, samples = units.unit_row.shape[0], x.shape[0]
    if dense_pays(units, x, units.rows, grad_y.dtype):
        return packed(grad_y.T @ x.to(grad_y.dtype), units).to(dtype)
    precision = precision_of(grad_y.dtype, x.device)
    # on the ordinary cores, with fully unrolled loops, RDNA has registers for a depth of 8
    deepest = 8 if grad_y.dtype == torch.float32 else 32
    options = fitted(weight_gradient_tiles(tile_of(cols), x.dtype, grad_y.dtype, precision), x.device, deepest)
    tiles = tiles_of(rows) * tiles_of(cols)
    groups, parts = groups_and_parts(num_units, rows.num_units, tiles, samples, options["GROUP"])
    samples_of_part = cdiv(cdiv(samples, parts), options["BLOCK_S"]) * options["BLOCK_S"]
    grad_values = torch.empty((parts, num_units, rows.width, cols.width), dtype=torch.float32, device=x.device)
    launch(
        weight_gradient_kernel,
        (groups, parts, tiles),
        grad_y=grad_y,
        y_column=rows.neuron_at,
        x=x,
        x_column=cols.neuron_at,
        row_ptr=units.row_ptr,
        row_slot=units.row_slot,
        unit_col=units.unit_col,
        grad_values=grad_values,
        samples=samples,
        samples_of_part=samples_of_part,
        num_rows=rows.num_units,
        num_units=num_units,
        y_size=rows.size,
        x_size=cols.size,
        R=rows.width,
        C=cols.width,
        PRECISION=precision,
        PART=part_ty(x.device),
        ROWS=next_power_of_2(rows.num_units),
        BLOCK_R=tile_of(rows),
        BLOCK_C=tile_of(cols),
        **options,
    )
    # the second stage: a plain sum over the parts, always in the same order
    return (grad_values.squeeze(0) if parts == 1 else grad_values.sum(0)).to(dtype)


# --- operators --------------------------------------------------------------------------------------------------


def refuses(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    reason = runtime.refuses("g2g_linear", None if x.dtype == torch.uint8 else x, values, bias)
    if reason is None and runtime.autocast_dtype(x.device.type) is None and x.dtype not in (values.dtype, torch.uint8):
        reason = f"needs x and values of one dtype (or autocast), not {x.dtype} and {values.dtype}"
    return reason or too_large(mask)


def too_large(mask: BlockMask, samples: int = 1) -> str | None:
    """Why 32-bit offsets in a tile of 128 samples or a step of ``samples``, or grids, do not reach it all, or None."""
    widest = max(side.num_units * side.width for side in (mask.rows, mask.cols))
    if samples * widest >= 1 << 31 or 128 * widest >= 1 << 31:
        return "serves fewer than 2³¹ neurons × samples per step, 128 samples at least (take fewer, or smaller layers)"
    if mask.rows.num_units > 1 << 20 or cdiv(mask.rows.width, 64) * cdiv(mask.cols.width, 64) >= 1 << 16:
        return "serves at most 2²⁰ rows of units of 2²⁸ weights (choose another `block_size`)"
    return None


def g2g_linear(x: torch.Tensor, values: torch.Tensor, mask: BlockMask, bias: torch.Tensor | None) -> torch.Tensor:
    dtype = runtime.autocast_dtype(x.device.type) or values.dtype
    return product_of(FORWARD, x, values, mask, bias, dtype)


def _forward(call: LinearCall, keep: bool) -> torch.Tensor:
    units = units_of(call.mask, call.values)
    return product(call.x, call.values.to(call.dtype), units, call.bias, call.dtype)


def _backward(given: Backward) -> list[torch.Tensor | None]:
    grad_y: Any
    call, _, (grad_y,), (want_x, want_values, _, *want_bias) = given
    units = units_of(call.mask, call.values)
    x = values = bias = None
    if want_x:
        x = input_gradient(grad_y, call.values.to(grad_y.dtype), units, call.x.dtype)
    if want_values:
        values = weight_gradient(grad_y, call.x, units, call.values.dtype)
    if any(want_bias):
        bias = grad_y.sum(0, dtype=torch.float32).to(call.bias.dtype)
    return given.aligned(call._replace(x=x, values=values, bias=bias))


FORWARD = operator_of("triton_", ("CPU", "CUDA"), _forward, _backward)  # CPU: Triton's interpreter
