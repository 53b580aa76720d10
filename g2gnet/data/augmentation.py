"""Random changes of training images, made on their device for a whole batch at once."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from g2g_kernels.numbers import WHOLE, Number

#: by name, the largest shift of images in pixels; each also mirrors half of the images
SHIFTS = {"crop-flip": 4, "shift-flip": 1, "flip": 0}

#: of an erased rectangle: its share of the image, its height over its width, and how many are drawn until one fits
ERASED, ASPECT, TRIES = (0.02, 0.33), (0.3, 3.3), 10


def random_crop_and_flip(
    images: torch.Tensor, generator: torch.Generator, shift: int = SHIFTS["crop-flip"]
) -> torch.Tensor:
    """Shifts each image by up to ``shift`` pixels in both directions, filling with zeros, and mirrors half of them.

    With 4 pixels that is the usual augmentation for CIFAR (He et al. 2016). Draws are independent for each image.
    Images are [B, ..., height, width], of any dtype, on any device; the generator may be on another device. The result
    is new. Raises ValueError for a shift below 0.

    Example:
        >>> images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
        >>> random_crop_and_flip(images, torch.Generator().manual_seed(0), shift=2).shape
        torch.Size([5, 28, 28])
    """
    WHOLE.check("shift", shift)
    count, (height, width) = len(images), images.shape[-2:]
    drawn_on = generator.device
    top, left = torch.randint(2 * shift + 1, (2, count, 1), generator=generator, device=drawn_on).to(images.device)
    flipped = torch.randint(2, (count, 1), generator=generator, device=drawn_on).to(images.device)
    column = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + column + flipped * (width - 1 - 2 * column)

    padded = F.pad(images.reshape(count, -1, height, width), (shift,) * 4)
    # one gather of whole images: where each pixel of the result lies in the padded, flattened image
    source = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).view(count, 1, -1)
    pixels = padded.flatten(2).gather(2, source.expand(-1, padded.shape[1], -1))
    return pixels.view(images.shape)


def random_erase(images: torch.Tensor, generator: torch.Generator, probability: float) -> torch.Tensor:
    """Sets a rectangle of some images to zero (Zhong et al. 2020), distributed as by torchvision's RandomErasing.

    Its area is uniform from 2 to 33 % of the image, its aspect ratio log-uniform from 0.3 to 3.3, its place uniform.
    Each image loses one with that ``probability``, independently; none may fit into very narrow images. Arguments and
    result are those of :func:`random_crop_and_flip`. Raises ValueError for a probability out of range.

    Example:
        >>> images = torch.ones(100, 28, 28)
        >>> erased = random_erase(images, torch.Generator().manual_seed(0), probability=0.5)
        >>> 30 < (erased == 0).flatten(1).any(1).sum() < 70
        tensor(True)
    """
    Number(0, 1).check("probability", probability)
    count, (height, width) = len(images), images.shape[-2:]
    drawn_on = generator.device
    share, shape = torch.rand(2, TRIES, count, generator=generator, device=drawn_on)
    area = height * width * (ERASED[0] + (ERASED[1] - ERASED[0]) * share)
    aspect = (math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * shape).exp()
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(0, keepdim=True)
    chance, down, right = torch.rand(3, count, generator=generator, device=drawn_on)
    chosen = (chance < probability) & fits.any(0)
    rows, columns = (
        _covered(size, length.gather(0, first)[0], place)
        for size, length, place in ((height, tall, down), (width, wide, right))
    )
    hidden = (chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]).to(images.device)
    return images.reshape(count, -1, height, width).masked_fill(hidden[:, None], 0).view(images.shape)


def random_unit_shift(sequences: torch.Tensor, generator: torch.Generator, most: int) -> torch.Tensor:
    """Moves each sequence by up to ``most`` places along its units, the same number at all steps, filling with zeros.

    On channels of a cochlea that changes the pitch; Nowotny et al. (2025) move SHD by up to 40 of its 700. Sequences
    are [B, T, units], of any dtype, on any device. Raises ValueError for a number below 0.

    Example:
        >>> moved = random_unit_shift(torch.ones(50, 3, 9), torch.Generator().manual_seed(0), most=2)
        >>> moved.sum(2).unique().tolist()
        [7.0, 8.0, 9.0]
    """
    WHOLE.check("most", most)
    count, steps, units = sequences.shape
    begin = torch.randint(2 * most + 1, (count, 1, 1), generator=generator, device=generator.device)
    source = begin.to(sequences.device) + torch.arange(units, device=sequences.device)
    return F.pad(sequences, (most, most)).gather(2, source.expand(-1, steps, -1))


def shift_problem(most: int, name: str, shape: Sequence[int]) -> str | None:
    """What is wrong with such shifts of sequences of the data set ``name``, whose steps have that shape."""
    if most == 0 or (len(shape) == 1 and most < shape[0]):
        return None
    return (
        f"unit_shift={most} needs sequences of vectors with more places, but a step of {name} is of shape "
        f"{list(shape)}; lower it, or leave it out"
    )


def _covered(size: int, length: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Which of ``size`` pixels in a line are covered: [B, size]; ``place``: the share of the places before theirs."""
    begin = torch.minimum((place * (size - length + 1)).floor(), size - length)[:, None]
    pixels = torch.arange(size, device=length.device)
    return (pixels >= begin) & (pixels < begin + length[:, None])
