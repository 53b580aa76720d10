"""A sparse linear layer over a :class:`BlockMask`."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from g2g_kernels import BlockMask, GroupLayout, g2g_linear
from g2g_kernels.block_mask import version
from g2gnet.derived import NOT_WRITABLE, DerivedWeight


class AbsentGradient:
    """Gives absent units of a layer a gradient too: while it is set, the layer runs with every unit.

    Absent units are zero, so the layer computes the same output with the same kernels (by events if the input is
    spikes), and its own weights get the same gradient. The gradients of all units of the grid are summed over backward
    passes in ``total``.

    Args:
        mask: the layer's.

    Attributes:
        mask: the mask of every unit; slot u holds unit u of the grid, counted row by row.
        total: ∂L/∂W so far, [block rows · block columns, unit_rows, unit_cols], or None.
    """

    def __init__(self, mask: BlockMask) -> None:
        self.mask = mask.filled()
        self.total: torch.Tensor | None = None

    def expand(self, values: torch.Tensor, mask: BlockMask) -> tuple[torch.Tensor, BlockMask]:
        """The same weights with every unit: packed values and their mask."""
        units = values.new_zeros(self.mask.num_units, *mask.unit_shape).index_copy(0, mask.flat_unit(), values)
        units.register_hook(self._add)
        return units, self.mask

    def _add(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().float()
        self.total = gradient.clone() if self.total is None else self.total + gradient

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer takes no part in the step


class G2GLinear(nn.Module):
    """y = x·Wᵀ + b with a weight of which only the units of ``mask`` exist.

    A ``copy.deepcopy`` of a layer is independent, with one exception: if its weights are then written to but never
    trained, it counts as an average of this layer (EMA, SWA), and :meth:`rewire_` rewires it too. It then has the units
    that the network has now, and its average of a grown unit starts anew.

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
        self._alone()
        #: while this is set, training steps give every unit a gradient
        self.absent_gradient: AbsentGradient | None = None
        device = mask.unit_row.device
        self.values = nn.Parameter(torch.empty(mask.num_units, *mask.unit_shape, device=device))
        self.bias = nn.Parameter(torch.empty(mask.shape[0], device=device)) if bias else None
        self.reset_parameters(generator)

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
        uniform = torch.rand(self.values.shape, generator=generator).to(self.values.device) * 2 - 1
        self.values.copy_(uniform * bound * self.mask.valid())
        if self.bias is not None:
            bound = fan_in.float().mean().clamp(min=1).rsqrt()
            uniform = torch.rand(self.bias.shape, generator=generator).to(self.bias.device) * 2 - 1
            self.bias.copy_(uniform * bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        return g2g_linear(x, *self.weights(), self.bias, backend=self.backend)

    def weights(self) -> tuple[torch.Tensor, BlockMask]:
        """The packed weights and their mask for the kernels in this step."""
        self._catch_up()
        if self.absent_gradient is None or not (self.training and torch.is_grad_enabled()):
            return self.values, self.mask
        return self.absent_gradient.expand(self.values, self.mask)

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
        if torch.compiler.is_compiling() or type(weight) is not torch.Tensor:  # traced, or a stand-in
            return weight
        return weight.as_subclass(DerivedWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(f"weight cannot be assigned: that {NOT_WRITABLE}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # where nn.Module puts an assigned Parameter
            raise AttributeError(f"weight cannot be assigned: that {NOT_WRITABLE}")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    # --- averages of it -----------------------------------------------------------------------------------------

    def rewire_(self, slots: torch.Tensor, units: torch.Tensor, really: torch.Tensor) -> None:
        """Gives slots to other units, whose weights (and gradients, if any) start at zero.

        Args:
            slots: integer [k].
            units: int64 [k], the units, counted row by row (:meth:`BlockMask.flat_unit`).
            really: bool scalar; if it is false, ``units`` are those that the slots have now, and nothing changes.
        """
        _leave(self)  # a layer that is rewired itself is not an average
        averages = self._averages()
        for average in averages:  # some were written to since the last change but not used since
            average._catch_up()
        with torch.no_grad():
            self.mask.relabel_(slots, units // self.mask.grid[1], units % self.mask.grid[1])
            for tensor in (self.values, self.values.grad):
                if tensor is not None:
                    tensor[slots] = torch.where(really, 0.0, tensor[slots])
        for average in averages:
            average._follow(self)

    def _alone(self) -> None:
        """Makes this a layer that averages no other and that no other averages."""
        self._origin: weakref.ref[G2GLinear] | None = None
        self._copies: weakref.WeakSet[G2GLinear] = weakref.WeakSet()
        #: for a copy: the version of its initial weights, and the changes of the original's mask that it has
        self._unwritten: int | None = None
        self._seen = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "G2GLinear":
        self._catch_up()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._origin = weakref.ref(self)
        twin._mark()
        self._copies.add(twin)
        # a layer that is trained is not an average
        twin_of = weakref.ref(twin)
        if twin.values.requires_grad:
            twin.values.register_post_accumulate_grad_hook(lambda _: _leave(twin_of()))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_origin", "_copies")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._alone()

    def _mark(self) -> None:
        """Notes the version of the weights, and which units they belong to."""
        origin = self._origin() if self._origin is not None else None
        self._unwritten = version(self.values)
        self._seen = origin.mask.changes if origin is not None else 0

    def _is_average(self) -> bool:
        """Whether it is a copy whose weights were written to and never trained."""
        return self._origin is not None and self.values.grad is None and version(self.values) != self._unwritten

    def _averages(self) -> "list[G2GLinear]":
        return [copied for copied in self._copies if copied._is_average()]

    def _catch_up(self) -> None:
        """Applies what was written from outside: a wiring into the mask, first weights into an average."""
        if torch.compiler.is_compiling():
            return
        self.mask.receive()
        origin = self._origin() if self._origin is not None else None
        if origin is not None and origin.mask.changes != self._seen and self._is_average():
            self._follow(origin)

    @torch.no_grad()
    def _follow(self, origin: "G2GLinear") -> None:
        """Takes over the wiring of the layer that it averages and, for slots with new units, its weights."""
        if self.values.shape == origin.values.shape:
            before = self.mask.flat_unit()
            self.mask.become_(origin.mask)
            new = (before != self.mask.flat_unit())[:, None, None]
            self.values.copy_(torch.where(new, origin.values.to(self.values), self.values))
        self._seen = origin.mask.changes
        for average in self._averages():
            average._follow(self)

    def _apply(self, fn: Callable, recurse: bool = True) -> "G2GLinear":
        written = self._is_average()
        super()._apply(fn, recurse)
        self._unwritten = None if written else version(self.values)
        return self

    # --- saving -------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # The mask first: it determines the shape of the values. It is loaded again as a child, which reports errors.
        self.mask._load_from_state_dict(state_dict, prefix + "mask.", local_metadata, strict, [], [], [])
        packed = (self.mask.num_units, *self.mask.unit_shape)
        if self.values.shape != packed:
            self.values.data = self.values.new_empty(packed)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._origin is not None:
            self._mark()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._catch_up()
        # Zero the padding, which is ignored, so equal networks give equal files. A tensor of another type (an FSDP
        # shard) has none.
        if self.mask.has_padding and type(self.values.data) is torch.Tensor and not self.values.is_inference():
            self.values.data.masked_fill_(~self.mask.valid(), 0)
        super()._save_to_state_dict(destination, prefix, keep_vars)


def _leave(layer: G2GLinear | None) -> None:
    if layer is not None:
        layer._origin = None
