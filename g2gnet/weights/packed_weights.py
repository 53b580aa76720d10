"""Packed weights and their mask, which mean nothing without one another: a layer owns both.

They are called, copied, moved, saved, loaded and rewired together, or not at all:

- A copy is a layer of its own (but see :mod:`g2gnet.weights.tied_averages`).
- What is written into the buffer ``mask.wiring`` with the weights is read at the next use of the mask. Two writes are
  not noticed: those that PyTorch does not count (through ``.data``, by ``torch.distributed.broadcast``), and those in
  compiled code. ``load_state_dict`` of the network's own ``state_dict()`` reads them.
- Weights in place of the layer's own (``torch.func.functional_call``) come with their ``mask.wiring``, or have the
  layer's.
- A ``state_dict`` refers to the weights and the buffer themselves; both are written in place, or neither is.
- A load of other units drops the gradient, which belongs to the units before. An optimizer's state (momentum) belongs
  to them, too, and a layer cannot see it: load the optimizer's state together with a network in training.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from g2g_kernels import BlockMask
from g2g_kernels.mask.sides import deep_copied
from g2g_kernels.mask.wiring import DRIFT
from g2g_kernels.ops.checks import check_tensor
from g2g_kernels.tracing import is_traced, unwrapped, version
from g2gnet.weights.few_bits import in_bits, scale_of
from g2gnet.weights.tied_averages import Ties, after_other_units

logger = logging.getLogger("g2gnet")


class PackedWeights(nn.Module):
    """The packed weights [num_units, unit_rows, unit_cols] of the units of a mask, both of which the module owns. Where
    a weight is a kernel, its dimensions follow: [num_units, unit_rows, unit_cols, kernel rows, kernel columns].

    Attributes:
        bits: of the weights that it computes with, rounded from ``values``; None: these are ``values``. A network sets
            it (``net.quantize``).
        scaled_with: the other modules whose rounded weights have the same scale.
    """

    bits: int | None = None
    scaled_with: "tuple[PackedWeights, ...]" = ()

    def __init__(self, mask: BlockMask, values: nn.Parameter) -> None:
        """Takes a copy of the mask: two layers with one would rewire one another."""
        nn.Module.__init__(self)
        #: its averages and copies; a copy begins with its own
        self.ties = Ties()
        self._modules["mask"] = copy.deepcopy(mask)  # the class has a property of that name
        self.values = values

    @property
    def mask(self) -> BlockMask:
        """The units that exist, which are those of the buffer ``mask.wiring`` after a write to it."""
        self._read_wiring()
        return self._own_mask

    @property
    def _own_mask(self) -> BlockMask:
        """The mask before a write to the buffer is read."""
        mask: Any = self._modules["mask"]
        return mask

    def _read_wiring(self) -> None:
        """Reads the buffer ``mask.wiring`` if it was written; a tied average takes its units from the tie instead.
        Raises ValueError if the buffer describes no mask of these weights."""
        mask = self._own_mask
        if is_traced() or not mask.writes or self.ties.source is not None:
            return
        written = mask.own_wiring
        if written.is_meta or mask.describes(written):
            mask.note_wiring()
        elif mask.describes(written, DRIFT * mask.writes):  # an average of equal wirings, rounded
            mask.write_wiring()
        else:
            self._take_units_of(written)

    def _take_units_of(self, wiring: torch.Tensor) -> None:
        mask, arrived = self._own_mask, _mask_of(wiring, self._own_mask.shape, "mask.wiring was written to, and")
        if (arrived.num_units, *arrived.unit_shape) != self.values.shape[:3]:
            raise ValueError(
                f"mask.wiring was written to and has {arrived.num_units} units of {arrived.unit_shape}, but values "
                f"have shape {tuple(self.values.shape)}; load the state of one network, which has both"
            )
        mask.become_(arrived.to(mask.unit_row.device))
        self._drop_gradient()
        after_other_units(self)

    def _drop_gradient(self) -> None:
        """Drops the gradient of the units before."""
        if self.values.grad is not None:
            self.values.grad = None
            logger.warning(
                "a layer got other units while it had a gradient, which was dropped; load the optimizer's state from "
                "the same checkpoint, or make a new optimizer"
            )

    def settle(self) -> None:
        """Synchronises mask and buffer before both are read: the one that was not written follows the other."""
        if self.ties.source is None:
            self._read_wiring()
        elif self._own_mask.writes:
            self._own_mask.write_wiring()

    def weights(self) -> tuple[torch.Tensor, BlockMask]:
        """The packed weights and their mask for kernels; in ``torch.func.functional_call`` maybe another layer's."""
        mask: Any = self._modules["mask"]
        if not is_traced():
            if version(mask.own_wiring) != mask.written:
                self._read_wiring()
            if mask.wiring is not mask.own_wiring:
                mask = _mask_in_place_of(mask)
        return (self.values if self.bits is None else self._in_bits(self.bits)), mask

    def _in_bits(self, bits: int) -> torch.Tensor:
        """The values rounded to ``bits``, with one scale for them and those of :attr:`scaled_with`."""
        together = [each._without_padding() for each in (self, *self.scaled_with)]
        return in_bits(together[0], scale_of(together, bits), bits)

    def _without_padding(self) -> torch.Tensor:
        mask = self._own_mask
        return self.values.masked_fill(~self.valid(), 0) if mask.has_padding else self.values

    @property
    def weights_of_place(self) -> int:
        """The number of weights at one place of the mask, which are those of a kernel."""
        return self.values.shape[3:].numel()

    def over_kernels(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [units, …] with as many dimensions as ``values``, the others of size 1."""
        return tensor[(..., *[None] * (self.values.dim() - tensor.dim()))]

    def valid(self) -> torch.Tensor:
        """:meth:`BlockMask.valid` of ``values``, which broadcasts over kernels."""
        return self.over_kernels(self.mask.valid())

    @property
    def has_plain_values(self) -> bool:
        """Whether ``values`` is a parameter, and not what a parametrization, pruning or a norm computes."""
        return "values" in self._parameters

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask":
            raise AttributeError(
                "mask cannot be assigned: it belongs to the weights. Create a layer, G2GLinear(mask), or give this one "
                "the units of another network: g2gnet.sync_wiring(source, target)"
            )
        if name == "parametrizations":  # torch.nn.utils.parametrize puts it there, empty
            value = _Parametrizations()
        super().__setattr__(name, value)

    def rewire_(self, slots: torch.Tensor, units: torch.Tensor, apply: torch.Tensor) -> Callable[[], None]:
        """Gives ``slots``, integer [k], to ``units``, int64 [k] counted row by row, with weights of zero. Nothing
        changes if ``apply``, a bool scalar, is false: ``units`` must then be those of the slots now. Returns a function
        that undoes it; after an error nothing has changed."""
        mask = self.mask
        with torch.no_grad(), contextlib.ExitStack() as undo:
            undo.callback(mask.relabel_, slots, mask.unit_row[slots], mask.unit_col[slots])
            mask.relabel_(slots, units // mask.grid[1], units % mask.grid[1])
            for tensor in (self.values, self.values.grad):
                if tensor is not None:
                    rows = tensor[slots].detach()
                    undo.callback(tensor.detach().index_copy_, 0, slots, rows)
                    tensor[slots] = torch.where(apply, 0.0, rows)
            return undo.pop_all().close

    def keep_(self, kept: torch.Tensor) -> Callable[[], None]:
        """Keeps the units of the slots where ``kept``, bool [num_units], is true. Returns a function that undoes it."""
        mask, values, gradient = self.mask, self.values.data, self.values.grad
        before, wiring = copy.deepcopy(mask), mask.own_wiring
        mask.keep_(kept)
        self.write_(values[kept], None if gradient is None else gradient[kept])

        def undo() -> None:
            mask.replace_by_(before, wiring)
            self.write_(values, gradient)

        return undo

    def write_(self, values: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
        """Writes weights, of any number of units, and their gradient; in place if the shape stays."""
        if self.values.shape == values.shape:
            self.values.data.copy_(values)
        else:
            self.values.grad = None
            # a kept result has a node that accumulates gradients of the old shape; only another dtype makes a new node
            self.values.data = values.new_empty(0, dtype=torch.float if values.dtype == torch.half else torch.half)
            self.values.data = values
        self.values.grad = gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeights":
        twin = memo[id(self)] = type(self).__new__(type(self))
        # torch.nn.utils.parametrize replaces __getstate__ of the object's class by a refusal
        twin.__setstate__(deep_copied(PackedWeights.__getstate__(self), memo))
        self.ties.copies.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**self.__dict__, "ties": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.ties = Ties()

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedWeights":
        self.settle()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.settle()
        # Padding is ignored. It is saved as zeros, so that equal networks give equal files; shards (FSDP) have none.
        plain = self.has_plain_values and type(self.values.data) is torch.Tensor and not self.values.is_inference()
        if plain and self.mask.has_padding:
            self.values.data.masked_fill_(~self.valid(), 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key, place = f"{prefix}values", f"{prefix}mask.wiring"
        mine, given = self._own_mask, key in state_dict
        try:
            mask = _mask_to_load(self, state_dict, prefix)
        except ValueError as error:
            mask = None
            error_msgs.append(str(error))
            if self.has_plain_values:
                state_dict.pop(key, None)
        missing: list[str] = []
        if mask is not None:
            values = state_dict[key]
            if not mine.equals(mask):
                self._drop_gradient()
            if local_metadata.get("assign_to_params_buffers", False):
                mine.replace_by_(mask.to(values.device), state_dict[place].to(values.device))
            elif not self.values.is_meta:
                mine.become_(mask.to(mine.unit_row.device))
            if self.values.shape != values.shape:
                self.write_(self.values.new_zeros(values.shape))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [name for name in missing if name != key or not given]
        if mask is not None:
            after_other_units(self)
        if place in state_dict:  # the mask is a child, loaded next: it gets what it has
            state_dict[place] = mine.own_wiring


class _Parametrizations(nn.ModuleDict):
    """The parametrizations by parameter: one is called ``values``, which is a method of every other ModuleDict."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def _mask_of(wiring: torch.Tensor, shape: tuple[int, int], where: str) -> BlockMask:
    """The mask that a buffer describes. Raises ValueError, which begins with ``where``, if it describes none."""
    try:
        return BlockMask.from_state({"wiring": wiring}, shape)
    except ValueError as error:
        raise ValueError(
            f"{where} describes no mask of this layer ({error}); give parameters and buffers of one network, and tie "
            "an average to its network: DSTScheduler(averages=[average]) or tie_wiring(network, average)"
        ) from error


def _mask_in_place_of(mask: BlockMask) -> BlockMask:
    """The mask that the buffer in its place describes, in ``torch.func.functional_call``. Raises ValueError if it
    describes none, or several under ``torch.func.vmap``."""
    rows = unwrapped(mask.wiring).detach()
    sent = rows.reshape(-1, rows.shape[-1]).cpu()
    if not (sent == sent[:1]).all():
        raise ValueError("networks with different wirings cannot share one torch.func.vmap; call each alone")
    if mask.describes(sent[0]):
        return mask
    return _mask_of(sent[0], mask.shape, "the buffer in place of mask.wiring").to(mask.wiring.device)


def _mask_to_load(layer: PackedWeights, state: Mapping[str, Any], prefix: str) -> BlockMask | None:
    """The mask of layer ``prefix`` in a state, None if it stays. Raises ValueError if it or its weights do not fit."""
    plain = layer.has_plain_values
    wiring: Any = state.get(f"{prefix}mask.wiring")
    values: Any = state.get(f"{prefix}values")
    if plain and (wiring is None) != (values is None):
        there, lacks = ("values", "mask.wiring") if wiring is None else ("mask.wiring", "values")
        raise ValueError(
            f"{prefix}{there} is in the state without {prefix}{lacks}, and they are loaded together or not at all; "
            "save the whole state_dict() of the layer"
        )
    if wiring is None:
        return None
    for name, tensor in (("values", values), ("mask.wiring", wiring)):
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ValueError(f"{prefix}{name} is on the device meta, which has no numbers to load")
    try:
        mask = BlockMask.from_state({"wiring": wiring}, layer._own_mask.shape)
    except ValueError as error:
        raise ValueError(f"{prefix}mask: {error}") from error
    if not plain:
        if mask.equals(layer.mask):
            return None
        raise ValueError(
            f"{prefix}mask differs from the layer's, whose weights a parametrization (or pruning, or a norm) computes; "
            "load the state before that is registered"
        )
    check_tensor(f"{prefix}values", values)
    packed = (mask.num_units, *mask.unit_shape, *layer.values.shape[3:])
    if tuple(values.shape) != packed:
        raise ValueError(f"size mismatch for {prefix}values: {tuple(values.shape)}, but its mask has units {packed}")
    return mask
