"""A spiking layer: what modules, operators and backends know of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops.g2g_stack.delays import Delay
from g2g_kernels.ops.neurons.models import Neurons
from g2g_kernels.ops.record import TYPES

#: called with the inputs of a product and what it gives; returns that
ProductObserver = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Recurrent(NamedTuple):
    """A connection from a layer's neurons to themselves: its spikes of one step are inputs of the next.

    Attributes:
        values: packed weights [num_units, unit_rows, unit_cols].
        mask: the units that exist, of as many outputs as inputs.
    """

    values: torch.Tensor
    mask: Any  # inside operators its tensors


class Connection(NamedTuple):
    """What else reaches the neurons of a layer.

    Attributes:
        values: packed weights [num_units, unit_rows, unit_cols].
        mask: the units that exist.
        source: the number of the layer whose spikes it receives, which may be a later one or the layer itself; −1: it
            receives the inputs of the whole stack.
        delay: by how many steps they arrive later; None: in the same step.
        bias: [N], which acts at every step; or None.
        observer: as those of a layer.
    """

    values: torch.Tensor
    mask: Any
    source: int
    delay: Delay | None = None
    bias: torch.Tensor | None = None
    observer: ProductObserver | None = None


class SpikingLayer(NamedTuple):
    """A connection and its neurons.

    This is the only list of what a layer has. Operators take it (``ops/record.py``), the structure
    ``Layer`` of the C interface is filled from the fields of the same names, and a backend refuses a layer with a field
    that it does not read.

    Attributes:
        values: packed weights [num_units, unit_rows, unit_cols].
        mask: the units that exist; inside operators its tensors.
        bias: [N], or None.
        population: its neurons, with this layer's own model, reset, surrogate and α.
        dropped: bool [B, N], or None: neurons that stay silent in a sample, so that nothing comes from them and no
            gradient goes through them.
        state: float [states, B, N], the neurons' states before the first step, in the model's order; None: all 0.
        recurrent: what joins the neurons to themselves, or None: it adds V·S_{t−1} to the current, S_{t−1} being the
            spikes of the step before: none before the first step, those of ``state`` where that is given.
        membranes: whether the run gives the layer's membranes over time. Its neurons then take steps in turn, but on
            ``triton``.
        observers: of the connection and of the recurrent one, or None: called with x and W·x + b, and at each step with
            S_{t−1} and V·S_{t−1}. They return the latter, perhaps by a node that finds its gradient. The operators then
            run one after the other; in chunks, what is called in the backward pass is what has gradients.
        source: the number of the layer whose spikes the connection receives; −1: the inputs of the whole stack; None:
            the layer before.
        delay: by how many steps they arrive later; None: in the same step.
        more: other connections to the same neurons.
        sent: float [D, B, N], what the neurons sent in the D steps before the first, if a delay of more than one step
            reads it; None: nothing.

    Example:
        >>> mask = BlockMask.full(GroupLayout(4, 1), GroupLayout(8, 1), block_size=4)
        >>> population = Neurons("lif", (torch.tensor([0.9]), torch.tensor([1.0])))
        >>> layer = SpikingLayer(mask.pack(torch.ones(4, 8)), mask, None, population)
        >>> g2g_stack(torch.rand(2, 8), [layer], steps=5).counts.shape
        torch.Size([2, 4])
    """

    values: torch.Tensor
    mask: Any
    bias: torch.Tensor | None
    population: Neurons
    dropped: torch.Tensor | None = None
    state: torch.Tensor | None = None
    recurrent: Recurrent | None = None
    membranes: bool = False
    observers: tuple[ProductObserver | None, ProductObserver | None] = (None, None)
    source: int | None = None
    delay: Delay | None = None
    more: tuple[Connection, ...] = ()
    sent: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """The number of its neurons."""
        return self.mask.shape[0]

    def connections(self, number: int) -> list[Connection]:
        """What reaches layer ``number``, which this is: its connection, the recurrent one, and the others."""
        of_input, of_recurrent = self.observers
        source = number - 1 if self.source is None else self.source
        first = Connection(self.values, self.mask, source, self.delay, self.bias, of_input)
        if self.recurrent is None:
            return [first, *self.more]
        return [first, Connection(*self.recurrent, number, ONE_STEP, None, of_recurrent), *self.more]


#: the delay of a recurrent connection
ONE_STEP = Delay(1, 1)


def is_chain(layers: Sequence[SpikingLayer]) -> bool:
    """Whether each layer receives the spikes of the one before it, and nothing else but its own of the last step."""
    return all([not layer.more and layer.source in (None, number - 1) for number, layer in enumerate(layers)])


def unread(read: Iterable[str]) -> list[str]:
    """The fields of a layer that a backend which reads only these must refuse where they are given."""
    known = set(read)
    return [name for name in SpikingLayer._fields if name not in known]


def refuses_fields(names: Sequence[str], layers: Sequence[SpikingLayer]) -> str | None:
    """Why a backend that does not read the fields ``names`` cannot serve a call, or None."""
    for name in names:
        default = SpikingLayer._field_defaults.get(name)
        if any([getattr(layer, name) is not default for layer in layers]):
            return f"does not read {name!r} of a layer"
    return None


TYPES |= {"SpikingLayer": SpikingLayer, "Recurrent": Recurrent, "Connection": Connection}
