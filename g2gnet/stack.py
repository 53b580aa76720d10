"""A stack of spiking layers, each a connection and its neurons: all time steps in one call, or step by step."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity, SpikingLayer, g2g_stack
from g2gnet.layers import G2GLinear
from g2gnet.neurons import NeuronState, SpikingNeurons

#: called with the inputs and the activity of a run over all time steps
ActivityHook = Callable[[torch.Tensor, Activity], None]
#: the state of every layer's neurons, from input to output
StackState = tuple[NeuronState, ...]


class SpikingStack(nn.Module):
    """Connections and neurons ``fc1``, ``lif1``, ``fc2``, ``lif2``, …, the spikes of one layer the inputs of the next.

    Args:
        layers: pairs (connection, neurons), from input to output. Model, reset and surrogate are each layer's own.
        T: number of time steps for which inputs [B, D] are held.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.

    Raises:
        ValueError: for T below 1, no layers, or sizes that do not follow one another.
    """

    def __init__(
        self,
        layers: Sequence[tuple[G2GLinear, SpikingNeurons]],
        T: int = 50,  # noqa: N803  (the field's name for it)
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if T < 1:
            raise ValueError(f"T={T} must be at least 1 time step")
        if not layers:
            raise ValueError("layers is empty; give at least one pair of a G2GLinear and its neurons")
        for number, ((lower, _), (upper, _)) in enumerate(itertools.pairwise(layers), 1):
            if lower.out_features != upper.in_features:
                raise ValueError(
                    f"fc{number} has {lower.out_features} outputs, but fc{number + 1} {upper.in_features} inputs"
                )
        self.T = T
        self.backend = backend
        self.depth = len(layers)
        self._activity_hooks: OrderedDict[int, ActivityHook] = OrderedDict()
        for number, (connection, neurons) in enumerate(layers, 1):
            self.add_module(f"fc{number}", connection)
            self.add_module(f"lif{number}", neurons)

    def layers(self) -> Iterator[tuple[G2GLinear, SpikingNeurons]]:
        """The pairs (connection, neurons), from input to output."""
        for number in range(1, self.depth + 1):
            yield getattr(self, f"fc{number}"), getattr(self, f"lif{number}")

    def simulate(self, inputs: torch.Tensor) -> Activity:
        """Runs the stack on inputs [B, D] held for T steps, or [T, B, D].

        Returns:
            Activity: differentiable spike counts of the output [B, C] and firing rates of each layer, and the spikes.

        Raises:
            ValueError: if the inputs have another shape.
        """
        layers = [
            SpikingLayer(*connection.weights(), connection.bias, neurons.population)
            for connection, neurons in self.layers()
        ]
        steps = self.T if inputs.dim() == 2 else None
        activity = g2g_stack(inputs, layers, steps, self.backend)
        for hook in self._activity_hooks.values():
            hook(inputs, activity)
        return activity

    def register_activity_hook(self, hook: ActivityHook) -> RemovableHandle:
        """Has ``hook(inputs, activity)`` called after every :meth:`simulate`; the handle's ``remove()`` ends that."""
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
