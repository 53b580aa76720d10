"""Networks of spiking populations, joined by connections with delays: all time steps in one call, or step by step."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity, Connection, Population
from g2g_kernels.choices import check_choice
from g2g_kernels.dispatch import Choice
from g2g_kernels.mask.groups import as_integers
from g2g_kernels.numbers import COUNT, Number
from g2g_kernels.ops.g2g_stack import (
    Call,
    Delay,
    DenseSpikes,
    NeuronState,
    Spikes,
    StackState,
    activity_of,
    choose,
    run,
)
from g2g_kernels.ops.g2g_stack.activity import as_one, check_state_form, named
from g2g_kernels.ops.g2g_stack.delays import reaches_of
from g2g_kernels.ops.g2g_stack.images import Images, through
from g2g_kernels.ops.g2g_stack.population import ProductObserver
from g2g_kernels.tracing import is_transformed, replaced
from g2gnet.base.hooks import OwnHook, has_hooks
from g2gnet.called_layers import CalledModules, NormedModule, step_of_called
from g2gnet.convolution import G2GConv2d
from g2gnet.images import images_of, normed
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons
from g2gnet.projections import NumberedProjection, PopulationGraph, Projection
from g2gnet.selections import Selection, shown_of, silent_too
from g2gnet.weights.few_bits import check_bits

#: a dropped neuron is drawn by 16 random bits
DRAWS = 1 << 16
#: at least one of the draws keeps a neuron
DROPOUT = Number(0, 1 - 1 / DRAWS)
#: what the output answers: spike counts; or the last, mean or largest membrane of neurons that do not spike
READOUTS = ("counts", "last", "mean", "max")
#: called with the inputs and the activity of a run over all time steps, and with the state that it continues
ActivityHook = Callable[[torch.Tensor, Activity, StackState | None], None]
#: what one population (or the input) sent over some steps and samples, [..., N], or spikes whose ``dense()`` gives that
SpikeTrain = torch.Tensor | Spikes


class SpikingNetwork(PopulationGraph):
    """Populations of spiking neurons, and projections between them with delays.

    The current of population p is I_p[t] = Σ_k (W_k·S_src(k)[t − d_k] + b_k), over the projections k to it. Before the
    first step S is 0, or what the state continues; the input is 0 before it. Biases act at every step. Gradients pass
    through spikes by the surrogate.

    One call (:func:`g2g_kernels.g2g_stack`) reads all weights and parameters; :meth:`explain` says which way it runs.
    Modules are called in turn, on their own ``backend``, where hooks on one of them, a ``forward`` of its own or
    another module in its place would otherwise not run. That is slower, gives the same results, and is logged once.

    Args:
        populations: their neurons by name. Sizes follow from the projections.
        projections: between them; two may join the same pair. The connection from a to b is the module ``a_to_b``, the
            next one of the same pair ``a_to_b_2``; its delays are ``a_to_b_delay``, a buffer, or a parameter if they
            are learned (:meth:`delays`). Or a dict, whose keys name the connections.
        output: the name of the population whose counts or readout are the answer.
        T: number of time steps for which inputs [B, D] are held.
        dropout: probability with which a neuron (but of the output) is dropped in a sample, in training mode: it is
            silent at all steps, and what the others send is divided by the probability that they are kept.
            :meth:`step` drops nothing.
        input_shape: (C, H, W) of images, if sizes are needed before the first of them comes (delays that differ between
            neurons, parameters of each neuron, :meth:`drop`); None: that of the first.
        readout: what the network returns: ``"counts"``, the output's spikes over all steps. With ``"last"``,
            ``"mean"`` or ``"max"`` its neurons neither spike nor are reset, whatever their threshold and reset, and the
            answer is their membrane after the last step, or its mean or largest value over all steps. Their spikes,
            counts and rates are 0. ``"last"`` costs what counts do; for the others operators run one after the other.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Raises:
        ValueError: for names that are unknown or taken, sizes that do not match, a population that nothing reaches, a
            cycle without delay, an unknown readout, or one of a population that sends spikes; T below 1, or a dropout
            outside [0, 1 − 2⁻¹⁶].
        TypeError: for connections or neurons that are no such modules.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> from g2gnet import LIF, AdLIF
        >>> def joined(into, out, **options):
        ...     return G2GLinear(BlockMask.sample(GroupLayout(out), GroupLayout(into), block_size=4), **options)
        >>> net = SpikingNetwork(
        ...     {"l4": LIF(), "l23": AdLIF(), "out": LIF()},
        ...     [
        ...         Projection("input", "l4", joined(64, 32)),
        ...         Projection("l4", "l23", joined(32, 48), delay=2),
        ...         Projection("l23", "l4", joined(48, 32, bias=False), delay=3),
        ...         Projection("l23", "out", joined(48, 10)),
        ...     ],
        ...     output="out",
        ... )
        >>> activity = net.simulate(torch.rand(20, 5, 64))
        >>> activity.counts.shape, activity.rates["l23"].shape
        (torch.Size([5, 10]), torch.Size([48]))
    """

    #: whether :meth:`simulate` or :meth:`step` is calling the modules at the moment
    calls_layers = False
    # what no population or connection may be called
    backend: str | None = None
    _quantize: int | None = None

    def __init__(
        self,
        populations: Mapping[str, nn.Module],
        projections: Sequence[Projection] | Mapping[str, Projection],
        output: str,
        T: int = 50,  # noqa: N803  (the field's name for it)
        dropout: float = 0.0,
        readout: str = "counts",
        backend: str | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        check_choice("readout", readout, READOUTS)
        steps = COUNT.check("T", T)
        super().__init__(populations, projections, output, readout, input_shape)
        self._T, self.backend, self.dropout = steps, backend, dropout
        self._readout = readout
        self._activity_hooks: OrderedDict[int, ActivityHook] = OrderedDict()

    @property
    def T(self) -> int:  # noqa: N802
        """The time steps for which inputs [B, D] are held; it may be changed, unless samples unfold over time."""
        return self._T

    @T.setter
    def T(self, value: int) -> None:  # noqa: N802
        steps, fixed = COUNT.check("T", value), self._fixed_steps()
        if fixed is not None and steps != fixed:
            raise ValueError(
                f"T={steps} would change nothing: samples of this network unfold over {fixed} steps (input_order); "
                f"make a network with T={steps}"
            )
        self._T = steps

    def _fixed_steps(self) -> int | None:
        """The time steps that every sample has; None if they may differ."""
        return None

    @property
    def steps(self) -> torch.Tensor:
        """``T`` as it is saved, int64 []. ``torch.func.functional_call`` sets it for the length of a call."""
        return torch.tensor(self.T)

    @steps.setter
    def steps(self, value: torch.Tensor) -> None:
        self.T = int(as_integers("steps", value))

    @property
    def readout(self) -> str:
        """What the output answers; its neurons were made for it, so it stays."""
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
    def quantize(self) -> int | None:
        """The bits of the weights that the network computes with, 8 or 4, or None for those of its parameters.

        It may be changed, as before training goes on; the parameters stay floats. Weights are rounded to whole numbers
        times one scale for all that reach a population from others, and another one for those from the input, as
        :func:`g2gnet.interop.quantize` rounds them. Gradients pass by the rounding, but for weights that it clips."""
        return self._quantize

    @quantize.setter
    def quantize(self, bits: int | None) -> None:
        if bits is not None:
            check_bits("quantize", bits)
            for name, module in self.connections().items():
                if not isinstance(module, G2GLinear):
                    raise ValueError(
                        f"quantize={bits} rounds G2GLinear layers, and {name} is a {type(module).__name__}"
                    )
        self._quantize = bits
        modules: Any = self._modules
        for projections in self._to:
            for of_input in (True, False):
                group = [modules[each.name] for each in projections if (each.source < 0) == of_input]
                group = [each for each in group if isinstance(each, G2GLinear)]
                for module in group:
                    module.bits, module.scaled_with = bits, tuple([each for each in group if each is not module])

    @property
    def _drops(self) -> int:
        """In how many of ``DRAWS`` equally likely draws a neuron is dropped."""
        return round(self.dropout * DRAWS)

    @property
    def _scale(self) -> float:
        """What the output of kept neurons is multiplied by."""
        return DRAWS / (DRAWS - self._drops)

    def drop(self, samples: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Draws the neurons that are dropped in each sample: bool [samples, N] for each population but the output.

        From ``generator``, or PyTorch's global one, on its own device. Each has 16 random bits: the probability is
        ``dropout``, rounded to a multiple of 2⁻¹⁶.
        """
        device = next(self.parameters()).device if generator is None else generator.device
        least = self._drops - DRAWS // 2
        drawn = []
        for neurons in self.sizes[: self.depth - 1]:
            if is_transformed():  # vmap draws for every element, but not into a tensor that is there already
                shape = samples, neurons
                drawn.append(torch.rand(shape, generator=generator, device=device) < self._drops / DRAWS)
                continue
            size = samples * neurons
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
        membranes: bool | Selection = False,
        batch_first: bool | None = None,
        silenced: Selection | None = None,
        truncate: int | None = None,
    ) -> Activity:
        """Runs the network on inputs [B, D] held for T steps, or [T, B, D].

        Inputs over time may be a sparse COO tensor without gradient, of input events. Networks in lists that run by
        events take them as they are. Elsewhere a large one is made dense some steps at a time, as a run in chunks.

        A run may start from a state and gives the last one, in the form of :meth:`step`: two halves in turn are the
        whole, with gradients through the state. If that is detached, this is truncated backpropagation.

        Time comes first, unless ``batch_first`` says otherwise, and the length of a sequence may differ from the
        network's ``T``. What the activity has over time is [T, B, N] in any case.

        Args:
            state: ``activity.state`` of the run that this one continues, or what :meth:`step` returned; None, for all
                or for one population: its states are 0.
            chunk: how many steps are computed at a time. The backward pass computes them again, from the states between
                chunks: the same gradients, and memory that grows with T by spikes and those states only.
            dropped: in training mode with ``dropout``, what :meth:`drop` returns; None: drawn here, once for all steps.
                A run that continues another drops the same neurons, and must be given them.
            spikes: whether the spikes over time have a gradient too (:func:`g2g_kernels.g2g_stack`).
            membranes: whether ``activity.membranes`` has the membranes over time [T, B, N] of every population, with a
                gradient. All neurons then take one step after the other, which is slower, and currents, spikes and
                membranes of all are in memory. Or by the name of a population the neurons, by number or bool [N], whose
                membranes it has, [T, B, n]; it has None for the other populations, which need no steps of their own.
                Networks in lists give them by events, at hardly a cost, under ``torch.no_grad()``.
            batch_first: whether inputs over time are [B, T, D]. None: they are [T, B, D]; where all samples have T
                steps (``sequence`` of a :class:`G2GNet`), inputs whose second dimension alone is T are refused.
            silenced: in any mode, by the name of a population the neurons that stay silent in this run, by number or
                bool [N], or bool [B, N], those of each sample. They send nothing, pass no gradient and their states are
                0; the others send what they would otherwise.
            truncate: K, truncated backpropagation in one call: at steps K, 2·K, … the neurons' states, and the spikes
                that were sent before and arrive later, are constants; values and inputs keep their gradients. Without
                it, gradients over thousands of steps may grow beyond floats, which ``backward`` then says. None:
                nothing is cut off.

        Returns:
            Activity: ``output`` [B, C], the output's spike counts or readout, rates, spikes and the last state.

        Raises:
            ValueError: if the inputs have another shape, or seem to have time second; if the state is not one of this
                network and these samples; for neurons that it does not have; for a chunk or ``truncate`` with
                spikes; for a state, one of these two, membranes or a readout of a network that calls its modules.
        """
        call = self._call(inputs, state, chunk, dropped, spikes, membranes, batch_first, silenced, truncate)
        if call.modules is None:
            activity = run(call, chunk)
        else:
            self.calls_layers = True
            try:
                activity = run(call, chunk)
            finally:
                self.calls_layers = False
        inputs = call.x
        if self._readout != "counts":
            activity = self._read(activity, len(inputs) if call.steps is None else call.steps, membranes)
        activity = named(activity, self.populations)
        if call.modules is None:
            self._count_norms()
        if self._activity_hooks:
            for hook in list(self._activity_hooks.values()):
                hook(inputs, activity, state)
        return activity

    def _count_norms(self) -> None:
        """Counts a batch of each norm that trains, as its module would."""
        for module in self._modules.values():
            if isinstance(module, nn.BatchNorm2d) and module.training and module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)

    def explain(
        self, inputs: torch.Tensor, state: StackState | None = None, chunk: int | None = None, **options: Any
    ) -> Choice:
        """Which way :meth:`simulate` would run with these arguments of its own, and why no way before it in the table
        does. It can be printed, and runs nothing.

        Example:
            >>> from g2gnet import G2GNet
            >>> print(G2GNet(64, 64, 10, block_size=8, backend="torch").explain(torch.rand(3, 64)))
            g2g_stack runs by reference
              not operators in turn: those of backend torch are the reference
              not modules in turn: no module has to be called
        """
        inputs = self._flat(inputs)
        if self.training and self._dropout and options.get("dropped") is None:  # draws nothing
            shapes = [(inputs.shape[-2], size) for size in self.sizes[: self.depth - 1]]
            options["dropped"] = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
        return choose(self._call(inputs, state, chunk, **options), chunk)

    def _call(
        self,
        inputs: torch.Tensor,
        state: StackState | None,
        chunk: int | None,
        dropped: Sequence[torch.Tensor] | None = None,
        spikes: bool = False,
        membranes: bool | Selection = False,
        batch_first: bool | None = None,
        silenced: Selection | None = None,
        truncate: int | None = None,
    ) -> Call:
        """A run as the operator takes it. What kept neurons send is scaled: the weights that it meets are."""
        inputs = self._time_first(inputs, batch_first if state is None else bool(batch_first))
        self.settle()
        of_populations = self._dropped(inputs, state, dropped) if self.training and self._dropout else None
        parts = {f"chunk={chunk}": chunk is not None, f"truncate={truncate}": truncate is not None}
        scale = 1.0 if of_populations is None else self._scale
        why = self.why_called()
        if why is not None:
            asked = {f"membranes={membranes!r:.40}": membranes, f"readout={self._readout!r}": self._readout != "counts"}
            asked |= {"a state": state is not None, **parts}
            if wrong := [what for what, is_asked in asked.items() if is_asked]:
                raise ValueError(
                    f"{wrong[0]} was given to a network whose modules are called in turn, and they return spikes only "
                    f"({why}); take single steps with step(x, state)"
                )
        states: Sequence[NeuronState | None] = (None,) * self.depth
        sent: Sequence[torch.Tensor | None] = (None,) * (self.depth + 1)
        if state is not None:
            states, sent = self.divided(state, inputs.shape[-2:-1])
        drops: Sequence[torch.Tensor | None] = of_populations or (None,) * self.depth
        if silenced is not None:
            drops = silent_too(drops, silenced, self._size_of(), inputs)
        populations = []
        for number, (name, gives) in enumerate(
            zip(self.populations, shown_of(membranes, self._size_of()), strict=True)
        ):
            neurons: Any = self._modules[name]
            # neurons of other people's have no record
            neurons = neurons.population if why is None else getattr(neurons, "population", None)
            if self._readout != "counts" and number + 1 == self.depth:
                neurons, gives = neurons.integrating(), gives if self._readout == "last" else True
            before = None if state is None else as_one(states[number])
            connections = self._connections(number, why is not None, scale)
            populations.append(Population(neurons, connections, drops[number], before, sent[number], gives))
        steps = self._T if inputs.dim() == 2 else None
        called = None if why is None else CalledModules(self, why, scale)
        return Call(
            inputs, tuple(populations), steps, sent[-1], self.backend, spikes, truncate=truncate, modules=called
        )

    def why_called(self, names: Iterable[str] | None = None) -> str | None:
        """What only calls of modules would run: of these, or of all, with the hooks of every module; None: nothing."""
        if names is None and (
            every_module._global_forward_hooks
            or every_module._global_forward_pre_hooks
            or every_module._global_backward_hooks
            or every_module._global_backward_pre_hooks
        ):
            return "hooks are registered for every module"
        modules: Any = self._modules if names is None else {name: self._modules[name] for name in names}
        for name, module in modules.items():
            hooks: Any = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            if (hooks or module._backward_pre_hooks) and has_hooks(module):
                return f"{name} carries hooks"
            forwards = (SpikingNeurons.forward,) if name in self.populations else _FORWARDS
            if type(module).forward not in forwards or "forward" in module.__dict__:
                remedy = " (G2GLinear.from_linear(linear) has not)" if isinstance(module, nn.Linear) else ""
                return f"{name} ({type(module).__name__}) has a forward of its own{remedy}"
        return None

    def check_uncalled(self, where: str) -> None:
        """Raises ValueError for what only calls of modules would run, which ``where`` has no form for."""
        if why := self.why_called():
            raise ValueError(
                f"{where} has no form for what calls of modules run ({why}); remove it, pruning by "
                "torch.nn.utils.prune.remove(layer, 'values'), of a dense convolution 'weight'"
            )

    def _connections(self, number: int, called: bool, scale: float = 1.0) -> tuple[Connection, ...]:
        """The connections to a population: modules that are ``called``, or weights, those of other populations times
        ``scale``."""
        connections: tuple[Connection, ...] = ()
        for projection in self._to[number]:
            module: Any = self._modules[projection.name]
            delay = self.delay_of(projection) if projection.most else None
            path, source = self._paths[projection.name], (*self.populations, "input")[projection.source]
            norm: Any = self._modules.get(f"{projection.name}_norm")
            if called:
                bias: Any = getattr(module, "bias", True) if norm is None else True
                images = images_of(path, module, self.shapes[source]) if path.takes_images else None
                if norm is not None:
                    module = NormedModule(module, norm)
                elif path.kind == "pool":
                    images = images and replaced(images, before=())  # which the module does
                each = Connection("module", module, None, projection.source, delay, bias, None, projection.onto, images)
            elif path.kind != "linear":
                each = self._of_images(projection, module, norm, delay, scale if projection.source >= 0 else 1.0)
            else:
                if module.bits != self._quantize:
                    raise ValueError(
                        f"{projection.name} computes with bits={module.bits}, and the network with "
                        f"quantize={self._quantize}: it was replaced or is another network's, too; set `quantize` again"
                    )
                (values, mask), observer = module.observed_weights()
                if scale != 1 and projection.source >= 0:
                    values, observer = values * scale, observer and _of_scaled(observer, scale)
                images = images_of(path, module, self.shapes[source]) if path.takes_images else None
                own = projection.source, delay, module.bias, observer, projection.onto, images
                each = Connection("linear", values, mask, *own)
            connections = *connections, each
        return connections

    def behind_pools(self, projection: NumberedProjection, train: SpikeTrain) -> SpikeTrain:
        """What reaches the weights of a projection of what its source sent, without gradient."""
        path = self._paths[projection.name]
        if not path.before or path.kind == "pool":
            return train
        sent = train.detach() if isinstance(train, torch.Tensor) else train.dense().detach()
        shape: Any = self.shapes[(*self.populations, "input")[projection.source]]
        return through(Images(shape, path.before), sent, lambda x: x, flat=False)

    def _of_images(
        self,
        projection: NumberedProjection,
        module: Any,
        norm: nn.BatchNorm2d | None,
        delay: Delay | None,
        scale: float,
    ) -> Connection:
        """The connection of a convolution, its norm folded into it where that does not train, or of a pool."""
        path, source = self._paths[projection.name], (*self.populations, "input")[projection.source]
        values: Any = None
        bias = of_norm = None
        if path.kind == "convolution":
            values, bias = module.kernels(), module.bias
            values = values if scale == 1 else values * scale
            if norm is not None:
                values, bias, of_norm = normed(values, bias, norm)
        elif scale != 1:
            values = torch.tensor(scale, device=next(self.parameters()).device)
        images = images_of(path, module, self.shapes[source], of_norm)
        own = projection.source, delay, bias, None, projection.onto, images
        return Connection(path.kind, values, None, *own)

    def _time_first(self, inputs: torch.Tensor, batch_first: bool | None) -> torch.Tensor:
        """Inputs [B, D] or [T, B, D], as :meth:`simulate` takes them."""
        if not isinstance(inputs, torch.Tensor):
            check_input(inputs)
        if inputs.dim() > 2 or self._shapes is None:
            inputs = self._flat(inputs)
        if inputs.dim() != 3:
            return inputs
        if batch_first:
            return inputs.transpose(0, 1)
        steps, (first, second, _) = self._fixed_steps(), inputs.shape
        if batch_first is None and steps is not None and first != steps == second:
            raise ValueError(
                f"the input is {list(inputs.shape)}, of {first} steps if time is first, and samples of this network "
                f"have {steps}; give batch_first=True if time is second, batch_first=False if it is first, or call "
                "predict(samples), which standardises and encodes them, too"
            )
        return inputs

    def _dropped(
        self, inputs: torch.Tensor, state: StackState | None, dropped: Sequence[torch.Tensor] | None
    ) -> list[torch.Tensor | None]:
        """The neurons that each population drops."""
        if state is not None and dropped is None:
            raise ValueError(
                "a run that continues from a state drops the neurons that were dropped before it: call "
                f"dropped = net.drop({inputs.shape[-2]}) once, and give it to every part of the run"
            )
        drops = [*(self.drop(inputs.shape[-2]) if dropped is None else dropped), None]
        if len(drops) != self.depth:
            raise ValueError(
                f"dropped is of {len(drops) - 1} populations, but {self.depth - 1} can drop neurons; give what "
                f"drop({inputs.shape[-2]}) returns"
            )
        return drops

    def divided(
        self, state: StackState | None, batch: Sequence[int]
    ) -> tuple[Sequence[NeuronState | None], list[torch.Tensor | None]]:
        """The states of the neurons; and what each population, and at the end the input, sent before; batch: (B,)."""
        if state is None:
            return (None,) * self.depth, [None] * (self.depth + 1)
        # how many steps of each population, and at the end of the input, are part of a state
        delays = [(each.source, self.delay_of(each)) for each in self._projections]
        reaches = reaches_of(delays, [*self._models().values()])
        senders = zip((*self.populations, "the input"), reaches, self.sizes, strict=True)
        check_state_form(state, self.depth, {name: (reach, *batch, size) for name, reach, size in senders if reach})
        rest = iter(state[self.depth :])
        return state[: self.depth], [next(rest) if reach else None for reach in reaches]  # type: ignore[misc]

    def _read(self, activity: Activity, steps: int, membranes: bool | Selection) -> Activity:
        """The activity of a run whose output integrates: its readout, and no spikes."""
        states, over_time = activity.states, activity.membranes
        assert states is not None
        if self.readout == "last":
            readout = states[-1][-1]
        else:
            assert over_time is not None
            membrane = over_time[-1]
            assert membrane is not None
            readout = membrane.mean(0) if self.readout == "mean" else membrane.amax(0)
            *others, wanted = shown_of(membranes, self._size_of())
            own = membrane[..., list(wanted)] if isinstance(wanted, tuple) else membrane if wanted else None
            over_time = (*over_time[:-1], own) if wanted or any(others) else None
        none = torch.zeros_like(activity.counts)
        return replaced(
            activity,
            counts=none,
            rates=(*activity.rates[:-1], torch.zeros_like(activity.rates[-1])),
            spikes=(*activity.spikes[:-1], DenseSpikes(none.expand(steps, *none.shape))),
            membranes=over_time,
            readout=readout,
        )

    def register_activity_hook(self, hook: ActivityHook) -> RemovableHandle:
        """Calls ``hook(inputs, activity, state)`` after every :meth:`simulate`, until the handle's ``remove()``."""
        handle = RemovableHandle(self._activity_hooks)
        self._activity_hooks[handle.id] = hook
        return handle

    def step(self, x: torch.Tensor, state: StackState | None = None) -> tuple[torch.Tensor, StackState]:
        """Runs the network for one time step; T steps give the spikes of :meth:`simulate`.

        For online input and recurrent use. Over a whole sequence :meth:`simulate` computes the same, faster.

        Args:
            x: inputs of this step [B, D].
            state: what the last step returned, or ``activity.state`` of a run; None at the first.

        Returns:
            output spikes of this step [B, C], or the membranes that the readout is taken from; and the state.
        """
        check_input(x)
        x = self._flat(x)
        self.settle()
        states, sent = self.divided(state, x.shape[-2:-1])
        recorders = [hook for hook in self._activity_hooks.values() if isinstance(hook, OwnHook)]
        self.calls_layers = bool(recorders)  # what they do is recorded here
        try:
            populations = []
            for number, module in enumerate(self.neurons().values()):
                record: Any = getattr(module, "population", None)
                before: Any = states[number]
                before = (before,) if isinstance(before, torch.Tensor) else before
                populations.append(
                    Population(record, self._connections(number, called=True), None, before, sent[number])
                )
            call = Call(x[None], tuple(populations), before=sent[-1])
            output, trains, after = step_of_called(call, self, self._readout == "counts")
        finally:
            self.calls_layers = False
        for hook in recorders:
            hook(x[None], activity_of(trains, None, differentiable=False), state)
        return output, after

    def forward(self, x: torch.Tensor, *, batch_first: bool | None = None) -> torch.Tensor:
        """Inputs [B, D] held for T steps, or [T, B, D] → logits [B, C]: the output's spike counts, or its readout.
        ``batch_first`` as for :meth:`simulate`."""
        return answer(self.simulate(x, batch_first=batch_first))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "steps"] = self.steps

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        *_, unexpected_keys, error_msgs = rest
        # a state without it is loaded, one with another number is not
        super()._load_from_state_dict(state_dict, prefix, *rest)
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


#: of modules that connections of operators stand for
_FORWARDS = (
    G2GLinear.forward, G2GConv2d.forward, nn.MaxPool2d.forward, nn.AvgPool2d.forward, nn.BatchNorm2d.forward,
    nn.Sequential.forward,
)  # fmt: skip


def answer(activity: Activity) -> torch.Tensor:
    """Its output. (By no property: torch.export of PyTorch 2.6 leaves that out of its graph.)"""
    return activity.counts if activity.readout is None else activity.readout


def check_input(x: object) -> None:
    """Raises TypeError unless the input of a network is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"the input is a {type(x).__name__}, not a tensor")


def _of_scaled(observer: ProductObserver, scale: float) -> ProductObserver:
    """An observer that is told of scaled inputs where the weights are scaled instead."""
    return lambda x, y: observer(x * scale, y)
