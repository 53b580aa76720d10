"""A sparse linear layer over a :class:`BlockMask`."""

import copy

import torch
from torch import nn

from g2g_kernels import BlockMask, GroupLayout, g2g_linear
from g2gnet.derived import NOT_WRITABLE, DerivedWeight


class AbsentGradient:
    """Has absent units of a layer get a gradient, too: while it is set, the layer runs with every unit.

    Units that are absent are zero then, so that the layer computes what it would without them, by the same kernels (by
    events where the input is spikes), and its own weights get the same gradient. What backward passes find for all
    units of the grid is added up in ``total``.

    Args:
        mask: of the layer.

    Attributes:
        mask: the mask of every unit; slot u holds unit u of the grid, counted row by row.
        total: ∂L/∂W so far, [block rows · block columns, unit_rows, unit_cols], or None.
    """

    def __init__(self, mask: BlockMask) -> None:
        self.mask = mask.filled()
        self.total: torch.Tensor | None = None

    def expand(self, values: torch.Tensor, mask: BlockMask) -> tuple[torch.Tensor, BlockMask]:
        """The same weights with every unit: packed values, and the mask that they belong to."""
        units = values.new_zeros(self.mask.num_units, *mask.unit_shape).index_copy(0, mask.flat_unit(), values)
        units.register_hook(self._add)
        return units, self.mask

    def _add(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().float()
        self.total = gradient.clone() if self.total is None else self.total + gradient

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the layer is in nobody's step


class G2GLinear(nn.Module):
    """y = x·Wᵀ + b with a weight of which only the units of ``mask`` exist.

    Initial values: the active weights of output neuron i are uniform in ±1/√k_i with k_i its active fan-in (Kaiming-
    uniform with a = √5, rescaled to the active fan-in), the bias uniform in ±1/√(mean k).

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
        #: while it is set, training steps give every unit a gradient
        self.absent_gradient: AbsentGradient | None = None
        device = mask.unit_row.device
        self.values = nn.Parameter(torch.empty(mask.num_units, *mask.unit_shape, device=device))
        self.bias = nn.Parameter(torch.empty(mask.shape[0], device=device)) if bias else None
        self.reset_parameters(generator)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: BlockMask | torch.Tensor | None = None, backend: str | None = None
    ) -> "G2GLinear":
        """The layer that computes what ``linear`` would with its weight times ``mask``, of the same device and dtype.

        Args:
            linear: its weights that exist and its bias are copied.
            mask: a :class:`BlockMask`, copied too, or bool [out, in], taken as units of single weights. None: the
                mask that ``torch.nn.utils.prune`` put on the layer, and where there is none every weight.
            backend: as for the layer.

        Raises:
            ValueError: if the mask has another shape than the weight.
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
        # initial values are drawn only to be replaced: not from the user's generator
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
        """Draws the initial values anew."""
        fan_in = self.mask.fan_in()
        # every neuron of a block row has the same fan-in: read it off the row's first place
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
        """The packed weights and their mask as kernels are to take them in this step."""
        if self.absent_gradient is None or not (self.training and torch.is_grad_enabled()):
            return self.values, self.mask
        return self.absent_gradient.expand(self.values, self.mask)

    def dense_weight(self) -> torch.Tensor:
        """The weight in dense form, [out, in], zero where nothing exists; differentiable."""
        values, mask = self.weights()
        return mask.unpack(values)

    @property
    def weight(self) -> torch.Tensor:
        """:meth:`dense_weight`, for code that reads that of an ``nn.Linear``: made at every access, at the cost of a
        dense copy. Writing to it raises RuntimeError, assigning it AttributeError: what is trained is ``values``.
        """
        weight = self.dense_weight()
        if torch.compiler.is_compiling() or type(weight) is not torch.Tensor:  # traced, or one that stands for another
            return weight
        return weight.as_subclass(DerivedWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(f"weight cannot be assigned: that {NOT_WRITABLE}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # as nn.Module takes an assigned Parameter
            raise AttributeError(f"weight cannot be assigned: that {NOT_WRITABLE}")
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # The mask first, since it says which shape the values have. Loaded again as a child it reports what is wrong.
        problems: list[str] = []
        self.mask._load_from_state_dict(state_dict, prefix + "mask.", local_metadata, strict, [], [], problems)
        packed = (self.mask.num_units, *self.mask.unit_shape)
        if self.values.shape != packed:
            self.values.data = self.values.new_empty(packed)
        values = state_dict.get(prefix + "values")
        if not problems and isinstance(values, torch.Tensor) and values.shape == packed:
            padding = ~self.mask.valid()
            if values.detach().to(padding.device)[padding].any():
                error_msgs.append(f"{prefix}values: there are weights outside of the mask's units")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
