"""Random changes of training images, made on their device for a whole batch at once."""

import torch
from torch.nn import functional as F

#: zero pixels added on each side before an image is cropped to its old size
PADDING = 4


def random_crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts each image by up to 4 pixels in both directions, zeros moving in, and mirrors half of them left to right.

    That is the usual augmentation for CIFAR (He et al. 2016): crops at uniform places of the zero-padded image, each
    flipped with probability 1/2, drawn for each image by itself.

    Args:
        images: [B, ..., height, width], any dtype, on any device.
        generator: source of randomness; its device may differ from that of the images.

    Returns:
        New images of the same shape and dtype.
    """
    count, (height, width) = len(images), images.shape[-2:]
    drawn_on = generator.device
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator, device=drawn_on).to(images.device)
    flipped = torch.randint(2, (count, 1), generator=generator, device=drawn_on).to(images.device)
    column = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + column + flipped * (width - 1 - 2 * column)

    padded = F.pad(images.reshape(count, -1, height, width), (PADDING,) * 4)
    # one gather of whole images: where each pixel of the result lies in the padded, flattened image
    source = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).view(count, 1, -1)
    pixels = padded.flatten(2).gather(2, source.expand(-1, padded.shape[1], -1))
    return pixels.view(images.shape)
