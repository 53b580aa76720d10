"""Stacks to and from NIR, the Neuromorphic Intermediate Representation (Pedersen et al. 2024).

NIR describes neurons in continuous time; the time step Δt is chosen when they are run. Its LIF is

    τ·dv/dt = (v_leak − v) + R·I,    v ← v_reset after a spike, where v > v_threshold

and an Euler step of it, v ← (1 − Δt/τ)·v + (Δt/τ)·(v_leak + R·I), is our U ← β·U + I with

    β = 1 − Δt/τ,    U = v/g,    θ = v_threshold/g,    g = R·Δt/τ,    v_leak = v_reset = 0.

Of the pairs (R, v_threshold) that describe the same neuron, :func:`to_nir` writes R = 1, v_threshold = (1 − β)·θ, since
Norse's importer takes R to be 1. A decay of 1, to which a learned β may rise, would need an infinite τ: LIF neurons
that all have β = 1 are NIR's IF, dv/dt = R·I, whose Euler step has g = R·Δt. Here :func:`to_nir` writes R = 1/Δt,
v_threshold = θ, so that tools which leave R·Δt out run the same neuron. A spike resets our membrane before the next
step's decay, which with reset to zero equals NIR's immediate reset.

NIR's CubaLIF has a synaptic current before the membrane, τ_syn·dI/dt = −I + w_in·S, τ_mem·dv/dt = (v_leak − v) + R·I.
Euler steps, the current's first, as snnTorch and Norse take them, are our C ← γ·C + I, U ← β·U + C of synaptic neurons
with

    γ = 1 − Δt/τ_syn,    β = 1 − Δt/τ_mem,    g = R·w_in·(Δt/τ_syn)·(Δt/τ_mem).

Here :func:`to_nir` writes w_in = τ_syn/Δt and R = τ_mem/Δt, so that g = 1 and v_threshold = θ, as snnTorch's importer
demands. The resets differ slightly: in the step after a spike NIR's membrane charges from zero, while that of
``Synaptic`` stays at zero, as in snnTorch. A warning says so.

A recurrent connection V is a loop of two nodes, neurons → linear → neurons. Its spikes take one time step, as in all
tools that run NIR step by step. :func:`to_nir` writes the layer as a graph inside of the graph, with the nodes
``input``, ``lif``, ``w_rec``, ``output``; snnTorch writes the same nodes without that graph. A bias in the loop is a
constant current: it is read as part of b.

NIR cannot carry adaptive neurons; the reset by subtraction, since its neurons only reset to a value; decays of 1 beside
others in one population, or of synaptic neurons; the encoding of samples. Surrogates, learnability, groups and units go
into the nodes' metadata, which other tools do not read. A graph with delays is refused.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels import BlockMask
from g2g_kernels.choices import check_choice, check_flag
from g2g_kernels.numbers import SHARPNESS, Number, check_parameter
from g2g_kernels.ops.neurons import MODELS
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE, SURROGATES
from g2gnet.base.optional import optional_package
from g2gnet.interop.arrays import FINITE, numbers
from g2gnet.layers import G2GLinear
from g2gnet.neurons import NEURONS, SpikingNeurons
from g2gnet.stack import Pair, RecurrentLayer, SpikingStack, plain_layers

logger = logging.getLogger("g2gnet")


class _Form(NamedTuple):
    """NIR's form of a model: the node, its time constant for each of our decays, and those of its input strengths that
    are written as the inverse of 1 − a decay (the others as 1).
    """

    node: str
    time_constants: dict[str, str]
    strengths: dict[str, str]


_FORMS = {
    "lif": _Form("LIF", {"beta": "tau"}, {}),
    "synaptic": _Form("CubaLIF", {"syn_decay": "tau_syn", "beta": "tau_mem"}, {"r": "beta", "w_in": "syn_decay"}),
}
#: of each node that is read: our model, and NIR's time constant for each of its decays that is not 1
_READ = {
    **{form.node: (model, form.time_constants) for model, form in _FORMS.items()},
    "IF": ("lif", {}),
}
#: the first version with a reset value of neurons
_LEAST_NIR = (1, 0, 7)
#: what time constants and input strengths are
_POSITIVE = Number(0, open_low=True)
#: the time step of snnTorch's and most other NIR converters, in seconds
DEFAULT_DT = 1e-4


def to_nir(stack: SpikingStack, dt: float = DEFAULT_DT) -> Any:
    """The ``nir.NIRGraph`` of a stack: input → fc1 → lif1 → fc2 → … → output; a recurrent layer's lif is a graph.

    Args:
        stack: its neurons have reset to zero.
        dt: the time step, in seconds, with which the graph will be run.

    Raises:
        ValueError: for anything that NIR cannot express.
        ImportError: if the package ``nir``, 1.0.7 or newer, is not installed.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_nir(G2GNet(64, 32, 10, block_size=4, reset="zero"))
        >>> list(graph.nodes)
        ['input', 'fc1', 'lif1', 'fc2', 'lif2', 'fc3', 'lif3', 'output']
    """
    nir = optional_package("nir", "interop", _LEAST_NIR)
    layers = plain_layers(stack, "to_nir")
    if stack.readout != "counts":
        raise ValueError(
            f"readout={stack.readout!r} cannot be written to NIR, whose LIF nodes spike; train the network with "
            "readout='counts' (train.py --readout counts)"
        )
    for number, (_, neurons, _) in enumerate(layers, 1):  # no reset makes them fit
        if neurons.model.name not in _FORMS:
            raise ValueError(
                f"lif{number}: NIR has no {neurons.model.name!r} neurons; only {', '.join(_FORMS)} convert"
            )
    for _, neurons, _ in layers:
        if neurons.reset != "zero":
            raise ValueError(
                f"reset={neurons.reset!r} cannot be written to NIR, whose neurons reset to a value; train the network "
                "with reset='zero' (train.py --reset zero)"
            )
    _POSITIVE.check("dt", dt)
    nodes = {"input": _end(nir.Input, layers[0][0].in_features)}
    held = []
    for number, (connection, neurons, recurrent) in enumerate(layers, 1):
        size = connection.out_features
        nodes[f"fc{number}"] = _connection_node(connection, nir)
        node = _neurons_node(f"lif{number}", neurons, size, dt, nir)
        if isinstance(node, nir.CubaLIF):
            held.append(f"lif{number}")
        if recurrent is not None:
            inner = {"input": _end(nir.Input, size), "lif": node, "w_rec": _connection_node(recurrent, nir)}
            edges = [("input", "lif"), ("lif", "w_rec"), ("w_rec", "lif"), ("lif", "output")]
            node = nir.NIRGraph(nodes={**inner, "output": _end(nir.Output, size)}, edges=edges)
        nodes[f"lif{number}"] = node
    nodes["output"] = _end(nir.Output, size)
    _warn_of_the_hold(held)
    return nir.NIRGraph(nodes=nodes, edges=list(itertools.pairwise(nodes)))


def from_nir(
    graph: Any,
    dt: float = DEFAULT_DT,
    masks: Mapping[str, BlockMask | torch.Tensor] | None = None,
    *,
    T: int,  # noqa: N803  (the field's name for it)
    backend: str | None = None,
) -> SpikingStack:
    """The stack of a NIR graph in which linear or affine nodes alternate with LIF, CubaLIF or IF nodes.

    Neurons may lead back to themselves through one linear or affine node, the layer's recurrent connection.

    Args:
        graph: a ``nir.NIRGraph``, as ``nir.read(file)`` gives it.
        dt: the time step, in seconds, for which the graph was made.
        masks: by name of a node (``"lif1.w_rec"`` of one in a graph inside of the graph), the weights that exist, as
            for :meth:`G2GLinear.from_linear`. Other nodes have the mask of their metadata, or every weight.
        T, backend: of the stack; a graph does not say for how many steps inputs [B, D] are held.

    Raises:
        ValueError: for a graph of another form, neurons that the stack does not have, or numbers that no network has
            (NaN, infinite or complex; a time constant or input strength that is not above 0; a threshold below 0).
        ImportError: if the package ``nir``, 1.0.7 or newer, is not installed.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_nir(G2GNet(64, 32, 10, block_size=4, reset="zero"))  # or nir.read("network.nir")
        >>> from_nir(graph, T=25)(torch.rand(2, 64)).shape
        torch.Size([2, 10])
    """
    nir = optional_package("nir", "interop", _LEAST_NIR)
    _POSITIVE.check("dt", dt)
    if not isinstance(graph, nir.NIRGraph):
        raise ValueError(f"the graph is a {type(graph).__name__}; give a nir.NIRGraph, as nir.read(file) returns it")
    if not isinstance(masks or {}, Mapping):
        raise ValueError(f"masks is a {type(masks).__name__}; give a dict of masks by the name of their node")
    masks = masks or {}
    chain = _chain(graph, nir)
    linear, neurons = chain[::2], chain[1::2]
    for kinds, found in ((_linear_kinds(nir), linear), (tuple(getattr(nir, kind) for kind in _READ), neurons)):
        for name, node, _ in found:
            if node is None:
                raise ValueError(f"node {name} is empty: the tool that wrote the graph could not express it in NIR")
            if not isinstance(node, kinds):
                raise ValueError(
                    f"node {name} is a {type(node).__name__}; a stack takes Affine or Linear and LIF, CubaLIF or IF "
                    "nodes in turn"
                )
    if not linear or len(linear) != len(neurons):
        raise ValueError(
            f"the graph has {len(linear)} linear and {len(neurons)} LIF, CubaLIF or IF nodes; each needs the other"
        )
    known = [name for name, *_ in linear] + [recurrent[0] for *_, recurrent in neurons if recurrent is not None]
    if unknown := set(masks) - set(known):
        raise ValueError(f"masks names {', '.join(sorted(unknown))}, the graph {', '.join(known)}")

    def connection(name: str, node: Any, bias: np.ndarray | None) -> G2GLinear:
        return _connection(name, node, bias, masks.get(name), backend)

    layers: list[Pair | RecurrentLayer] = []
    for (name, node, _), (lif_name, lif_node, recurrent) in zip(linear, neurons, strict=True):
        size = len(numbers(f"node {name}: weight", node.weight))
        ours = _neurons(lif_name, lif_node, size, dt, backend)
        bias = _bias(name, node, size)
        if recurrent is None:
            layers.append((connection(name, node, bias), ours))
            continue
        in_loop = _bias(*recurrent, size)
        if in_loop is not None and in_loop.any():  # tools that know no Linear write an Affine with zeros
            bias = in_loop if bias is None else bias + in_loop
        layers.append((connection(name, node, bias), ours, connection(*recurrent, None)))
    _warn_of_the_hold([name for name, node, _ in neurons if isinstance(node, nir.CubaLIF)])
    return SpikingStack(layers, T, backend)


_LOOPS = (
    "a stack has loops of a layer's neurons and one Linear or Affine node only, by which their spikes return one step "
    "later"
)


def _linear_kinds(nir: Any) -> tuple[type, ...]:
    return nir.Affine, nir.Linear


def _end_of(what: str, nodes: dict[str, Any], edges: list[tuple[str, str]], kind: Any) -> str:
    """The one input or output of a graph, whose node some tools leave out."""
    side = 1 if kind.__name__ == "Input" else 0
    joined = {edge[side] for edge in edges}
    found = [name for name, node in nodes.items() if isinstance(node, kind)] or [n for n in nodes if n not in joined]
    if len(found) != 1:
        raise ValueError(f"{what} has {len(found)} {kind.__name__.lower()}s; a stack takes graphs with one")
    return found[0]


def _flattened(graph: Any, nir: Any, prefix: str = "") -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Nodes and edges of a graph and of those inside of it, without Flatten and inner ends, which compute nothing."""
    nodes: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    ends: dict[str, tuple[str, str]] = {}
    for key, node in graph.nodes.items():
        name = prefix + key
        if isinstance(node, nir.NIRGraph):
            inner = _flattened(node, nir, f"{name}.")
            first, last = (_end_of(f"the graph {name}", *inner, kind) for kind in (nir.Input, nir.Output))
            ends[name] = first, last
            nodes |= inner[0]
            edges += inner[1]
        else:
            nodes[name] = node
    for edge in graph.edges:
        if len(edge) != 2 or not set(edge) <= set(graph.nodes):
            raise ValueError(f"the edge {tuple(edge)} does not join two of the nodes {', '.join(graph.nodes)}")
        source, target = (prefix + end for end in edge)
        edges.append((ends.get(source, (source, source))[1], ends.get(target, (target, target))[0]))
    own = {prefix + key for key in graph.nodes}
    for name, node in list(nodes.items()):
        if isinstance(node, nir.Flatten) or (isinstance(node, nir.Input | nir.Output) and name not in own):
            del nodes[name]
            before = [source for source, target in edges if target == name and source != name]
            after = [target for source, target in edges if source == name and target != name]
            edges = [edge for edge in edges if name not in edge] + list(itertools.product(before, after))
    return nodes, list(dict.fromkeys(edges))


