"""What becomes of the copies of a layer when its wiring changes: averages follow, all others stay as they are.

Packed weights mean nothing without their mask. If a network is rewired and its average is not, the next step of the
average mixes weights of different connections. Nothing tells a layer that a copy of it is an average, so:

- A copy that :func:`tie_wiring` ties to a network is an average of it.
- Any other ``copy.deepcopy`` counts as one once its weights differ from those that it was made (or loaded) with, unless
  it was trained. What it was written with does not matter: ``lerp_``, ``.data``, another storage. The first time
  that such a copy is rewired, the log says so.
- :func:`untie_wiring` makes a copy a network of its own.

Weights and a ``mask.wiring`` in place of a network's own (``torch.func.functional_call``; torchrl's target networks,
which are tensors and no modules) are a copy, too, if they need no gradient and had its wiring when they were first
used.

An average is rewired together with its network. Loading a ``state_dict`` into a network is no such change: its
averages keep their wiring and weights, since they are usually loaded as well. An average that is then written to all
the same has been mixed with weights of the network's new wiring: it takes over that wiring, and for units that are new
in their slots the network's weights.
"""

import contextlib
import functools
import logging
import math
import weakref
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from g2g_kernels import BlockMask
from g2g_kernels.tracing import is_transformed

if TYPE_CHECKING:
    from g2gnet.packed_weights import PackedWeights

logger = logging.getLogger("g2gnet")


