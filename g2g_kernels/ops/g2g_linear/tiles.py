"""Tile sizes of the Triton kernels of products, and which way a product takes: by units, or dense.

A dense product is cuBLAS's, at a larger share of the card's rate than ours, but multiplies what does not exist. It
pays for nearly full masks, and for units below 16, whose tiles (at least 16 × 16) are mostly padding: at the default
density a mask of single weights has no empty 16 × 16 block at all. In float32 our products go by parts to tensor
cores, cuBLAS's do not. The times of :mod:`g2g_kernels.triton.costs` decide, for each product of a layer by itself.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from g2g_kernels.triton import costs, runtime
from g2g_kernels.triton.runtime import cdiv

# --- tiles --------------------------------------------------------------------------------------------------------


def side_of(width: int) -> int:
    """The side of a tile that covers a range of that width, or a part of one wider than 64: 16, 32 or 64."""
    return 16 if width <= 16 else 32 if width <= 32 else 64


def product_tiles(samples: int, width: int, x: torch.dtype, products: torch.dtype, precision: str) -> dict[str, int]:
    """Rows and depth of a tile for units ``width`` deep, and the number of loads in flight.

    128 rows are two ``wgmma`` of 64, and reuse each weight tile for 128 FLOPs per byte; for few samples 16 rows are
    enough, the minimum of a tensor core. Three stages of 16 KB of x and 8 KB of weights leave room for other programs
    on an SM, and fit the 99 KB of consumer cards. float32 samples take twice the registers, whatever they are converted
    to: half the rows, half the depth; float32 weights alone, and units 16 deep, half the rows. ``ieee`` products run on
    the ordinary cores, with fully unrolled loops: a depth of 16. Parts, of which there are three for a tile of weights,
    are shared by 128 rows and two sums by 8 warps: read for 64 rows they would come from L2 more slowly than they are
    multiplied. With these numbers no kernel uses the stack (``benchmarks/results/aot.md``).
    """
    wide = precision == "parts" or torch.float32 not in (x, products)
    block_m = 16 if samples <= 32 else 128 if wide and width > 16 else 64
    depth = 16 if _on_ordinary_cores(products, precision) else 32 if x == torch.float32 else 64
    num_warps = 8 if precision == "parts" and block_m == 128 else 4
    return {"BLOCK_M": block_m, "BLOCK_K": min(depth, width), "num_warps": num_warps, "num_stages": STAGES}


#: buffers of the loads that a product waits for: that of this turn, and those of the next two
STAGES = 3


def _on_ordinary_cores(products: torch.dtype, precision: str) -> bool:
    return products == torch.float32 and precision == "ieee"


def fitted(tiles: dict[str, int], device: torch.device, deepest: int = 32) -> dict[str, int]:
    """The tiles of a matrix-product kernel, adjusted to ``device``.

    On AMD's cards loads travel in registers, and the 64 KB of shared memory hold two programs of two stages: one stage
    is in shared memory while the other is loaded.

    RDNA: 8 warps, and no tile deeper than ``deepest``. Its warps are 32 threads wide like NVIDIA's, but its ``wmma``
    needs each factor twice in a warp's registers. With the tiles of other cards, 16-bit kernels spilled up to 292 bytes
    per thread to the stack, a float32 kernel 2,764.
    """
    architecture = runtime.amd(device)
    if not architecture:
        return tiles
    tiles = tiles | {"num_stages": 2}
    if not architecture.startswith(RDNA):
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

    128 columns of x, as wide as a ``wgmma`` or two of them deep: with 256, most rows of the default mask (8 or 9 units
    of 64) would leave a last group almost empty. 64 samples per step are four ``wgmma`` deep; three stages take 72 KB
    at most. In float32, half of both, as in :func:`product_tiles`, and for floats by parts a quarter of the samples;
    spikes beside parts are narrow enough for all 128 columns, with 8 warps for the sums. CHAIN is 0 where one chain is
    as good as several.
    """
    floats = torch.float32 in (x, products)
    by_parts, spikes = precision == "parts", x == torch.uint8
    depth = 16 if _on_ordinary_cores(products, precision) or (by_parts and not spikes) else 32 if floats else 64
    lanes = 64 if floats and not (by_parts and spikes) else 128
    chain = 256 if products == torch.float32 else 0
    warps = 8 if by_parts and spikes else 4
    return {"GROUP": lanes // width, "BLOCK_S": depth, "CHAIN": chain, "num_warps": warps, "num_stages": STAGES}


def groups_and_parts(units: int, rows: int, tiles: int, samples: int, group: int) -> tuple[int, int]:
    """How many groups of units at most, and parts of the samples, a weight gradient has."""
    groups = units // group + rows
    return groups, max(1, min(_PROGRAMS // (groups * tiles), samples // 1024))


# --- times --------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The numbers of a layer on which times depend: of units, and of each side its ranges, their width, its neurons."""

    units: int
    row_ranges: int
    row_width: int
    outputs: int
    col_ranges: int
    col_width: int
    inputs: int

    @property
    def weights(self) -> int:
        """Of the units, padding included."""
        return self.units * self.row_width * self.col_width

    @property
    def dense(self) -> int:
        """Of the whole grid, which is assembled before a dense product."""
        return self.row_ranges * self.row_width * self.col_ranges * self.col_width

    @property
    def transposed(self) -> "Shape":
        rows, cols = self[1:4], self[4:]
        return Shape(self.units, *cols, *rows)


class Call(NamedTuple):
    """A product: ``"forward"``, ``"to x"`` (the input gradient) or ``"to weights"`` of a layer.

    Attributes:
        shape: of the layer.
        samples: M.
        x: the dtype of what is multiplied: for the input gradient of dy, else of the layer's inputs (uint8: spikes).
        y: the dtype of the result.
        products, precision: how factors are multiplied.
        card: on which.
    """

    way: str
    shape: Shape
    samples: int
    x: torch.dtype
    y: torch.dtype
    products: torch.dtype
    precision: str
    card: costs.Card

    @property
    def weight_bytes(self) -> int:
        return costs.PART_BYTES if self.precision == "parts" else self.products.itemsize

    @property
    def factors(self) -> tuple[str, int]:
        return costs.factors(self.products, self.precision, self.x == torch.uint8)


def parts_work(shape: Shape) -> costs.Work:
    """What makes parts of the weights."""
    return costs.Work(bytes=(4 + costs.PART_BYTES) * shape.weights, programs=cdiv(shape.weights, 1024))


def _by_units(call: Call) -> list[costs.Work]:
    """The product of units with x by rows, or by columns, which is the input gradient."""
    shape = call.shape if call.way == "forward" else call.shape.transposed
    tiles = product_tiles(call.samples, side_of(shape.col_width), call.x, call.products, call.precision)
    block = costs.Block(tiles["BLOCK_M"], side_of(shape.row_width), tiles["BLOCK_K"])
    columns, of_m = cdiv(shape.row_width, block.n), cdiv(call.samples, block.m)
    pairs = shape.units * columns * cdiv(shape.col_width, block.k) * of_m
    kind, times = call.factors
    moved = call.samples * (shape.inputs * call.x.itemsize + shape.outputs * call.y.itemsize)
    own = costs.Work(
        times * block.flop(pairs),
        kind,
        moved + shape.weights * call.weight_bytes,
        block.l2_bytes(pairs, call.x.itemsize, call.weight_bytes),
        shape.row_ranges * columns * of_m,
        tiles["num_warps"],
    )
    return [parts_work(shape), own] if call.precision == "parts" else [own]


def _weight_gradient(call: Call) -> list[costs.Work]:
    """The gradient of units, and the sum over its parts."""
    shape = call.shape
    tiles = weight_gradient_tiles(side_of(shape.col_width), call.x, call.products, call.precision)
    block_r, block_c = side_of(shape.row_width), tiles["GROUP"] * side_of(shape.col_width)
    of_unit = cdiv(shape.row_width, block_r) * cdiv(shape.col_width, side_of(shape.col_width))
    groups, parts = groups_and_parts(shape.units, shape.row_ranges, of_unit, call.samples, tiles["GROUP"])
    block = costs.Block(block_r, block_c, call.samples)
    pairs = of_unit * costs.groups_of(shape.units, shape.row_ranges, tiles["GROUP"])
    kind, times = call.factors
    moved = call.samples * (shape.outputs * call.products.itemsize + shape.inputs * call.x.itemsize)
    own = costs.Work(
        times * block.flop(pairs),
        kind,
        moved + 4 * parts * shape.weights,
        block.l2_bytes(pairs, call.products.itemsize, call.x.itemsize),
        groups * parts * of_unit,
        tiles["num_warps"],
    )
    return [own, costs.Work(bytes=4 * (parts + 1) * shape.weights)]


def _dense(call: Call) -> list[costs.Work]:
    """A product with stored zeros, and what is done before and after it."""
    shape, size = call.shape, call.products.itemsize
    inputs, outputs = call.samples * shape.inputs, call.samples * shape.outputs
    kind, _ = costs.factors(call.products, "tf32" if call.precision == "tf32" else "ieee", False)
    put = shape.dense + shape.weights
    # cut into units, whose numbers take four small kernels, and selected; or zeros, units put among them, rows joined
    passes = [2 * shape.dense, put, 0, 0, 0, 0] if call.way == "to weights" else [put, put, 2 * shape.dense]
    work = [costs.Work(bytes=size * numbers) for numbers in passes]
    work.append(costs.Work(2 * inputs * shape.outputs, kind, (inputs + outputs + shape.dense) * size))
    if call.x != call.products:
        work.append(costs.Work(bytes=inputs * (call.x.itemsize + size)))
    if call.y != call.products:
        made = {"forward": outputs, "to x": inputs, "to weights": shape.weights}[call.way]
        work.append(costs.Work(bytes=made * (call.y.itemsize + size)))
    return work


@functools.lru_cache(maxsize=4096)
def seconds(call: Call, dense: bool) -> float:
    """The modelled time of a product, by units or dense."""
    work = _dense(call) if dense else _weight_gradient(call) if call.way == "to weights" else _by_units(call)
    return sum(costs.seconds(each, call.card) for each in work)


def dense_pays(shape: Shape, way: str, x: torch.Tensor, y: torch.dtype, products: torch.dtype, precision: str) -> bool:
    """True where the dense product is expected to be faster; a cost model, not measured.

    Args:
        shape: of the layer.
        way, y, products, precision: as :class:`Call` has them.
        x: [M, …], what is multiplied.
    """
    if _chosen is not None:
        return _chosen
    call = Call(way, shape, x.shape[0], x.dtype, y, products, precision, costs.card_of(x.device))
    return seconds(call, True) < seconds(call, False)


_chosen: bool | None = None


@contextlib.contextmanager
def choose(dense: bool) -> Iterator[None]:
    """Inside, every product is dense, or none is, whatever :func:`dense_pays` says; to compare the two."""
    global _chosen
    before, _chosen = _chosen, dense
    try:
        yield
    finally:
        _chosen = before
