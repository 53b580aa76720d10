"""A stack of spiking layers, each a connection and its neurons: all time steps in one call, or step by step."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity, SpikingLayer, g2g_stack
from g2g_kernels.choices import check_choice
from g2g_kernels.mask.groups import as_integers
from g2g_kernels.numbers import COUNT, Number
from g2g_kernels.ops.g2g_stack import (
    DenseSpikes,
    NeuronState,
    Recurrent,
    StackState,
    activity_of,
)
from g2g_kernels.ops.g2g_stack.layer import Observer
from g2g_kernels.tracing import is_transformed, replaced, symbolic_call
from g2gnet import graphs
from g2gnet.called_layers import OwnHook, Triple, spikes_of_called, step_of_called, synapses_of_called, why_called
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons
from g2gnet.stack_checks import check_input, check_layers, check_state_form

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
        check_layers(layers, readout)
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
        for connection, neurons, _ in self._triples():
            yield connection, neurons

    def recurrents(self) -> list[G2GLinear | None]:
        """The recurrent connection of each layer, or None."""
        return [recurrent for *_, recurrent in self._triples()]

    def _triples(self) -> list[Triple]:
        """(connection, neurons, recurrent connection or None) of each layer."""
        modules, numbers = self._modules, range(1, self.depth + 1)
        return [(modules[f"fc{n}"], modules[f"lif{n}"], modules.get(f"rec{n}")) for n in numbers]

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
        of_layers = self._of_layers(inputs, state, dropped) if self.training and self._dropout else None
        if chunk is not None and self._readout in ("mean", "max"):
            raise ValueError(
                f"chunk={chunk} does not keep the membranes of all steps that readout={self.readout!r} is taken from; "
                "leave it out, or make the stack with readout='last'"
            )
        steps = self.T if inputs.dim() == 2 else None
        triples = self._triples()
        reason = why_called(triples)
        if reason is None:
            layers = self._records(triples, of_layers, state, membranes)
            activity = g2g_stack(inputs, layers, steps, self.backend, spikes, chunk)
            if self._readout != "counts":
                activity = self._read(activity, len(inputs) if steps is None else steps, membranes)
        else:
            for asked, what in (
                (membranes, "membranes=True"),
                (self._readout != "counts", f"readout={self._readout!r}"),
                (state is not None, "a state"),
                (chunk is not None, f"chunk={chunk}"),
            ):
                if asked:
                    raise ValueError(
                        f"{what} was given to a stack whose layers are called in turn, and modules return spikes only "
                        f"({reason}); take single steps with step(x, state)"
                    )
            activity = self._of_called(inputs, triples, of_layers, steps, reason, spikes)
        if self._activity_hooks:
            self._call_hooks(list(self._activity_hooks.values()), inputs, activity, state)
        return activity

    def _of_layers(
        self, inputs: torch.Tensor, state: StackState | None, dropped: Sequence[torch.Tensor] | None
    ) -> list[torch.Tensor | None]:
        """The neurons that each layer drops."""
        if state is not None and dropped is None:
            raise ValueError(
                "a run that continues from a state drops the neurons that were dropped before it: call "
                f"dropped = stack.drop({inputs.shape[-2]}) once, and give it to every part of the run"
            )
        of_layers = [*(self.drop(inputs.shape[-2]) if dropped is None else dropped), None]
        if len(of_layers) != self.depth:
            raise ValueError(
                f"dropped is of {len(of_layers) - 1} layers, this stack has {self.depth - 1} hidden ones; give what "
                f"drop({inputs.shape[-2]}) returns"
            )
        return of_layers

    def _records(
        self,
        triples: Sequence[Triple],
        dropped: Sequence[torch.Tensor | None] | None,
        state: StackState | None,
        membranes: bool,
    ) -> list[SpikingLayer]:
        """The layers as the operator takes them. What kept neurons send is scaled: the weights that it meets are."""
        if state is not None:
            check_state_form(state, self.depth)
        records = []
        for number, (connection, neurons, recurrent) in enumerate(triples):
            (values, mask), observer = connection.observed_weights()
            population, gives, silent = neurons.population, membranes, None if dropped is None else dropped[number]
            if number and dropped is not None:
                values, observer = values * self._scale, observer and _of_scaled(observer, self._scale)
            joined, of_recurrent = None, None
            if recurrent is not None:
                (own, own_mask), of_recurrent = recurrent.observed_weights()
                if silent is not None:
                    own, of_recurrent = own * self._scale, of_recurrent and _of_scaled(of_recurrent, self._scale)
                joined = Recurrent(own, own_mask)
            if self._readout != "counts" and number + 1 == self.depth:
                population, gives = population.integrating(), membranes or self._readout != "last"
            before = None if state is None else _as_one(state[number])
            observers = observer, of_recurrent
            records.append(
                SpikingLayer(values, mask, connection.bias, population, silent, before, joined, gives, observers)
            )
        return records

    def _call_hooks(
        self,
        hooks: Sequence[ActivityHook],
        inputs: torch.Tensor,
        activity: Activity,
        state: Sequence[NeuronState | None] | None,
    ) -> None:
        """Calls hooks after a run that continues ``state``."""
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

    def _of_called(
        self,
        inputs: torch.Tensor,
        layers: Sequence[Triple],
        dropped: Sequence[torch.Tensor | None] | None,
        steps: int | None,
        reason: str,
        spikes: bool,
    ) -> Activity:
        """The activity of a run by calls of the modules (:mod:`g2gnet.called_layers`)."""
        self.calls_layers = True
        try:
            trains = spikes_of_called(inputs, layers, dropped, self._scale, steps, reason)
        finally:
            self.calls_layers = False
        activity = activity_of(trains, None, differentiable=spikes)
        return replaced(activity, synapses=synapses_of_called(inputs, layers, trains, steps))

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
            check_state_form(state, self.depth)
        recorders = [hook for hook in self._activity_hooks.values() if isinstance(hook, OwnHook)]
        self.calls_layers = bool(recorders)  # what they do is recorded here
        try:
            output, trains, afters = step_of_called(x, self._triples(), befores, self._readout == "counts")
        finally:
            self.calls_layers = False
        if not recorders:
            return output, afters
        self._call_hooks(
            recorders, x, activity_of([spikes[None] for spikes in trains], None, differentiable=False), state
        )
        return output, afters

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


def _of_scaled(observer: Observer, scale: float) -> Observer:
    """An observer that is told of scaled inputs where the weights are scaled instead."""
    return lambda x, y: observer(x * scale, y)


def _as_one(state: NeuronState | None) -> torch.Tensor | None:
    """The states of a layer's neurons as one tensor [states, B, N]."""
    if state is None:
        return None
    return state.unsqueeze(0) if isinstance(state, torch.Tensor) else torch.stack(tuple(state))
