"""Weights of few bits: whole numbers times one scale, and the gradients that training them passes on."""

from collections.abc import Sequence

import torch

#: bits of a weight
BITS = (8, 4)
#: the scales that are tried, as shares of the one with which the largest weight is the largest whole number
SHARES = tuple(share / 20 for share in range(6, 21))


def check_bits(name: str, bits: object) -> None:
    """Raises ValueError unless ``bits`` is one of :data:`BITS`."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"{name}={bits!r} is not one of {', '.join(map(str, BITS))}")


def largest_of(bits: int) -> int:
    """Q, the largest whole number: the smallest is −Q."""
    return 2 ** (bits - 1) - 1


def scale_of(weights: Sequence[torch.Tensor], bits: int) -> torch.Tensor:
    """The scale of all these weights that has the least squared error, of 15 shares of the largest one, a scalar.

    Weights that are such whole numbers times a scale have that scale: rounding them again changes nothing."""
    largest = largest_of(bits)
    of_all = torch.cat([each.detach().flatten() for each in weights])
    of_all = of_all.to(torch.promote_types(of_all.dtype, torch.float32))
    most = torch.cat([of_all.abs(), of_all.new_zeros(1)]).max() / largest
    scales = [torch.where(most > 0, most, 1) * share for share in SHARES]
    errors = [
        (of_all / scale).round_().clamp_(-largest, largest).mul_(scale).sub_(of_all).square_().sum() for scale in scales
    ]
    return torch.stack(scales).gather(0, torch.stack(errors).argmin(0, keepdim=True)).squeeze()


def in_bits(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights rounded to multiples of ``scale``, in their dtype. Gradients pass unchanged, but for clipped weights."""
    largest, exact = largest_of(bits), values.detach()
    nearest = (exact / scale).round_()
    rounded = (nearest.clamp(-largest, largest) * scale).to(values.dtype)
    # the sum is exact: a multiple is 0, or between half and twice what is rounded to it
    return torch.where(nearest.abs() <= largest, values + (rounded - exact), rounded)