def _chain(graph: Any, nir: Any) -> list[tuple[str, Any, tuple[str, Any] | None]]:
    """The nodes between input and output in order, each with that of its recurrent connection."""
    nodes, edges = _flattened(graph, nir)
    start = _end_of("the graph", nodes, edges, nir.Input)
    chain: list[tuple[str, Any, tuple[str, Any] | None]] = []
    left = dict(nodes)
    name: str | None = start
    while name is not None:
        node = left.pop(name)
        loop = _loop_of(name, nodes, edges, nir)
        chain.append((name, node, None if loop is None else (loop, left.pop(loop))))
        onward = [target for source, target in edges if source == name and target != loop]
        if len(onward) > 1:
            raise ValueError(f"node {name} leads to {onward}; a stack has no branches")
        name = onward[0] if onward else None
    if left:
        raise ValueError(
            f"node {next(iter(left))} is not on the way from {start}; a stack has one input and no branches"
        )
    return [each for each in chain if not isinstance(each[1], nir.Input | nir.Output)]


def _loop_of(name: str, nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]], nir: Any) -> str | None:
    """The linear node by which a node leads back to itself; None: it does not. Raises ValueError for more than one, or
    a loop of other nodes.
    """
    ways = [_way(target, name, edges) for source, target in edges if source == name]
    loops = [way for way in ways if way]
    for *through, _ in loops:
        if len(through) != 1 or not isinstance(nodes[through[0]], _linear_kinds(nir)):
            by = ", ".join(f"{each} ({type(nodes[each]).__name__})" for each in through)
            raise ValueError(f"node {name} leads back to itself{' by ' * bool(by)}{by}; {_LOOPS}")
        if isinstance(nodes[name], _linear_kinds(nir)):
            raise ValueError(f"nodes {name} and {through[0]} are a loop without neurons; {_LOOPS}")
        others = {each for edge in edges if through[0] in edge for each in edge} - {name, through[0]}
        if others:
            raise ValueError(f"node {through[0]}, in the loop of {name}, is joined to {', '.join(others)}; {_LOOPS}")
    if len(loops) > 1:
        raise ValueError(
            f"node {name} has {len(loops)} recurrent connections, {', '.join(first for first, *_ in loops)}; a layer "
            "has one: add their weights and biases"
        )
    return loops[0][0] if loops else None


