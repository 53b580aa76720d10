"""Held-out training images: their choice, the best epoch on them, and the end of training by patience."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from g2gnet.base.seeding import stream
from g2gnet.network_settings import SettingsError


def held_out(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """The numbers of the held-out training images, ascending, int64 [n].

    Of each class, ``share`` of the images, rounded, are drawn with ``seed``. At least one image of each class is held
    out, and at least one is trained on. Raises SettingsError for a class of one image.

    Example:
        >>> labels = torch.tensor([0, 1] * 10)
        >>> index = held_out(labels, 0.3, seed=0)
        >>> labels[index].bincount()
        tensor([3, 3])
    """
    chosen, labels = [], labels.cpu()
    for label, members in enumerate(labels.argsort(stable=True).split(labels.bincount().tolist())):
        count = len(members)
        if count == 1:
            has = f"class {label}, which has one of the {len(labels)} training images"
            remedy = "leave `validation` out, or give more of its images"
            raise SettingsError(f"validation={share} cannot hold out and keep an image of {has}; {remedy}")
        wanted = min(max(1, round(share * count)), count - 1) if count else 0
        chosen.append(members[torch.randperm(count, generator=stream(seed, "validation", label))[:wanted]])
    return torch.cat(chosen).sort().values


def best_of(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of the first epoch with the best held-out accuracy, among those with the fewest units."""
    return max(history, key=lambda record: (-sum(record.get("units", {}).values()), record["val_acc"]))


def out_of_patience(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether ``patience`` epochs have passed since the best one; False if ``patience`` is None."""
    return bool(history) and patience is not None and history[-1]["epoch"] - best_of(history)["epoch"] >= patience
