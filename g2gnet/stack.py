"""A stack of spiking layers, each a connection and its neurons: all time steps in one call, or step by step."""

import functools
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity, SpikingLayer, g2g_stack, neurons_step
from g2g_kernels.choices import check_choice
from g2g_kernels.groups import as_integers
from g2g_kernels.numbers import COUNT, Number
from g2g_kernels.ops.g2g_stack import (
    Border,
    DenseSpikes,
    NeuronState,
    Recurrent,
    StackState,
    Synapses,
    activity_of,
    check_dropped,
)
from g2g_kernels.ops.g2g_stack.layer import Observer
from g2g_kernels.ops.neurons.checks import check_states
from g2g_kernels.ops.neurons.step import spikes_of
from g2g_kernels.tracing import is_traced, is_transformed, replaced, symbolic_call
from g2gnet import graphs
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons

logger = logging.getLogger("g2gnet")

#: a dropped neuron is drawn by 16 random bits
DRAWS = 1 << 16
#: at least one of the draws keeps a neuron
DROPOUT = Number(0, 1 - 1 / DRAWS)
#: what the last layer answers: its spike counts, or of neurons that do not spike the last, mean or largest membrane
READOUTS = ("counts", "last", "mean", "max")
#: called with the inputs and the activity of a run over all time steps
ActivityHook = Callable[[torch.Tensor, Activity], None]
Pair = tuple[G2GLinear, SpikingNeurons]
RecurrentLayer = tuple[G2GLinear, SpikingNeurons, G2GLinear]


class OwnHook:
    """A hook that needs no call of its module, and is dropped when that is copied or pickled: a stack that carries only
    such hooks runs in one call."""

    def __init__(self, function: Callable[..., None], *first: Any) -> None:
        self._function, self._first = function, first

    def __call__(self, *arguments: Any) -> None:
        self._function(*self._first, *arguments)

    def __reduce__(self) -> tuple:
        return OwnHook, (_nothing,)


def _nothing(*arguments: Any) -> None:
    pass