def _way(start: str, end: str, edges: Sequence[tuple[str, str]]) -> list[str]:
    """The shortest way from ``start`` to ``end``, both included; empty: there is none."""
    ways, seen = [[start]], {start}
    for way in ways:  # which grows
        if way[-1] == end:
            return way
        onward = [target for source, target in edges if source == way[-1] and target not in seen]
        seen.update(onward)
        ways += [[*way, target] for target in onward]
    return []


def _bias(name: str, node: Any, size: int) -> np.ndarray | None:
    bias = getattr(node, "bias", None)
    return None if bias is None else np.broadcast_to(numbers(f"node {name}: bias", bias, size), size)


def _threshold(name: str, value: float) -> None:
    """Raises ValueError for a threshold that a membrane of 0 is above."""
    if check_parameter(name, value) < 0:
        raise ValueError(f"{name}={value} must be at least 0: below it neurons spike at every step without any input")


def _surrogate(key: str, value: Any) -> str:
    check_choice(key, value, SURROGATES)
    return value


def _metadata_entry(name: str, node: Any, key: str, otherwise: Any, read: Callable[[str, Any], Any]) -> Any:
    """What ``read`` makes of an entry of a node's metadata, as :func:`to_nir` writes it."""
    if not isinstance(node.metadata, Mapping):
        raise ValueError(f"node {name}: metadata is a {type(node.metadata).__name__}; give a dict, or {{}}")
    value = node.metadata.get(key, otherwise)
    try:
        return read(key, value.item() if getattr(value, "shape", None) == () else value)  # files give NumPy's numbers
    except ValueError as error:
        raise ValueError(f"node {name}: metadata: {error}; mend or delete {key!r}") from error


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy().copy()


