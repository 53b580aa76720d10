"""A network as plain arrays: weights that exist by the neuron that they leave, delays in steps, decays as they act."""

from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.numbers import FLOAT32
from g2gnet.layers import G2GLinear
from g2gnet.network import G2GNet
from g2gnet.neurons import SpikingNeurons
from g2gnet.sequences import tap_delays
from g2gnet.spiking_network import SpikingNetwork

#: the parameters of each model that is written, the threshold first
MODELS_IN_C = {
    "lif": ("threshold", "beta"),
    "synaptic": ("threshold", "beta", "syn_decay"),
    "adlif": ("threshold", "beta", "adapt_decay", "a", "b"),
}
#: the options of neurons that are written, or act in training only
READ = ("reset", "surrogate", "alpha")


class PlainConnection(NamedTuple):
    """The weights of a connection that exist, by source.

    Attributes:
        name: of the module.
        source, target: numbers of populations; −1: the input.
        starts: int64 [N_src + 1], where the weights of each source begin.
        targets: int64 [weights], rising for each source.
        weights: float64 [weights].
        delays: int64 [N_src], in steps.
    """

    name: str
    source: int
    target: int
    starts: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    delays: np.ndarray

    @property
    def sources(self) -> np.ndarray:
        """int64 [weights], the neuron that each weight leaves."""
        return np.repeat(np.arange(len(self.delays)), np.diff(self.starts))


class PlainPopulation(NamedTuple):
    """Neurons: their number, their model (:data:`g2g_kernels.ops.neurons.MODELS`) and reset, its parameters by name,
    float64 of one entry or ``size``, and the sum of the biases that reach them at every step, float64 [size]."""

    name: str
    size: int
    model: str
    reset: str
    parameters: dict[str, np.ndarray]
    bias: np.ndarray


class PlainNetwork(NamedTuple):
    """A network that runs without PyTorch.

    Attributes:
        populations: in the order of a step: each after those whose spikes reach it in the same one.
        connections: to them.
        output: the number of the output population.
        inputs: the values of a step, D.
        steps: T.
        held: whether a sample is held for all steps; else it has ``steps · inputs`` values.
        order: int64 [steps, inputs], the places of a step's values in a sample, where these are not in order; or None.
        scale, offset: what reaches the input's connections is ``scale · x + offset``.
        readout: ``"counts"``, ``"last"``, ``"mean"`` or ``"max"``.
    """

    populations: tuple[PlainPopulation, ...]
    connections: tuple[PlainConnection, ...]
    output: int
    inputs: int
    steps: int
    held: bool
    order: np.ndarray | None
    scale: float
    offset: float
    readout: str

    @property
    def num_weights(self) -> int:
        return sum(len(each.weights) for each in self.connections)


