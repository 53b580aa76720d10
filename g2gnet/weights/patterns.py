"""Which units of a sparse layer exist at first: groupings and patterns by name, or functions (docs/patterns.md).

A function gets the :class:`~g2g_kernels.mask.sides.UnitAxis` of outputs and inputs and a generator. It returns [ranges
of outputs, ranges of inputs]: bool, which units exist, or float, the probability of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from g2g_kernels import BlockMask, GroupLayout
from g2g_kernels.mask.groups import partners
from g2g_kernels.mask.sampling import LARGEST_GRID
from g2g_kernels.mask.sides import UnitAxis
from g2g_kernels.numbers import COUNT, PROBABILITY, SIZE, Number, share_of
from g2g_kernels.ops.checks import DTYPES
from g2g_kernels.tracing import on_cpu
from g2gnet.weights.densities import expected_density

#: of each grouping, the kinds of groups (:class:`GroupLayout`) of the first, second, third … layer, over and over.
#: ``"mixer"`` takes turns between contiguous ranges (spatial mixing) and interleaved groups (feature mixing).
GROUPINGS = {
    "index": ("index",),
    "random": ("random",),
    "mixer": ("index", "interleaved"),
}
#: from the output and the input side of a layer, and a source of randomness, to its units
Pattern = Callable[[UnitAxis, UnitAxis, torch.Generator | None], torch.Tensor]


@dataclass(frozen=True)
class ErdosRenyi:
    """Each unit exists with the same probability, independently of all others (Erdős and Rényi 1959): no modules.

    Example:
        >>> 0.1 < pattern_mask(ErdosRenyi(density=0.25), GroupLayout(64), GroupLayout(64), block_size=4).density < 0.4
        True
    """

    density: float

    def __post_init__(self) -> None:
        PROBABILITY.check("density", self.density)

    def __call__(self, out: UnitAxis, into: UnitAxis, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.rand(out.num_units, into.num_units, generator=generator, dtype=torch.float64) < self.density


@dataclass(frozen=True)
class Regular(ErdosRenyi):
    """Each unit exists with the same probability, and each row has equally many, rounded: no modules, equal fan-in.

    Example:
        >>> pattern_mask(Regular(density=0.25), GroupLayout(64), GroupLayout(64), block_size=4).fan_in().unique()
        tensor([16])
    """

    def __call__(self, out: UnitAxis, into: UnitAxis, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.full((out.num_units, into.num_units), self.density, dtype=torch.float64)


@dataclass(frozen=True)
class SmallWorld:
    """A small world of groups (Watts and Strogatz 1998): most links join neighbours on a ring, a few any two groups.

    Each group of outputs is linked to the ``neighbours`` nearest of the other groups of inputs, or as many more as
    ``p_inter`` needs. Each link moves, with probability ``rewire``, to a group drawn from those without a link. Units
    exist with probability ``p_intra`` inside groups, and with one between linked groups that makes ``p_inter`` the mean
    over all other groups.

    Example:
        >>> world = SmallWorld(p_intra=1.0, p_inter=0.2, neighbours=2, rewire=0.0)
        >>> world.links(5, 5)[0].int()  # of the first group
        tensor([0, 1, 0, 0, 1], dtype=torch.int32)
    """

    p_intra: float = 1.0
    p_inter: float = 0.15
    neighbours: int = 2
    rewire: float = 0.1

    def __post_init__(self) -> None:
        COUNT.check("neighbours", self.neighbours)
        for name in ("p_intra", "p_inter", "rewire"):
            PROBABILITY.check(name, getattr(self, name))

    def links(self, out_groups: int, in_groups: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """The groups of inputs that each group of outputs is linked to: bool [groups out, groups in]."""
        same = partners(out_groups, in_groups)
        centres = ((torch.arange(groups, dtype=torch.float64) + 0.5) / groups for groups in (out_groups, in_groups))
        distance = _ring_distance(*centres).masked_fill(same, torch.inf)
        links = torch.zeros_like(same)
        for row, (others, order) in enumerate(zip((~same).sum(1).tolist(), distance.argsort(stable=True), strict=True)):
            needed = others - share_of(1 - self.p_inter, others)
            near = order[: min(others, max(self.neighbours, needed))]
            links[row, near] = True
            for column in near[torch.rand(len(near), generator=generator) < self.rewire].tolist():
                free = (~links[row] & ~same[row]).nonzero()[:, 0]
                if len(free):
                    links[row, column] = False
                    links[row, free[torch.randint(len(free), (), generator=generator)]] = True
        return links

    def __call__(self, out: UnitAxis, into: UnitAxis, generator: torch.Generator | None = None) -> torch.Tensor:
        groups = out.layout.num_groups, into.layout.num_groups
        own, links = partners(*groups), self.links(*groups, generator)
        between = self.p_inter * (~own).sum(1) / links.sum(1).clamp(min=1)
        probability = torch.where(own, self.p_intra, links * between.double()[:, None].clamp(max=1))
        return probability[out.group_of_unit][:, into.group_of_unit]


@dataclass(frozen=True)
class Distance:
    """Units with distant sides are rare: they exist with probability min(1, c·exp(−d / ``scale``)).

    The ranges of neurons of each side lie on a ring of length 1, in the order of the groups; d is the shorter way
    between them. The constant c makes the mean probability of a weight ``density``.

    Example:
        >>> 0.2 < pattern_mask(Distance(density=0.3, scale=0.15), GroupLayout(64), GroupLayout(64), 4).density < 0.4
        True
    """

    density: float
    scale: float = 0.1

    def __post_init__(self) -> None:
        PROBABILITY.check("density", self.density)
        Number(0, open_low=True).check("scale", self.scale)

    def __call__(self, out: UnitAxis, into: UnitAxis, generator: torch.Generator | None = None) -> torch.Tensor:
        nearness = (-self._distance(out, into) / self.scale).exp().clamp(min=1e-300)
        # the k nearest have probability 1: the least k for which c, from the others' share, makes none of them exceed 1
        nearest, order = nearness.flatten().sort(descending=True)
        sizes = out.lengths[:, None] * into.lengths.double()
        of_sorted = (sizes / sizes.mean()).flatten()[order]
        rest = (of_sorted * nearest).flip(0).cumsum(0).flip(0)
        factors = (self.density * len(order) - (of_sorted.cumsum(0) - of_sorted)) / rest
        (fits,) = (factors * nearest <= 1).nonzero(as_tuple=True)
        return (nearness * factors[fits[0] if len(fits) else -1]).clamp(0, 1)

    def _distance(self, out: UnitAxis, into: UnitAxis) -> torch.Tensor:
        return _ring_distance(
            *((side.bounds[1:] + side.bounds[:-1]).double() / (2 * side.size) for side in (out, into))
        )


@dataclass(frozen=True)
class Plane(Distance):
    """The same with distances on the plane of an image, in its sides: the neurons of each side, in the order of the
    groups, fill a square row by row, as pixels do. A range of neurons lies at their mean place.

    Example:
        >>> mask = pattern_mask(Plane(density=0.1, scale=0.1), GroupLayout(64), GroupLayout(64), block_size=1)
        >>> place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
        >>> torch.cdist(place, place)[mask.to_dense()].mean() < 3  # pixels; 4.1 between any two
        tensor(True)
    """

    def _distance(self, out: UnitAxis, into: UnitAxis) -> torch.Tensor:
        return torch.cdist(_plane_places(out), _plane_places(into))


def _plane_places(side: UnitAxis) -> torch.Tensor:
    """The mean place of the neurons of each range of a side in the unit square: [ranges, 2]."""
    width = math.ceil(math.sqrt(side.size))
    neuron = torch.arange(side.size)
    places = torch.stack([neuron // width, neuron % width], 1).double()
    places = (places + 0.5) / torch.tensor([math.ceil(side.size / width), width])
    bounds = side.bounds.long()
    sums = torch.cat([torch.zeros(1, 2, dtype=torch.float64), places.cumsum(0)])[bounds]
    return sums.diff(dim=0) / bounds.diff()[:, None]


def _ring_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The shorter way between each two places on a ring of length 1: [len(first), len(second)]."""
    way = (first[:, None] - second).abs()
    return torch.minimum(way, 1 - way)


