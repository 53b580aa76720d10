"""Products of tiles: float32 on tensor cores, by parts in bfloat16, and all others as they are.

A float32 number has 24 bits of mantissa, a bfloat16 eight, with the same exponents: three bfloat16 numbers hold any
float32 exactly. A tensor core multiplies bfloat16 exactly and adds in float32, so

    x·w = x·(w₁ + w₂ + w₃)                              three products for a spike x, 0 or 1, exact in bfloat16
    x·w ≈ x₁w₁ + x₁w₂ + x₂w₁ + x₁w₃ + x₂w₂ + x₃w₁       six for any x; at most 2⁻²²·x·w is left out

at 16 times (A100) or 15 times (H100) the rate of float32 on the ordinary cores. (Graphics cards, 2 to 4 times as fast,
multiply float32 as it is.) Tensor cores truncate sums, so long ones would drift (Ootomo and Yokota 2022). The sum of a
tile therefore begins at zero, smallest terms first, and is added to the total outside of them, rounded: emulated over
2048 inputs with 5 % spikes, the error is 1.2 times that of plain float32, not 19 times.

A factor that is not finite gives what float32 gives: its first part holds it, the others are 0. Parts below 1e-38 are
subnormal: a card that takes these as 0 loses the last bits of numbers below 1e-33.
"""

import torch
import triton
import triton.language as tl

from g2g_kernels.triton import runtime

#: the bfloat16 parts of a float32 number
PARTS = 3


@triton.jit
def _eight_bits(tile, more: tl.constexpr):
    """The numbers with the first eight bits of their mantissas, cut off (more = 0) or rounded (0x8000): exact in
    bfloat16. Cut off, no number becomes infinite, and infinity and NaN stay."""
    return ((tile.to(tl.int32, bitcast=True) + more) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def parts_of(tile, part_ty: tl.constexpr):
    """Tiles of ``part_ty`` whose sum is ``tile``: three of float32, one of bytes (spikes), which are exact."""
    if tile.dtype == tl.float32:
        first = _eight_bits(tile, 0)
        rest = tl.where(tl.abs(tile) < float("inf"), tile - first, 0.0)
        # rounded, so that the third part, and with it what products leave out, has either sign
        second = _eight_bits(rest, 0x8000)
        return first.to(part_ty), second.to(part_ty), (rest - second).to(part_ty)
    else:
        return (tile.to(part_ty),)


@triton.jit
def plus_product_of_parts(total, a, b):
    """total + A·B, of the parts of A and B."""
    if len(a) == 1 and len(b) == 1:
        return total + tl.dot(a[0], b[0])
    elif len(a) == 1:
        return total + tl.dot(a[0], b[0], tl.dot(a[0], b[1], tl.dot(a[0], b[2])))
    elif len(b) == 1:
        return total + tl.dot(a[0], b[0], tl.dot(a[1], b[0], tl.dot(a[2], b[0])))
    else:
        small = tl.dot(a[0], b[2], tl.dot(a[1], b[1], tl.dot(a[2], b[0])))
        small = tl.dot(a[0], b[1], tl.dot(a[1], b[0], small))
        # 0 · ∞ of a part that is 0 and a factor that is not finite
        small = tl.where(small == small, small, 0.0)
        return total + tl.dot(a[0], b[0], small)


@triton.jit
def load_factors(address, mask, apart, PRECISION: tl.constexpr):
    """A tile of packed weights: one, or its parts, which are ``apart`` in memory."""
    if PRECISION == "parts":
        return (
            tl.load(address, mask=mask, other=0),
            tl.load(address + apart, mask=mask, other=0),
            tl.load(address + 2 * apart, mask=mask, other=0),
        )
    else:
        return (tl.load(address, mask=mask, other=0),)


@triton.jit
def plus_product(total, x, factors, PRECISION: tl.constexpr):
    """total + X·F, for a tile x of any dtype and the factors that :func:`load_factors` loads."""
    if PRECISION == "parts":
        return plus_product_of_parts(total, parts_of(x, factors[0].dtype), factors)
    else:
        return tl.dot(x.to(factors[0].dtype), factors[0], total, input_precision=PRECISION)


@triton.jit
def plus_product_over_rows(total, a, b, products: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr):
    """total + Aᵀ·B, of tiles whose rows are summed over, multiplied in the dtype ``products``."""
    if PRECISION == "parts":
        return plus_product_of_parts(total, parts_of(tl.trans(a), PART), parts_of(b, PART))
    else:
        return tl.dot(tl.trans(a.to(products)), b.to(products), total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["count"])
def parts_kernel(values, parts, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """parts[slot][p] = the p-th part of values[slot], for tiles of SIZE weights: BLOCK of ``count`` per program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    address = parts + i // SIZE * (3 * SIZE) + i % SIZE
    three = parts_of(tl.load(values + i, mask=i < count, other=0.0), parts.dtype.element_ty)
    for part in tl.static_range(3):
        tl.store(address + part * SIZE, three[part], mask=i < count)


def in_memory(values: torch.Tensor) -> torch.Tensor:
    """Packed weights [units, rows, columns] as they are, float32 ones as parts, bfloat16 [units, 3, rows, columns]."""
    if runtime.precision_of(values.dtype, values.device) != "parts":
        return values
    units, rows, cols = values.shape
    dtype = torch.float32 if _as_floats(values.device) else torch.bfloat16
    parts = torch.empty((units, PARTS, rows, cols), dtype=dtype, device=values.device)
    if parts.numel():
        runtime.launch(
            parts_kernel,
            (runtime.cdiv(values.numel(), 1024),),
            values=values,
            parts=parts,
            count=values.numel(),
            SIZE=rows * cols,
            BLOCK=1024,
            num_warps=4,
        )
    return parts


def part_ty(device: torch.device) -> tl.dtype:
    """The dtype of parts that a kernel makes of a tile."""
    return tl.float32 if _as_floats(device) else tl.bfloat16


def _as_floats(device: torch.device) -> bool:
    """Whether parts are float32, which are the same numbers: in Triton's interpreter products of bfloat16 are wrong."""
    return device.type == "cpu" and runtime.interpreted()
