"""What the layers of any model receive and the neurons behind them do, seen by hooks that exist while recording."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from g2g_kernels import Activity
from g2g_kernels.ops.g2g_stack import Spikes
from g2gnet.layers import G2GLinear
from g2gnet.stack import SpikingStack

#: the activity of one population over some steps and samples, [..., N], or spikes whose ``dense()`` gives that
Train = torch.Tensor | Spikes
#: pairs (pre, post) of one layer, one a call; pre may lack the time dimension that post has, and was then held
Recording = list[tuple[Train, Train]]


def dense(train: Train) -> torch.Tensor:
    """The activity as a tensor [..., N]."""
    return train if isinstance(train, torch.Tensor) else train.dense()


class ActivityRecorder:
    """Records the pre- and postsynaptic activity of the :class:`G2GLinear` layers of a model while it trains.

    The postsynaptic activity is what comes out of the module that takes a layer's output (a :class:`LIF`, an
    ``snn.Leaky``, an ``nn.ReLU``; of a tuple its first element), and where no module takes it, as behind the last layer
    of a classifier, that output itself. Calls in evaluation mode or without gradients are left out, and so are those
    inside a model that was compiled before. In a :class:`SpikingStack` the spikes come from
    :meth:`~SpikingStack.simulate`.

    Args:
        model: runs the layers.
        layers: the layers to record.
    """

    def __init__(self, model: nn.Module, layers: Sequence[G2GLinear]) -> None:
        self._model = model
        self._number = {layer: number for number, layer in enumerate(layers)}
        self._handles: list[RemovableHandle] = []
        self._recordings: list[Recording] = []
        # outputs of layers that no module has taken yet: (number of the layer, its input, its output)
        self._open: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._seen_forwards: set[G2GLinear] = set()

    def start(self) -> None:
        """Begins to record."""
        self._recordings = [[] for _ in self._number]
        for module in self._model.modules():
            if isinstance(module, SpikingStack):
                self._handles.append(module.register_activity_hook(functools.partial(self._stack_hook, module)))
            self._handles.append(module.register_forward_hook(self._module_hook))

    def stop(self) -> list[Recording]:
        """Ends the recording, if there is one, and gives what was recorded, layer by layer."""
        for handle in self._handles:
            handle.remove()
        for number, pre, output in self._open:
            self._recordings[number].append((pre, output.detach()))
        recordings = self._recordings
        self._handles, self._recordings, self._open, self._seen_forwards = [], [], [], set()
        return recordings

    def _module_hook(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._records(module):
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

    def _stack_hook(self, stack: SpikingStack, inputs: torch.Tensor, activity: Activity) -> None:
        if not self._records(stack):
            return
        pre: Train = inputs.detach()
        for (connection, _), post in zip(stack.layers(), activity.spikes, strict=True):
            if connection in self._number and self._is_new(connection):
                self._recordings[self._number[connection]].append((pre, post))
            pre = post

    def _is_new(self, layer: G2GLinear) -> bool:
        """Whether this is no repetition of a call that was recorded.

        A checkpointed part of a model runs again in the backward pass, and is recorded there only if it was not before:
        with ``use_reentrant=True`` its first run is one without gradients.
        """
        if torch._C._current_graph_task_id() == -1:  # no backward pass is running
            self._seen_forwards.add(layer)
            return True
        return layer not in self._seen_forwards

    def _records(self, module: nn.Module) -> bool:
        return bool(self._handles) and module.training and torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        # a model that is copied or saved while its activity is recorded takes these hooks along; the copy must not
        # record, since nobody would ever collect it
        return {**self.__dict__, "_handles": [], "_recordings": [], "_open": [], "_seen_forwards": set()}