class SpikingStack(nn.Module):
    """Connections and neurons ``fc1``, ``lif1``, ``fc2``, ``lif2``, …, each layer's spikes the next one's inputs.

    A layer may be recurrent: ``rec1`` then joins the neurons ``lif1`` to themselves. With W, b of ``fc1`` and V of
    ``rec1`` their current is I_t = W·x_t + b + V·S_{t−1}; the first step has no S_{t−1}, or that of the state that it
    continues. Gradients pass through S_{t−1} by the surrogate.

    All layers run in one call (:func:`g2g_kernels.g2g_stack`), which reads their weights and parameters. What only a
    call of a module would run (hooks on one of them, which also rewrite its weights; a ``forward`` of its own; another
    module in its place) is not left out: the stack then calls them in turn, each over all steps and on its own
    ``backend``. That is slower, gives the same results, and is logged once.

    Args:
        layers: pairs (connection, neurons), from input to output, or (connection, neurons, recurrent connection), the
            last of as many inputs as outputs and without a bias. Each layer has its own model, reset and surrogate.
        T: number of time steps for which inputs [B, D] are held.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        dropout: probability with which a hidden neuron is dropped in a sample, in training mode: it stays silent at all
            steps of that sample, and the output of the others is divided by the probability that they are kept. For
            :meth:`simulate`; :meth:`step` drops nothing.
        readout: what the stack returns of the last layer: ``"counts"``, spikes over all steps. With ``"last"``,
            ``"mean"`` or ``"max"`` its neurons do not spike and are not reset, whatever their threshold and reset: they
            integrate, and the answer is their membrane after the last step, its mean, or its largest value over all
            steps. Their spikes, counts and rates are 0. ``"last"`` costs what counts do; for the others the operators
            run one after the other, and the last layer takes steps.

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

    #: whether :meth:`simulate` or :meth:`step` is calling the layers at the moment
    calls_layers = False
    #: while hooks are called, the state that the run continues
    _continued: Sequence[NeuronState | None] | None = None

    def __init__(
        self,
        layers: Sequence[Pair | RecurrentLayer],
        T: int = 50,  # noqa: N803  (the field's name for it)
        backend: str | None = None,
        dropout: float = 0.0,
        readout: str = "counts",
    ) -> None:
        super().__init__()
        DROPOUT.check("dropout", dropout)
        check_choice("readout", readout, READOUTS)
        if not layers:
            raise ValueError("layers is empty; give at least one pair of a G2GLinear and its neurons")
        for number, (connection, neurons, *recurrent) in enumerate(layers, 1):
            if not hasattr(connection, "in_features"):
                raise TypeError(
                    f"fc{number} is a {type(connection).__name__}; a stack joins G2GLinear layers. Put others, as "
                    "convolutions, into a module of your own with LIF layers behind them (docs/limits.md)"
                )
            if recurrent:
                _check_recurrent(number, connection, neurons, recurrent)
        for number, ((lower, *_), (upper, *_)) in enumerate(itertools.pairwise(layers), 1):
            if lower.out_features != upper.in_features:
                raise ValueError(
                    f"fc{number} has {lower.out_features} outputs, but fc{number + 1} {upper.in_features} inputs"
                )
        if readout != "counts":
            _check_integrates(readout, *layers[-1])
        self.T = COUNT.check("T", T)
        self._readout = readout
        self.backend = backend
        self.dropout = dropout
        self.depth = len(layers)
        self._activity_hooks: OrderedDict[int, ActivityHook] = OrderedDict()
        for number, (connection, neurons, *recurrent) in enumerate(layers, 1):
            self.add_module(f"fc{number}", connection)
            self.add_module(f"lif{number}", neurons)
            if recurrent:
                self.add_module(f"rec{number}", recurrent[0])

    @property
    def steps(self) -> torch.Tensor:
        """``T`` as it is saved, int64 []. ``torch.func.functional_call`` sets it for the length of a call."""
        return torch.tensor(self.T)

    @steps.setter
    def steps(self, value: torch.Tensor) -> None:
        self.T = COUNT.check("T", int(as_integers("steps", value)))

    @property
    def readout(self) -> str:
        """What the last layer answers; its neurons were made for it, so it stays."""
        return self._readout

    @property
    def dropout(self) -> float:
        """The probability with which a hidden neuron is dropped; it may be changed."""
        return self._dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        DROPOUT.check("dropout", value)
        self._dropout = value

    @property
    def _drops(self) -> int:
        """In how many of ``DRAWS`` equally likely draws a neuron is dropped."""
        return round(self.dropout * DRAWS)

    @property
    def _scale(self) -> float:
        """What the output of kept neurons is multiplied by."""
        return DRAWS / (DRAWS - self._drops)

    def layers(self) -> Iterator[Pair]:
        """The pairs (connection, neurons), from input to output."""
        modules: dict[str, Any] = self._modules
        for number in range(1, self.depth + 1):
            yield modules[f"fc{number}"], modules[f"lif{number}"]

    def recurrents(self) -> list[G2GLinear | None]:
        """The recurrent connection of each layer, or None."""
        modules: dict[str, Any] = self._modules
        return [modules.get(f"rec{number}") for number in range(1, self.depth + 1)]

    def connections(self) -> dict[str, G2GLinear]:
        """All connections by name: ``fc1``, ``rec1`` where there is one, ``fc2``, …."""
        names = [f"{kind}{number}" for number in range(1, self.depth + 1) for kind in ("fc", "rec")]
        modules: dict[str, Any] = self._modules
        return {name: modules[name] for name in names if name in modules}

    def drop(self, samples: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Draws the hidden neurons that are dropped in each sample: bool [samples, N] for each hidden layer.

        From ``generator``, or PyTorch's global one, on its own device. Each has 16 random bits: the probability is
        ``dropout``, rounded to a multiple of 2⁻¹⁶.
        """
        *hidden, (last, _) = self.layers()
        device = last.values.device if generator is None else generator.device
        least = self._drops - DRAWS // 2
        drawn = []
        for connection, _ in hidden:
            if is_transformed():  # vmap draws for every element, but not into a tensor that is there already
                shape = samples, connection.out_features
                drawn.append(torch.rand(shape, generator=generator, device=device) < self._drops / DRAWS)
                continue
            size = samples * connection.out_features
            # four numbers per draw: PyTorch's own bernoulli_ takes five times as long on a CPU
            words = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
            words.random_(-(1 << 63), None, generator=generator)
            drawn.append(words.view(torch.int16)[:size].view(samples, -1) < least)
        return drawn

    def simulate(
        self,
        inputs: torch.Tensor,
        state: StackState | None = None,
        chunk: int | None = None,
        *,
        dropped: Sequence[torch.Tensor] | None = None,
        spikes: bool = False,
        membranes: bool = False,
    ) -> Activity:
        """Runs the stack on inputs [B, D] held for T steps, or [T, B, D].

        A run may start from a state and gives the last one, in the form of :meth:`step`: two halves in turn are the
        whole, with gradients through the state. If that is detached, this is truncated backpropagation.

        Time comes first, and the length of a sequence may differ from the stack's ``T``. Of inputs [B, T, D], which
        need ``transpose(0, 1)``, each sample would be a step: the output would have T rows, not B.

        Args:
            inputs: for all layers.
            state: ``activity.state`` of the run that this one continues, or what :meth:`step` returned; None, for all
                layers or for one: its states are 0.
            chunk: how many steps are computed at a time. The backward pass computes them again, from the states between
                chunks: the same gradients, and memory that grows with T by spikes and those states only.
            dropped: in training mode with ``dropout``, what :meth:`drop` returns; None: drawn here, once for all steps.
                A run that continues another drops the same neurons, and must be given them.
            spikes: whether the spikes over time have a gradient too (:func:`g2g_kernels.g2g_stack`).
            membranes: whether ``activity.membranes`` has the membranes over time [T, B, N] of every layer, with a
                gradient. All neurons then take one step after the other, which is slower, and currents, spikes and
                membranes of all layers are in memory.

        Returns:
            Activity: differentiable ``output`` [B, C], spike counts of the last layer or its readout, and firing rates
            of each layer; and the spikes.

        Raises:
            ValueError: if the inputs have another shape; if the state is not one of these layers and samples; if a
                chunk is given and spikes or membranes are wanted, or the readout is that of all steps; if a state, a
                chunk, membranes or a readout is asked of a stack that calls its modules.
        """
        check_input(inputs)
        of_layers: list[torch.Tensor | None] | None = None
        if self.training and self.dropout:
            if state is not None and dropped is None:
                raise ValueError(
                    "a run that continues from a state drops the neurons that were dropped before it: call "
                    f"dropped = stack.drop({inputs.shape[-2]}) once, and give it to every part of the run"
                )
            of_layers = [*(self.drop(inputs.shape[-2]) if dropped is None else dropped), None]
            if len(of_layers) != self.depth:
                raise ValueError(
                    f"dropped is of {len(of_layers) - 1} layers, this stack has {self.depth - 1} hidden ones; give "
                    f"what drop({inputs.shape[-2]}) returns"
                )
        if chunk is not None and self.readout in ("mean", "max"):
            raise ValueError(
                f"chunk={chunk} does not keep the membranes of all steps that readout={self.readout!r} is taken from; "
                "leave it out, or make the stack with readout='last'"
            )
        pairs = list(self.layers())
        recurrents = self.recurrents()
        reason = _why_called(pairs, recurrents)
        if reason is None:
            layers = self._as_layers(pairs, recurrents, of_layers, state)
            if membranes:
                layers = [replaced(layer, membranes=True) for layer in layers]
            if self.readout != "counts":
                *_, last = layers
                layers[-1] = replaced(
                    last, population=last.population.integrating(), membranes=membranes or self.readout != "last"
                )
            steps = self.T if inputs.dim() == 2 else None
            activity = g2g_stack(inputs, layers, steps, self.backend, spikes, chunk)
            if self.readout != "counts":
                activity = self._read(activity, self.T if inputs.dim() == 2 else len(inputs), membranes)
        else:
            if state is not None or chunk is not None or membranes or self.readout != "counts":
                given = "a state" if state is not None else f"chunk={chunk}"
                if membranes or self.readout != "counts":
                    given = "membranes=True" if membranes else f"readout={self.readout!r}"
                raise ValueError(
                    f"{given} was given to a stack whose layers are called in turn, and modules return spikes only "
                    f"({reason}); take single steps with step(x, state)"
                )
            if not is_traced():
                _say_that_layers_are_called(reason)
            activity = activity_of(self._in_turn(inputs, pairs, recurrents, of_layers), None, differentiable=spikes)
            if not is_traced() and all(isinstance(connection, G2GLinear) for connection in self.connections().values()):
                activity = replaced(activity, synapses=self._synapses(inputs, pairs, recurrents, activity))
        self._call(list(self._activity_hooks.values()), inputs, activity, state)
        return activity

    def _call(
        self,
        hooks: Sequence[ActivityHook],
        inputs: torch.Tensor,
        activity: Activity,
        state: Sequence[NeuronState | None] | None,
    ) -> None:
        """Calls hooks after a run that continues ``state``."""
        if not hooks:
            return
        self._continued = state
        try:
            for hook in hooks:
                hook(inputs, activity)
        finally:
            self._continued = None

    def spikes_before(self) -> list[torch.Tensor | None]:
        """For hooks: what the neurons of each recurrent layer did in the step before the run, bool [..., N].

        None if the run begins there, and for other layers.
        """
        befores = self._continued or (None,) * self.depth
        spikes: list[torch.Tensor | None] = []
        for (_, neurons), recurrent, before in zip(self.layers(), self.recurrents(), befores, strict=True):
            if recurrent is None or before is None:
                spikes.append(None)
                continue
            membrane = before if isinstance(before, torch.Tensor) else before[-1]
            spikes.append(membrane.detach() > neurons.population.parameters[-1].detach())
        return spikes

    def _as_layers(
        self,
        pairs: Sequence[Pair],
        recurrents: Sequence[G2GLinear | None],
        dropped: Sequence[torch.Tensor | None] | None,
        state: StackState | None,
    ) -> list[SpikingLayer]:
        """The layers in the operator's form."""
        layers = []
        for (connection, neurons), recurrent in zip(pairs, recurrents, strict=True):
            weights, observer = connection.observed_weights()
            joined, of_recurrent = None, None
            if recurrent is not None:
                recurrent_weights, of_recurrent = recurrent.observed_weights()
                joined = Recurrent(*recurrent_weights)
            observers = observer, of_recurrent
            layers.append(
                SpikingLayer(*weights, connection.bias, neurons.population, recurrent=joined, observers=observers)
            )
        if dropped is not None:
            layers = [
                self._with_dropped(number, *each) for number, each in enumerate(zip(layers, dropped, strict=True))
            ]
        if state is not None:
            self._check_form(state)
            layers = [replaced(layer, state=_as_one(before)) for layer, before in zip(layers, state, strict=True)]
        return layers

    def _read(self, activity: Activity, steps: int, membranes: bool) -> Activity:
        """The activity of a run whose last layer integrates: its readout, and no spikes."""
        states, over_time = activity.states, activity.membranes
        assert states is not None
        if self.readout == "last":
            readout = states[-1][-1]
        else:
            membrane = over_time and over_time[-1]
            assert isinstance(membrane, torch.Tensor)
            readout = membrane.mean(0) if self.readout == "mean" else membrane.amax(0)
        none = torch.zeros_like(activity.counts)
        return replaced(
            activity,
            counts=none,
            rates=(*activity.rates[:-1], torch.zeros_like(activity.rates[-1])),
            spikes=(*activity.spikes[:-1], DenseSpikes(none.expand(steps, *none.shape))),
            membranes=over_time if membranes else None,
            readout=readout,
        )

    def _with_dropped(self, number: int, layer: SpikingLayer, dropped: torch.Tensor | None) -> SpikingLayer:
        """The layer with neurons dropped; what kept neurons send it, from below and from itself, is scaled."""
        scale = self._scale
        values, recurrent, (observer, of_recurrent) = layer.values, layer.recurrent, layer.observers
        if recurrent is not None and dropped is not None:
            recurrent = replaced(recurrent, values=recurrent.values * scale)
            of_recurrent = of_recurrent and _of_scaled(of_recurrent, scale)
        if number:
            values = values * scale
            observer = observer and _of_scaled(observer, scale)
        observers = observer, of_recurrent
        return replaced(layer, values=values, dropped=dropped, recurrent=recurrent, observers=observers)

    def _synapses(
        self, inputs: torch.Tensor, pairs: Sequence[Pair], recurrents: Sequence[G2GLinear | None], activity: Activity
    ) -> Synapses:
        """What the synaptic operations of a run that called the modules are counted from."""
        weights = [[connection.weights()] for connection, _ in pairs]
        borders: list[Border | None] = [None] * self.depth
        for number, recurrent in enumerate(recurrents):
            if recurrent is not None:
                weights[number].append(recurrent.weights())
                spikes = activity.spikes[number].dense().detach()[-1]
                borders[number] = Border(None, spikes, torch.zeros_like(spikes[0]))
        return Synapses(inputs, self.T if inputs.dim() == 2 else None, weights, borders)

    def _check_form(self, state: StackState) -> None:
        """Raises unless there is one entry per layer, each a tensor, several or None."""
        if type(state) not in (tuple, list):
            raise TypeError(
                f"state is a {type(state).__name__}, not a tuple of the layers' states; give activity.state of a run, "
                "or what step(x, state) returned"
            )
        if len(state) != self.depth:
            raise ValueError(f"state is of {len(state)} layers, this stack has {self.depth}")
        for number, before in enumerate(state):
            tensors = before if type(before) in (tuple, list) else (before,)
            if before is not None and not all(isinstance(each, torch.Tensor) for each in tensors):
                raise TypeError(f"state of layer {number} is a {type(before).__name__}, not a tensor or several")

    def _in_turn(
        self,
        x: torch.Tensor,
        pairs: Sequence[Pair],
        recurrents: Sequence[G2GLinear | None],
        dropped: Sequence[torch.Tensor | None] | None,
    ) -> list[torch.Tensor]:
        """The spikes [T, B, N] of each layer, by calls of its modules. A held input passes the first connection once.

        Connections receive what is sent to them: with dropout, spikes divided by 1 − ``dropout``. A recurrent one is
        called at every step but the first, its neurons take steps.
        """
        steps = self.T if x.dim() == 2 else None
        scale = 1.0 if dropped is None else self._scale
        trains: list[torch.Tensor] = []
        self.calls_layers = True
        try:
            of_layers = [None] * self.depth if dropped is None else dropped
            for number, ((connection, neurons), of_layer) in enumerate(zip(pairs, of_layers, strict=True), 1):
                current = _output_of(f"fc{number}", connection, x, (*x.shape[:-1], None))
                if steps is not None:
                    current, steps = current.expand(steps, *current.shape), None
                if of_layer is not None:
                    check_dropped(f" of layer {number - 1}", of_layer, tuple(current.shape[1:]))
                    current = current.masked_fill(of_layer, 0)  # hooks of the neurons see them silent
                recurrent = recurrents[number - 1]
                if recurrent is None:
                    spikes = _output_of(f"lif{number}", neurons, current, current.shape)
                    if of_layer is not None:
                        spikes = spikes.masked_fill(of_layer, 0)
                else:
                    factor = 1.0 if of_layer is None else scale
                    spikes = _steps_in_turn(f"rec{number}", recurrent, neurons, current, of_layer, factor)
                trains.append(spikes)
                x = spikes if dropped is None else spikes * scale
        finally:
            self.calls_layers = False
        return trains

    def register_activity_hook(self, hook: ActivityHook) -> RemovableHandle:
        """Calls ``hook(inputs, activity)`` after every :meth:`simulate`, until the handle's ``remove()``."""
        handle = RemovableHandle(self._activity_hooks)
        self._activity_hooks[handle.id] = hook
        return handle

    def step(self, x: torch.Tensor, state: StackState | None = None) -> tuple[torch.Tensor, StackState]:
        """Runs the stack for one time step; T steps give the spikes of :meth:`simulate`.

        For online input and recurrent use. Over a whole sequence :meth:`simulate` computes the same, faster.

        Args:
            x: inputs of this step [B, D].
            state: what the last step returned, or ``activity.state`` of a run; None at the first.

        Returns:
            output spikes of this step [B, C], or the membranes that the readout is taken from; and the state.
        """
        befores: tuple[NeuronState | None, ...] = (None,) * self.depth if state is None else state
        if state is not None:
            self._check_form(state)
        recorders = [hook for hook in self._activity_hooks.values() if isinstance(hook, OwnHook)]
        if not recorders:
            output, _, afters = self._one_step(x, befores)
            return output, afters
        self.calls_layers = True  # what they do is recorded here
        try:
            output, trains, afters = self._one_step(x, befores)
        finally:
            self.calls_layers = False
        self._call(recorders, x, activity_of([spikes[None] for spikes in trains], None, differentiable=False), state)
        return output, afters

    def _one_step(
        self, x: torch.Tensor, befores: Sequence[NeuronState | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor], StackState]:
        """The output of one step, the spikes [B, N] of each layer, and the states after it."""
        trains, afters = [], []
        layers = zip(self.layers(), self.recurrents(), befores, strict=True)
        for number, ((connection, neurons), recurrent, before) in enumerate(layers, 1):
            _check_steps_of(f"lif{number}", neurons)
            current = connection(x)
            states = (before,) if isinstance(before, torch.Tensor) else before
            if recurrent is not None and states is not None:
                check_states(states, neurons.population, tuple(current.shape))  # a sum would broadcast
                current = current + recurrent(spikes_of(states[-1], neurons.population).to(current.dtype))
            if number == self.depth and self.readout != "counts":
                _, last = neurons_step(current, states, neurons.population.integrating())
                x, after = last[-1], last[0] if len(last) == 1 else last
                trains.append(torch.zeros_like(x))
            else:
                x, after = neurons.step(current, before)
                trains.append(x)
            afters.append(after)
        return x, trains, tuple(afters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [B, D] held for T steps, or [T, B, D] → spike counts of the output neurons, or their readout, [B, C]
        (the logits).
        """
        if not isinstance(x, torch.Tensor) and (node := symbolic_call(self, x)) is not None:
            return node
        activity = self.simulate(x)  # not its property: torch.export of PyTorch 2.6 leaves that out of its graph
        return activity.counts if activity.readout is None else activity.readout

    def to_networkx(self) -> Any:
        """The whole network as a ``networkx.DiGraph`` (:func:`g2gnet.graphs.to_networkx`)."""
        return graphs.to_networkx(self.layers(), self.recurrents())

    def _repr_html_(self) -> str:
        return graphs.to_html(self.layers(), self.recurrents())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "steps"] = self.steps

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # it is no parameter: what was saved without it is loaded, and what was saved with another one is not
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "steps"
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        try:
            saved = int(as_integers(key, torch.as_tensor(state_dict.get(key, self.T))))
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if saved != self.T:
            error_msgs.append(
                f"{key}: saved by a network with {saved} time steps, this one has {self.T}; load it into one with "
                f"T={saved}, whose T can be changed afterwards, or remove {key!r} from the state"
            )


def _check_recurrent(number: int, connection: nn.Module, neurons: nn.Module, recurrent: Sequence[Any]) -> None:
    """Raises unless what follows the neurons of layer ``number`` is one recurrent connection of these neurons."""
    name, size = f"rec{number}", connection.out_features
    if len(recurrent) > 1 or not isinstance(recurrent[0], G2GLinear):
        what = " and ".join(type(each).__name__ for each in recurrent)
        raise TypeError(f"{name} is {what}; give one G2GLinear from the layer's neurons to themselves")
    (own,) = recurrent
    if (own.out_features, own.in_features) != (size, size):
        raise ValueError(f"{name} joins {own.in_features} neurons to {own.out_features}, but lif{number} has {size}")
    if own.bias is not None:
        raise ValueError(f"{name} has a bias; give G2GLinear(mask, bias=False): fc{number} has the layer's bias")
    if not isinstance(neurons, SpikingNeurons):
        raise TypeError(
            f"lif{number} is a {type(neurons).__name__}; a recurrent layer takes steps of the neurons of g2gnet"
        )


def _check_integrates(readout: str, connection: nn.Module, neurons: nn.Module, *recurrent: nn.Module) -> None:
    """Raises unless the last layer can have this readout."""
    if recurrent:
        raise ValueError(
            f"readout={readout!r} is of neurons that do not spike, but the last layer is recurrent; leave its "
            "recurrent connection out, or give readout='counts'"
        )
    if not isinstance(neurons, SpikingNeurons):
        raise TypeError(
            f"readout={readout!r} is of the membranes of the neurons of g2gnet, and the last are "
            f"{type(neurons).__name__}; give readout='counts'"
        )


def _why_called(pairs: Sequence[Pair], recurrents: Sequence[G2GLinear | None]) -> str | None:
    """What would be left out unless the modules are called; None: nothing. (It costs every step some microseconds.)"""
    if (
        every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    ):
        return "hooks are registered for every module"
    for number, (connection, neurons) in enumerate(pairs, 1):
        reason = _why_call(connection, G2GLinear.forward)
        if reason is not None:
            return f"fc{number} {reason}"
        reason = _why_call(neurons, SpikingNeurons.forward)
        if reason is not None:
            return f"lif{number} {reason}"
    for number, recurrent in enumerate(recurrents, 1):
        reason = None if recurrent is None else _why_call(recurrent, G2GLinear.forward)
        if reason is not None:
            return f"rec{number} {reason}"
    return None


def _why_call(module: nn.Module, forward: Callable) -> str | None:
    """What of a module only a call would run; ``forward`` is the one that needs none."""
    if (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) and _has_hooks(module):
        return "carries hooks"
    if type(module).forward is not forward or "forward" in module.__dict__:
        return f"({type(module).__name__}) has a forward of its own"
    return None


def check_input(x: object) -> None:
    """Raises TypeError unless the input of a stack is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"the input is a {type(x).__name__}, not a tensor")


