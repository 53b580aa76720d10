"""The densities of a network's layers, as probabilities of a unit inside and between groups."""

from collections.abc import Sequence

from g2g_kernels import GroupLayout
from g2g_kernels.choices import check_choice
from g2g_kernels.mask.groups import partners
from g2g_kernels.numbers import COUNT, PROBABILITY

#: how the densities of a network's layers relate
DENSITIES = ("uniform", "erk")


def layer_probabilities(
    shapes: Sequence[tuple[int, int]], p_intra: float, p_inter: float, num_groups: int, density: str = "uniform"
) -> list[tuple[float, float]]:
    """The probabilities of a unit inside and between groups, layer by layer, for weights of ``shapes`` (out, in).

    With ``density="uniform"`` they are ``p_intra`` and ``p_inter`` in every layer. With ``"erk"`` a layer's density is
    proportional to (in + out) / (in · out), at most 1 (Evci et al. 2020, after Mocanu et al. 2018): small layers keep
    more, and all layers together as many weights. It changes ``p_inter``, and ``p_intra`` only where it must.

    Example:
        >>> layer_probabilities([(64, 784), (64, 64), (10, 64)], p_intra=1.0, p_inter=0.15, num_groups=8)[0]
        (1.0, 0.15)
    """
    check_choice("density", density, DENSITIES)
    if density == "uniform":
        return [(p_intra, p_inter)] * len(shapes)
    num_groups = COUNT.check("num_groups", num_groups)
    for name, value in (("p_intra", p_intra), ("p_inter", p_inter)):
        PROBABILITY.check(name, value)
    layouts = [[GroupLayout(size, min(num_groups, size)) for size in shape] for shape in shapes]
    weights = sum(expected_density(out, into, p_intra, p_inter) * out.size * into.size for out, into in layouts)
    inside = [_share_inside(out, into) for out, into in layouts]
    return [_inside_and_between(*of_layer, p_intra) for of_layer in zip(erk(shapes, weights), inside, strict=True)]


def erk(shapes: Sequence[tuple[int, int]], weights: float) -> list[float]:
    """Densities proportional to (in + out) / (in · out), at most 1, of layers with ``weights`` weights in all.

    Example:
        >>> shapes = [(64, 784), (64, 64), (10, 64)]
        >>> [round(density, 2) for density in erk(shapes, weights=10_000)]
        [0.16, 0.3, 1.0]
    """
    full: set[int] = set()
    while True:
        free = [layer for layer in range(len(shapes)) if layer not in full]
        left = weights - sum(shapes[layer][0] * shapes[layer][1] for layer in full)
        factor = left / max(1, sum(sum(shapes[layer]) for layer in free))
        densities = {layer: factor * sum(shapes[layer]) / (shapes[layer][0] * shapes[layer][1]) for layer in free}
        above = {layer for layer, density in densities.items() if density > 1}
        if not above:
            return [1.0 if layer in full else densities[layer] for layer in range(len(shapes))]
        full |= above


def expected_density(out: GroupLayout, into: GroupLayout, p_intra: float, p_inter: float) -> float:
    """The expected density of a layer with these probabilities of a unit inside and between groups.

    Example:
        >>> expected_density(GroupLayout(64, 8), GroupLayout(784, 8), p_intra=1.0, p_inter=0.15)
        0.25625
    """
    inside = _share_inside(out, into)
    return inside * p_intra + (1 - inside) * p_inter


def _share_inside(out: GroupLayout, into: GroupLayout) -> float:
    """The share of a layer's weights that lie inside groups."""
    weights = out.sizes[:, None] * into.sizes.double()
    return (weights * partners(out.num_groups, into.num_groups)).sum().item() / weights.sum().item()


def _inside_and_between(density: float, inside: float, p_intra: float) -> tuple[float, float]:
    """Probabilities whose mean is ``density``, inside groups as near to ``p_intra`` as possible."""
    least, most = max(0.0, (density - (1 - inside)) / inside), min(1.0, density / inside)
    p_intra = min(max(p_intra, least), most)
    p_inter = (density - inside * p_intra) / (1 - inside) if inside < 1 else 0.0
    return p_intra, min(max(p_inter, 0.0), 1.0)
