"""Tile sizes of the Triton kernels of products, and whether a product is computed by units or dense.

The dense product is cuBLAS's, which reaches a larger share of the card's rate than our kernels, but also multiplies
absent weights. It pays for nearly full masks, and for units below 16, whose tiles (at least 16 × 16) are mostly
padding. In float32 our products run on tensor cores, in parts; cuBLAS's do not. :func:`dense_pays` decides.
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
    """Rows and depth of a tile for units ``width`` deep, warps, and the number of loads in flight.

    128 rows are two ``wgmma`` of 64; 64 rows make twice the programs for one step of a batch; 16, the minimum of a
    tensor core, are enough for few samples. Three stages of 16 KB of x and 8 KB of weights fit the 99 KB of consumer
    cards. float32 samples take twice the registers: half the rows and depth, in parts a quarter of the depth. ``ieee``
    loops are fully unrolled: a depth of 16. In parts, 128 rows share a tile of weights, and 8 warps two sums: with 64
    rows L2 would be too slow. No kernel then uses the stack (``benchmarks/results/aot.md``).
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
    """The number of units ``width`` wide that share a tile of dy, of samples per step, of samples in a chain of sums
    (0: one chain is as good as several), of warps, and of loads in flight.

    128 columns of x: with 256, most rows of the default mask (8 or 9 units of 64) would leave a last group almost
    empty. 64 samples per step are four ``wgmma`` deep. In float32 half of both, in parts a quarter of the samples;
    spikes times parts have room for all 128 columns, but take 8 warps: with 4 they spill on sm_89.
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

#: the shares of a card's rate that are reached: by cuBLAS, and by our kernels on tensor cores and on ordinary cores
_CUBLAS, _TENSOR_CORES, _ORDINARY_CORES = 0.8, 0.6, 0.45
#: the time of a multiplication relative to 16 bits on tensor cores: in TF32, and in float32 on ordinary cores
_TF32, _FLOAT32 = 2, 12
#: a float32 weight in three parts of 16 bits: its bytes, and its products with a spike and with a float in parts
_PARTS_BYTES, _PARTS_BY_SPIKE, _PARTS_BY_FLOAT = 6, 3, 6
#: samples that share a tile of weights; and how many times as fast as memory L2 is
_TILE_ROWS, _L2_SPEED = 128, 2
#: assembling a dense matrix: its passes over the matrix, in samples, and its launches (ten microseconds), in bytes
_ASSEMBLY_SAMPLES, _ASSEMBLY_BYTES = 1000, 2e7


def dense_pays(units: Units, x: torch.Tensor, outer: Side, products: torch.dtype) -> bool:
    """True where the dense product of x [M, …] is expected to be faster; a rule, not measured. ``outer`` is the side of
    ``units`` that is not summed over: the rows, in the input gradient the columns.

    Times are per sample, in multiplications of cuBLAS. A product takes as long as its multiplications or its loads and
    stores, whichever is longer. cuBLAS does not multiply spikes as bytes: they are converted first.
    """
    if runtime.assumed.dense is not None:
        return runtime.assumed.dense
    rows, cols, samples = units.rows, units.cols, len(x)
    inputs, outputs = (cols.size, rows.size) if outer is rows else (rows.size, cols.size)
    x_bytes, product_bytes = x.dtype.itemsize, products.itemsize
    precision = runtime.precision_of(products, x.device)
    of_a_byte = float(runtime.card_of(x.device).flop_per_byte)  # from memory
    multiplication, weight_bytes = _CUBLAS / _TENSOR_CORES, product_bytes
    if precision == "tf32":
        of_a_byte /= _TF32
    elif products == torch.float32:
        of_a_byte /= _FLOAT32
        multiplication = _CUBLAS / _ORDINARY_CORES
        if precision == "parts":  # on tensor cores, where cuBLAS is on ordinary ones
            parts = _PARTS_BY_SPIKE if x_bytes == 1 else _PARTS_BY_FLOAT
            multiplication, weight_bytes = _CUBLAS / _TENSOR_CORES * parts / _FLOAT32, _PARTS_BYTES

    weights_with_padding = units.unit_row.shape[0] * _padded(rows) * _padded(cols)
    loads_per_weight = of_a_byte / _L2_SPEED * (x_bytes / tile_of(outer) + weight_bytes / _TILE_ROWS)
    in_memory = of_a_byte * (x_bytes * inputs + product_bytes * outputs)
    by_units = max(weights_with_padding * max(multiplication, loads_per_weight), in_memory)

    dense = max(inputs * outputs, of_a_byte * product_bytes * (inputs + outputs))
    conversion = 0 if x.dtype == products else of_a_byte * (x_bytes + product_bytes) * inputs
    assembly = _ASSEMBLY_SAMPLES * inputs * outputs + of_a_byte * _ASSEMBLY_BYTES
    return by_units * samples > (dense + conversion) * samples + assembly


def _padded(side: Side) -> int:
    """The places in all tiles that cover a range."""
    return tiles_of(side) * tile_of(side)