class Lineage:
    """Where a layer comes from, and which layers come from it."""

    def __init__(self, layer: "PackedWeights") -> None:
        self._layer = weakref.ref(layer)
        self._origin: weakref.ref[PackedWeights] | None = None
        self._copies: list[weakref.ref[PackedWeights]] = []
        #: the weights and wirings that were used in place of the layer's, while someone keeps them, as layers
        self._guests: list[tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], PackedWeights]] = []
        self.tied = False
        #: whether its weights are a tensor that someone else owns, whose shape stays
        self.guest = False
        #: of a copy: whether its weights were written to, whether its slots mean what those of the origin do, and the
        #: fingerprint of its weights when that was noted
        self._averages, self._in_step = False, True
        self._noted: int | None = None
        self.watched = 0  # the id of the parameter that is watched

    @property
    def layer(self) -> "PackedWeights":
        layer = self._layer()
        assert layer is not None  # it owns this
        return layer

    @property
    def origin(self) -> "PackedWeights | None":
        """The layer that this one is a copy of, if that lives and this is no network of its own.

        A layer whose weights something computes (a parametrization, pruning) is one: they are not in units' slots.
        """
        if self._origin is not None and not self.layer.has_plain_values:
            self.leave()
        return None if self._origin is None else self._origin()

    def come_from(self, origin: "PackedWeights", tied: bool = False) -> None:
        """Notes that the layer is a copy of ``origin``, or with ``tied`` its average."""
        self._origin, self.tied, self._averages, self._in_step = weakref.ref(origin), tied, tied, True
        copies = [copy for copy in origin.lineage._copies if copy() not in (None, self.layer)]
        origin.lineage._copies = [*copies, self._layer]
        self._note()

    def synchronised(self) -> None:
        """Notes that the layer has the wiring of its origin now; an average stays one."""
        self._in_step = True
        self._note()

    def leave(self) -> None:
        """Makes the layer a network of its own."""
        self._origin = None

    def mask_of_guest(self, values: torch.Tensor, wiring: torch.Tensor, mask: BlockMask) -> BlockMask:
        """The mask of packed weights that stand in place of the layer's own.

        Args:
            values, wiring: the tensors that are there now.
            mask: what ``wiring`` describes; the layer's own if it describes that.
        """
        if is_transformed() or values.requires_grad or type(values) is not torch.Tensor:
            return mask
        self._guests = [guest for guest in self._guests if guest[0]() is not None and guest[1]() is not None]
        for weights, row, guest in self._guests:
            if weights() is values and row() is wiring:
                guest.catch_up()
                return guest.mask
        layer = self.layer
        if mask is not layer.mask:
            return mask
        guest = layer.with_tensors(values, wiring)
        guest.lineage.guest = True
        guest.lineage.come_from(layer)
        self._guests.append((weakref.ref(values), weakref.ref(wiring), guest))
        return guest.mask

    def watch(self) -> None:
        """Notes from now on when the weights receive a gradient: unless the layer is tied, it is then no average."""
        values = self.layer.values
        if self.watched != id(values) and values.requires_grad and values.is_leaf:
            self.watched = id(values)
            lineage = weakref.ref(self)
            values.register_hook(lambda _: _trained(lineage()))

    def loaded(self) -> None:
        """Notes that mask and weights were read from a file: what was written before is gone."""
        origin = self.origin
        if origin is not None:
            self._averages, self._in_step = self.tied, self.layer.mask.equals(origin.mask)
        self._note()

    def _note(self) -> None:
        if self.origin is not None:  # nobody asks for that of any other layer
            self._noted = fingerprint(self.layer.values)

    def catch_up(self) -> None:
        """Notes whether the weights were written to; if that was after the origin's wiring changed, takes that over."""
        if self.origin is None:
            return
        now = fingerprint(self.layer.values)
        if now is None or self._noted is None or now == self._noted:
            return
        self._averages = True
        if not self._in_step:
            self._follow()

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """While entered, dtype, device or padding of the weights change, which is no writing."""
        self.catch_up()
        yield
        self._note()

    def _is_average(self) -> bool:
        """Whether the layer has to be rewired together with its origin."""
        trained = self.layer.values.grad is not None and not self.tied
        return self._averages and self._in_step and not trained

    def _follow(self) -> None:
        origin = self.origin
        assert origin is not None
        if self.guest and self.layer.values.shape != origin.values.shape:
            self.leave()
            return
        if not self.tied:
            _say_that_copies_follow()
        take_wiring(origin, self.layer)
        self._in_step = True
        self._note()

    @contextlib.contextmanager
    def rewired(self, follow: bool) -> Iterator[None]:
        """While entered, the units of the layer change; its averages then follow, or keep their own."""
        # the layers are held meanwhile: one that is freed in between could not follow
        layers = [copy for copy in (reference() for reference in self._copies) if copy is not None]
        copies = [copy.lineage for copy in layers if copy.lineage.origin is self.layer]
        for copy in copies:
            copy.catch_up()
        averages = [copy for copy in copies if copy._is_average()]
        yield
        for copy in copies:
            if follow and copy in averages:
                copy._follow()
            elif copy._in_step:
                copy._in_step = False
                copy._note()


def _trained(lineage: Lineage | None) -> None:
    if lineage is not None and not lineage.tied:
        lineage.leave()


@torch.no_grad()
def take_wiring(source: "PackedWeights", target: "PackedWeights") -> None:
    """Gives ``target`` the units of ``source``; for units that are new in their slots, the source's weights.

    If it has fewer units than before, there are other slots, and for units that are new.
    """
    if target.values.shape != source.values.shape:
        _take_fewer(source, target)
        return
    before = target.mask.flat_unit()
    with target.rewired(follow=True):
        target.mask.become_(source.mask)
        new = (before != target.mask.flat_unit())[:, None, None]
        target.values.copy_(torch.where(new, source.values.to(target.values), target.values))


def _take_fewer(source: "PackedWeights", target: "PackedWeights") -> None:
    before, now = target.mask.flat_unit(), source.mask.flat_unit().to(target.values.device)
    slot_of = before.new_full((math.prod(target.mask.grid),), -1)
    slot_of[before] = torch.arange(len(before), device=before.device)
    slots = slot_of[now]
    weights = torch.where((slots < 0)[:, None, None], source.values.to(target.values), target.values[slots])
    with target.rewired(follow=True):
        target.mask.become_(source.mask)
        target.hold_(weights)