def plain(net: SpikingNetwork, held: bool | None = None) -> PlainNetwork:
    """The arrays of a network in evaluation mode.

    Args:
        net: any graph of populations. Its spikes are drawn from nothing, so ``enc="rate"`` is refused.
        held: whether samples [D] are held for all T steps; None: they are, unless they unfold over time
            (``sequence`` of a :class:`G2GNet`).

    Raises ValueError, naming the part, for what has no exact meaning outside of PyTorch.
    """
    if not isinstance(net, SpikingNetwork):
        inside = getattr(net, "module", None)
        give = "its .module" if isinstance(inside, SpikingNetwork) else "a SpikingNetwork, a SpikingStack or a G2GNet"
        raise ValueError(f"the network is a {type(net).__name__}; give {give}")
    net.check_linear("C (or quantize)")
    for name, parameter in net.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}, whose rounding no C file repeats; give net.float()")
    for name, module in (*net.connections().items(), *net.neurons().items()):
        if not isinstance(module, G2GLinear | SpikingNeurons):
            raise ValueError(f"{name} is a {type(module).__name__}; only G2GLinear and the neurons of g2gnet convert")
    for name, neurons in net.neurons().items():
        if neurons.model_name not in MODELS_IN_C:
            raise ValueError(
                f"{name}: {neurons.model_name!r} neurons are not written; only {', '.join(MODELS_IN_C)} are"
            )
        # a field that is added to the record says nothing here until it is written
        record = neurons.population
        if other := [
            key
            for key, default in record._field_defaults.items()
            if key not in READ and record[record._fields.index(key)] != default
        ]:
            raise ValueError(f"{name} has {other[0]}, which is not written; leave it out")
    if onto := [each.name for each in net.projections() if each.onto]:
        raise ValueError(f"{onto[0]} adds to the membrane, which is not written; make it with onto='current'")
    net.check_uncalled("C (or quantize)")
    fixed, inputs, taps, scale, offset, order = None, net.sizes[-1], 1, 1.0, 0.0, None
    if isinstance(net, G2GNet):
        if net.enc != "current":
            raise ValueError(f"enc={net.enc!r} draws spikes at random; train the network with enc='current'")
        taps, scale, offset = net.input_taps, net.enc_scale, net.enc_bias
        inputs //= taps
        if net.standardize:
            mean, deviation = (each.double() for each in (net.input_mean, net.input_deviation))
            scale, offset = float(scale / deviation), float(offset - scale * mean / deviation)
        if net.sequence != "none":
            fixed = net.whole("input_order").cpu().numpy()
            order = None if np.array_equal(fixed.ravel(), np.arange(fixed.size)) else fixed
    if held is None:
        held = fixed is None
    if held and (fixed is not None or taps > 1):
        raise ValueError("held=True, but samples of this network unfold over time (sequence, input_taps)")
    net.settle()
    sizes = dict(zip(net.populations, net.sizes))  # noqa: B905  (the last is the input's)
    connections = []
    biases = {name: np.zeros(size) for name, size in sizes.items()}
    for each in net.projections():
        module, delays = net.connections()[each.name], net.delays(each.name).cpu().numpy().astype(np.int64)
        connection = _connection(each.name, module, each.source, each.target, delays)
        if each.source < 0 and taps > 1:
            connection = _of_taps(connection, inputs, tap_delays(net.T, taps))
        if each.source < 0 and offset and connection.delays.any():
            raise ValueError(
                f"{each.name} delays an input that is standardised or has a bias, and 0 is not what it is before the "
                "first step; train the network with standardize=False, enc_bias=0"
            )
        connections.append(connection)
        if module.bias is not None:
            biases[net.populations[each.target]] += _array(module.bias)
    populations = []
    for name, neurons in net.neurons().items():
        record = neurons.population
        if name == net.populations[-1] and net.readout != "counts":
            record = record.integrating()
        parameters = {}
        for key, value in zip(neurons.model.parameters, record.parameters, strict=True):
            parameters[key] = _array(value.clamp(0, 1) if key in neurons.model.decays else value).reshape(-1)
        populations.append(PlainPopulation(name, sizes[name], record.model, record.reset, parameters, biases[name]))
    numbers = [(connection.name, [connection.weights]) for connection in connections]
    numbers += [(population.name, [*population.parameters.values(), population.bias]) for population in populations]
    numbers.append(("the standardisation of the input", [np.array([scale, offset])]))
    for name, arrays in numbers:
        if not all((np.abs(array) <= FLOAT32[1]).all() for array in arrays):
            raise ValueError(f"{name} has a number that is not finite in float32")
    order_of_step = _order_of_step(len(populations), connections)
    place = {number: at for at, number in enumerate(order_of_step)} | {-1: -1}
    moved = [each._replace(source=place[each.source], target=place[each.target]) for each in connections]
    return PlainNetwork(
        tuple(populations[number] for number in order_of_step), tuple(moved), place[len(populations) - 1],
        inputs, net.T, held, order, scale, offset, net.readout,
    )  # fmt: skip


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy().copy()


def _connection(name: str, module: Any, source: int, target: int, delays: np.ndarray) -> PlainConnection:
    values, mask = module.weights()
    edges = mask.edges(values)  # by target
    by_source = np.argsort(edges.source, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(edges.source, minlength=len(delays)))])
    weights = edges.weight[by_source].astype(np.float64)
    return PlainConnection(name, source, target, starts, edges.target[by_source], weights, delays)


def _order_of_step(count: int, connections: list[PlainConnection]) -> list[int]:
    """The numbers of populations, each after those whose spikes reach it in the same step, otherwise as they are."""
    before = [{each.source for each in connections if each.target == n and not each.delays.all()} for n in range(count)]
    order: list[int] = []
    while len(order) < count:
        order.append(next(n for n in range(count) if n not in order and before[n] <= {-1, *order}))
    return order


def _of_taps(connection: PlainConnection, inputs: int, late: list[int]) -> PlainConnection:
    """The connection from one input each instead of its copies: by source, which has one delay, so that copies stay."""
    delays = connection.delays + np.repeat(late, inputs)
    return connection._replace(delays=delays)
