"""Tile sizes of the Triton kernels of products, and which way a product takes: by units, or dense.

A dense product is cuBLAS's, at a larger share of the card's rate than ours, but multiplies what does not exist. It
pays for nearly full masks, and for units below 16, whose tiles (at least 16 × 16) are mostly padding. In float32 our
products go by parts to tensor cores, cuBLAS's do not. :func:`dense_pays` decides for each product by itself.
"""

import torch

from g2g_kernels.mask.packing import Units
from g2g_kernels.mask.sides import Side
from g2g_kernels.triton import runtime

# --- tiles --------------------------------------------------------------------------------------------------------


def tile_of(side: Side) -> int:
    """The side of a tile that covers a range, or a part of one wider than 64: 16, 32 or 64."""
    return 16 if side.width <= 16 else 32 if side.width <= 32 else 64


def tiles_of(side: Side) -> int:
    """The number of tiles that cover a range."""
    return runtime.cdiv(side.width, tile_of(side))


def product_tiles(samples: int, width: int, x: torch.dtype, products: torch.dtype, precision: str) -> dict[str, int]:
    """Rows and depth of a tile for units ``width`` deep, and the number of loads in flight.

    128 rows are two ``wgmma`` of 64; 64 make twice the programs for one step of a batch, and 16, the minimum of a
    tensor core, are enough for few samples. Three stages of 16 KB of x and 8 KB of weights fit the 99 KB of consumer
    cards. float32 samples take twice the registers: half the rows, half the depth; by parts a quarter of it. float32
    weights alone, and units 16 deep: half the rows. ``ieee`` products run on the ordinary cores, with fully unrolled
    loops: a depth of 16. The three parts of a tile of weights are shared by 128 rows and two sums by 8 warps: for 64
    rows L2 would be too slow. With these numbers no kernel uses the stack (``benchmarks/results/aot.md``).
    """
    wide = (precision == "parts" or torch.float32 not in (x, products)) and samples > 1024
    block_m = 16 if samples <= 32 else 128 if wide and width > 16 else 64
    by_parts = precision == "parts" and x == torch.float32
    depth = 16 if by_parts or _on_ordinary_cores(products, precision) else 32 if x == torch.float32 else 64
    num_warps = 8 if precision == "parts" and block_m == 128 else 4
    return {"BLOCK_M": block_m, "BLOCK_K": min(depth, width), "num_warps": num_warps, "num_stages": STAGES}


#: buffers of the loads that a product waits for: that of this turn, and those of the next two
STAGES = 3


def _on_ordinary_cores(products: torch.dtype, precision: str) -> bool:
    return products == torch.float32 and precision == "ieee"


def fitted(tiles: dict[str, int], device: torch.device, deepest: int = 32) -> dict[str, int]:
    """The tiles of a matrix-product kernel, adjusted to ``device``.

    On AMD's cards loads travel in registers: one of two stages is in shared memory while the other is loaded. RDNA: 8
    warps, and no tile deeper than ``deepest``, since its ``wmma`` needs each factor twice in a warp's registers. With
    the tiles of other cards, 16-bit kernels spilled up to 292 bytes per thread, a float32 kernel 2,764.
    """
    card = runtime.card_of(device)
    if not card.amd:
        return tiles
    tiles = tiles | {"num_stages": 2}
    if not card.architecture.startswith(RDNA):
        return tiles
    capped = {name: min(tiles[name], deepest) for name in ("BLOCK_K", "BLOCK_S") if name in tiles}
    return tiles | capped | {"num_warps": 8}


#: AMD's GPUs with warps of 32 threads; the others' have 64
RDNA = ("gfx10", "gfx11", "gfx12")


#: programs of the weight gradient: four for each of an H100's 132 SMs. Constant, so sums have the same order on
#: every card.
_PROGRAMS = 528


