"""Stacks to and from NIR, the Neuromorphic Intermediate Representation (Pedersen et al. 2024).

NIR describes neurons in continuous time; the time step Δt is chosen when they are run. Its LIF is

    τ·dv/dt = (v_leak − v) + R·I,    v ← v_reset after a spike, where v > v_threshold

and an Euler step of it, v ← (1 − Δt/τ)·v + (Δt/τ)·(v_leak + R·I), is our U ← β·U + I with

    β = 1 − Δt/τ,    U = v/g,    θ = v_threshold/g,    g = R·Δt/τ,    v_leak = v_reset = 0.

Of the pairs (R, v_threshold) that describe the same neuron, :func:`to_nir` writes R = 1, v_threshold = (1 − β)·θ, since
Norse's importer takes R to be 1. A spike resets our membrane before the next step's decay, which with reset to zero
equals NIR's immediate reset.

NIR's CubaLIF has a synaptic current before the membrane, τ_syn·dI/dt = −I + w_in·S, τ_mem·dv/dt = (v_leak − v) + R·I.
Euler steps, the current's first, as snnTorch and Norse take them, are our C ← γ·C + I, U ← β·U + C of synaptic neurons
with

    γ = 1 − Δt/τ_syn,    β = 1 − Δt/τ_mem,    g = R·w_in·(Δt/τ_syn)·(Δt/τ_mem).

Here :func:`to_nir` writes w_in = τ_syn/Δt and R = τ_mem/Δt, so that g = 1 and v_threshold = θ, as snnTorch's importer
demands. The resets differ slightly: in the step after a spike NIR's membrane charges from zero, while that of
``Synaptic`` stays at zero, as in snnTorch. A warning says so.

NIR cannot carry

- the reset by subtraction, delayed or not: its neurons only reset to a value (train with ``reset="zero"``);
- decays of 1: no leak means an infinite τ (NIR's IF, which has none, is read as β = 1, g = R·Δt);
- surrogates, learnability, groups and units: these go into the nodes' metadata, which other tools do not read;
- the encoding of samples: the graph's input is that of fc1.
"""

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels import BlockMask
from g2g_kernels.ops.neurons import MODELS
from g2g_kernels.ops.neurons.surrogates import ALPHA, SURROGATE
from g2gnet.interop.optional import optional_package
from g2gnet.layers import G2GLinear
from g2gnet.neurons import NEURONS, SpikingNeurons
from g2gnet.stack import SpikingStack

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
#: the time step of snnTorch's and most other NIR converters, in seconds
DEFAULT_DT = 1e-4


