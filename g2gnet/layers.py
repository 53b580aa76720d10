"""A sparse linear layer over a :class:`BlockMask`."""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from g2g_kernels import BlockMask, GroupLayout, g2g_linear
from g2g_kernels.sides import deep_copied
from g2g_kernels.tracing import is_traced, symbolic_call
from g2gnet.copies import Lineage
from g2gnet.derived import NOT_WRITABLE, DerivedWeight

#: called with what a layer receives and what it gives for that, before its bias or after
Observer = Callable[[torch.Tensor, torch.Tensor], None]


class G2GLinear(nn.Module):
    """y = x·Wᵀ + b with a weight of which only the units of ``mask`` exist.

    A ``copy.deepcopy`` of a layer is independent, unless it is an average of this layer (EMA, SWA): :meth:`rewire_`
    rewires it too. It then has the units that the network has now, and its average of a grown unit starts anew.
    :mod:`g2gnet.copies` says what counts as an average.

    Initial values: the active weights of output neuron i are uniform in ±1/√k_i, where k_i is its active fan-in
    (Kaiming-uniform with a = √5, rescaled to the active fan-in). The bias is uniform in ±1/√(mean k).

    Args:
        mask: the units that exist; the layer owns it from now on (``.to``, ``state_dict`` and DST act on it).
        bias: whether to add a learnable bias.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        generator: source of randomness for the initial values (PyTorch's global one if None), on the CPU.

    Attributes:
        values: packed weights, Parameter [num_units, unit_rows, unit_cols].
        bias: Parameter [out], or None.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> draw = torch.Generator().manual_seed(0)
        >>> mask = BlockMask.sample(GroupLayout(32), GroupLayout(64), p_inter=0.15, block_size=4, generator=draw)
        >>> layer = G2GLinear(mask, generator=draw)
        >>> layer.values.shape  # the weights that exist, unit by unit
        torch.Size([32, 4, 4])
        >>> layer(torch.rand(5, 64)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        mask: BlockMask,
        bias: bool = True,
        backend: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.mask = mask
        self.backend = backend
        #: which averages are rewired with it
        self.lineage = Lineage(self)
        #: states that were given out, while someone keeps them: the weights, and the row that describes the mask
        self._states: list[tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]]] = []
        #: while this is set, it is called in every training step
        self.observer: Observer | None = None
        device = mask.unit_row.device
        self.values = nn.Parameter(torch.empty(mask.num_units, *mask.unit_shape, device=device))
        self.bias = nn.Parameter(torch.empty(mask.shape[0], device=device)) if bias else None
        self.reset_parameters(generator)
        if torch.get_default_device().type != "cpu":  # where masks are created all the same
            self.to(torch.get_default_device())

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: BlockMask | torch.Tensor | None = None, backend: str | None = None
    ) -> "G2GLinear":
        """Creates the layer that computes ``linear`` with its weight times ``mask``, with its device and dtype.

        Args:
            linear: provides the bias and the weights that exist; both are copied.
            mask: a :class:`BlockMask`, copied too, or bool [out, in], read as units of single weights. None: the
                mask that ``torch.nn.utils.prune`` put on the layer, or every weight if it put none.
            backend: as for the layer.

        Raises:
            ValueError: if the shapes of mask and weight differ.
        """
        pruned: torch.Tensor | None = getattr(linear, "weight_mask", None)
        # under pruning linear.weight is a product of the last forward pass
        weight: torch.Tensor = linear.weight if pruned is None else linear.get_parameter("weight_orig")
        if mask is None:
            if pruned is None:
                mask = BlockMask.full(GroupLayout(weight.shape[0], 1), GroupLayout(weight.shape[1], 1))
            else:
                mask = BlockMask.from_dense(pruned != 0)
        elif isinstance(mask, torch.Tensor):
            mask = BlockMask.from_dense(mask)
        else:
            mask = copy.deepcopy(mask)
        if mask.shape != tuple(weight.shape):
            raise ValueError(f"mask describes {mask.shape} weights, the linear layer has {tuple(weight.shape)}")
        # the initial values are replaced at once: draw them without changing the global generator
        layer = cls(mask, bias=linear.bias is not None, backend=backend, generator=torch.Generator())
        layer.to(weight.device, weight.dtype).train(linear.training)
        layer.values.data.copy_(layer.mask.pack(weight.detach()))
        layer.values.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer

    def to_linear(self) -> nn.Linear:
        """A new ``nn.Linear`` with this layer's dense weight and bias, for tools that know only that class."""
        # without initial values, which would change the global generator
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.values.dtype)
        linear.to_empty(device=self.values.device).train(self.training)
        for ours, theirs in ((self.dense_weight(), linear.weight), (self.bias, linear.bias)):
            if ours is not None:
                theirs.data.copy_(ours.detach())
        linear.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear

    @property
    def in_features(self) -> int:
        return self.mask.shape[1]

    @property
    def out_features(self) -> int:
        return self.mask.shape[0]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new initial values."""
        fan_in = self.mask.fan_in()
        # all neurons of a block row have the same fan-in: read that of the first
        first_neuron = self.mask.rows.order[self.mask.rows.bounds[:-1].long()]
        bound = fan_in[first_neuron].clamp(min=1).rsqrt()[self.mask.unit_row.long(), None, None]
        uniform = torch.rand(self.values.shape, generator=generator, device="cpu").to(self.values.device) * 2 - 1
        self.values.copy_(uniform * bound * self.mask.valid())
        if self.bias is not None:
            bound = fan_in.float().mean().clamp(min=1).rsqrt()
            uniform = torch.rand(self.bias.shape, generator=generator, device="cpu").to(self.bias.device) * 2 - 1
            self.bias.copy_(uniform * bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        if not isinstance(x, torch.Tensor) and (node := symbolic_call(self, x)) is not None:
            return node
        y = g2g_linear(x, *self.weights(), self.bias, backend=self.backend)
        observer = self.active_observer
        if observer is not None:
            observer(x, y)
        return y

    @property
    def active_observer(self) -> Observer | None:
        """The observer, in training mode with gradients."""
        return self.observer if self.training and torch.is_grad_enabled() else None

    def weights(self) -> tuple[torch.Tensor, BlockMask]:
        """The packed weights and their mask for the kernels in this step.

        Inside ``torch.func.functional_call`` they may be those of another layer.
        """
        own = mask = self.mask
        if is_traced():
            values = self.values
        else:
            self.catch_up()
            values, mask = self.values, own.current()
            if self._own != id(values):
                visited = own.visited
                mask = self.lineage.mask_of_guest(values, own.wiring, mask) if visited else _mask_of(values, mask)
            elif torch.is_grad_enabled() and self.lineage.origin is not None:
                self.lineage.watch()
        return values, mask

    def with_tensors(self, values: torch.Tensor, wiring: torch.Tensor) -> "G2GLinear":
        """A layer with this mask, whose weights and whose mask's description are these tensors."""
        twin = G2GLinear(self.mask.described_in(wiring), bias=False, generator=torch.Generator())
        twin.values = nn.Parameter(values.detach(), requires_grad=False)
        return twin

    def dense_weight(self) -> torch.Tensor:
        """The weight in dense form, [out, in], zero where nothing exists; differentiable."""
        values, mask = self.weights()
        return mask.unpack(values)

    @property
    def weight(self) -> torch.Tensor:
        """:meth:`dense_weight`, for code that reads the weight of an ``nn.Linear``: computed at every access, at the
        cost of a dense copy. Writing to it raises RuntimeError, assigning it AttributeError; ``values`` is trained.
        """
        weight = self.dense_weight()
        if is_traced() or type(weight) is not torch.Tensor:  # traced, or a stand-in
            return weight
        return weight.as_subclass(DerivedWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(f"weight cannot be assigned: that {NOT_WRITABLE}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # where nn.Module puts an assigned Parameter
            raise AttributeError(f"weight cannot be assigned: that {NOT_WRITABLE}")
        super().register_parameter(name, param)
        if name == "values":
            self._own_values()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations":  # torch.nn.utils.parametrize puts it there, empty
            value = _Parametrizations()
        super().__setattr__(name, value)

    @property
    def has_plain_values(self) -> bool:
        """Whether ``values`` is a parameter, and not what a parametrization, pruning or a norm computes."""
        return "values" in self._parameters

    def _own_values(self) -> None:
        """Notes that the present parameter is the layer's own, with this mask."""
        #: the parameter's id (a reference, even a weak one, would keep PyTorch from swapping parameters)
        self._own = 0
        if self.has_plain_values:
            self._own = id(self.values)
            _OWNERS[self._own] = self
        self.lineage.watched = 0

    def _repr_html_(self) -> str:
        return self.mask._repr_html_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # --- changes of the wiring ----------------------------------------------------------------------------------

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

    @contextlib.contextmanager
    def rewired(self, follow: bool) -> Iterator[None]:
        """While entered, mask and weights change together; with ``follow`` averages of the layer then change, too."""
        with self.lineage.rewired(follow):
            yield
        # the weights in a state_dict that someone keeps are the layer's own, its description of the mask is a copy
        for values, wiring in self._states:
            kept, row = values(), wiring()
            if kept is not None and row is not None and kept.data_ptr() == self.values.data_ptr():
                row.data = self.mask.state_dict()["wiring"]

    def catch_up(self) -> None:
        """Applies what was written from outside: a wiring into the mask, weights of a new wiring into an average."""
        received = self.mask.received()
        if received is not None:
            with self.rewired(follow=False):
                self.mask.become_(received)
        if self.has_plain_values and self._own == id(self.values):
            self.lineage.catch_up()

    def __deepcopy__(self, memo: dict[int, Any]) -> "G2GLinear":
        self.catch_up()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(deep_copied(self._state(), memo))
        twin.lineage.come_from(self)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("lineage", "_states", "_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lineage, self._states = Lineage(self), []
        self._own_values()

    def _apply(self, fn: Callable, recurse: bool = True) -> "G2GLinear":
        with self.lineage.unchanged():
            super()._apply(fn, recurse)
        self._own_values()
        return self

    # --- saving -------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Loads mask and weights together or not at all, since either is meaningless without the other.

        Weights alone (a state of parameters, for ``strict=False``) are taken for those of the units that the layer has.
        """
        mask_prefix, key = prefix + "mask.", prefix + "values"
        wiring = state_dict.get(mask_prefix + "wiring")
        assign = local_metadata.get("assign_to_params_buffers", False)
        given = key in state_dict
        mask: BlockMask | None = None
        try:
            if mask_prefix + "unit_row" in state_dict:
                raise ValueError(
                    f"{mask_prefix}unit_row was saved by a version that described masks by several tensors; now it is "
                    f"one, {mask_prefix}wiring. Train the network again; or save dense_weight() of each layer with "
                    "that version and pass BlockMask.from_dense(weight != 0), units of single weights, to "
                    "G2GLinear.from_linear"
                )
            if wiring is not None and not self.has_plain_values:
                self._check_that_wiring_stays(wiring, prefix)
            elif wiring is not None:
                mask = self._mask_to_load(wiring, state_dict.get(key), prefix)
            fits = given
        except ValueError as error:
            error_msgs.append(str(error))
            # the mask is a child and is loaded next: it finds what it has
            self.mask._save_to_state_dict(state_dict, mask_prefix, keep_vars=False)
            fits = False
        if not fits and self.has_plain_values:
            state_dict.pop(key, None)
        missing: list[str] = []
        with self.rewired(follow=False) if mask is not None else contextlib.nullcontext():
            if mask is not None:
                self._become(mask, state_dict[key], assign)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
            )
        missing_keys += [name for name in missing if name != key or not given]
        if fits:
            self.lineage.loaded()
        if assign and mask is not None:  # the weights in that state are the layer's own now
            self._give_out(state_dict, prefix)

    def _mask_to_load(self, wiring: Any, values: Any, prefix: str) -> BlockMask:
        """The mask that a state describes, if it fits this layer and the weights beside it.

        Raises:
            ValueError: if it does not.
        """
        key = prefix + "values"
        if values is None:
            raise ValueError(
                f"{key} and its mask are loaded together or not at all, and the state lacks {key}; save the whole "
                "state_dict() of the layer"
            )
        for name, tensor in ((key, values), (f"{prefix}mask.wiring", wiring)):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                raise ValueError(f"{name} is on the device meta, which has no numbers to load")
        mask = _mask_from(wiring, self.mask.shape, prefix)
        packed = (mask.num_units, *mask.unit_shape)
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"{key} must be a floating-point tensor, not {kind}")
        if tuple(values.shape) != packed:
            raise ValueError(f"size mismatch for {key}: {tuple(values.shape)}, but its mask has units {packed}")
        return mask

    def _check_that_wiring_stays(self, wiring: Any, prefix: str) -> None:
        """Raises ValueError if a state has another mask than this layer, whose weights are computed from others."""
        if not _mask_from(wiring, self.mask.shape, prefix).equals(self.mask):
            raise ValueError(
                f"{prefix}mask differs from the layer's, whose weights a parametrization (or pruning, or a norm) "
                "computes; load the state into a layer of the same wiring, or before that was registered"
            )

    def _become(self, mask: BlockMask, values: torch.Tensor, assign: bool) -> None:
        """Takes over a mask, and makes room for the weights that belong to it."""
        if assign:
            self.mask.replace_by_(mask.to(values.device))
        elif not self.values.is_meta:
            self.mask.become_(mask.to(self.mask.unit_row.device))
        if self.values.shape != values.shape:
            self.values.data, self.values.grad = self.values.new_zeros(values.shape), None

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
            self._give_out(state, prefix)
        return state

    def _give_out(self, state: dict[str, Any], prefix: str) -> None:
        """Notes that a state, whose weights are the layer's own, is in someone's hands."""
        values, wiring = (weakref.ref(state[prefix + name]) for name in ("values", "mask.wiring"))
        self._states = [kept for kept in self._states if kept[0]() is not None]
        self._states.append((values, wiring))


class _Parametrizations(nn.ModuleDict):
    """The parametrizations of a layer by parameter: ``values`` is one, and a method of every other ModuleDict."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def _mask_from(wiring: Any, shape: tuple[int, int], prefix: str) -> BlockMask:
    """The mask of a layer ``prefix`` of that shape in a state; raises ValueError if ``wiring`` describes none."""
    try:
        if not isinstance(wiring, torch.Tensor):
            raise ValueError(f"wiring must be a tensor, not {type(wiring).__name__}")
        return BlockMask.from_state({"wiring": wiring}, shape)
    except ValueError as error:
        raise ValueError(f"{prefix}mask: {error}") from error


#: the layer that each packed parameter belongs to, by the parameter's id
_OWNERS: weakref.WeakValueDictionary[int, G2GLinear] = weakref.WeakValueDictionary()


def _mask_of(values: torch.Tensor, mask: BlockMask) -> BlockMask:
    """The mask of packed weights in place of a layer's own: that of the layer whose parameter they are, or ``mask``."""
    owner = _OWNERS.get(id(values))
    return owner.mask if owner is not None and owner._parameters.get("values") is values else mask
