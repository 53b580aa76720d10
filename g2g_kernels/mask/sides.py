"""One side of a weight matrix: its neurons sorted by group and cut into ranges, the sides of units."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from g2g_kernels.mask.groups import GroupLayout
from g2g_kernels.tracing import on_cpu


class Side(NamedTuple):
    """Where the ``size`` neurons of a side are: ``num_units`` ranges of ``width`` *places* each, the last ones of a
    shorter range empty. Neuron n is row or column n of a matrix in memory.

    Attributes:
        neuron_at: int64 [num_units · width], the neuron at each place, ``size`` at an empty one; None if place p holds
            neuron p.
        place_of: int64 [size], the place of each neuron; None in the same case.
        bounds: int32 [num_units + 1], those of a :class:`UnitAxis`, if some ranges are shorter than ``width``; else
            None. Weights beyond a range's length are padding, which is not read.
        holes: whether some neurons have no place; their ``place_of`` is one past the last.
    """

    num_units: int
    width: int
    size: int
    neuron_at: torch.Tensor | None = None
    place_of: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    holes: bool = False


def side_of(
    order: torch.Tensor,
    bounds: torch.Tensor,
    neuron_at: torch.Tensor | None = None,
    place_of: torch.Tensor | None = None,
) -> Side:
    """The side with these :meth:`UnitAxis.tensors`."""
    size, num_units = order.shape[0], bounds.shape[0] - 1
    if neuron_at is None or not neuron_at.shape[0]:
        return Side(num_units, size // num_units, size)
    width = neuron_at.shape[0] // num_units
    return Side(num_units, width, size, neuron_at, place_of, bounds if size < num_units * width else None)


def deep_copied(attributes: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """``copy.deepcopy`` of a module's attributes. A dozen of them are empty dicts of hooks."""
    return {
        name: value.copy() if isinstance(value, dict) and not value else copy.deepcopy(value, memo)
        for name, value in attributes.items()
    }


class Indices(nn.Module):
    """A module whose index tensors move with it, but are not buffers: weight averages (EMA, SWA) would average them."""

    INDICES: ClassVar[tuple[str, ...]]
    #: its tensors in the operators' form, until they are replaced
    _tensors: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tensors"}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Indices":
        # copy.deepcopy takes ten times as long as clone; it finds these tensors in memo
        for name in self.INDICES:
            index = self.__dict__[name]
            memo[id(index)] = index.clone()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(deep_copied(self.__getstate__(), memo))
        return twin

    def _apply(self, fn: Callable, recurse: bool = True) -> "Indices":
        super()._apply(fn, recurse)
        for name in self.INDICES:
            setattr(self, name, fn(getattr(self, name)))
        self._tensors = None
        return self


class UnitAxis(Indices):
    """One side of a weight matrix, sorted by group and cut into ranges of at most ``block_size`` neurons.

    A group of n neurons is cut into ⌈n / block_size⌉ ranges whose lengths differ by at most one, the longer ones
    first: 98 neurons by 16 are seven ranges of 14. With a short last range DST would drift towards its small units.

    Attributes:
        order: int64 [size], the neuron at each place of the group-sorted order.
        bounds: int32 [num_units + 1], range u covers places ``bounds[u] … bounds[u + 1] − 1`` of that order.
        group_of_unit: int64 [num_units], the group that range u belongs to.
        neuron_at: int64 [num_units · width], the neuron at each place when every range is padded to ``width``
            places; ``size`` where there is none.
        place_of: int64 [size], the padded place of each neuron (the inverse of ``neuron_at``).
    """

    INDICES = ("order", "bounds", "group_of_unit", "neuron_at", "place_of")

    @on_cpu
    def __init__(self, layout: GroupLayout, block_size: int) -> None:
        super().__init__()
        self.layout = layout
        self.size = layout.size
        sizes = layout.sizes
        pieces = (sizes + block_size - 1) // block_size
        group = torch.repeat_interleave(torch.arange(len(sizes)), pieces)
        place_in_group = torch.arange(len(group)) - (pieces.cumsum(0) - pieces)[group]
        length = (sizes // pieces)[group] + (place_in_group < (sizes % pieces)[group])
        self.num_units = len(length)
        self.width = int(length.max())
        #: whether place p holds neuron p, since every range is full and neurons stand in group order
        self.in_order = int(length.min()) == self.width and layout.kind == "index"

        order = torch.argsort(layout.group_of, stable=True)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
        unit_of_place = torch.repeat_interleave(torch.arange(self.num_units), length)
        padded_place = unit_of_place * self.width + torch.arange(self.size) - bounds[unit_of_place]
        self.order = order
        self.bounds = bounds.to(torch.int32)
        self.group_of_unit = group
        self.neuron_at = torch.full((self.num_units * self.width,), self.size)
        self.neuron_at[padded_place] = order
        self.place_of = torch.empty(self.size, dtype=torch.int64)
        self.place_of[order] = padded_place

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [num_units], the number of neurons in each range."""
        return self.bounds.diff().long()

    @property
    def unit_of(self) -> torch.Tensor:
        """int64 [size], the range that each neuron belongs to."""
        return self.place_of // self.width

    @property
    def side(self) -> Side:
        """Where its neurons are."""
        return side_of(self.order, self.bounds, *(() if self.in_order else (self.neuron_at, self.place_of)))

    @property
    def ragged(self) -> bool:
        """Whether some ranges are shorter than ``width``."""
        return self.size < self.num_units * self.width

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``order``, ``bounds``, ``neuron_at`` and ``place_of`` for operators, the last two empty if in order."""
        nothing = self.order[:0]
        neuron_at, place_of = (nothing, nothing) if self.in_order else (self.neuron_at, self.place_of)
        return self.order, self.bounds, neuron_at, place_of