def to_nir(stack: SpikingStack, dt: float = DEFAULT_DT) -> Any:
    """The ``nir.NIRGraph`` of a stack: input → fc1 → lif1 → fc2 → … → output.

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
    nir = optional_package("nir", _LEAST_NIR)
    for _, neurons in stack.layers():
        if neurons.reset != "zero":
            raise ValueError(
                f"reset={neurons.reset!r} cannot be written to NIR, whose neurons reset to a value; train the network "
                "with reset='zero' (train.py --reset zero)"
            )
    if not dt > 0:
        raise ValueError(f"dt={dt} must be above 0 seconds")
    layers = list(stack.layers())
    nodes = {"input": nir.Input(input_type={"input": np.array([layers[0][0].in_features])})}
    for number, (connection, neurons) in enumerate(layers, 1):
        weight, metadata = _array(connection.dense_weight()), _mask_metadata(connection.mask)
        if connection.bias is None:
            nodes[f"fc{number}"] = nir.Linear(weight=weight, metadata=metadata)
        else:
            nodes[f"fc{number}"] = nir.Affine(weight=weight, bias=_array(connection.bias), metadata=metadata)
        nodes[f"lif{number}"] = _neurons_node(f"lif{number}", neurons, connection.out_features, dt)
    nodes["output"] = nir.Output(output_type={"output": np.array([layers[-1][0].out_features])})
    names = list(nodes)
    _warn_of_the_hold([name for name, node in nodes.items() if isinstance(node, nir.CubaLIF)])
    return nir.NIRGraph(nodes=nodes, edges=list(itertools.pairwise(names)))


def from_nir(
    graph: Any,
    dt: float = DEFAULT_DT,
    masks: Mapping[str, BlockMask | torch.Tensor] | None = None,
    *,
    T: int,  # noqa: N803  (the field's name for it)
    backend: str | None = None,
) -> SpikingStack:
    """The stack of a NIR graph in which linear or affine nodes alternate with LIF, CubaLIF or IF nodes.

    Args:
        graph: a ``nir.NIRGraph``, as ``nir.read(file)`` gives it.
        dt: the time step, in seconds, for which the graph was made.
        masks: by name of a node, the weights that exist, as for :meth:`G2GLinear.from_linear`. Other nodes have the
            mask of their metadata, or every weight.
        T: the number of steps for which the stack holds inputs [B, D], which a graph does not say. The length of inputs
            [T, B, D] may differ from it.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Raises:
        ValueError: for a graph of another form, or neurons that the stack does not have.
        ImportError: if the package ``nir``, 1.0.7 or newer, is not installed.

    Example:
        >>> from g2gnet import G2GNet
        >>> graph = to_nir(G2GNet(64, 32, 10, block_size=4, reset="zero"))  # or nir.read("network.nir")
        >>> from_nir(graph, T=25)(torch.rand(2, 64)).shape
        torch.Size([2, 10])
    """
    nir = optional_package("nir", _LEAST_NIR)
    if not dt > 0:
        raise ValueError(f"dt={dt} must be above 0 seconds")
    masks = masks or {}
    chain = [(name, node) for name, node in _chain(graph, nir) if not isinstance(node, nir.Flatten)]
    linear, neurons = chain[::2], chain[1::2]
    for kinds, found in (((nir.Affine, nir.Linear), linear), (tuple(getattr(nir, kind) for kind in _READ), neurons)):
        for name, node in found:
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
    unknown = set(masks) - {name for name, _ in linear}
    if unknown:
        raise ValueError(f"masks names {', '.join(sorted(unknown))}, the graph {', '.join(n for n, _ in linear)}")
    layers = [
        (
            _connection(name, node, masks.get(name), backend),
            _neurons(lif_name, lif_node, dt, backend),
        )
        for (name, node), (lif_name, lif_node) in zip(linear, neurons, strict=True)
    ]
    _warn_of_the_hold([name for name, node in neurons if isinstance(node, nir.CubaLIF)])
    return SpikingStack(layers, T, backend)


def _chain(graph: Any, nir: Any) -> list[tuple[str, Any]]:
    """The nodes of a graph without branches, in order, those of a graph inside of it among them, without the ends."""
    followers: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        followers[source].append(target)
    followed = {target for _, target in graph.edges}
    # some tools leave the input node out
    starts = [name for name, node in graph.nodes.items() if isinstance(node, nir.Input)] or [
        name for name in graph.nodes if name not in followed
    ]
    if len(starts) != 1:
        raise ValueError(f"the graph has {len(starts)} inputs; a stack has one")
    names = [starts[0]]
    while followers[names[-1]]:
        if len(followers[names[-1]]) > 1 or followers[names[-1]][0] in names:
            raise ValueError(f"node {names[-1]} leads to {followers[names[-1]]}; a stack has no branches and no loops")
        names.append(followers[names[-1]][0])
    chain: list[tuple[str, Any]] = []
    for name in names:
        node = graph.nodes[name]
        if isinstance(node, nir.NIRGraph):
            chain += [(f"{name}.{inner}", inner_node) for inner, inner_node in _chain(node, nir)]
        elif not isinstance(node, nir.Input | nir.Output):
            chain.append((name, node))
    return chain


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy().copy()


def _mask_metadata(mask: BlockMask) -> dict[str, Any]:
    return {} if mask.is_full else {"wiring": _array(mask.state_dict()["wiring"])}


def _connection(name: str, node: Any, mask: BlockMask | torch.Tensor | None, backend: str | None) -> G2GLinear:
    weight = torch.as_tensor(node.weight).float()
    bias = getattr(node, "bias", None)
    linear = torch.nn.utils.skip_init(torch.nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(torch.as_tensor(bias))
    if mask is None and "wiring" in node.metadata:
        mask = BlockMask.from_state(
            {"wiring": torch.as_tensor(node.metadata["wiring"])}, (weight.shape[0], weight.shape[1])
        )
        if weight[~mask.to_dense()].any():
            raise ValueError(f"node {name} has weights that its metadata calls absent; give masks={{{name!r}: ...}}")
    return G2GLinear.from_linear(linear, mask, backend)


def _neurons_node(name: str, neurons: SpikingNeurons, size: int, dt: float) -> Any:
    if neurons.model.name not in _FORMS:
        raise ValueError(f"{name}: NIR has no {neurons.model.name!r} neurons; only {', '.join(_FORMS)} convert")
    form = _FORMS[neurons.model.name]
    values = {
        parameter: (value.clamp(0, 1) if parameter in neurons.model.decays else value)
        .detach()
        .cpu()
        .double()
        .expand(size)
        .numpy()
        for parameter, value in neurons.values.items()
    }
    for decay in form.time_constants:
        if (values[decay] == 1).any():
            raise ValueError(f"{name} has {decay}=1, no leak: the time constant that NIR asks for is infinite")
    strengths = {strength: 1 / (1 - values[decay]) for strength, decay in form.strengths.items()}
    metadata: dict[str, Any] = {"surrogate": neurons.surrogate, "alpha": neurons.alpha}
    for parameter, value in neurons.values.items():
        metadata[f"{parameter}_per_neuron"] = value.numel() > 1
        metadata[f"learn_{parameter}"] = isinstance(value, torch.nn.Parameter)
    gain = math.prod(1 - values[decay] for decay in form.time_constants if decay not in form.strengths.values())
    return getattr(optional_package("nir", _LEAST_NIR), form.node)(
        **{constant: dt / (1 - values[decay]) for decay, constant in form.time_constants.items()},
        **{"r": np.ones(size), **strengths},
        v_leak=np.zeros(size),
        v_reset=np.zeros(size),
        v_threshold=values["threshold"] * gain,
        metadata=metadata,
    )


def _neurons(name: str, node: Any, dt: float, backend: str | None) -> SpikingNeurons:
    model, time_constants = _READ[type(node).__name__]

    def numbers(option: str, otherwise: float = 0.0) -> np.ndarray:  # of an array, a number, or another tool's tensor
        return _array(torch.as_tensor(getattr(node, option, otherwise))).astype(np.float64)

    for option in ("v_leak", "v_reset"):
        if numbers(option).any():
            raise ValueError(f"node {name} has {option} other than 0, which our neurons do not support")
    values: dict[str, np.ndarray] = {decay: np.ones(()) for decay in MODELS[model].decays}
    gain = numbers("r") * numbers("w_in", 1.0) * (1.0 if time_constants else dt)
    for decay, constant in time_constants.items():
        step = dt / numbers(constant)
        if np.any(step > 1) or np.any(step < 0):
            raise ValueError(
                f"node {name} has a time constant below dt={dt} s; give the dt that the graph was made for"
            )
        values[decay] = 1 - step
        gain = gain * step
    values["threshold"] = numbers("v_threshold") / gain
    about = node.metadata
    population = NEURONS[model](
        reset="zero",
        surrogate=about.get("surrogate", SURROGATE),
        alpha=float(about.get("alpha", ALPHA)),
        backend=backend,
        # no leak stays none: NIR cannot express a decay next to 1
        **{
            f"learn_{parameter}": bool(about.get(f"learn_{parameter}", parameter in ("threshold", *time_constants)))
            for parameter in values
        },
    )
    for parameter, value in values.items():
        tensor = torch.from_numpy(np.asarray(value)).float()
        per_neuron = about.get(f"{parameter}_per_neuron", bool((tensor != tensor.flatten()[0]).any()))
        population.values[parameter].data = tensor.flatten() if per_neuron else tensor.flatten()[:1]
    return population


def _warn_of_the_hold(names: list[str]) -> None:
    if names:
        logger.warning(
            "%s: after a spike NIR's CubaLIF charges from zero, Synaptic stays at zero for that step, as snnTorch's "
            "does; spikes of a neuron may differ after its first",
            ", ".join(names),
        )
