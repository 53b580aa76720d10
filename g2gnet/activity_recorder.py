"""Records, by hooks, what the layers of any model receive and what the neurons behind them do, from start to stop."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity
from g2g_kernels.ops.g2g_stack import StackState
from g2g_kernels.ops.g2g_stack.activity import as_one
from g2g_kernels.ops.g2g_stack.delays import LateSpikes
from g2gnet.base.hooks import OwnHook
from g2gnet.layers import G2GLinear
from g2gnet.spiking_network import SpikeTrain, SpikingNetwork

#: pairs (pre, post) of one layer, one per call; pre without the time dimension of post was held at every step
Recording = list[tuple[SpikeTrain, SpikeTrain]]


def dense(train: SpikeTrain) -> torch.Tensor:
    """The activity as a tensor [..., N]."""
    return train if isinstance(train, torch.Tensor) else train.dense()


def received_in(
    net: SpikingNetwork, inputs: torch.Tensor, activity: Activity, state: StackState | None = None
) -> list[tuple[nn.Module, SpikeTrain, SpikeTrain]]:
    """Each connection of a network, what it received in a run that continued ``state``, and the spikes of the neurons
    that it leads to."""
    spikes: list[Any] = [*activity.spikes, inputs.detach()]
    states, sent = net.divided(state, inputs.shape[-2:-1])
    connections, neurons = net.connections(), [*net.neurons().values()]
    found: list[tuple[nn.Module, SpikeTrain, SpikeTrain]] = []
    for each in net.projections():
        train, delay = spikes[each.source], net.delay_of(each)
        if delay is not None:
            before = sent[each.source]
            own = None if before is not None or each.source < 0 else as_one(states[each.source])
            if own is not None:
                before = (own[-1:] > neurons[each.source].population.parameters[-1]).detach()
            held = net.T if each.source < 0 and inputs.dim() == 2 else None
            train = LateSpikes(train, delay, before, held)
        train = net.behind_pools(each, train)
        found.append((connections[each.name], train, spikes[each.target]))
    return found


class ActivityRecorder:
    """Records the pre- and postsynaptic activity of the :class:`G2GLinear` layers of a model while it trains.

    The postsynaptic activity is the output of the module that receives a layer's output (a :class:`LIF`, an
    ``snn.Leaky``, an ``nn.ReLU``); of a tuple, its first element. If no module receives it, as for the last layer of a
    classifier, it is the layer's output itself. Calls in evaluation mode or without gradients are not recorded. In a
    :class:`SpikingNetwork` the spikes come from :meth:`~SpikingNetwork.simulate` and :meth:`~SpikingNetwork.step`.

    Code that ``torch.compile`` has compiled ignores hooks registered later; ``Uncompiled`` makes it run them.

    Args:
        model: runs the layers.
        layers: the layers to record.
    """

    def __init__(self, model: nn.Module, layers: Sequence[G2GLinear]) -> None:
        self.model = model
        self._number = {layer: number for number, layer in enumerate(layers)}
        self._handles: list[RemovableHandle] = []
        self._recordings: list[Recording] = []
        # outputs of layers that no module has taken yet: (number of the layer, its input, its output)
        self._open: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._seen_forwards: set[G2GLinear] = set()
        #: the layers that :meth:`_network_hook` records, each in its network
        self._in_network: dict[nn.Module, SpikingNetwork] = {}

    def start(self) -> None:
        """Starts recording."""
        self._recordings = [[] for _ in self._number]
        for module in self.model.modules():
            if isinstance(module, SpikingNetwork):
                layers = [self._layer_in(connection) for connection in module.connections().values()]
                self._in_network.update((layer, module) for layer in layers if layer is not None)
                self._handles.append(module.register_activity_hook(OwnHook(self._network_hook, module)))
            self._handles.append(module.register_forward_hook(OwnHook(self._module_hook)))

    def stop(self) -> list[Recording]:
        """Stops recording, if it was started, and returns what was recorded, layer by layer."""
        for handle in self._handles:
            handle.remove()
        recordings = self._recordings
        for number, pre, output in self._open:
            recordings[number].append((pre, output.detach()))
        self._handles, self._recordings, self._open, self._seen_forwards = [], [], [], set()
        return recordings

    def _module_hook(self, module: nn.Module, args: tuple, output: Any) -> None:
        net = self._in_network.get(module)
        if not self._records(module) or (net is not None and net.calls_layers):
            return
        for taken in args:
            for place, (number, pre, current) in enumerate(self._open):
                if taken is current:
                    first = output[0] if isinstance(output, tuple) else output
                    if isinstance(first, torch.Tensor) and first.shape[-1:] == current.shape[-1:]:
                        self._recordings[number].append((pre, first.detach()))
                        del self._open[place]
                    break
        if isinstance(module, G2GLinear) and module in self._number and self._is_new(module):
            self._open.append((self._number[module], args[0].detach(), output))

    def _network_hook(
        self, net: SpikingNetwork, inputs: torch.Tensor, activity: Activity, state: StackState | None
    ) -> None:
        if not self._records(net):
            return
        for connection, pre, post in received_in(net, inputs, activity, state):
            layer = self._layer_in(connection)
            if layer is not None and self._is_new(layer):
                self._recordings[self._number[layer]].append((pre, post))

    def _layer_in(self, connection: nn.Module) -> G2GLinear | None:
        """The recorded layer that is a connection of a network, or the only one in a module that wraps it."""
        layers = [layer for layer in connection.modules() if isinstance(layer, G2GLinear) and layer in self._number]
        return layers[0] if len(layers) == 1 else None

    def _is_new(self, layer: G2GLinear) -> bool:
        """Whether this call does not repeat one that was recorded: a checkpointed part of a model runs again in the
        backward pass, and counts there only if its first run had no gradients (``use_reentrant=True``)."""
        if torch._C._current_graph_task_id() == -1:  # no backward pass is running
            self._seen_forwards.add(layer)
            return True
        return layer not in self._seen_forwards

    def _records(self, module: nn.Module) -> bool:
        return bool(self._handles) and module.training and torch.is_grad_enabled()


class Uncompiled:
    """Runs everything that ``torch.compile`` compiled in eager mode, from now until :meth:`end`: code compiled before
    or after, in any part of a model, so hooks and attributes set on layers take effect. It needs PyTorch 2.6; for older
    versions there is ``check_compiled``.
    """

    _there: ClassVar["set[Uncompiled]"] = set()
    _stance: ClassVar[Any] = None

    def __init__(self) -> None:
        if not Uncompiled._there and hasattr(torch.compiler, "set_stance"):
            Uncompiled._stance = torch.compiler.set_stance("force_eager")
        Uncompiled._there.add(self)

    def end(self) -> None:
        Uncompiled._there.discard(self)
        if not Uncompiled._there and Uncompiled._stance is not None:
            stance, Uncompiled._stance = Uncompiled._stance, None
            stance.__exit__(None, None, None)


def check_compiled(model: nn.Module, what: str) -> None:
    """Raises ValueError if the model is compiled and this PyTorch cannot run it in eager mode."""
    if hasattr(torch.compiler, "set_stance"):
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{what} of {name or 'the model'} cannot be recorded, because it is compiled and PyTorch "
                f"{torch.__version__} has no torch.compiler.set_stance; use PyTorch 2.6 or newer, do not compile the "
                "model, or use rules that record nothing (prune='set' or 'random' with grow='random')"
            )
