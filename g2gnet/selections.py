"""Neurons of a network chosen by number or by a mask: those that an experiment silences, and those that it records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

#: by the name of a population: numbers of its neurons, or bool [N]
Selection = Mapping[str, Any]


def chosen(
    option: str, given: Selection, sizes: Mapping[str, int], batch: int | None = None
) -> dict[str, torch.Tensor]:
    """The chosen neurons of each population that ``given`` names: their numbers, bool [N], or unless ``batch`` is None
    bool [batch, N], as they are given.

    Raises ValueError, naming the option, for unknown populations and for what chooses no neurons of them.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{option} is a {type(given).__name__}; give a dict of neurons by the name of their population")
    found = {}
    for name, neurons in given.items():
        if name not in sizes:
            raise ValueError(f"{option} names {name!r}, which is none of the populations {', '.join(sizes)}")
        size = sizes[name]
        shapes = [(size,), *([] if batch is None else [(batch, size)])]
        if isinstance(neurons, torch.Tensor) and neurons.dtype == torch.bool and tuple(neurons.shape) in shapes:
            found[name] = neurons
            continue
        # a copy: PyTorch takes no array that is read-only
        array = np.array(neurons.detach().cpu().numpy() if isinstance(neurons, torch.Tensor) else neurons)
        if array.dtype == bool and array.shape in shapes:
            found[name] = torch.from_numpy(array)
            continue
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{option}[{name!r}] is {array.dtype} {list(array.shape)}; give numbers of neurons, or bool {wanted}"
            )
        if outside := [each for each in array.tolist() if not 0 <= each < size]:
            raise ValueError(
                f"{option}[{name!r}] names neuron {outside[0]}; {name} has {size} neurons, numbered from 0"
            )
        found[name] = torch.from_numpy(array.astype(np.int64))
    return found


def silent_too(
    dropped: Sequence[torch.Tensor | None], silenced: Selection, sizes: Mapping[str, int], like: torch.Tensor
) -> list[torch.Tensor | None]:
    """What each population drops, bool [B, N] or None, with the neurons that are ``silenced``; like: of B samples, on
    their device."""
    silent, batch = dict(zip(sizes, dropped, strict=True)), like.shape[-2]
    for name, neurons in chosen("silenced", silenced, sizes, batch).items():
        if neurons.dtype != torch.bool:
            neurons = torch.zeros(sizes[name], dtype=torch.bool).index_fill_(0, neurons, True)
        own, before = neurons.to(like.device).expand(batch, -1), silent[name]
        silent[name] = own if before is None else own | before
    return list(silent.values())


def shown_of(membranes: bool | Selection, sizes: Mapping[str, int]) -> list[bool | tuple[int, ...]]:
    """Of each population whether its membranes are wanted, or the numbers of the neurons of which they are."""
    if not isinstance(membranes, Mapping):
        return [bool(membranes)] * len(sizes)
    numbers = {
        name: neurons.nonzero()[:, 0] if neurons.dtype == torch.bool else neurons
        for name, neurons in chosen("membranes", membranes, sizes).items()
    }
    return [tuple(numbers[name].tolist()) if name in numbers else False for name in sizes]
