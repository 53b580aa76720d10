"""Stacks in NeuroBench, whose harness counts what hooks on layers and neurons see."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from g2g_kernels import Activity
from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons
from g2gnet.stack import SpikingStack

#: what a connection receives, from the inputs and the activity of a run
Received = Callable[[torch.Tensor, Activity], torch.Tensor]


def to_neurobench(stack: SpikingStack) -> Any:
    """The stack as a ``NeuroBenchModel``, in evaluation mode.

    It takes NeuroBench's batches [B, T, D], or samples [B, D] that are held for the stack's ``T`` steps, and returns
    the output spikes [B, T, C]. Synaptic operations are those of weights that are not zero, recurrent ones included;
    those of a held sample are counted once, since it passes the first connection once. NeuroBench's connection sparsity
    knows no layers but PyTorch's own: it is the mean of ``mask.sparsity()``, weighted by the sizes of layers.

    Raises:
        ValueError: for a stack whose output does not spike.
        ImportError: if NeuroBench is not installed.

    Example:
        >>> from g2gnet import G2GNet
        >>> model = to_neurobench(G2GNet(64, 32, 10, block_size=4))  # doctest: +SKIP
    """
    if stack.readout != "counts":
        raise ValueError(
            f"readout={stack.readout!r} has no output spikes, which NeuroBench takes; give readout='counts'"
        )
    try:
        from neurobench.hooks.layer import LayerHook
        from neurobench.hooks.neuron import NeuronHook
        from neurobench.models import NeuroBenchModel
    except ImportError as error:
        raise ImportError(f"this needs the package neurobench; pip install neurobench installs it ({error})") from error

    # The hooks read the activity of a run, which is one call for all layers: hooks on the modules would call these in
    # turn, and the neurons of a recurrent layer, which take steps, have no call that they could hang on.

    class ConnectionHook(LayerHook):
        """Records what a connection receives; NeuroBench counts with its weights as an ``nn.Linear``."""

        def __init__(self, connection: G2GLinear, received: Received) -> None:
            super().__init__(None)
            self.received = received
            self.layer = nn.Linear(connection.in_features, connection.out_features, bias=False)
            self.layer.weight = nn.Parameter(connection.dense_weight().detach(), requires_grad=False)
            self.register_hook()

        def register_hook(self) -> None:
            self.hook = stack.register_activity_hook(self.record)

        def record(self, inputs: torch.Tensor, activity: Activity) -> None:
            self.inputs.append((self.received(inputs, activity),))

    class PopulationHook(NeuronHook):
        """Records the spikes of a layer."""

        def __init__(self, number: int, neurons: SpikingNeurons) -> None:
            super().__init__(None, f"lif{number}")
            self.number, self.layer = number, neurons
            self.hook = stack.register_activity_hook(self.record)

        def record(self, inputs: torch.Tensor, activity: Activity) -> None:
            self.activation_outputs.append(activity.spikes[self.number - 1].dense())

    class StackModel(NeuroBenchModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = stack.eval()
            self.add_activation_module(SpikingNeurons)

        def __call__(self, batch: torch.Tensor) -> torch.Tensor:
            inputs = batch.transpose(0, 1) if batch.dim() == 3 else batch
            encode = getattr(stack, "encode", None)
            with torch.no_grad():
                activity = stack.simulate(inputs if encode is None else encode(inputs))
            return activity.spikes[-1].dense().transpose(0, 1)

        def __net__(self) -> SpikingStack:
            return stack

        def register_hooks(self) -> None:
            layers = zip(stack.layers(), stack.recurrents(), strict=True)
            for number, ((connection, neurons), recurrent) in enumerate(layers, 1):
                self.connection_hooks.append(ConnectionHook(connection, _from_below(number)))
                if recurrent is not None:
                    self.connection_hooks.append(ConnectionHook(recurrent, _from_itself(number)))
                self.activation_hooks.append(PopulationHook(number, neurons))

    return StackModel()


def _from_below(number: int) -> Received:
    """What layer ``number`` receives from the layer below."""
    if number == 1:
        return lambda inputs, activity: inputs
    return lambda inputs, activity: activity.spikes[number - 2].dense()


def _from_itself(number: int) -> Received:
    """What layer ``number`` receives from itself: nothing at first, then its spikes of the step before."""

    def received(inputs: torch.Tensor, activity: Activity) -> torch.Tensor:
        spikes = activity.spikes[number - 1].dense()
        return torch.cat([torch.zeros_like(spikes[:1]), spikes[:-1]])

    return received
