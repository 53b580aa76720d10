"""A stack of spiking layers, each a connection and its neurons: all time steps in one call, or step by step."""

import functools
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity, SpikingLayer, g2g_stack
from g2g_kernels.groups import as_integers, whole_number
from g2gnet import graphs
from g2gnet.layers import G2GLinear
from g2gnet.neurons import NeuronState, SpikingNeurons

logger = logging.getLogger("g2gnet")

#: called with the inputs and the activity of a run over all time steps
ActivityHook = Callable[[torch.Tensor, Activity], None]
#: the state of every layer's neurons, from input to output
StackState = tuple[NeuronState, ...]


class SpikingStack(nn.Module):
    """Connections and neurons ``fc1``, ``lif1``, ``fc2``, ``lif2``, …, each layer's spikes the next one's inputs.

    Args:
        layers: pairs (connection, neurons), from input to output. Each layer has its own model, reset and surrogate.
        T: number of time steps for which inputs [B, D] are held.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        dropout: probability with which a hidden neuron is dropped in a sample, in training mode: it stays silent at all
            steps of that sample, and the output of the others is divided by 1 − ``dropout``. For :meth:`simulate`;
            :meth:`step` drops nothing.

    Raises:
        ValueError: for T below 1, a dropout outside [0, 1), no layers, or sizes that do not match.
    """

    def __init__(
        self,
        layers: Sequence[tuple[G2GLinear, SpikingNeurons]],
        T: int = 50,  # noqa: N803  (the field's name for it)
        backend: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        if not layers:
            raise ValueError("layers is empty; give at least one pair of a G2GLinear and its neurons")
        for number, ((lower, _), (upper, _)) in enumerate(itertools.pairwise(layers), 1):
            if lower.out_features != upper.in_features:
                raise ValueError(
                    f"fc{number} has {lower.out_features} outputs, but fc{number + 1} {upper.in_features} inputs"
                )
        self.T = whole_number("T", T)
        self.backend = backend
        self.dropout = dropout
        self.depth = len(layers)
        self._activity_hooks: OrderedDict[int, ActivityHook] = OrderedDict()
        for number, (connection, neurons) in enumerate(layers, 1):
            self.add_module(f"fc{number}", connection)
            self.add_module(f"lif{number}", neurons)

    def layers(self) -> Iterator[tuple[G2GLinear, SpikingNeurons]]:
        """The pairs (connection, neurons), from input to output."""
        for number in range(1, self.depth + 1):
            yield getattr(self, f"fc{number}"), getattr(self, f"lif{number}")

    def drop(self, samples: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
        """Draws the hidden neurons that are dropped in each sample: bool [samples, N] for each hidden layer.

        From ``generator``, or PyTorch's global one, on its own device. Each has 16 random bits: the probability is a
        multiple of 2⁻¹⁶.
        """
        *hidden, (last, _) = self.layers()
        device = last.values.device if generator is None else generator.device
        least = round(self.dropout * (1 << 16)) - (1 << 15)
        drawn = []
        for connection, _ in hidden:
            size = samples * connection.out_features
            # four numbers per draw: PyTorch's own bernoulli_ takes five times as long on a CPU
            words = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
            words.random_(-(1 << 63), None, generator=generator)
            drawn.append(words.view(torch.int16)[:size].view(samples, -1) < least)
        return drawn

    def simulate(
        self, inputs: torch.Tensor, dropped: Sequence[torch.Tensor] | None = None, *, spikes: bool = False
    ) -> Activity:
        """Runs the stack on inputs [B, D] held for T steps, or [T, B, D].

        Time comes first. The length of a sequence may differ from the stack's ``T``. But if the batch then has exactly
        ``T`` samples, the input is probably [B, T, D], and it is refused. If both are ``T``, the order cannot be
        checked, and one warning says so.

        Args:
            inputs: for all layers.
            dropped: in training mode with ``dropout``, what :meth:`drop` returns; None: drawn here.
            spikes: whether the spikes over time have a gradient too (:func:`g2g_kernels.g2g_stack`).

        Returns:
            Activity: differentiable spike counts of the output [B, C] and firing rates of each layer, and the spikes.

        Raises:
            ValueError: if the inputs have another shape, or seem to have samples before time steps.
        """
        if inputs.dim() == 3 and not torch.compiler.is_compiling():  # where sizes may be unknown
            self._check_that_time_is_first(*inputs.shape[:2])
        layers = [
            SpikingLayer(*connection.weights(), connection.bias, neurons.population)
            for connection, neurons in self.layers()
        ]
        if self.training and self.dropout:
            dropped = self.drop(inputs.shape[-2]) if dropped is None else dropped
            scale = 1 / (1 - self.dropout)
            layers = [
                layer._replace(values=layer.values * scale if number else layer.values, dropped=of_layer)
                for number, (layer, of_layer) in enumerate(zip(layers, [*dropped, None], strict=True))
            ]
        steps = self.T if inputs.dim() == 2 else None
        activity = g2g_stack(inputs, layers, steps, self.backend, spikes)
        for hook in self._activity_hooks.values():
            hook(inputs, activity)
        return activity

    def _check_that_time_is_first(self, steps: int, samples: int) -> None:
        if samples != self.T:
            return
        if steps == self.T:
            _say_what_is_time(self.T)
            return
        raise ValueError(
            f"inputs of {steps} × {samples} vectors would be {steps} steps of {samples} samples, but T={self.T} here: "
            f"they seem to be [B, T, D]; give inputs.transpose(0, 1), or if they are [T, B, D] set T={steps}"
        )

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
            state: what the last step returned; None at the first.

        Returns:
            output spikes of this step [B, C], and the state.
        """
        befores: tuple[NeuronState | None, ...] = (None,) * self.depth if state is None else state
        if len(befores) != self.depth:
            raise ValueError(f"state is of {len(befores)} layers, this stack has {self.depth}")
        afters = []
        for (connection, neurons), before in zip(self.layers(), befores, strict=True):
            x, after = neurons.step(connection(x), before)
            afters.append(after)
        return x, tuple(afters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [B, D] held for T steps, or [T, B, D] → spike counts of the output neurons [B, C] (the logits)."""
        return self.simulate(x).counts

    def to_networkx(self) -> Any:
        """The whole network as a ``networkx.DiGraph`` (:func:`g2gnet.graphs.to_networkx`)."""
        return graphs.to_networkx(self.layers())

    def _repr_html_(self) -> str:
        return graphs.to_html(self.layers())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "T"] = torch.tensor(self.T)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # it is no parameter: what was saved without it is loaded, and what was saved with another one is not
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "T"
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


@functools.cache
def _say_what_is_time(steps: int) -> None:
    logger.warning(
        "inputs of %d × %d vectors are taken as [T, B, D], time first; [B, T, D] would look the same", steps, steps
    )
