"""What the layers of any model receive and the neurons behind them do, seen by hooks that exist while recording."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
    of a classifier, that output itself. Calls in evaluation mode or without gradients are left out. In a
    :class:`SpikingStack` the spikes come from :meth:`~SpikingStack.simulate`.

    Hooks that come later are not seen by what ``torch.compile`` has compiled: ``Uncompiled`` is for that.

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

    def start(self) -> None:
        """Begins to record."""
        self._recordings = [[] for _ in self._number]
        for module in self.model.modules():
            if isinstance(module, SpikingStack):
                self._handles.append(module.register_activity_hook(_Hook(self._stack_hook, module)))
            self._handles.append(module.register_forward_hook(_Hook(self._module_hook)))

    def stop(self) -> list[Recording]:
        """Ends the recording, if there is one, and gives what was recorded, layer by layer."""
        for handle in self._handles:
            handle.remove()
        recordings = self.recorded()
        self._handles, self._recordings, self._open, self._seen_forwards = [], [], [], set()
        return recordings

    def recorded(self) -> list[Recording]:
        """What has been recorded so far, layer by layer."""
        recordings = [list(pairs) for pairs in self._recordings]
        for number, pre, output in self._open:
            recordings[number].append((pre, output.detach()))
        return recordings

    def resume(self, recorded: list[Recording]) -> None:
        """Goes on recording, behind what has been recorded before."""
        self.start()
        self._recordings = recorded

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


class _Hook:
    """A hook that a copy of its module, or a saved one, does not have: nobody would collect what it records."""

    def __init__(self, function: Callable[..., None], *first: Any) -> None:
        self._function, self._first = function, first

    def __call__(self, *arguments: Any) -> None:
        self._function(*self._first, *arguments)

    def __reduce__(self) -> tuple:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    pass


class Uncompiled:
    """Has all that ``torch.compile`` compiled run as it is written, from now until :meth:`end`.

    Whatever was compiled, before or after, in whatever part of a model: hooks and what is set on layers count again. It
    takes PyTorch 2.6; for older ones there is ``check_compiled``.
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
    """Raises ValueError where nothing of a compiled model can be seen, and this is one."""
    if hasattr(torch.compiler, "set_stance"):
        return
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{what} of {name or 'the model'} cannot be seen, since it is compiled and PyTorch {torch.__version__} "
                "has no torch.compiler.set_stance; take PyTorch 2.6 or newer, do not compile the model, or take rules "
                "that need nothing (prune='set' or 'random' with grow='random')"
            )
