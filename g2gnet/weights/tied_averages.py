"""Ties: an average of a network's weights (EMA, SWA) is rewired with the network if :func:`tie_wiring` said so.
Otherwise its next step would mix weights of different connections. Any other copy is a network of its own."""

import logging
import weakref
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from g2g_kernels import BlockMask
    from g2gnet.weights.packed_weights import PackedWeights

logger = logging.getLogger("g2gnet")

#: wrappers of networks, for averages, data parallelism and torch.compile, which layers' names are given without
WRAPPERS = {"module", "_orig_mod"}


class Ties:
    """Links from a layer to its averages, its source and its copies."""

    def __init__(self) -> None:
        #: averages, which are rewired with the layer
        self.averages: weakref.WeakSet[PackedWeights] = weakref.WeakSet()
        self.copies: weakref.WeakSet[PackedWeights] = weakref.WeakSet()
        #: whether the user declared what this copy is
        self.declared = False
        #: of an average: its source, and all averages whose ties end with its own
        self._tie: tuple[weakref.ref[PackedWeights], weakref.WeakSet[PackedWeights]] | None = None

    @property
    def source(self) -> "PackedWeights | None":
        """The layer that this one is an average of."""
        return None if self._tie is None else self._tie[0]()

    @staticmethod
    def begin(pairs: "list[tuple[PackedWeights, PackedWeights]]") -> None:
        """Ties the second layer of each pair to the first. These ties end together."""
        together = weakref.WeakSet(average for _, average in pairs)
        for source, average in pairs:
            source.ties.averages.add(average)
            average.ties.declared, average.ties._tie = True, (weakref.ref(source), together)

    def end(self, why: str | None = None) -> None:
        """Ends the tie of two networks in all layers, with a warning if there is a reason."""
        averages = [] if self._tie is None else list(self._tie[1])
        for average in averages:
            average.settle()  # from now on its buffer is read, whatever was averaged there
        for average in averages:
            if (source := average.ties.source) is not None:
                source.ties.averages.discard(average)
            average.ties._tie = None
        if averages and why is not None:
            logger.warning("an average is no longer rewired with its network: %s; call tie_wiring again", why)


def rewire_averages(layer: "PackedWeights") -> None:
    """Gives the averages of a layer the units that it has now."""
    for average in list(layer.ties.averages):
        if average.has_plain_values:
            take_wiring(layer, average)
            rewire_averages(average)
        else:
            average.ties.end("something computes its weights now")


def after_other_units(layer: "PackedWeights") -> None:
    """Updates the ties of a layer that was given a mask from outside: equal units get equal slots, others end a tie."""
    pairs = [(layer, average) for average in layer.ties.averages]
    if layer.ties.source is not None:
        pairs.insert(0, (layer.ties.source, layer))
    for source, average in pairs:
        if _same_units(source.mask, average.mask):
            take_wiring(source, average)
            rewire_averages(average)
        else:
            average.ties.end("a state of other units was loaded into one of them")


def _same_places(one: "BlockMask", other: "BlockMask") -> torch.Tensor:
    """Whether a unit's number means the same neurons in both masks, whose grids are equal: a bool scalar."""
    mine, theirs = ([*mask.rows.tensors()[:2], *mask.cols.tensors()[:2]] for mask in (one, other))  # orders and bounds
    return torch.stack([(a == b.to(a.device)).all() for a, b in zip(mine, theirs, strict=True)]).all()


def _same_units(one: "BlockMask", other: "BlockMask") -> bool:
    """Whether both masks have the same units, in any slots."""
    units = [mask.sorted_units().cpu() for mask in (one, other)]
    return one.grid == other.grid and torch.equal(*units) and bool(_same_places(one, other))


@torch.no_grad()
def take_wiring(source: "PackedWeights", target: "PackedWeights") -> None:
    """Gives ``target`` the units of ``source`` in the same slots. Units that target has keep its weights, others get
    the source's. Does not wait for the device."""
    mine, theirs = target.mask, source.mask
    device = target.values.device
    now = theirs.flat_unit().to(device)
    slots = torch.full_like(now, -1)
    if mine.grid == theirs.grid and mine.num_units:
        before = mine.sorted_units()
        place = torch.searchsorted(before, now).clamp(max=len(before) - 1)
        had = (before[place] == now) & _same_places(mine, theirs)
        slots = torch.where(had, mine.row_slot.long()[place], slots)
    new = target.over_kernels(slots < 0)
    values = torch.where(new, source.values.to(target.values), target.values[slots])
    gradient = target.values.grad
    gradient = None if gradient is None else torch.where(new, 0, gradient[slots])
    mine.become_(theirs)
    target.write_(values, gradient)


