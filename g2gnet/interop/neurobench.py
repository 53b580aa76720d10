"""Stacks in NeuroBench, whose harness counts what hooks on layers and neurons see."""

from typing import Any

import torch
from torch import nn

from g2gnet.layers import G2GLinear
from g2gnet.neurons import SpikingNeurons
from g2gnet.stack import SpikingStack


def to_neurobench(stack: SpikingStack) -> Any:
    """The stack as a ``NeuroBenchModel``, in evaluation mode.

    It takes NeuroBench's batches [B, T, D], or samples [B, D] that are held for the stack's ``T`` steps, and returns
    the output spikes [B, T, C]. Synaptic operations are those of weights that are not zero; those of a held sample are
    counted once, since it passes the first connection once. NeuroBench's connection sparsity knows no layers but
    PyTorch's own: it is the mean of ``mask.sparsity()``, weighted by the sizes of layers.

    Raises:
        ImportError: if NeuroBench is not installed.

    Example:
        >>> from g2gnet import G2GNet
        >>> model = to_neurobench(G2GNet(64, 32, 10, block_size=4))  # doctest: +SKIP
    """
    try:
        from neurobench.hooks.layer import LayerHook
        from neurobench.hooks.neuron import NeuronHook
        from neurobench.models import NeuroBenchModel
    except ImportError as error:
        raise ImportError(f"this needs the package neurobench; pip install neurobench installs it ({error})") from error

    class ConnectionHook(LayerHook):
        """Records what a connection receives; NeuroBench counts with its weights as an ``nn.Linear``."""

        def __init__(self, connection: G2GLinear) -> None:
            super().__init__(None)
            self.connection = connection
            self.layer = nn.Linear(connection.in_features, connection.out_features, bias=False)
            self.layer.weight = nn.Parameter(connection.dense_weight().detach(), requires_grad=False)
            self.register_hook()

        def register_hook(self) -> None:
            self.hook = self.connection.register_forward_pre_hook(self.hook_fn)

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
            for number, (connection, neurons) in enumerate(stack.layers(), 1):
                self.connection_hooks.append(ConnectionHook(connection))
                self.activation_hooks.append(NeuronHook(neurons, f"lif{number}"))

    return StackModel()