def weight_gradient_tiles(width: int, x: torch.dtype, products: torch.dtype, precision: str) -> dict[str, int]:
    """The number of units ``width`` wide that share a tile of dy, of samples per step, and of loads in flight.

    128 columns of x: with 256, most rows of the default mask (8 or 9 units of 64) would leave a last group almost
    empty. 64 samples per step are four ``wgmma`` deep. In float32 half of both, and for floats by parts a quarter of
    the samples; spikes beside parts are narrow enough for all 128 columns. Beside spikes, float32 sums take 8 warps:
    with 4 they spill on the ordinary cores of sm_89. CHAIN is 0 where one chain is as good as several.
    """
    floats = torch.float32 in (x, products)
    by_parts, spikes = precision == "parts", x == torch.uint8
    depth = 16 if _on_ordinary_cores(products, precision) or (by_parts and not spikes) else 32 if floats else 64
    lanes = 64 if floats and not (by_parts and spikes) else 128
    chain = 256 if products == torch.float32 and precision != "tf32" else 0
    warps = 8 if chain and spikes else 4
    return {"GROUP": lanes // width, "BLOCK_S": depth, "CHAIN": chain, "num_warps": warps, "num_stages": STAGES}


def groups_and_parts(units: int, rows: int, tiles: int, samples: int, group: int) -> tuple[int, int]:
    """How many groups of units at most, and parts of the samples, a weight gradient has."""
    groups = units // group + rows
    return groups, max(1, min(_PROGRAMS // (groups * tiles), samples // 1024))


# --- units or dense -----------------------------------------------------------------------------------------------


#: of a multiplication, in cuBLAS's: it reaches 0.8 of a card's rate, we 0.6 on tensor cores, 0.45 on ordinary ones
_TENSOR_CORE_TIME, _ORDINARY_CORE_TIME = 4 / 3, 16 / 9
#: how many times as long as on tensor cores in 16 bits a product takes in TF32, and on ordinary cores in float32
_TF32, _FLOAT32 = 2, 12
#: a float32 weight in 16-bit parts: its bytes, and their products with a spike, and with the parts of a float
_BYTES_IN_PARTS, _PARTS_OF_SPIKES, _PARTS_OF_FLOATS = 6, 3, 6
#: rows of a tile; and the speed of L2, in that of memory
_TILE_ROWS, _L2 = 128, 2
#: assembling the dense matrix takes as long as so many samples, its launches (ten microseconds) as so many bytes
_ASSEMBLY_SAMPLES, _ASSEMBLY_BYTES = 1000, 2e7


def dense_pays(units: Units, x: torch.Tensor, outer: Side, products: torch.dtype) -> bool:
    """True where the dense product of x [M, …] is expected to be faster; a rule, not measured. ``outer`` is what is not
    summed over: of ``units`` the rows, in the input gradient the columns.

    Times are in multiplications of cuBLAS, per sample. A weight of a tile waits for our cores or, if that is slower,
    for L2, which gives a tile of ``_TILE_ROWS`` × ``tile_of(outer)`` its factors. cuBLAS multiplies no spikes as bytes.
    """
    if runtime.assumed.dense is not None:
        return runtime.assumed.dense
    rows, cols = units.rows, units.cols
    weights_in_tiles = units.unit_row.shape[0] * tiles_of(rows) * tile_of(rows) * tiles_of(cols) * tile_of(cols)
    inputs, outputs = (cols.size, rows.size) if outer is rows else (rows.size, cols.size)
    precision, byte = runtime.precision_of(products, x.device), float(runtime.card_of(x.device).flop_per_byte)
    size, x_size, weight_size, ours = products.itemsize, x.dtype.itemsize, products.itemsize, _TENSOR_CORE_TIME
    if precision == "tf32":
        byte /= _TF32
    elif products == torch.float32:
        byte, ours = byte / _FLOAT32, _ORDINARY_CORE_TIME
        if precision == "parts":
            parts = _PARTS_OF_SPIKES if x_size == 1 else _PARTS_OF_FLOATS
            ours, weight_size = _TENSOR_CORE_TIME * parts / _FLOAT32, _BYTES_IN_PARTS
    of_a_weight = max(ours, byte / _L2 * (x_size / tile_of(outer) + weight_size / _TILE_ROWS))
    by_units = max(of_a_weight * weights_in_tiles, byte * (x_size * inputs + size * outputs))
    dense = max(inputs * outputs, byte * size * (inputs + outputs))
    if x.dtype != products:
        dense += byte * (x_size + size) * inputs
    assembly = _ASSEMBLY_SAMPLES * inputs * outputs + byte * _ASSEMBLY_BYTES
    return by_units * len(x) > dense * len(x) + assembly
