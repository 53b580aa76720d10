"""Random changes of training images, made on their device for a whole batch at once."""

import torch
from torch.nn import functional as F

#: by name, the maximal shift of images in pixels; all of them also mirror half of the images
SHIFTS = {"crop-flip": 4, "shift-flip": 1, "flip": 0}


def random_crop_and_flip(
    images: torch.Tensor, generator: torch.Generator, shift: int = SHIFTS["crop-flip"]
) -> torch.Tensor:
    """Shifts each image by up to ``shift`` pixels in both directions, filling with zeros, and mirrors half of them.

    With 4 pixels that is the usual augmentation for CIFAR (He et al. 2016): crops at uniform places of the zero-padded
    image, each mirrored left to right with probability 1/2, drawn independently for each image.

    Args:
        images: [B, ..., height, width], any dtype, on any device.
        generator: source of randomness; its device may differ from that of the images.
        shift: pixels, at least 0.

    Returns:
        New images of the same shape and dtype.

    Example:
        >>> images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
        >>> random_crop_and_flip(images, torch.Generator().manual_seed(0), shift=2).shape
        torch.Size([5, 28, 28])
    """
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
