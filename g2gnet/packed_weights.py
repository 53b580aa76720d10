"""Packed weights and their mask, which mean nothing without one another: what happens to one happens to both.

They are called, copied, moved, saved, loaded and rewired together. :mod:`g2gnet.copies` says what becomes of copies,
:mod:`g2gnet.saved_weights` which states can be loaded, :mod:`g2gnet.arrivals` which masks arrive from elsewhere.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from g2g_kernels import BlockMask
from g2g_kernels.sides import deep_copied
from g2g_kernels.tracing import is_traced
from g2gnet.arrivals import Received, current_mask, is_replaced
from g2gnet.copies import Lineage
from g2gnet.saved_weights import GivenStates, mask_to_load


class PackedWeights(nn.Module):
    """The weights of the units of a mask; the base of :class:`g2gnet.G2GLinear`.

    Args:
        mask: the units that exist; the module owns it from now on.
        values: their packed weights [num_units, unit_rows, unit_cols].

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> layer = G2GLinear(BlockMask.full(GroupLayout(8), GroupLayout(8), block_size=1))
        >>> values, mask = layer.weights()  # that a kernel takes
        >>> mask.unpack(values).shape
        torch.Size([8, 8])
    """

    #: attributes that say what happened to this very module; a copy begins with its own
    _NOT_COPIED = ("lineage", "_received", "_given", "_own")

    def __init__(self, mask: BlockMask, values: nn.Parameter) -> None:
        super().__init__()
        self._begin()
        self.mask = mask
        self.values = values

    def _begin(self) -> None:
        #: which averages are rewired with it
        self.lineage = Lineage(self)
        self._received = Received()
        self._given = GivenStates()

    # --- the weights of a step ----------------------------------------------------------------------------------

    def weights(self) -> tuple[torch.Tensor, BlockMask]:
        """The packed weights and their mask for the kernels in this step.

        Inside ``torch.func.functional_call`` they may be those of another layer.
        """
        if is_traced():
            return self.values, self.mask
        self.catch_up()
        values = self.values
        return values, self._mask_of(values)

    def _mask_of(self, values: torch.Tensor) -> BlockMask:
        """The mask of the packed weights that are here now."""
        own = self.mask
        mask = current_mask(own)
        if self._own == id(values):
            if torch.is_grad_enabled() and self.lineage.origin is not None:
                self.lineage.watch()
            return mask
        if is_replaced(own):
            return self.lineage.mask_of_guest(values, own.wiring, mask)
        owner = _OWNERS.get(id(values))
        return owner.mask if owner is not None and owner._parameters.get("values") is values else mask

    @property
    def has_plain_values(self) -> bool:
        """Whether ``values`` is a parameter, and not what a parametrization, pruning or a norm computes."""
        return "values" in self._parameters

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "values":
            self._own_values()

    def _own_values(self) -> None:
        """Notes that the present parameter is the layer's own, with this mask."""
        #: the parameter's id (a reference, even a weak one, would keep PyTorch from swapping parameters)
        self._own = 0
        if self.has_plain_values:
            self._own = id(self.values)
            _OWNERS[self._own] = self
        self.lineage.watched = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations":  # torch.nn.utils.parametrize puts it there, empty
            value = _Parametrizations()
        super().__setattr__(name, value)

    # --- changes of the mask ------------------------------------------------------------------------------------

    def rewire_(self, slots: torch.Tensor, units: torch.Tensor, apply: torch.Tensor) -> Callable[[], None]:
        """Gives slots to other units, whose weights (and gradients, if any) start at zero; inside :meth:`rewired`.

        Args:
            slots: integer [k].
            units: int64 [k], the units, counted row by row (:meth:`BlockMask.flat_unit`).
            apply: bool scalar; if it is false, ``units`` are those that the slots have now, and nothing changes.

        Returns:
            a function that takes it back. If an error is raised, nothing has changed.
        """
        with torch.no_grad(), contextlib.ExitStack() as undo:
            undo.callback(self.mask.relabel_, slots, self.mask.unit_row[slots], self.mask.unit_col[slots])
            self.mask.relabel_(slots, units // self.mask.grid[1], units % self.mask.grid[1])
            for tensor in (self.values, self.values.grad):
                if tensor is not None:
                    rows = tensor[slots].detach()
                    undo.callback(tensor.detach().index_copy_, 0, slots, rows)
                    tensor[slots] = torch.where(apply, 0.0, rows)
            return undo.pop_all().close

    def keep_(self, kept: torch.Tensor) -> Callable[[], None]:
        """Keeps the units of the slots where ``kept``, bool [num_units], is true; inside :meth:`rewired`.

        Returns:
            a function that takes it back. If an error is raised, nothing has changed.
        """
        before, values, gradient = copy.deepcopy(self.mask), self.values.data, self.values.grad
        fewer = values[kept]
        self.mask.keep_(kept)
        self.hold_(fewer, None if gradient is None else gradient[kept])

        def undo() -> None:
            self.mask.replace_by_(before)
            self.hold_(values, gradient)

        return undo

    def hold_(self, values: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
        """Makes ``values``, of any number of units, the data of the same parameter, and ``gradient`` its gradient."""
        self.values.grad = None
        # a graph that someone keeps has the node that accumulates gradients of the old shape; PyTorch makes another one
        # only for another dtype
        self.values.data = values.new_empty(0, dtype=torch.float if values.dtype == torch.half else torch.half)
        self.values.data = values
        self.values.grad = gradient

    @contextlib.contextmanager
    def rewired(self, follow: bool) -> Iterator[None]:
        """While entered, mask and weights change together; with ``follow`` averages of the layer then change, too."""
        with self.lineage.rewired(follow):
            yield
        self._given.rewired(self)

    def catch_up(self) -> None:
        """Applies what was written from outside: a wiring into the mask, weights of a new wiring into an average."""
        mask = self.mask
        received = self._received.mask(mask)
        if received is not None:
            with self.rewired(follow=False):
                mask.become_(received)
        if self._own == id(self._parameters.get("values")):
            self.lineage.catch_up()

    # --- copies, devices and dtypes -----------------------------------------------------------------------------

    def with_tensors(self, values: torch.Tensor, wiring: torch.Tensor) -> "PackedWeights":
        """Weights with this mask; they and the mask's description are these tensors."""
        mask = copy.deepcopy(self.mask)
        mask.publish_in(wiring)
        return PackedWeights(mask, nn.Parameter(values.detach(), requires_grad=False))

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeights":
        self.catch_up()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(deep_copied(self._state(), memo))
        twin.lineage.come_from(self)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self._state()

    def _state(self) -> dict[str, Any]:
        """What a copy begins with. (``torch.nn.utils.parametrize`` replaces ``__getstate__`` by a refusal.)"""
        return {name: value for name, value in self.__dict__.items() if name not in self._NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()
        self._own_values()

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedWeights":
        with self.lineage.unchanged():
            super()._apply(fn, recurse)
        self._own_values()
        return self

    # --- states -------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Loads mask and weights together or not at all.

        Weights alone (a state of parameters, for ``strict=False``) are taken for those of the units that the layer has.
        """
        key = f"{prefix}values"
        given = fits = key in state_dict
        mask: BlockMask | None = None
        try:
            mask = mask_to_load(self, state_dict, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            # the mask is a child and is loaded next: it finds what it has
            self.mask._save_to_state_dict(state_dict, f"{prefix}mask.", keep_vars=False)
            fits = False
        if not fits and self.has_plain_values:
            state_dict.pop(key, None)
        assign = local_metadata.get("assign_to_params_buffers", False)
        missing: list[str] = []
        with contextlib.nullcontext() if mask is None else self.rewired(follow=False):
            if mask is not None:
                self._become(mask, state_dict[key], assign)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
            )
        missing_keys += [name for name in missing if name != key or not given]
        if fits:
            self.lineage.loaded()
        if assign and mask is not None:  # the weights in that state are the layer's own now
            self._given.add(state_dict, prefix)

    def _become(self, mask: BlockMask, values: torch.Tensor, assign: bool) -> None:
        """Takes over a mask, and makes room for the weights that belong to it."""
        if assign:
            self.mask.replace_by_(mask.to(values.device))
        elif not self.values.is_meta:
            self.mask.become_(mask.to(self.mask.unit_row.device))
        if self.values.shape != values.shape:
            self.hold_(self.values.new_zeros(values.shape))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.catch_up()
        # Zero the padding, which is ignored, so equal networks give equal files. A tensor of another type (an FSDP
        # shard) has none.
        plain = self.has_plain_values and type(self.values.data) is torch.Tensor and not self.values.is_inference()
        if plain and self.mask.has_padding:
            with self.lineage.unchanged():
                self.values.data.masked_fill_(~self.mask.valid(), 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def state_dict(self, *args, **kwargs):
        """As that of any module: its tensors are the layer's own, also after the layer was rewired."""
        state = super().state_dict(*args, **kwargs)
        if not self.has_plain_values:
            return state
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if state[prefix + "values"] is not self.values:
            self._given.add(state, prefix)
        return state


class _Parametrizations(nn.ModuleDict):
    """The parametrizations of a layer by parameter: ``values`` is one, and a method of every other ModuleDict."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


#: the layer that each packed parameter belongs to, by the parameter's id
_OWNERS: weakref.WeakValueDictionary[int, PackedWeights] = weakref.WeakValueDictionary()