def _layers(model: nn.Module) -> "dict[str, PackedWeights]":
    """The packed layers of a model, by their names without the wrappers around the network."""
    found: dict[str, PackedWeights] = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "ties", None), Ties):
            name = ".".join(part for part in path.split(".") if part not in WRAPPERS)
            if name in found:
                raise ValueError(f"two sparse layers are called {name!r}; pass modules that correspond")
            found[name] = cast("PackedWeights", module)
    return found


def _pairs(source: nn.Module, target: nn.Module) -> "list[tuple[PackedWeights, PackedWeights]]":
    for model in (source, target):
        if not isinstance(model, nn.Module):
            raise TypeError(f"a {type(model).__name__} is no module; pass the network, or the module that averages it")
    theirs, mine = _layers(source), _layers(target)
    if not theirs or theirs.keys() != mine.keys():
        raise ValueError(
            f"the sparse layers, {', '.join(theirs) or 'none'} and {', '.join(mine) or 'none'}, must have the same "
            "names; pass modules that correspond, for example average.module.net"
        )
    for name, layer in theirs.items():
        if not (layer.has_plain_values and mine[name].has_plain_values):
            raise ValueError(
                f"the weights of layer {name!r} are computed by a parametrization, pruning or a norm; tie or "
                "synchronise the networks before that is registered"
            )
        if layer is mine[name]:
            raise ValueError(f"layer {name!r} is in both; pass two networks")
        if layer.values.shape != mine[name].values.shape or layer.mask.shape != mine[name].mask.shape:
            raise ValueError(
                f"layer {name!r} has packed weights {list(layer.values.shape)} of {layer.mask.shape} and "
                f"{list(mine[name].values.shape)} of {mine[name].mask.shape}; build both networks alike"
            )
    return [(layer, mine[name]) for name, layer in theirs.items()]


def sync_wiring(source: nn.Module, target: nn.Module) -> None:
    """Gives the sparse layers of ``target`` the units that those of ``source`` have now, in the same slots.

    Units that target already has keep its weights; others get the source's. Call it before, and after each update of
    source's masks, where parameters of networks that are not tied are copied or averaged one by one. Both may be in
    wrappers (``AveragedModel``, DistributedDataParallel). Raises TypeError if one is no module, and ValueError if
    layers differ in name or size.

    Example:
        >>> net, other = (G2GNet(64, 64, 10, block_size=8) for _ in range(2))
        >>> other.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> sync_wiring(net, other)
        >>> other.fc2.mask.equals(net.fc2.mask)
        True
    """
    for theirs, mine in _pairs(source, target):
        if mine.ties.source is not theirs:
            mine.ties.end("it was given the wiring of another network")
        take_wiring(theirs, mine)
        mine.ties.declared = True
        rewire_averages(mine)


def tie_wiring(source: nn.Module, average: nn.Module) -> None:
    """Declares ``average`` an average of ``source``, which is rewired whenever source is.

    It begins with :func:`sync_wiring`, and raises the same errors. When DST gives slots to other units, those that stay
    keep their averaged weights, and new ones get the source's. A load of the same units in another order, into either
    network, is brought into the source's order; a load of other units ends the tie, with a warning. The tie writes the
    average's ``mask.wiring`` and does not read it. Copies, pickles and files do not have the tie. The average may be in
    a wrapper (``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEmaV3``).

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> net = G2GNet(64, 64, 10, block_size=8)
        >>> average = AveragedModel(net)
        >>> tie_wiring(net, average)  # DST of net now rewires average too
    """
    pairs = _pairs(source, average)
    for theirs, mine in pairs:
        above: PackedWeights | None = theirs
        while above is not None:
            if above is mine:
                raise ValueError("the source is tied to this average; untie_wiring(source) first")
            above = above.ties.source
    for theirs, mine in pairs:
        mine.ties.end()
        take_wiring(theirs, mine)
        rewire_averages(mine)
    Ties.begin(pairs)


def untie_wiring(model: nn.Module) -> None:
    """Declares ``model`` a network of its own, rewired with no other, as every copy that nobody tied is. DST then does
    not warn of the copy.

    Example:
        >>> import copy
        >>> net = G2GNet(64, 64, 10, block_size=8)
        >>> untie_wiring(copy.deepcopy(net))  # no average of net: no warning when net is rewired
    """
    for layer in _layers(model).values():
        layer.ties.end()
        layer.ties.declared = True
