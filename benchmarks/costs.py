"""How long kernels take on a card: the model by which times were predicted. Nothing of it is measured.

The rules by which kernels are chosen (``dense_pays``, ``fused_pays``) are simpler; a test compares them with it.

A kernel takes the longest of three times: its products at a share of the card's rate, the bytes that it reads and
writes, each once, at a share of the memory's, and what its tiles read from L2. The first and the last are longer where
programs do not fill the card. Added to this is a start. ``results/predictions.jsonl`` is what followed at its commit.
"""

import math
from typing import NamedTuple


class Card(NamedTuple):
    """Rates of a GPU."""

    architecture: str  # its name in :data:`g2g_kernels.triton.runtime.CARDS`
    flop_per_s: dict[str, float]  # of dense matrix products, by their factors: "bf16" (16 bits), "tf32" and "fp32"
    bytes_per_s: float  # of memory
    l2_bytes_per_s: float
    multiprocessors: int
    source: str  # of these numbers


CARDS = {
    "h100": Card("sm_90", {"bf16": 798e12, "tf32": 399e12, "fp32": 67e12}, 3.0e12, 5.5e12, 132,
                 "H100 SXM, as measured on one (fp32: data sheet)"),
    "h200": Card("sm_90", {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12}, 4.8e12, 5.5e12, 132,
                 "H200 SXM, peak rates of the data sheet"),
    "a100": Card("sm_80", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 2.039e12, 4e12, 108,
                 "A100 SXM 80 GB, peak rates of the data sheet"),
}  # fmt: skip

#: the guesses: shares of a card's rates, and seconds
ASSUMED = {
    "share of the matrix rate, our products, tensor cores": 0.6,
    "share of the matrix rate, our products, ordinary cores": 0.45,
    "share of the matrix rate, PyTorch's products": 0.8,
    "share of the memory's rate": 0.85,
    "share of the rate of L2": 0.8,
    "start of a kernel, s": 2e-6,
}
#: warps on a multiprocessor that reach these shares; fewer reach as much less
ENOUGH_WARPS = 8


class Work(NamedTuple):
    """What a kernel does."""

    flop: float = 0  # of its products
    factors: str = "bf16"  # their format, a key of :attr:`Card.flop_per_s`
    bytes: float = 0  # read from and written to memory, each once
    l2_bytes: float = 0  # read from L2
    programs: int = 0  # its grid; none for PyTorch's kernels, which fill the card
    warps: int = 4  # of a program


def seconds(work: Work, card: Card) -> float:
    """The time of a kernel."""
    share = "PyTorch's products"
    if work.programs:
        share = f"our products, {'ordinary' if work.factors == 'fp32' else 'tensor'} cores"
    rate = card.flop_per_s[work.factors] * ASSUMED[f"share of the matrix rate, {share}"]
    l2 = work.l2_bytes / (card.l2_bytes_per_s * ASSUMED["share of the rate of L2"])
    memory = work.bytes / (card.bytes_per_s * ASSUMED["share of the memory's rate"])
    longer = waiting(work.programs, work.warps, card.multiprocessors)
    return max(work.flop / rate * longer, l2 * longer, memory) + ASSUMED["start of a kernel, s"]


def waiting(programs: int, warps: int, multiprocessors: int) -> float:
    """By how much a grid takes longer than one that fills the card: the busiest multiprocessor has ⌈programs /
    multiprocessors⌉ programs, and too few warps to hide latency where that is one small program."""
    if not programs:
        return 1.0
    most = math.ceil(programs / multiprocessors)
    return most * multiprocessors / programs / min(1, most * warps / ENOUGH_WARPS)