#: each pattern from p_intra, p_inter and the mean probability; groups are contiguous
PATTERNS: dict[str, Callable[[float, float, float], Pattern]] = {
    "erdos_renyi": lambda p_intra, p_inter, density: ErdosRenyi(density),
    "regular": lambda p_intra, p_inter, density: Regular(density),
    "small_world": lambda p_intra, p_inter, density: SmallWorld(p_intra, p_inter),
    "distance": lambda p_intra, p_inter, density: Distance(density),
    "plane": lambda p_intra, p_inter, density: Plane(density),
}
#: the sparse models of a network by name, those with every unit, and all models
SPARSE = (*GROUPINGS, *PATTERNS)
FULL = ("dense", "conv")
MODELS = (*FULL, *SPARSE)


@on_cpu
def pattern_mask(
    pattern: Pattern,
    out_layout: GroupLayout,
    in_layout: GroupLayout,
    block_size: int = 64,
    generator: torch.Generator | None = None,
) -> BlockMask:
    """The mask with the units of ``pattern``. From probabilities, each unit exists with exactly its probability, and
    each row of units gets ⌊Σp⌋ or ⌈Σp⌉ units.

    Raises:
        ValueError: if the pattern returns anything but units or probabilities, or the grid is too large for them.
        TypeError: for a class of patterns in place of one of its objects.

    Example:
        >>> def diagonal(out, into, generator):
        ...     return torch.eye(out.num_units, into.num_units, dtype=torch.bool)
        ...
        >>> print(pattern_mask(diagonal, GroupLayout(8, 2), GroupLayout(8, 2), block_size=2).to_string())
        █░░░
        ░█░░
        ░░█░
        ░░░█
    """
    if isinstance(pattern, type):
        raise TypeError(f"the pattern {pattern.__name__} is a class; give one of its objects, {pattern.__name__}(…)")
    rows, cols = (UnitAxis(layout, SIZE.check("block_size", block_size)) for layout in (out_layout, in_layout))
    if (total := rows.num_units * cols.num_units) > LARGEST_GRID:
        raise ValueError(
            f"the pattern {_name(pattern)} would form a number for each of {total:,} units, more than "
            f"{LARGEST_GRID:,}; give a larger block_size, model='index', whose units are drawn one by one "
            "(BlockMask.sample), or connections of your own (Projection.from_edges)"
        )
    units = pattern(rows, cols, generator)
    _check_units(pattern, units, (rows.num_units, cols.num_units))
    units = units.detach().cpu()
    if units.dtype != torch.bool:
        units = _drawn(units.double(), generator)
    unit_row, unit_col = units.nonzero(as_tuple=True)
    return BlockMask(out_layout, in_layout, unit_row, unit_col, block_size)