def _end(kind: Any, size: int) -> Any:
    """An input or output node."""
    name = kind.__name__.lower()
    return kind(**{f"{name}_type": {name: np.array([size])}})


def _connection_node(connection: G2GLinear, nir: Any) -> Any:
    mask = connection.mask
    weight = _array(connection.dense_weight())
    metadata = {} if mask.is_full else {"wiring": _array(mask.state_dict()["wiring"])}
    if connection.bias is None:
        return nir.Linear(weight=weight, metadata=metadata)
    return nir.Affine(weight=weight, bias=_array(connection.bias), metadata=metadata)


def _connection(
    name: str, node: Any, bias: np.ndarray | None, mask: BlockMask | torch.Tensor | None, backend: str | None
) -> G2GLinear:
    weight = numbers(f"node {name}: weight", node.weight)
    linear = torch.nn.utils.skip_init(torch.nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(torch.from_numpy(weight))
    if bias is not None:
        linear.bias.data.copy_(torch.tensor(bias))

    def read(key: str, row: Any) -> BlockMask | None:
        if row is None:
            return None
        wiring = torch.from_numpy(numbers(key, row, np.size(row)))
        return BlockMask.from_state({"wiring": wiring}, (weight.shape[0], weight.shape[1]))

    if mask is None:
        mask = _metadata_entry(name, node, "wiring", None, read)
        if mask is not None and weight[~mask.to_dense().numpy()].any():
            raise ValueError(f"node {name} has weights that its metadata calls absent; give masks={{{name!r}: ...}}")
    return G2GLinear.from_linear(linear, mask, backend)


def _neurons_node(name: str, neurons: SpikingNeurons, size: int, dt: float, nir: Any) -> Any:
    form = _FORMS[neurons.model.name]
    values = {
        parameter: (value.clamp(0, 1) if parameter in neurons.model.decays else value)
        .detach().cpu().double().expand(size).numpy()
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
        rate = np.full(size, 1 / dt)
        return nir.IF(r=rate, v_threshold=values["threshold"], v_reset=np.zeros(size), metadata=metadata)
    strengths = {strength: 1 / (1 - values[decay]) for strength, decay in form.strengths.items()}
    gain = math.prod(1 - values[decay] for decay in form.time_constants if decay not in form.strengths.values())
    return getattr(nir, form.node)(
        **{constant: dt / (1 - values[decay]) for decay, constant in form.time_constants.items()},
        **{"r": np.ones(size), **strengths},
        v_leak=np.zeros(size),
        v_reset=np.zeros(size),
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
            raise ValueError(
                f"node {name} has a time constant below dt={dt} s; give the dt that the graph was made for"
            )
        values[decay] = 1 - step
        gain = gain * step
    gain = numbers(f"node {name}: gain g", gain, size, _POSITIVE.check)
    threshold = of_node("v_threshold", 1.0, _threshold)
    values["threshold"] = numbers(f"node {name}: v_threshold/g", threshold / gain, size, check_parameter)
    read = functools.partial(_metadata_entry, name, node)
    learned = {  # no leak stays none: NIR cannot express a decay next to 1
        f"learn_{parameter}": read(f"learn_{parameter}", parameter in ("threshold", *time_constants), check_flag)
        for parameter in values
    }
    neurons = NEURONS[model](
        reset="zero",
        surrogate=read("surrogate", SURROGATE, _surrogate),
        alpha=float(read("alpha", ALPHA, SHARPNESS.check)),
        backend=backend,
        **learned,
    )
    for parameter, value in values.items():
        tensor = torch.from_numpy(value).float()
        differ = bool((tensor != tensor[0]).any())
        per_neuron = read(f"{parameter}_per_neuron", differ, check_flag) or differ
        neurons.by_name[parameter].data = tensor.expand(size).clone() if per_neuron else tensor[:1]
    return neurons


def _warn_of_the_hold(names: list[str]) -> None:
    if names:
        logger.warning(
            "%s: after a spike NIR's CubaLIF charges from zero, Synaptic stays at zero for that step, as snnTorch's "
            "does; spikes of a neuron may differ after its first",
            ", ".join(names),
        )
