"""The activity of spiking populations: counts, rates, spikes in a backend's own form, synaptic operations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from g2g_kernels.mask.block_mask import BlockMask
from g2g_kernels.ops.g2g_stack.delays import Delay, LateSpikes
from g2g_kernels.ops.g2g_stack.images import convolved, through
from g2g_kernels.ops.g2g_stack.population import Call, Connection, reaches, sent_before
from g2g_kernels.tracing import replaced

#: of a population: the membrane [B, N] of a model with no other state, else its states in order, the membrane last
NeuronState = torch.Tensor | tuple[torch.Tensor, ...]
#: that of every population, from input to output; behind them what delays need
StackState = tuple[NeuronState, ...]


def unpacked_bits(words: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [..., size], 0 or 1: the first ``size`` bits of int64 words [..., W]."""
    of_bytes = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
    return (of_bytes & 1).flatten(-2)[..., :size]


class Spikes:
    """Spikes of one population in a backend's own form; each form defines :meth:`dense`."""

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order; without gradient unless requested."""
        raise NotImplementedError

    def events(self) -> torch.Tensor:
        """The spikes one by one, int64 [spikes, 3]: the step, the sample and the neuron of each, in this order."""
        return self.dense().nonzero()


class DenseSpikes(Spikes):
    """Spikes of one population kept as the float tensor that the backend computed."""

    def __init__(self, spikes: torch.Tensor) -> None:
        self._spikes = spikes

    def dense(self) -> torch.Tensor:
        """The spikes, 0 or 1, float [T, B, N] in neuron order."""
        return self._spikes


class SynapticOperations(NamedTuple):
    """The operations of the connections to one population, over all steps and samples of a run, as NeuroBench defines
    them (Yik et al. 2025): one for each input that is not zero and each weight that it meets and that is not zero, at
    every time step. An input held for all steps meets the weights once, since its product is computed once. Biases and
    neurons count as nothing.

    Attributes:
        accumulates: additions of a weight, if all that they receive is −1, 0 or 1 (spikes).
        multiplies: multiplications with an addition, if they are not.
        dense: what dense connections would do if no input were zero.
    """

    accumulates: int
    multiplies: int
    dense: int


class Synapses:
    """The inputs and the weights of a run, from which its synaptic operations can be counted afterwards. It keeps no
    graph of autograd.

    Args:
        call: the run; modules are not in it.
        spikes: what each population sent.
    """

    def __init__(self, call: Call, spikes: Sequence[Spikes]) -> None:
        self._x, self._steps = call.x.detach(), call.steps
        #: to each population: connections, and what arrives late, or in an image
        self._received: list[list[tuple[Connection, LateSpikes | None]]] = []
        reach: list[int] = []
        for population in call.populations:
            received = []
            for each in population.connections:
                late, source, delay = None, each.source, each.delay
                if each.images is not None and delay is None:
                    delay = Delay(0, 0)
                if delay is not None and source < 0:
                    late = LateSpikes(call.x, delay, call.before, call.steps)
                elif delay is not None:
                    reach = reach or reaches(call.populations)
                    train = spikes[source]
                    with torch.no_grad():
                        earlier = sent_before(call.populations[source], reach[source], call.x.dtype)
                    late = LateSpikes(train.dense() if isinstance(train, DenseSpikes) else train, delay, earlier)
                values = None if each.values is None else each.values.detach()
                received.append((replaced(each, values=values), late))
            self._received.append(received)
        self._then = self._now()

    def _now(self) -> list[object]:
        """What differs after something that is counted has changed."""
        tensors, now = [self._x], list[object]()
        for received in self._received:
            for each, late in received:
                tensors += [] if each.values is None else [each.values]
                tensors += [] if late is None else late.tensors
                now.append(each.mask and each.mask.changes)
        for tensor in tensors:
            if not tensor.is_inference():  # those of inference mode have no version
                now.append(tensor._version)
        return now

    def operations(self, rates: Sequence[torch.Tensor]) -> tuple[SynapticOperations, ...]:
        """Of the connections to each population, given the firing rates of each, [N]; waits for the device.
        Exact up to 2²³ spikes per neuron. Raises RuntimeError if inputs, weights or masks have changed in the meantime.
        """
        if self._now() != self._then:
            raise RuntimeError(
                "the inputs, weights or masks of this run have changed since, so its synaptic operations are unknown; "
                "call synaptic_operations() right after the run, before optimizer and scheduler step"
            )
        x, of_inputs = self._x, math.prod(self._x.shape[:-1])
        # a held input that arrives later is another one at each step
        vectors = of_inputs * (self._steps or 1)
        sent = [(of.detach().double() * vectors).nan_to_num().round().long() for of in rates]
        numbers, place = (x.values(), x.indices()[-1]) if x.is_sparse else (x[x != 0], x.nonzero()[:, -1])
        sent.append(torch.bincount(place[numbers != 0], minlength=x.shape[-1]))
        spiking = bool(((numbers == 0) | (numbers.abs() == 1)).all())
        counted = []
        for connections in self._received:
            totals = [0, 0, 0]
            for each, late in connections:
                source, images = each.source, each.images
                rows = of_inputs if source < 0 and late is None else vectors
                multiplies = source < 0 and not spiking
                if images is None:
                    received = sent[source] if late is None else (late.dense() != 0).sum((0, 1))
                    fan_out, dense = _fan_out(each.values, each.mask), each.mask.shape[0] * each.mask.shape[1]
                elif each.kind == "pool":
                    continue
                else:
                    assert late is not None
                    held = self._x if source < 0 and each.delay is None and self._steps else None
                    seen = late.dense() if held is None else held[None]
                    rows = math.prod(seen.shape[:2])
                    seen = through(replaced(images, norm=None, after=()), seen, lambda x: x, flat=False)
                    multiplies = bool(((seen != 0) & (seen.abs() != 1)).any())
                    received = (seen != 0).sum((0, 1))
                    fan_out, dense = _fan_out_of_images(each)
                totals[int(multiplies)] += int((received * fan_out).sum())
                totals[2] += rows * dense
            counted.append(SynapticOperations(*totals))
        return tuple(counted)


def _fan_out(values: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """int64 [in], the number of weights other than zero of each input neuron."""
    per_unit = ((values != 0) & mask.valid()).sum(1)
    per_place = per_unit.new_zeros(mask.cols.num_units, mask.cols.width)
    per_place.index_add_(0, mask.unit_col.long(), per_unit)
    return per_place.flatten()[mask.cols.place_of]


def _fan_out_of_images(connection: Connection) -> tuple[torch.Tensor, int]:
    """:func:`_fan_out` behind the pools of a connection of images, and the sum of that if no weight were zero."""
    images, values = connection.images, connection.values
    assert images is not None
    if connection.kind == "linear":
        return _fan_out(values, connection.mask), connection.mask.shape[0] * connection.mask.shape[1]
    found = []
    for weight in (values != 0, torch.ones_like(values, dtype=torch.bool)):
        pixels = torch.zeros(1, *convolved(images), dtype=torch.float64, device=values.device, requires_grad=True)
        with torch.enable_grad():
            met = F.conv2d(pixels, weight.double(), None, *images.convolution or ()).sum()
        found.append(torch.autograd.grad(met, pixels)[0].flatten().long())
    return found[0], int(found[1].sum())


class PerPopulation(tuple[Any, ...]):
    """One value per population of a network, by number or by name: ``rates[0]``, ``rates[-1]``, ``rates["lif1"]``.

    A tuple in all else: it iterates over values, ``rates[:-1]`` are those of the hidden populations, and it is a node
    of PyTorch's pytrees. Raises KeyError for an unknown name.

    Example:
        >>> rates = PerPopulation((0.1, 0.3), ("lif1", "lif2"))
        >>> rates["lif2"], rates[:-1], dict(rates.items())
        (0.3, (0.1,), {'lif1': 0.1, 'lif2': 0.3})
    """

    _names: tuple[str, ...]

    def __new__(cls, values: Iterable[Any], names: Iterable[str]) -> "PerPopulation":
        self = super().__new__(cls, values)
        self._names = tuple(names)
        return self

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self._names:
                raise KeyError(f"no population is called {key!r}; there are {', '.join(self._names)}")
            key = self._names.index(key)
        return super().__getitem__(key)

    def keys(self) -> tuple[str, ...]:
        """The names of the populations, the output's last."""
        return self._names

    def items(self) -> tuple[tuple[str, Any], ...]:
        """(name, value) of each population."""
        return tuple(zip(self._names, self, strict=True))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self._names