def fingerprint(values: torch.Tensor) -> int | None:
    """A checksum of packed weights; None where there are no numbers to read (``meta``, traced, sharded).

    Versions of tensors count writes too, but not those through ``.data``.
    """
    data = values.data
    if type(data) is not torch.Tensor or data.is_meta:
        return None
    return zlib.crc32(data.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@functools.cache
def _say_that_copies_follow() -> None:
    logger.warning(
        "a copy of a rewired network was written to and never trained: it counts as an average and is rewired with the "
        "network. If it is a network of its own, call g2gnet.untie_wiring(copy) after making it; "
        "g2gnet.tie_wiring(network, copy) says that it is an average"
    )


def _layers(model: nn.Module) -> "dict[str, PackedWeights]":
    found = {name: module for name, module in model.named_modules() if hasattr(module, "lineage")}
    return cast("dict[str, PackedWeights]", found)


def _pairs(source: nn.Module, target: nn.Module) -> "list[tuple[PackedWeights, PackedWeights]]":
    theirs, mine = _layers(source), _layers(target)
    if not theirs or theirs.keys() != mine.keys():
        raise ValueError(
            f"the sparse layers of the two networks ({', '.join(theirs) or 'none'} and {', '.join(mine) or 'none'}) "
            "must have the same names; pass modules that correspond, for example average.module"
        )
    for name, layer in theirs.items():
        if not (layer.has_plain_values and mine[name].has_plain_values):
            raise ValueError(
                f"the weights of layer {name!r} are computed by a parametrization, pruning or a norm, and belong to "
                "its own wiring; tie or synchronise the networks before that is registered"
            )
        if layer is mine[name]:
            raise ValueError(f"layer {name!r} is in both networks, which must be two")
        if layer.values.shape != mine[name].values.shape or layer.mask.shape != mine[name].mask.shape:
            raise ValueError(
                f"layer {name!r} has packed weights {tuple(layer.values.shape)} of {layer.mask.shape} in one network "
                f"and {tuple(mine[name].values.shape)} of {mine[name].mask.shape} in the other; build both alike"
            )
    return [(layer, mine[name]) for name, layer in theirs.items()]


def sync_wiring(source: nn.Module, target: nn.Module) -> None:
    """Gives the sparse layers of ``target`` the units that those of ``source`` have now, in the same slots.

    A unit that target has in the same slot keeps its weights; the others get the source's. For networks that are no
    copies of one another and whose parameters are then copied or averaged one by one, such as target networks in
    reinforcement learning: call it before, and after each update of the source's graph.

    Raises:
        ValueError: if layers differ in name or size.

    Example:
        >>> net, other = (G2GNet(64, 64, 10, block_size=8) for _ in range(2))
        >>> other.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> sync_wiring(net, other)
        >>> other.fc2.mask.equals(net.fc2.mask)
        True
    """
    for theirs, mine in _pairs(source, target):
        mine.catch_up()
        take_wiring(theirs, mine)
        if mine.lineage.origin is theirs:
            mine.lineage.synchronised()


def tie_wiring(source: nn.Module, average: nn.Module) -> None:
    """Says that ``average`` is an average of ``source``: from now on it is rewired whenever source is.

    It begins with :func:`sync_wiring`.

    Raises:
        ValueError: if layers differ in name or size.

    Example:
        >>> net, average = (G2GNet(64, 64, 10, block_size=8) for _ in range(2))
        >>> average.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> tie_wiring(net, average)  # DST of net now rewires average too
    """
    sync_wiring(source, average)
    for theirs, mine in _pairs(source, average):
        mine.lineage.come_from(theirs, tied=True)


def untie_wiring(model: nn.Module) -> None:
    """Says that ``model`` is a network of its own: it is never rewired with the one that it was copied from.

    Example:
        >>> import copy
        >>> net = G2GNet(64, 64, 10, block_size=8)
        >>> start = copy.deepcopy(net)
        >>> untie_wiring(start)  # stays as it is when net is rewired
    """
    for layer in _layers(model).values():
        layer.lineage.leave()
