"""Random draws of units."""

import torch


def sample_rows(candidates: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws units with probability ``p`` among ``candidates``, bool [block rows, block columns]; as such a tensor.

    Each row gets ⌊p·n⌋ or ⌈p·n⌉ of its n candidates at uniformly drawn places: randomised rounding, so that the
    probability of each unit is exactly p and rows have equal work.
    """
    rounding = torch.rand(len(candidates), generator=generator, dtype=torch.float64)
    count = torch.floor(candidates.sum(1).double() * p + rounding).long()
    # candidates in uniformly random order first, the others behind them
    key = torch.rand(candidates.shape, generator=generator).masked_fill_(~candidates, 2.0)
    rank = torch.empty_like(key, dtype=torch.int64)
    rank.scatter_(1, key.argsort(dim=1), torch.arange(key.shape[1]).expand_as(rank))
    return candidates & (rank < count[:, None])
