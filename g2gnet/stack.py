"""A stack of spiking layers, each a connection and its neurons: a chain of populations."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from g2gnet.convolution import G2GConv2d
from g2gnet.images import grouped, parts_of
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons
from g2gnet.projections import NumberedProjection, Pair
from g2gnet.spiking_network import Projection, SpikingNetwork

RecurrentLayer = tuple[G2GLinear, SpikingNeurons, G2GLinear]


class SpikingStack(SpikingNetwork):
    """Connections and neurons ``fc1``, ``lif1``, ``fc2``, ``lif2``, …, each layer's spikes the next one's inputs.

    A layer may be recurrent: ``rec1`` then joins the neurons ``lif1`` to themselves. With W, b of ``fc1`` and V of
    ``rec1`` their current is I_t = W·x_t + b + V·S_{t−1}; the first step has no S_{t−1}, or that of the state that it
    continues. All layers run in one call.

    Args:
        layers: pairs (connection, neurons), from input to output, or (connection, neurons, recurrent connection), the
            last of as many inputs as outputs and without a bias. Each layer has its own model, reset and surrogate.
            Between images the connection is a :class:`G2GConv2d`, whose name is ``conv1``; pools, ``nn.Flatten`` and
            ``nn.BatchNorm2d`` stand between pairs or, with the connection, in an ``nn.Sequential``: they are part of
            the connection that follows. A pool alone is ``pool1``.
        T, backend, dropout, readout, input_shape: as for :class:`SpikingNetwork`.

    Raises:
        ValueError: for T below 1, a dropout outside [0, 1 − 2⁻¹⁶], an unknown readout, a readout of a layer that is
            recurrent, no layers, or sizes that do not match.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> layouts = [GroupLayout(size) for size in (64, 48, 32, 10)]
        >>> masks = [BlockMask.sample(out, into, block_size=4) for into, out in zip(layouts, layouts[1:])]
        >>> stack = SpikingStack([(G2GLinear(mask), LIF(beta=0.95)) for mask in masks], T=10)
        >>> stack(torch.rand(5, 64)).shape  # held for T steps
        torch.Size([5, 10])
        >>> stack.simulate(torch.rand(20, 5, 64)).rates[0].shape
        torch.Size([48])
    """

    def __init__(
        self,
        layers: Sequence[Pair | RecurrentLayer],
        T: int = 50,  # noqa: N803  (the field's name for it)
        backend: str | None = None,
        dropout: float = 0.0,
        readout: str = "counts",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        populations, projections = chain(layers)
        output = f"lif{len(populations)}"
        super().__init__(populations, projections, output, T, dropout, readout, backend, input_shape)


def is_plain(net: SpikingNetwork) -> bool:
    """Whether a network is what a :class:`SpikingStack` is: layers in a chain, recurrent or not, by its names."""
    names = {f"{kind}{number + 1}" for number in range(net.depth) for kind in ("fc", "rec", "lif")}
    return (
        not _other_projections(net)
        and all(isinstance(each, G2GLinear) for each in net.connections().values())
        and names.issuperset([*net.connections(), *net.populations])
    )


def plain_layers(net: nn.Module, where: str) -> list[tuple[G2GLinear, SpikingNeurons, G2GLinear | None]]:
    """(connection, neurons, recurrent connection or None) of each layer, for formats without other connections; a
    ValueError names the first of these, and the format (``where``)."""
    if not isinstance(net, SpikingNetwork):
        raise ValueError(f"{where} takes a SpikingStack, a G2GNet or a SpikingNetwork, not a {type(net).__name__}")
    net.check_linear(where)
    net.check_uncalled(where)
    for each in _other_projections(net):
        raise ValueError(
            f"{where} has no form for {each.name}, with delays up to {each.most} steps from population "
            f"{each.source + 1} to {each.onto or 'population'} {each.target + 1}; it takes layers in a chain, "
            "recurrent or not"
        )
    return [(*pair, recurrent) for pair, recurrent in zip(net.layers(), net.recurrents(), strict=True)]


def _other_projections(net: SpikingNetwork) -> list[NumberedProjection]:
    """The connections that are not a population's only one from the population before it, without delay, nor its only
    one to itself, one step later."""
    plain = {form for number in range(net.depth) for form in ((number - 1, number, 0), (number, number, 1))}
    others = []
    for each in net.projections():
        form = each.source, each.target, each.most
        if each.per_neuron or each.onto or form not in plain:
            others.append(each)
        plain.discard(form)
    return others


def chain(layers: Iterable[Pair | RecurrentLayer]) -> tuple[dict[str, nn.Module], dict[str, Projection]]:
    """Populations ``lif1``, … and projections ``fc1``, ``rec1``, … of layers."""
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers is a {type(layers).__name__}; give a list of pairs (connection, neurons)")
    parts = grouped(layers)
    if not parts:
        raise ValueError("layers is empty; give at least one pair of a G2GLinear and its neurons")
    populations: dict[str, nn.Module] = {}
    projections: dict[str, Projection] = {}
    source = "input"
    for number, (modules, (neurons, *recurrent)) in enumerate(parts, 1):
        connection = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
        kind = {"convolution": "conv", "pool": "pool"}.get(parts_of(f"layer {number}", connection).path.kind, "fc")
        target = f"lif{number}"
        populations[target], projections[f"{kind}{number}"] = neurons, Projection(source, target, connection)
        if recurrent:
            _check_recurrent(number, neurons, recurrent)
            projections[f"rec{number}"] = Projection(target, target, recurrent[0], delay=1)
        source = target
    return populations, projections


def _check_recurrent(number: int, neurons: nn.Module, recurrent: Sequence[Any]) -> None:
    """Raises unless what follows the neurons of layer ``number`` is one recurrent connection."""
    name = f"rec{number}"
    if len(recurrent) > 1 or not isinstance(recurrent[0], G2GLinear | G2GConv2d):
        what = " and ".join(type(each).__name__ for each in recurrent)
        raise TypeError(f"{name} is {what}; give one G2GLinear from the layer's neurons to themselves")
    if recurrent[0].bias is not None:
        kind = type(recurrent[0]).__name__
        raise ValueError(f"{name} has a bias; give {kind}(…, bias=False): the layer's connection has its bias")
    if not isinstance(neurons, SpikingNeurons):
        raise TypeError(f"lif{number} is a {type(neurons).__name__}; a recurrent layer takes steps of g2gnet's neurons")
