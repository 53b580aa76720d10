"""Networks to and from NIR, the Neuromorphic Intermediate Representation (Pedersen et al. 2024).

NIR describes neurons in continuous time; the time step Δt is chosen for each run. Its LIF is

    τ·dv/dt = (v_leak − v) + R·I,    v ← v_reset after a spike, where v > v_threshold

and an Euler step of it, v ← (1 − Δt/τ)·v + (Δt/τ)·(v_leak + R·I), is our U ← β·U + I with

    β = 1 − Δt/τ,    U = v/g,    θ = v_threshold/g,    g = R·Δt/τ,    v_leak = v_reset = 0.

Of the pairs (R, v_threshold) for one neuron, :func:`to_nir` writes R = 1, v_threshold = (1 − β)·θ, since Norse's
importer takes R to be 1. A decay of 1, which a learned β may reach, would need an infinite τ: LIF neurons that all have
β = 1 are NIR's IF, dv/dt = R·I, whose Euler step has g = R·Δt. They are written with R = 1/Δt, v_threshold = θ, for
tools that leave R·Δt out. A spike resets our membrane before the next step's decay, which with reset to zero equals
NIR's immediate reset.

NIR's CubaLIF has a synaptic current before the membrane, τ_syn·dI/dt = −I + w_in·S, τ_mem·dv/dt = (v_leak − v) + R·I.
Euler steps, the current's first, as in snnTorch and Norse, are C ← γ·C + I, U ← β·U + C of our synaptic neurons with

    γ = 1 − Δt/τ_syn,    β = 1 − Δt/τ_mem,    g = R·w_in·(Δt/τ_syn)·(Δt/τ_mem).

:func:`to_nir` writes w_in = τ_syn/Δt and R = τ_mem/Δt, so that g = 1 and v_threshold = θ, as snnTorch's importer
demands. The resets differ, and a warning says so: in the step after a spike NIR's membrane charges from zero, while
that of ``Synaptic`` stays at zero, as in snnTorch.

Edges into a node add up, and Delay(τ) is y(t) = x(t − τ). A projection of delay d is source → Delay(d·Δt) → linear →
target, with τ in seconds for each neuron of the source, in whole steps. Learned delays are written as they act.

A recurrent connection V is a loop of two nodes, neurons → linear → neurons. Without a Delay its spikes take one time
step, the least possible, as in all tools that run NIR step by step; a Delay is all of its delay. A longer cycle without
any Delay is refused, since NIR does not say which edge takes the step. :func:`to_nir` writes a population with a
connection of one step to itself as a graph inside of the graph, with the nodes ``input``, ``lif``, ``w_rec``,
``output``; snnTorch writes the same nodes without that graph. In a chain, a bias in the loop is read as part of b.

Convolutions are Conv2d, pools of sums and means SumPool2d and AvgPool2d, each before or behind the weights as in the
projection, and where neurons of an image become a list there is a Flatten. A norm that does not train is folded into
its convolution. NIR has no node for pools of maxima.

NIR cannot carry adaptive neurons; the reset by subtraction, since its neurons only reset to a value; decays of 1 next
to others in one population, or of synaptic neurons; the encoding of samples. Surrogates, learnability, groups and units
go into the nodes' metadata, which other tools do not read, and so do the names of networks other than plain chains and
the bits of weights (``net.quantize``). NIR has no place for sparse or whole weights and their scales: rounded weights
are written as floats, and the floats behind them are not.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.choices import check_choice, check_flag
from g2g_kernels.numbers import SHARPNESS, Number
from g2g_kernels.ops.neurons import MODELS
from g2g_kernels.ops.neurons.checks import check_parameter
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE, SURROGATES
from g2gnet.base.optional import optional_package
from g2gnet.images import Shape
from g2gnet.interop import nir_images, nir_links
from g2gnet.interop.arrays import FINITE, Mask, numbers
from g2gnet.layers import G2GLinear
from g2gnet.neurons import NEURONS, SpikingNeurons
from g2gnet.projections import NumberedProjection, Projection
from g2gnet.spiking_network import SpikingNetwork
from g2gnet.stack import SpikingStack, is_plain
from g2gnet.weights.few_bits import check_bits

logger = logging.getLogger("g2gnet")


class _Form(NamedTuple):
    """NIR's form of a model: the node, its time constant for each of our decays, and, of its input strengths, those
    that are written as the inverse of 1 − a decay (the others are 1)."""

    node: str
    time_constants: dict[str, str]
    strengths: dict[str, str]


_FORMS = {
    "lif": _Form("LIF", {"beta": "tau"}, {}),
    "synaptic": _Form("CubaLIF", {"syn_decay": "tau_syn", "beta": "tau_mem"}, {"r": "beta", "w_in": "syn_decay"}),
}
#: for each node that is read: our model, and NIR's time constant for each of its decays that is not 1
_READ = {**{form.node: (model, form.time_constants) for model, form in _FORMS.items()}, "IF": ("lif", {})}
#: the range of time constants and input strengths
_POSITIVE = Number(0, open_low=True)
#: the time step of snnTorch's and most other NIR converters, in seconds
DEFAULT_DT = 1e-4


def to_nir(net: SpikingNetwork, dt: float = DEFAULT_DT) -> Any:
    """The ``nir.NIRGraph`` of a network: a node for each population, connection and delay, by the network's names.

    Args:
        net: its neurons have reset to zero.
        dt: the time step, in seconds, with which the graph will be run.

    Raises ValueError for anything that NIR cannot express, ImportError without the package ``nir``.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_nir(G2GNet(64, 32, 10, block_size=4, reset="zero", delay=9), dt=1e-3)
        >>> graph.edges[:3], graph.nodes["fc1_delay"].delay.shape
        ([('input', 'fc1_delay'), ('fc1_delay', 'fc1'), ('fc1', 'lif1')], (64,))
    """
    nir = optional_package("nir", "interop")
    if not isinstance(net, SpikingNetwork):
        raise ValueError(f"to_nir takes a SpikingNetwork, a SpikingStack or a G2GNet, not a {type(net).__name__}")
    _check_written(net)
    _POSITIVE.check("dt", dt)
    neurons = net.neurons()
    taken = {*net.connections(), *neurons}

    def free(name: str) -> str:
        """The name of a node that no module has."""
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    start, end = free("input"), free("output")
    shapes = net.shapes
    nodes = {start: nir_links.end_node(nir.Input, *shapes["input"])}
    edges: list[tuple[str, str]] = []
    cells = {name: _neurons_node(name, of, shapes[name], dt, nir) for name, of in neurons.items()}
    chains = {each.name: nir_images.nodes_of(net, each, nir) for each in net.projections()}
    joins = {name: chain[name] for name, chain in chains.items()}
    for name, node in () if is_plain(net) else (*cells.items(), *joins.items()):
        node.metadata["g2g_name"] = name
    for projection in net.projections():
        target, connection = net.populations[projection.target], joins[projection.name]
        chain, of_one_step = chains[projection.name], projection.source == projection.target and projection.most == 1
        of_one_step = of_one_step and not projection.per_neuron and len(chain) == 1
        if of_one_step and not isinstance(nodes.get(target), nir.NIRGraph):
            first, last = (nir_links.end_node(kind, *shapes[target]) for kind in (nir.Input, nir.Output))
            inner = {"input": first, "lif": cells[target], "w_rec": connection, "output": last}
            loop = [("input", "lif"), ("lif", "w_rec"), ("w_rec", "lif"), ("lif", "output")]
            nodes[target] = nir.NIRGraph(nodes=inner, edges=loop)
            continue
        own = {name if name == projection.name else free(name): node for name, node in chain.items()}
        way = [start if projection.source < 0 else net.populations[projection.source], *own, target]
        if (projection.most or projection.per_neuron) and not of_one_step:
            way.insert(1, free(f"{projection.name}_delay"))
            nodes[way[1]] = _delay_node(net, projection, dt, nir)
        nodes |= own
        nodes.setdefault(target, cells[target])
        edges += itertools.pairwise(way)  # in the order in which currents are added up
    nodes[end] = nir_links.end_node(nir.Output, *shapes[net.populations[-1]])
    _warn_of_the_hold([name for name, of in neurons.items() if of.model.name == "synaptic"])
    return nir.NIRGraph(nodes=nodes, edges=[*edges, (net.populations[-1], end)])


def _check_written(net: SpikingNetwork) -> None:
    for name, module in (*net.connections().items(), *net.neurons().items()):
        if not isinstance(module, G2GLinear | SpikingNeurons) and not nir_images.is_of_images(module):
            kind = type(module).__name__
            raise ValueError(f"{name} is a {kind}; only G2GLinear, G2GConv2d, pools and the neurons of g2gnet convert")
        if "/" in name:
            raise ValueError(f"{name!r} cannot be a name in NIR's files, where / joins names; choose another")
    net.check_uncalled("to_nir")
    for number, name in enumerate(net.populations[:-1]):
        if not any(projection.source == number != projection.target for projection in net.projections()):
            raise ValueError(f"{name} sends to no other population, and NIR takes it for an output; leave it out")
    if net.readout != "counts":
        raise ValueError(
            f"readout={net.readout!r} cannot be written to NIR, whose LIF nodes spike; train the network with "
            "readout='counts' (train.py --readout counts)"
        )
    for projection in net.projections():
        if projection.onto:
            raise ValueError(
                f"{projection.name} adds to the membrane, and all that reaches NIR's CubaLIF to its current"
            )
    for name, neurons in net.neurons().items():
        if neurons.model_name not in _FORMS:
            kind = neurons.model_name
            lacks = f"{kind!r} neurons" + (" (its CubaLIF stands for Synaptic)" if kind == "cubalif" else "")
            raise ValueError(f"{name}: NIR has no {lacks}; only {', '.join(_FORMS)} convert")
        if neurons.reset != "zero":
            raise ValueError(
                f"reset={neurons.reset!r} cannot be written to NIR, whose neurons reset to a value; train the network "
                "with reset='zero' (train.py --reset zero)"
            )


def from_nir(
    graph: Any,
    dt: float = DEFAULT_DT,
    masks: Mapping[str, Mask] | None = None,
    *,
    T: int,  # noqa: N803  (the field's name for it)
    backend: str | None = None,
) -> SpikingNetwork:
    """The network of a NIR graph in which linear or affine nodes, and Delay nodes, join LIF, CubaLIF or IF nodes.

    Layers in a chain without delays, recurrent or not, are a :class:`SpikingStack`, numbered from the input on. Other
    graphs, and what :func:`to_nir` wrote of other networks, are a :class:`SpikingNetwork` with the names of the nodes
    (``"a_b"`` for ``b`` in a graph ``a`` inside of the graph). Weights and parameters are read as float32.

    Args:
        graph: a ``nir.NIRGraph``, as ``nir.read(file)`` gives it.
        dt: the time step, in seconds, for which the graph was made.
        masks: by name of a node (``"lif1.w_rec"`` of one in a graph inside of the graph), the weights that exist, as
            for :meth:`G2GLinear.from_linear`. Other nodes have the mask of their metadata, or every weight.
        T, backend: of the network; a graph does not say for how many steps inputs [B, D] are held.

    Raises ValueError, naming the node, for a graph of another form, or numbers that no network has; ImportError without
    the package ``nir``.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_nir(G2GNet(64, 32, 10, block_size=4, reset="zero"))  # or nir.read("network.nir")
        >>> from_nir(graph, T=25)(torch.rand(2, 64)).shape
        torch.Size([2, 10])
    """
    nir = optional_package("nir", "interop")
    _POSITIVE.check("dt", dt)
    if not isinstance(graph, nir.NIRGraph):
        raise ValueError(f"the graph is a {type(graph).__name__}; give a nir.NIRGraph, as nir.read(file) returns it")
    masks = {} if masks is None else masks
    if not isinstance(masks, Mapping):
        raise ValueError(f"masks is a {type(masks).__name__}; give a dict of masks by the name of their node")
    nodes, edges = nir_links.flattened(graph, nir)
    links, output = nir_links.links_of(nodes, edges, dt, nir)
    known = sorted(link.name for link in links)
    if unknown := set(masks) - set(known):
        raise ValueError(f"masks names {', '.join(sorted(unknown))}, the graph {', '.join(known)}")

    def connection(link: nir_links.Link) -> Any:
        mask = masks.get(link.name)
        if len(link.shape) == 2:
            layer: Any = _connection(link, nodes[link.name], mask, backend)
        else:
            layer = nir_images.layer_of(link, nodes[link.name], mask, backend)
        pools = [[nir_images.pool_of(name, nodes[name]) for name in names] for names in (link.before, link.after)]
        parts = [*pools[0], layer, *pools[1]]
        return layer if len(parts) == 1 else torch.nn.Sequential(*parts)

    ours = {}
    for link in links:
        if link.target not in ours:
            node = nodes[link.target]
            size = link.shape[0] if len(link.shape) == 2 else np.size(node.v_threshold)
            ours[link.target] = _neurons(link.target, node, size, dt, backend)
    inputs = [np.ravel(node.input_type["input"]).tolist() for node in nodes.values() if isinstance(node, nir.Input)]
    shape = next((tuple(map(int, each)) for each in inputs if len(each) == 3), None)
    _warn_of_the_hold([name for name in ours if isinstance(nodes[name], nir.CubaLIF)])
    names = {}
    for name in (*ours, *known):
        with nir_links.metadata_of(name, nodes[name]) as metadata:
            names[name] = str(metadata.get("g2g_name", ""))
    if not any(names.values()) and (chain := nir_links.chain_of(links, output)) is not None:
        layers: list[Any] = [(connection(link), ours[link.target], *map(connection, loops)) for link, loops in chain]
        return _in_bits(SpikingStack(layers, T, backend, input_shape=shape))
    modules = {name: of or name.replace(".", "_") for name, of in names.items()}
    for name, module in modules.items():
        if [*modules.values()].count(module) > 1:
            raise ValueError(f"nodes {name} and another are both called {module!r} here; rename one")
    projections = {}
    for link in links:
        source = "input" if link.source is None else modules[link.source]
        given: Any = {name: getattr(link, name) for name in link._fields[5:9]}
        projections[modules[link.name]] = Projection(source, modules[link.target], connection(link), **given)
    populations = {modules[name]: neurons for name, neurons in ours.items()}
    net = SpikingNetwork(populations, projections, modules[output], T, backend=backend, input_shape=shape)
    return _in_bits(net)


def _in_bits(net: SpikingNetwork) -> Any:
    """The network, which computes with as many bits as its nodes say."""
    bits = {name: layer.bits for name, layer in net.connections().items() if isinstance(layer, G2GLinear)}
    if len({*bits.values()}) > 1:
        raise ValueError(f"the weights of nodes have other numbers of bits ({bits}); give all the same, or none")
    net.quantize = next(iter(bits.values()), None)
    return net


def _threshold(name: str, value: float) -> None:
    """Raises ValueError for a threshold that is below a membrane of 0."""
    if check_parameter(name, value) < 0:
        raise ValueError(f"{name}={value} must be at least 0: below it neurons spike at every step without any input")


def _delay_node(net: SpikingNetwork, projection: NumberedProjection, dt: float, nir: Any) -> Any:
    metadata = {}
    if projection.per_neuron:
        metadata = {"max_delay": projection.most, "learn_delay": projection.width > 0}
        metadata |= {"delay_width": projection.width} if projection.width else {}
    shape = net.shapes[(*net.populations, "input")[projection.source]]
    delays = net.delays(projection.name).cpu().double().numpy().reshape(shape)
    return nir.Delay(delay=delays * dt, metadata=metadata)


def _connection(link: nir_links.Link, node: Any, mask: Mask | None, backend: str | None) -> G2GLinear:
    name, weight = link.name, numbers(f"node {link.name}: weight", node.weight)
    linear = torch.nn.utils.skip_init(torch.nn.Linear, weight.shape[1], weight.shape[0], bias=link.bias is not None)
    linear.weight.data.copy_(torch.from_numpy(weight))
    if link.bias is not None:
        linear.bias.data.copy_(torch.tensor(link.bias))
    with nir_links.metadata_of(name, node) as metadata:
        mask = nir_images.mask_of(name, metadata, weight) if mask is None else mask
        if (bits := metadata.get("bits")) is not None:
            check_bits("bits", bits)
    layer = G2GLinear.from_linear(linear, mask, backend)
    layer.bits = bits
    return layer


def _neurons_node(name: str, neurons: SpikingNeurons, shape: Shape, dt: float, nir: Any) -> Any:
    form, size = _FORMS[neurons.model.name], math.prod(shape)
    values = {
        parameter: (value.clamp(0, 1) if parameter in neurons.model.decays else value)
        .detach().cpu().double().expand(size).view(shape).numpy()
        for parameter, value in neurons.by_name.items()
    }  # fmt: skip
    integrates = neurons.model.name == "lif" and bool((values["beta"] == 1).all())
    for decay in () if integrates else form.time_constants:
        if endless := int((values[decay] == 1).sum()):
            raise ValueError(
                f"{name} has {decay}=1, no decay, in {endless} of {size} neurons: their time constant is infinite, and "
                "NIR's IF, which has none, is of LIF neurons that all have beta=1. Train with "
                f"learn_{decay}=False, or lower it: net.{name}.{decay}.data.clamp_(max=0.999)"
            )
    metadata: dict[str, Any] = {"surrogate": neurons.surrogate, "alpha": neurons.alpha}
    for parameter, value in neurons.by_name.items():
        metadata[f"{parameter}_per_neuron"] = value.numel() > 1
        metadata[f"learn_{parameter}"] = isinstance(value, torch.nn.Parameter)
    if integrates:
        rate = np.full(shape, 1 / dt)
        return nir.IF(r=rate, v_threshold=values["threshold"], v_reset=np.zeros(shape), metadata=metadata)
    strengths = {strength: 1 / (1 - values[decay]) for strength, decay in form.strengths.items()}
    gain = math.prod(1 - values[decay] for decay in form.time_constants if decay not in form.strengths.values())
    return getattr(nir, form.node)(
        **{constant: dt / (1 - values[decay]) for decay, constant in form.time_constants.items()},
        **{"r": np.ones(shape), **strengths},
        v_leak=np.zeros(shape),
        v_reset=np.zeros(shape),
        v_threshold=values["threshold"] * gain,
        metadata=metadata,
    )


def _neurons(name: str, node: Any, size: int, dt: float, backend: str | None) -> SpikingNeurons:
    model, time_constants = _READ[type(node).__name__]

    def of_node(option: str, otherwise: float, check: Callable[[str, float], Any]) -> np.ndarray:
        return numbers(f"node {name}: {option}", getattr(node, option, otherwise), size, check)

    for option in ("v_leak", "v_reset"):
        if of_node(option, 0.0, FINITE).any():
            raise ValueError(f"node {name} has {option} other than 0, which our neurons do not support")
    values: dict[str, np.ndarray] = {decay: np.ones(1) for decay in MODELS[model].decays}
    gain = of_node("r", 1.0, _POSITIVE.check) * of_node("w_in", 1.0, _POSITIVE.check) * (1.0 if time_constants else dt)
    for decay, constant in time_constants.items():
        step = dt / of_node(constant, 0.0, _POSITIVE.check)
        if np.any(step > 1):
            raise ValueError(f"node {name} has a time constant below dt={dt} s; give the dt that it was made for")
        values[decay] = 1 - step
        gain = gain * step
    gain = numbers(f"node {name}: gain g", gain, size, _POSITIVE.check)
    threshold = of_node("v_threshold", 1.0, _threshold)
    values["threshold"] = numbers(f"node {name}: v_threshold/g", threshold / gain, size, check_parameter)
    learned = {f"learn_{parameter}": parameter in ("threshold", *time_constants) for parameter in values}
    with nir_links.metadata_of(name, node) as metadata:
        neurons = NEURONS[model](
            reset="zero",
            surrogate=check_choice("surrogate", metadata.get("surrogate", SURROGATE), SURROGATES),
            alpha=float(SHARPNESS.check("alpha", metadata.get("alpha", ALPHA))),
            backend=backend,
            # a decay of 1 is not learned: NIR cannot express decays next to 1
            **{flag: metadata.get(flag, otherwise) for flag, otherwise in learned.items()},
        )
        own = {each: check_flag(f"{each}_per_neuron", metadata.get(f"{each}_per_neuron", False)) for each in values}
    for parameter, value in values.items():
        tensor = torch.from_numpy(value).float()
        differ = bool((tensor != tensor[0]).any())
        neurons.by_name[parameter].data = tensor.expand(size).clone() if differ or own[parameter] else tensor[:1]
    return neurons


def _warn_of_the_hold(names: list[str]) -> None:
    if names:
        logger.warning(
            "%s: after a spike NIR's CubaLIF charges from zero, Synaptic stays at zero for that step, as snnTorch's "
            "does; spikes of a neuron may differ after its first",
            ", ".join(names),
        )