pytree.register_pytree_node(
    PerPopulation,
    lambda each: (list(each), each.keys()),
    PerPopulation,
    serialized_type_name="g2g_kernels.PerPopulation",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda each: ([(pytree.MappingKey(name), of) for name, of in each.items()], each.keys()),
)
#: torch.compile of older versions cannot make an object of a subclass of tuple
_CAN_BE_COMPILED = torch.__version__ >= "2.8"


class Activity(NamedTuple):
    """The activity of spiking populations, the output's last.

    Of a network, ``rates``, ``spikes`` and ``membranes`` also take names (:class:`PerPopulation`). All but ``spikes``
    and ``synapses`` is differentiable.

    Attributes:
        counts: [B, N] of the output, spikes per neuron over all steps.
        rates: one [N] per population, spikes per neuron, step and sample (0 to 1).
        spikes: one object per population, whose ``dense()`` gives the spikes [T, B, N], with a gradient only if the
            call requested ``spikes``.
        synapses: what :meth:`synaptic_operations` counts; None if they are unknown.
        states: one [states, B, N] per population, after the last step. None if modules that keep their states to
            themselves were called.
        membranes: one [T, B, N] per population, the membrane U_t after each step, from which the spikes follow; of the
            chosen neurons alone [T, B, n]. None for a population that was not asked for them, or instead of all.
        readout: [B, N], what is read from the membranes of an output whose neurons do not spike.
        sent: what delays of more than one step need to continue the run: one object per population, and at the end one
            for the inputs, whose ``dense()`` gives what was sent in the last D steps, [D, B, N]; None where no delay
            reads it.

    Example:
        >>> from g2gnet import G2GNet
        >>> activity = G2GNet(64, 64, 10, block_size=8, T=5).simulate(torch.rand(3, 64))
        >>> activity.counts.shape, [rates.shape[0] for rates in activity.rates]
        (torch.Size([3, 10]), [64, 64, 10])
        >>> activity.spikes[0].dense().shape  # [T, B, N]
        torch.Size([5, 3, 64])
    """

    counts: torch.Tensor
    rates: tuple[torch.Tensor, ...]
    spikes: tuple[Spikes, ...]
    synapses: Synapses | None = None
    states: tuple[torch.Tensor, ...] | None = None
    membranes: tuple[torch.Tensor | None, ...] | None = None
    readout: torch.Tensor | None = None
    sent: tuple[Spikes | None, ...] = ()

    @property
    def output(self) -> torch.Tensor:
        """The output [B, N], logits of a classifier; spike counts where there is no readout."""
        return self.counts if self.readout is None else self.readout

    @property
    def state(self) -> "StackState":
        """The state after the last step, which continues the run, as :meth:`g2gnet.SpikingNetwork.step` returns it.

        One entry per population, and behind them what :attr:`sent` has. Raises RuntimeError if it is unknown.
        """
        if self.states is None:
            raise RuntimeError(
                "the state of this run is unknown: the network called its modules (hooks, or a forward of their own), "
                "which return only spikes; take steps with net.step"
            )
        of_neurons = [each[0] if len(each) == 1 else each.unbind() for each in self.states]
        return (*of_neurons, *(each.dense() for each in self.sent if each is not None))

    def synaptic_operations(self) -> tuple[SynapticOperations, ...]:
        """The additions and multiplications that spikes (and inputs) caused in each population, over all steps and
        samples; of a network, a :class:`PerPopulation`. Waits for the device. Raises RuntimeError if inputs, weights
        or masks have changed since the run, or if the run was compiled.
        """
        if self.synapses is None:
            raise RuntimeError(
                "this run does not keep what its synaptic operations are counted from: it was compiled or traced, a "
                "connection is no G2GLinear, or sparse inputs were run in parts; run it uncompiled, with dense inputs"
            )
        found = self.synapses.operations(self.rates)
        return PerPopulation(found, self.rates.keys()) if isinstance(self.rates, PerPopulation) else found