def _name(pattern: Pattern) -> str:
    return getattr(pattern, "__name__", type(pattern).__name__)


def _check_units(pattern: Pattern, units: object, shape: tuple[int, int]) -> None:
    what, fits = f"of type {type(units).__name__}", False
    if isinstance(units, torch.Tensor):
        dense = units.layout == torch.strided and not units.is_meta
        what = f"{units.dtype} {list(units.shape)}{'' if dense else f' of layout {units.layout} on {units.device}'}"
        fits = dense and tuple(units.shape) == shape and units.dtype in (torch.bool, *DTYPES)
        if fits and (units.dtype == torch.bool or bool(((units >= 0) & (units <= 1)).all())):
            return
    raise ValueError(
        f"the pattern {_name(pattern)} returned {what}{' with numbers that are not from 0 to 1' if fits else ''}; it "
        f"must return a dense tensor [{shape[0]}, {shape[1]}], bool (which units exist) or float (with which "
        "probability, from 0 to 1)"
    )


def _drawn(probability: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Systematic samples (Madow 1949): a unit exists where its row's sum, in random order, passes u + an integer."""
    order = torch.rand(probability.shape, generator=generator).argsort(dim=1)
    start = torch.rand(len(probability), 1, generator=generator, dtype=torch.float64)
    passed = (probability.gather(1, order).cumsum(1) + start).floor()
    chosen = passed.diff(dim=1, prepend=torch.zeros_like(start)) > 0
    return torch.zeros_like(chosen).scatter_(1, order, chosen) & (probability > 0) | (probability >= 1)


def layer_mask(
    pattern: str | Pattern,
    number: int,
    shape: tuple[int, int],
    probabilities: tuple[float, float],
    num_groups: int,
    block_size: int,
    generator: torch.Generator | None,
) -> BlockMask:
    """Draws the units of layer ``number`` (from 0), whose weight has ``shape`` (out, in).

    ``pattern`` is a name in ``SPARSE``, or a function, which has contiguous groups and ignores the ``probabilities`` of
    a unit inside and between groups (:func:`~g2gnet.weights.densities.layer_probabilities`). On a side with fewer
    neurons than ``num_groups`` each neuron is a group.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> layer_mask("mixer", 1, (64, 64), (1.0, 0.15), num_groups=8, block_size=4, generator=draw)  # of fc2
        BlockMask(64×64, 8 groups (interleaved), block_size=4, 66 of 256 units, density=0.2578, device=cpu)
    """
    kinds = GROUPINGS.get(pattern, ("index",)) if isinstance(pattern, str) else ("index",)
    num_groups = COUNT.check("num_groups", num_groups)
    out, into = (GroupLayout(size, min(num_groups, size), kinds[number % len(kinds)], generator) for size in shape)
    return mask_between(pattern, out, into, probabilities, block_size, generator)


def mask_between(
    model: str | Pattern,
    out_layout: GroupLayout,
    in_layout: GroupLayout,
    probabilities: tuple[float, float],
    block_size: int,
    generator: torch.Generator | None,
) -> BlockMask:
    """Draws the units of a pattern (of a model in ``FULL`` all units) between existing groups, such as those of a layer
    for its recurrent connections.

    Example:
        >>> groups = GroupLayout(8, 2)
        >>> mask_between("index", groups, groups, (1.0, 0.0), block_size=2, generator=None).density
        0.5
    """
    layouts = out_layout, in_layout
    if model in FULL:
        return BlockMask.full(*layouts, block_size)
    if not isinstance(model, str):
        return pattern_mask(model, *layouts, block_size, generator)
    if model in GROUPINGS:
        return BlockMask.sample(*layouts, *probabilities, block_size, generator)
    density = expected_density(*layouts, *probabilities)
    return pattern_mask(PATTERNS[model](*probabilities, density), *layouts, block_size, generator)
