"""Samples that unfold over time, batch by batch (:meth:`g2gnet.G2GNet.encode`): what a network receives at each step.
An order, int64 [T, D], gives the places of the D inputs of each of T steps in the flattened sample, each once."""

import math
from collections.abc import Sequence

import torch

from g2gnet.base.seeding import stream

#: by name, the input of a step
SEQUENCES = {
    "none": "the whole sample, held for all steps",
    "rows": "rows of the image",
    "pixels": "pixels of the image, row by row",
    "permuted": "pixels in one fixed random order",
    "own": "the next step of your own sequences, with time as the second axis",
}


def sequence_length(sequence: str, shape: Sequence[int], values: int = 1) -> int:
    """The time steps of a sample, by a name in :data:`SEQUENCES` other than ``"none"``. The ``shape`` of a sample is
    (height, width) or (channels, height, width) of an image, or (T, ...) of a sequence. A step has ``values`` rows or
    pixels. Raises ValueError if samples have no rows and pixels, or their number is no multiple of ``values``."""
    sizes = ", ".join(map(str, shape))
    if sequence == "own":
        if len(shape) < 2:
            raise ValueError(f"sequence=own needs sequences [N, T, ...], but samples are [{sizes}]; leave it out")
        return shape[0]
    if len(shape) not in (2, 3):
        raise ValueError(
            f"sequence={sequence} needs images [N, height, width] or [N, channels, height, width], but samples are "
            f"[{sizes}]; leave it out"
        )
    what, count = ("rows", shape[-2]) if sequence == "rows" else ("pixels", shape[-2] * shape[-1])
    if count % values:
        raise ValueError(f"sequence_step={values} does not divide the {count} {what} of an image; give a divisor of it")
    return count // values


def input_order(sequence: str, shape: Sequence[int], values: int = 1, seed: int = 0) -> torch.Tensor:
    """The places of the inputs of each step in a flattened sample: int64 [T, D]; arguments and errors are those of
    :func:`sequence_length`. A step of a colour image has all channels, one after the other. ``seed`` draws the order of
    ``"permuted"``, which is the same for all channels."""
    steps, total = sequence_length(sequence, shape, values), math.prod(shape)
    if sequence == "own":
        return torch.arange(total).view(steps, -1)
    pixels = shape[-2] * shape[-1]
    places = torch.arange(pixels)
    if sequence == "permuted":
        places = torch.randperm(pixels, generator=stream(seed, "permutation"))
    planes = torch.arange(total).view(-1, pixels)[:, places]
    return planes.view(len(planes), steps, -1).transpose(0, 1).reshape(steps, -1)


def tapped(x: torch.Tensor, taps: int) -> torch.Tensor:
    """A tapped delay line: copies of sequences x [T, B, D] with different delays side by side, [T, B, taps·D]. Tap k,
    from 0, is k·T/taps steps late, rounded down; before its first input it gives 0."""
    late_by = tap_delays(len(x), taps)
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 0, late, -late)) for late in late_by], dim=-1)


def tap_delays(steps: int, taps: int) -> list[int]:
    """By how many steps each of the ``taps`` of a sequence of ``steps`` is late."""
    return [tap * steps // taps for tap in range(taps)]


def unfold(samples: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Samples [B, T·D] as sequences [T, B, D] in the order of :func:`input_order`; ValueError for another size."""
    if samples.dim() != 2 or samples.shape[1] != order.numel():
        steps, inputs = order.shape
        raise ValueError(
            f"samples are {list(samples.shape)}, not [B, {order.numel()}]: {steps} steps of {inputs} inputs each; "
            f"sequences that are unfolded already are [{steps}, B, input_dim]"
        )
    ordered = samples.index_select(1, order.flatten())
    return ordered.unflatten(1, order.shape).transpose(0, 1).contiguous()  # `len` would fix the batch of an export
