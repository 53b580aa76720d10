"""A sparse linear layer over a :class:`BlockMask`."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from g2g_kernels import BlockMask, GroupLayout, g2g_linear
from g2g_kernels.choices import check_flag
from g2g_kernels.numbers import FLOAT32
from g2g_kernels.ops.g2g_stack.population import ProductObserver
from g2g_kernels.tracing import default_device, is_traced
from g2gnet.base.hooks import own_code
from g2gnet.weights.packed_weights import PackedWeights

#: why the dense weight cannot be written to, and what to do instead
_NOT_WRITABLE = (
    "of a sparse layer is computed from its packed values at every access. Change layer.values "
    "(layer.values.data.copy_(layer.mask.pack(weight)), layer.reset_parameters(), layer.values.requires_grad_(False)), "
    "or create a new layer: G2GLinear.from_linear(linear, mask), G2GConv2d.from_conv2d(conv, mask)"
)


class _DerivedWeight(torch.Tensor):
    """The dense weight of a :class:`SparseLayer`, for reading only, as is all that shares its memory (views,
    ``detach()``, ``.data``). Copies, and results computed from it, are ordinary tensors."""

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)  # functions of nn.init name their tensor
        name = function.__name__
        in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
        if (in_place and isinstance(first, cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(f"{name} would change a copy: the dense weight {_NOT_WRITABLE}")
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__deepcopy__", "__reduce_ex__"):
                return function(args[0].as_subclass(torch.Tensor), *args[1:])
            result = function(*args, **kwargs)
            if isinstance(result, torch.Tensor) and isinstance(first, cls) and _same_memory(result, first):
                return result.as_subclass(cls)
        return result


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout != torch.strided or one.is_nested:  # sparse and mkldnn tensors have no such memory
        return False
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def parameter_of(layer: nn.Module, name: str) -> Any:
    """The ``name`` ("weight" or "bias") that the next forward pass of a dense layer will use, or None if it has none: a
    parameter, one times the mask that ``torch.nn.utils.prune`` put on it, or what parametrizations make of it.

    Raises ValueError for one of a lazy layer, which has no size yet, and for a pruned bias, since ours have no mask;
    TypeError for one that hooks compute, as those of ``torch.nn.utils.weight_norm`` and ``spectral_norm`` do: the
    layer's attribute is of the last forward pass, or of none.
    """
    parameter = layer._parameters.get(name)
    if parameter is not None and is_lazy(parameter):
        raise ValueError(f"{name} of the {type(layer).__name__} has no size yet; call its model once before")
    with torch.enable_grad():  # so that what is computed here requires gradients as its parameters do
        pruned: torch.Tensor | None = getattr(layer, f"{name}_mask", None)
        if pruned is not None and name == "bias" and not pruned.all():
            raise ValueError(
                f"the bias of the {type(layer).__name__} is pruned, and would train: a bias has no mask here. "
                "torch.nn.utils.prune.remove(layer, 'bias') makes it one that trains"
            )
        if pruned is not None:
            return layer.get_parameter(f"{name}_orig") * pruned
        if name in vars(layer):
            raise TypeError(
                f"{name} of the {type(layer).__name__} is no parameter: hooks compute it in each forward pass, as do "
                "those of torch.nn.utils.weight_norm and spectral_norm. Use torch.nn.utils.parametrizations, or remove "
                "them first: torch.nn.utils.remove_weight_norm, remove_spectral_norm"
            )
        return getattr(layer, name)


def refuse_own_code(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raises TypeError for a dense layer that does more than its ``kind`` says, which a layer made of it would not."""
    if why := own_code(layer, kind):
        raise TypeError(
            f"the {type(layer).__name__} {why}, which a layer made of it would not have; give an nn.{kind.__name__} "
            "without it, and register hooks on what is made of it"
        )


class StepObserver(Protocol):
    """What :attr:`SparseLayer.observer` is told."""

    def of_call(self, values: torch.Tensor) -> tuple[torch.Tensor, ProductObserver]:
        """The packed weights for the products of one call, and what these products are told to."""

    def of_dense(self, weight: torch.Tensor) -> None:
        """The dense weight is read."""