def _steps_in_turn(
    name: str,
    recurrent: G2GLinear,
    neurons: SpikingNeurons,
    current: torch.Tensor,
    dropped: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The spikes [T, B, N] of a recurrent layer by calls of its connection and steps of its neurons.

    Raises:
        TypeError: if a hook on the neurons, or a forward of their own, would be left out.
    """
    lif = name.replace("rec", "lif")
    reason = _why_call(neurons, SpikingNeurons.forward)
    if reason is not None:
        raise TypeError(
            f"{lif} {reason}, which would not be run: the neurons of a recurrent layer take steps. Use {name} for "
            "hooks, or take steps with SpikingStack.step"
        )
    state: NeuronState | None = None
    spikes: list[torch.Tensor] = []
    for now in current.unbind():
        if spikes:
            now = now + _output_of(name, recurrent, spikes[-1] * scale, now.shape)
        train, state = neurons.step(now, state)
        spikes.append(train if dropped is None else train.masked_fill(dropped, 0))
    return torch.stack(spikes)


def _of_scaled(observer: Observer, scale: float) -> Observer:
    """An observer that is told of scaled inputs where the weights are scaled instead."""
    return lambda x, y: observer(x * scale, y)


def _as_one(state: NeuronState | None) -> torch.Tensor | None:
    """The states of a layer's neurons as one tensor [states, B, N]."""
    if state is None:
        return None
    return state.unsqueeze(0) if isinstance(state, torch.Tensor) else torch.stack(tuple(state))


def _has_hooks(module: nn.Module) -> bool:
    every = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(not isinstance(hook, OwnHook) for hooks in every for hook in hooks.values())


def _check_steps_of(name: str, neurons: nn.Module) -> None:
    """Raises TypeError unless a step of these neurons is one of their run, and says what hooks do not see."""
    kind = type(neurons)
    step = getattr(kind, "step", None)
    if step is None:
        raise TypeError(f"{name} ({kind.__name__}) has no step(current, state); give it one, or call simulate")
    if step is SpikingNeurons.step and (kind.forward is not SpikingNeurons.forward or "forward" in neurons.__dict__):
        raise TypeError(
            f"{name} ({kind.__name__}) has a forward of its own, but not a step that follows it; give it a "
            "step(current, state), or call simulate"
        )
    if _has_hooks(neurons) and not is_traced():
        _say_that_steps_pass_by(name)


def _output_of(name: str, module: nn.Module, x: torch.Tensor, shape: Sequence[int | None]) -> torch.Tensor:
    """The output of a module of the stack; raises TypeError unless it is a tensor of that shape (None: any size)."""
    output = module(x)
    is_tensor = isinstance(output, torch.Tensor)
    if is_tensor and len(output.shape) == len(shape):
        sizes = zip(output.shape, shape, strict=True)
        if all([expected is None or size == expected for size, expected in sizes]):
            return output
    what = f"a tensor {list(output.shape)}" if is_tensor else f"a {type(output).__name__}"
    sides = ", ".join("N" if size is None else str(size) for size in shape)
    raise TypeError(f"{name} ({type(module).__name__}) returned {what}; in a stack it must return a tensor [{sides}]")


@functools.cache
def _say_that_layers_are_called(reason: str) -> None:
    logger.warning("a SpikingStack calls its layers in turn, which is slower than one call for all: %s", reason)


@functools.cache
def _say_that_steps_pass_by(name: str) -> None:
    logger.warning("hooks on %s are not run by SpikingStack.step, which calls its step; simulate runs them", name)