def named(activity: Activity, names: Iterable[str]) -> Activity:
    """The activity, whose spikes, rates and membranes also take the populations' names."""
    if torch.compiler.is_compiling() and not _CAN_BE_COMPILED:
        return activity
    spikes, rates, membranes = activity.spikes, activity.rates, activity.membranes
    return replaced(
        activity,
        spikes=PerPopulation(spikes, names),
        rates=PerPopulation(rates, names),
        membranes=None if membranes is None else PerPopulation(membranes, names),
    )


def check_state_form(state: Any, depth: int, sent: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless there is one entry per population, each a tensor, several or None, and one of its shape [D, B, N]
    for each source that delays are read from (``sent``, by name), or None."""
    if type(state) not in (tuple, list):
        raise TypeError(
            f"state is a {type(state).__name__}, not a tuple; give activity.state of a run, or what step() returned"
        )
    if len(state) != depth + len(sent):
        behind = f", and {len(sent)} entries of what delays need" if sent else ""
        raise ValueError(f"state has {len(state)} entries, this network has {depth} populations{behind}")
    for number, before in enumerate(state):
        tensors = before if type(before) in (tuple, list) else (before,)
        if before is not None and not all(isinstance(each, torch.Tensor) for each in tensors):
            raise TypeError(f"state of population {number} is a {type(before).__name__}, not a tensor or several")
    for (name, shape), before in zip(sent.items(), state[depth:]):  # noqa: B905  (checked above)
        if before is not None and (not isinstance(before, torch.Tensor) or tuple(before.shape) != shape):
            found = list(before.shape) if isinstance(before, torch.Tensor) else type(before).__name__
            raise ValueError(
                f"the state has {found} of what {name} sent, but delays of this network read {list(shape)}, its last "
                f"{shape[0]} steps; give a state of this network and of as many samples"
            )


def as_one(state: NeuronState | None) -> torch.Tensor | None:
    """The states of a population as one tensor [states, B, N]."""
    if state is None:
        return None
    return state.unsqueeze(0) if isinstance(state, torch.Tensor) else torch.stack(tuple(state))