def checked_mask(mask: object, otherwise: str = "") -> BlockMask:
    """``mask`` itself. A mask that is no BlockMask raises TypeError, whose message ends with ``otherwise``."""
    if not isinstance(mask, BlockMask):
        give = "give a BlockMask (BlockMask.sample draws one, from_dense takes bool)"
        raise TypeError(f"mask is {type(mask).__name__}; {give}{otherwise}")
    return mask


class SparseLayer(PackedWeights):
    """A layer whose weights are the units of a mask, each weight a number or a kernel of numbers.

    Attributes:
        values: packed weights, Parameter [num_units, unit_rows, unit_cols]; kernels have two more dimensions.
        bias: Parameter [out], or None.
        observer: while it is set, it is told of every training step.
    """

    observer: StepObserver | None
    bias: Any

    def _make_parameters(self, bias: bool, generator: torch.Generator | None, draw: bool = True) -> None:
        """The rest of the constructor. Without ``draw`` the values stay, and those of the bias are for the caller."""
        device = self.mask.unit_row.device
        self.observer = None
        self.bias = nn.Parameter(torch.empty(self.mask.shape[0], device=device)) if check_flag("bias", bias) else None
        if draw:
            self.reset_parameters(generator)
        if default_device().type != "cpu":  # where masks are created all the same
            self.to(default_device())

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new initial values."""
        fan_in = self.mask.fan_in() * self.weights_of_place
        # all neurons of a block row have the same fan-in: read that of the first
        first_neuron = self.mask.rows.order[self.mask.rows.bounds[:-1].long()]
        of_units = fan_in[first_neuron].clamp(min=1).rsqrt()[self.mask.unit_row.long(), None, None] * self.mask.valid()
        of_bias = fan_in.float().mean().clamp(min=1).rsqrt()
        for tensor, bound in ((self.values, self.over_kernels(of_units)), (self.bias, of_bias)):
            if tensor is not None:
                uniform = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor.device) * 2 - 1
                tensor.copy_(uniform * bound)

    def _take(self, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Takes device, dtype and mode of a dense layer, those of its ``weight`` that exist here, and its ``bias``."""
        self.to(weight.device, weight.dtype).train(layer.training)
        self.values.data.copy_(self.mask.pack(weight.detach()))
        self.values.requires_grad_(weight.requires_grad)
        if bias is not None:
            self.bias.data.copy_(bias.detach())
            self.bias.requires_grad_(bias.requires_grad)

    def dense_weight(self) -> torch.Tensor:
        """The weight in dense form, [out, in] or [out, in, kernel rows, kernel columns], zero where nothing exists;
        differentiable."""
        values, mask = self.weights()
        weight = mask.unpack(values)
        if self.observer is not None and self.training and torch.is_grad_enabled():
            self.observer.of_dense(weight)
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """:meth:`dense_weight`, for code that reads the weight of a dense layer: computed at every access, at the
        cost of a dense copy. Writing to it raises RuntimeError, assigning it AttributeError: ``values`` is trained and
        has the gradient."""
        weight = self.dense_weight()
        if is_traced() or type(weight) is not torch.Tensor:  # traced, or a stand-in
            return weight
        return weight.as_subclass(_DerivedWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise AttributeError(f"weight cannot be assigned: that {_NOT_WRITABLE}")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # where nn.Module puts an assigned Parameter
            raise AttributeError(f"weight cannot be assigned: that {_NOT_WRITABLE}")
        super().register_parameter(name, param)

    def _repr_html_(self) -> str:
        return self.mask._repr_html_()


class G2GLinear(SparseLayer):
    """y = x·Wᵀ + b; of the weight W only the units of ``mask`` exist.

    A ``copy.deepcopy`` of a layer is a layer of its own; an average of a network (EMA, SWA) is rewired with it if it is
    tied to it (:func:`g2gnet.tie_wiring`). Initially the active weights of output neuron i are uniform in ±1/√k_i, k_i
    being its active fan-in (Kaiming-uniform with a = √5, rescaled to it), and the bias is in ±1/√(mean k).

    Args:
        mask: the units that exist. The layer has a copy, ``layer.mask``, which ``.to``, ``state_dict`` and DST act on.
        bias: whether to add a learnable bias.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        generator: source of randomness for the initial values (PyTorch's global one if None), on the CPU.

    Attributes:
        values: packed weights, Parameter [num_units, unit_rows, unit_cols].
        bias: Parameter [out], or None.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> layer = G2GLinear(BlockMask.sample(GroupLayout(32), GroupLayout(64), p_inter=1 / 7, block_size=4))
        >>> layer.values.shape, layer(torch.rand(5, 64)).shape  # the weights that exist, unit by unit
        (torch.Size([32, 4, 4]), torch.Size([5, 32]))
    """

    def __init__(
        self, mask: BlockMask, bias: bool = True, backend: str | None = None, generator: torch.Generator | None = None
    ) -> None:
        mask = checked_mask(mask, ", or have every weight: G2GLinear.from_linear(nn.Linear(in_features, out_features))")
        device = mask.unit_row.device
        super().__init__(mask, nn.Parameter(torch.empty(mask.num_units, *mask.unit_shape, device=device)))
        self.backend = backend
        self._make_parameters(bias, generator)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: BlockMask | torch.Tensor | None = None, backend: str | None = None
    ) -> "G2GLinear":
        """The layer that computes ``linear`` with its weight times ``mask``, of its device and dtype; both are copied.

        ``mask`` is a :class:`BlockMask`, or bool [out, in], read as units of single weights. None: the mask that
        ``torch.nn.utils.prune`` put on the layer, or every weight if it put none. Raises ValueError if the shapes of
        mask and weight differ; TypeError for what is no ``nn.Linear``, one with hooks or a ``forward`` of its own, and
        for a weight or bias that hooks compute.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is {type(linear).__name__}; give an nn.Linear, as G2GLinear.to_linear makes one")
        weight, bias = (parameter_of(linear, name) for name in ("weight", "bias"))
        refuse_own_code(linear, nn.Linear)
        pruned: torch.Tensor | None = getattr(linear, "weight_mask", None)
        if mask is None and pruned is not None:
            mask = pruned.bool()
        if mask is None:
            mask = BlockMask.full(GroupLayout(weight.shape[0], 1), GroupLayout(weight.shape[1], 1))
        elif not isinstance(mask, BlockMask):
            mask = BlockMask.from_dense(mask)
        if mask.shape != tuple(weight.shape):
            raise ValueError(f"mask describes {mask.shape} weights, the linear layer has {tuple(weight.shape)}")
        # initial values, which are replaced at once, are drawn without changing the global generator
        layer = cls(mask, bias=bias is not None, backend=backend, generator=torch.Generator())
        layer._take(linear, weight, bias)
        return layer

    @classmethod
    def from_scipy(cls, matrix: Any, block_size: int = 1, bias: Any = None, backend: str | None = None) -> "G2GLinear":
        """The layer with the weights [out, in] that a SciPy sparse matrix (or array) of any format stores, zeros too.

        Args:
            matrix: entries that it has twice are added.
            block_size: side of a unit. Weights of a unit that are not stored are 0.
            bias: [out], a tensor, an array or a list; None: the layer has none.
            backend: as for the layer.

        Raises:
            TypeError: for what is no SciPy sparse matrix.
            ValueError: for a bias of another size, or numbers that are not real, not finite, or that a float32 does not
                hold.

        Example:
            >>> import scipy.sparse
            >>> layer = G2GLinear.from_scipy(scipy.sparse.random(40, 30, density=0.1, random_state=0))
            >>> layer.values.shape, layer.mask.to_scipy(layer.values).nnz
            (torch.Size([120, 1, 1]), 120)
        """
        from scipy import sparse  # which is slow to import

        if not sparse.issparse(matrix):
            raise TypeError(f"matrix is a {type(matrix).__name__}; give a SciPy sparse one, scipy.sparse.coo_matrix(…)")
        if matrix.dtype.kind not in "fiub" or len(matrix.shape) != 2:
            raise ValueError(f"matrix is of {matrix.dtype} {list(matrix.shape)}; give real numbers [out, in]")
        if bias is not None:
            bias = torch.as_tensor(bias, device="cpu").detach()
            if tuple(bias.shape) != matrix.shape[:1]:
                raise ValueError(f"bias has shape {list(bias.shape)}, the layer {matrix.shape[0]} outputs")
            if bias.is_complex() or not (bias.double().abs() <= FLOAT32[1]).all():
                raise ValueError("bias has numbers that are not real, not finite, or that a float32 does not hold")
        layouts = GroupLayout(matrix.shape[0], 1), GroupLayout(matrix.shape[1], 1)
        none = torch.zeros(0, dtype=torch.int64)
        return cls._from_entries(matrix, BlockMask(*layouts, none, none, block_size), bias, backend)

    @classmethod
    def _from_entries(cls, matrix: Any, grid: BlockMask, bias: Any = None, backend: str | None = None) -> "G2GLinear":
        """:meth:`from_scipy` of real numbers, in units of the ``grid``, a mask of their shape."""
        matrix = matrix.tocoo()
        return cls._from_edges(matrix.row, matrix.col, matrix.data, grid, bias, backend)

    @classmethod
    def _from_edges(
        cls, post: Any, pre: Any, weight: Any, grid: BlockMask, bias: Any = None, backend: str | None = None
    ) -> "G2GLinear":
        """The same of columns: neurons of the ``grid`` and real weights, those of a pair added in their order."""
        (height, width), units_in_row = grid.unit_shape, grid.grid[1]
        size = height * width
        row, col = (torch.from_numpy(np.require(each, np.int64, ("C", "W"))) for each in (post, pre))
        row, col = (
            each if side.in_order else side.place_of[each] for side, each in ((grid.rows, row), (grid.cols, col))
        )
        # the places of all weights that the grid has room for, unit after unit
        place = (row * units_in_row).add_(col)
        if size > 1:
            place = (row // height * units_in_row + col // width) * size + row % height * width + col % width
        place, order = place.sort(stable=True)
        kind = np.float32 if weight.dtype == np.float32 else np.float64
        numbers = torch.from_numpy(np.require(weight, kind, ("C", "W")))[order].numpy()
        first = torch.ones_like(place, dtype=torch.bool)
        torch.ne(place[1:], place[:-1], out=first[1:])
        if not first.all():
            # in doubles, whose sums do not overflow
            place, numbers = place[first], np.add.reduceat(numbers, first.nonzero().flatten().numpy(), dtype=np.float64)
        if len(numbers) and not (numbers.min() >= -FLOAT32[1] and numbers.max() <= FLOAT32[1]):
            raise ValueError("matrix has weights that are not finite, or that a float32 does not hold")
        units: torch.Tensor = place
        at: Any = slice(None)
        if size > 1:
            units, slot = (place // size).unique_consecutive(return_inverse=True)
            at = slot * size + place % size
        unit_row = units // units_in_row
        mask = grid.with_units(unit_row, units - unit_row * units_in_row)
        values = torch.zeros(mask.num_units, height, width)
        values.view(-1)[at] = torch.from_numpy(numbers).float()
        layer = cls.__new__(cls)
        SparseLayer.__init__(layer, mask, nn.Parameter(values))
        layer.backend = backend
        layer._make_parameters(bias is not None, None, draw=False)
        if bias is not None:
            layer.bias.data.copy_(bias)
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
        return self._own_mask.shape[1]

    @property
    def out_features(self) -> int:
        return self._own_mask.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        (values, mask), observer = self.observed_weights()
        y = g2g_linear(x, values, mask, self.bias, backend=self.backend)
        return y if observer is None else observer(x, y)

    def observed_weights(self) -> tuple[tuple[torch.Tensor, BlockMask], ProductObserver | None]:
        """:meth:`weights`, and what is to be told of the products with them."""
        values, mask = self.weights()
        if self.observer is None or not (self.training and torch.is_grad_enabled()):
            return (values, mask), None
        values, of_products = self.observer.of_call(values)
        return (values, mask), of_products

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
