"""Packed weights and their mask, which mean nothing without one another: a layer owns both.

They are called, copied, moved, saved, loaded and rewired together, or not at all:

- A copy is a layer of its own (but see :mod:`g2gnet.weights.tied_averages`).
- What is written into the buffer ``mask.wiring`` with the weights is read when the mask is used next. What PyTorch does
  not count as a write (through ``.data``, by ``torch.distributed.broadcast``) is not noticed, nor is anything inside
  compiled code; ``load_state_dict`` of the network's own ``state_dict()`` reads it.
- Weights in place of the layer's own (``torch.func.functional_call``) come with their ``mask.wiring``, or have the
  layer's.
- A ``state_dict`` refers to the weights and the buffer themselves; both are written in place, or neither is.
- Other units have no gradient yet. What an optimizer keeps (momentum) is of the units before: its state is loaded with
  the network's.
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
from g2gnet.weights.tied_averages import Ties, after_other_units

logger = logging.getLogger("g2gnet")


class PackedWeights(nn.Module):
    """The packed weights [num_units, unit_rows, unit_cols] of the units of a mask, both of which the module owns."""

    def __init__(self, mask: BlockMask, values: nn.Parameter) -> None:
        """Takes a copy of the mask: two layers with one would rewire one another."""
        super().__init__()
        #: its averages and copies; a copy begins with its own
        self.ties = Ties()
        self._modules["mask"] = copy.deepcopy(mask)  # the class has a property of that name
        self.values = values

    @property
    def mask(self) -> BlockMask:
        """The units that exist. What was written into the buffer ``mask.wiring`` is read first (:meth:`settle`)."""
        self._read_wiring()
        return self._own_mask

    @property
    def _own_mask(self) -> BlockMask:
        """The mask as it was read last."""
        mask: Any = self._modules["mask"]
        return mask

    def _read_wiring(self) -> None:
        """Makes the mask what was written into its buffer since it was read last; that of a tied average is the tie's.
        Raises ValueError for what describes no mask of these weights."""
        mask = self._own_mask
        if is_traced() or not mask.writes or self.ties.source is not None:
            return
        wiring = mask.own_wiring
        if wiring.is_meta or mask.describes(wiring):
            mask.note_wiring()
            return
        if mask.describes(wiring, DRIFT * mask.writes):  # an average of equal numbers, which rounds
            mask.write_wiring()
            return
        arrived = _mask_of(wiring, mask.shape, "mask.wiring was written to, and")
        if (arrived.num_units, *arrived.unit_shape) != self.values.shape:
            raise ValueError(
                f"mask.wiring was written to and has {arrived.num_units} units of {arrived.unit_shape}, but values "
                f"have shape {tuple(self.values.shape)}; load the state of one network, which has both"
            )
        mask.become_(arrived.to(mask.unit_row.device))
        self._drop_gradient()
        after_other_units(self)

    def _drop_gradient(self) -> None:
        """Drops the gradient, which is of other units, and warns that optimizers keep more of these."""
        if self.values.grad is not None:
            self.values.grad = None
            logger.warning(
                "a layer in training was given other units. An optimizer's momentum is of the units before: load its "
                "state_dict, too, or make a new optimizer"
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
        return self.values, mask

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
        """Gives ``slots``, integer [k], to ``units``, int64 [k] counted row by row; their weights start at zero.
        Nothing changes if ``apply``, a bool scalar, is false: ``units`` are then those of the slots now. Returns what
        takes it back; after an error nothing has changed.
        """
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
        """Keeps the units of the slots where ``kept``, bool [num_units], is true; returns as :meth:`rewire_`."""
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
            # a result that someone keeps has the node that accumulates gradients of the old shape; another is made
            # only for another dtype
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
        # Zero the padding, which is ignored, so equal networks give equal files. A tensor of another type (an FSDP
        # shard) has none.
        plain = self.has_plain_values and type(self.values.data) is torch.Tensor and not self.values.is_inference()
        if plain and self.mask.has_padding:
            self.values.data.masked_fill_(~self.mask.valid(), 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key, place = f"{prefix}values", f"{prefix}mask.wiring"
        mine = self._own_mask
        given = key in state_dict
        mask: BlockMask | None = None
        try:
            mask = _mask_to_load(self, state_dict, prefix)
        except ValueError as error:
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
        if place in state_dict:  # the mask is a child and is loaded next: it finds what it has
            state_dict[place] = mine.own_wiring


class _Parametrizations(nn.ModuleDict):
    """The parametrizations of a layer by parameter: ``values`` is one, and a method of every other ModuleDict."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def _mask_of(wiring: torch.Tensor, shape: tuple[int, int], where: str) -> BlockMask:
    """The mask that a buffer describes; raises ValueError, which begins with ``where``, if that is none."""
    try:
        return BlockMask.from_state({"wiring": wiring}, shape)
    except ValueError as error:
        raise ValueError(
            f"{where} describes no mask of this layer ({error}); give parameters and buffers of one network, and tie "
            "an average to its network: DSTScheduler(averages=[average]) or tie_wiring(network, average)"
        ) from error


def _mask_in_place_of(mask: BlockMask) -> BlockMask:
    """What the buffer in place of the mask's own describes, in ``torch.func.functional_call``. Raises ValueError if
    that is no mask, or under ``torch.func.vmap`` several."""
    rows = unwrapped(mask.wiring).detach()
    sent = rows.reshape(-1, rows.shape[-1]).cpu()
    if not (sent == sent[:1]).all():
        raise ValueError(
            "networks with different wirings cannot run in one torch.func.vmap, which shares indices; call each alone"
        )
    if mask.describes(sent[0]):
        return mask
    return _mask_of(sent[0], mask.shape, "the buffer in place of mask.wiring").to(mask.wiring.device)


def _mask_to_load(layer: PackedWeights, state: Mapping[str, Any], prefix: str) -> BlockMask | None:
    """The mask of layer ``prefix`` in a state, None if it stays; ValueError if it or its weights do not fit."""
    plain = layer.has_plain_values
    wiring: Any = state.get(f"{prefix}mask.wiring")
    values: Any = state.get(f"{prefix}values")
    if plain and (wiring is None) != (values is None):
        there, lacks = ("values", "mask.wiring") if wiring is None else ("mask.wiring", "values")
        raise ValueError(
            f"{prefix}{there} is in the state, but {prefix}{lacks} is not, and they are loaded together or not at all; "
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
    packed = (mask.num_units, *mask.unit_shape)
    if tuple(values.shape) != packed:
        raise ValueError(f"size mismatch for {prefix}values: {tuple(values.shape)}, but its mask has units {packed}")
    return mask
