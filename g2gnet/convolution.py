"""A convolution that is computed by events where its input is spikes, of all kernels or those of a mask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from g2g_kernels import BlockMask, g2g_conv2d
from g2g_kernels.choices import check_flag
from g2g_kernels.numbers import COUNT, WHOLE
from g2g_kernels.ops.g2g_conv2d import pair_of
from g2g_kernels.ops.g2g_conv2d.reference import Pair
from g2gnet.layers import SparseLayer, checked_mask, parameter_of, refuse_own_code

#: one number for both axes of an image, two, or one of PyTorch's names of a padding
Size = int | Sequence[int]


class G2GConv2d(nn.Conv2d):
    """``nn.Conv2d`` for spikes: where its input is mostly zero, the compiled CPU kernels visit only what is not.

    It takes the place of ``nn.Conv2d`` between any modules: input [N, C, H, W], in channels-last memory or not, or
    [C, H, W], or with more dimensions before these, [T, B, C, H, W]. Without a ``mask`` it has the parameters and the
    state of ``nn.Conv2d``, ``weight`` and ``bias``. With one only those kernels exist that the mask names: the
    parameter is ``values``, the state also has ``mask.wiring``, :class:`DSTScheduler` rewires it, and everything that
    :class:`G2GLinear` says of averages and copies holds.

    Args:
        in_channels, out_channels: C, and the channels of the output.
        kernel_size, stride, padding, dilation: one number, or (of rows, of columns); the padding is with zeros. As for
            ``nn.Conv2d`` it may be ``"valid"``, or ``"same"`` where that is the same on both sides.
        groups: both channels are divided into so many groups; outputs read inputs of their own group alone.
        bias: whether to add a learnable bias.
        mask: [out_channels, in_channels / groups], the kernels that exist; the layer has a copy. Initial values are
            then uniform in ±1/√k, k being a channel's existing weights.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"``; None lets the device decide.
        generator: source of randomness for the initial values, on the CPU (PyTorch's global one if None).

    Attributes:
        weight: Parameter [out_channels, in_channels / groups, kernel rows, kernel columns]; with a mask its dense form,
            for reading only.
        values: with a mask, Parameter [num_units, unit_rows, unit_cols, kernel rows, kernel columns].
        bias: Parameter [out_channels], or None.

    Raises:
        ValueError: for options out of range, or a mask of other channels.
        TypeError: for a mask that is no :class:`BlockMask`.

    Example:
        >>> from g2g_kernels import BlockMask, GroupLayout
        >>> mask = BlockMask.sample(GroupLayout(32), GroupLayout(16), p_inter=1 / 7, block_size=4)
        >>> layer = G2GConv2d(16, 32, 3, padding=1, mask=mask)
        >>> spikes = (torch.rand(5, 16, 12, 12) < 0.1).float()
        >>> layer.values.shape[1:], layer(spikes).shape
        (torch.Size([4, 2, 3, 3]), torch.Size([5, 32, 12, 12]))
    """

    backend: str | None
    bias: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "G2GConv2d":
        masked = kwargs.get("mask") is not None or (len(args) > 8 and args[8] is not None)
        if not masked or issubclass(cls, MaskedConv2d):
            return super().__new__(cls)
        if cls is not G2GConv2d:
            raise TypeError(f"{cls.__name__} has no masks; derive it from g2gnet.convolution.MaskedConv2d")
        return super().__new__(MaskedConv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        mask: BlockMask | None = None,
        backend: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        kernel, stride, padding, dilation = _checked(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        )
        bias = check_flag("bias", bias)
        with torch.random.fork_rng(devices=(), enabled=generator is not None):
            super().__init__(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias)
        if generator is not None:
            self.reset_parameters(generator)
        self.backend = backend

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new initial values, of the distribution of ``nn.Conv2d``."""
        bound = self.weight[0].numel() ** -0.5
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                tensor.uniform_(-bound, bound, generator=generator)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, mask: BlockMask | torch.Tensor | None = None, backend: str | None = None
    ) -> "G2GConv2d":
        """The layer that computes ``conv`` with its kernels times ``mask``, of its device and dtype; both are copied.

        ``mask`` is a :class:`BlockMask`, or bool [out_channels, in_channels / groups], read as single kernels. None:
        the mask of a :class:`G2GConv2d`, the kernels that ``torch.nn.utils.prune`` left, or a layer without a
        mask if it pruned nothing. ``backend`` is that of ``conv``, where it has one, if None. Raises
        ValueError if the shapes of mask and kernels differ, and for a padding other than zeros; TypeError for a layer
        that is no ``nn.Conv2d``, one with hooks or a ``forward`` of its own, and for a weight or bias that hooks
        compute.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv is {type(conv).__name__}; give an nn.Conv2d")
        _refuse_padding(conv.padding_mode)
        weight, bias = (parameter_of(conv, name) for name in ("weight", "bias"))
        refuse_own_code(conv, G2GConv2d if isinstance(conv, G2GConv2d) else nn.Conv2d)
        pruned: torch.Tensor | None = getattr(conv, "weight_mask", None)
        if mask is None and isinstance(conv, MaskedConv2d):
            mask = conv.mask
        elif mask is None and pruned is not None:
            mask = pruned.flatten(2).any(2)
            if not torch.equal(pruned.bool(), mask[:, :, None, None].expand_as(pruned)):
                raise ValueError(
                    f"the {type(conv).__name__} is pruned within kernels, and a mask has whole ones: zeros in them "
                    "would train. Give mask=conv.weight_mask.flatten(2).any(2), or prune whole kernels"
                )
        if mask is not None and not isinstance(mask, BlockMask):
            mask = BlockMask.from_dense(mask)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias is not None,
            mask,
            getattr(conv, "backend", None) if backend is None else backend,
            torch.Generator(),  # initial values, which are replaced at once, do not change the global generator
        )
        layer._take(conv, weight, bias)
        return layer

    def _take(self, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Takes device, dtype and mode of a layer of the same options, its ``weight`` and its ``bias``."""
        self.to(weight.device, weight.dtype).train(layer.training)
        if weight.is_contiguous(memory_format=torch.channels_last):
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
        for mine, given in ((self.weight, weight), (self.bias, bias)):
            if given is not None:
                mine.data.copy_(given.detach())
                mine.requires_grad_(given.requires_grad)

    @property
    def padding_mode(self) -> Any:
        """``"zeros"``; others are refused."""
        return "zeros"

    @padding_mode.setter
    def padding_mode(self, mode: Any) -> None:
        _refuse_padding(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, C, H, W] → […, out_channels, rows, columns]."""
        if x.dim() < 3 or x.shape[-3] != self.in_channels:
            raise ValueError(f"x has shape {list(x.shape)}; give [N, {self.in_channels}, H, W], the layer's channels")
        images = x.flatten(0, -4) if x.dim() > 3 else x[None]
        padding: Any = self.padding  # pairs of numbers, as all others
        y = g2g_conv2d(
            images, self.kernels(), self.bias, self.stride, padding, self.dilation, self.groups, self.backend
        )
        return y.unflatten(0, x.shape[:-3]) if x.dim() > 3 else y[0]

    def kernels(self) -> torch.Tensor:
        """The dense weight."""
        return self.weight


class MaskedConv2d(SparseLayer, G2GConv2d):
    """:class:`G2GConv2d` with a mask, which makes one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        mask: BlockMask | None = None,
        backend: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        mask = checked_mask(mask)
        options = _checked(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        if mask.shape != (out_channels, in_channels // groups):
            raise ValueError(
                f"mask describes {mask.shape} kernels, the layer has {(out_channels, in_channels // groups)}: "
                "[out_channels, in_channels / groups]"
            )
        values = torch.empty(mask.num_units, *mask.unit_shape, *options[0], device=mask.unit_row.device)
        SparseLayer.__init__(self, mask, nn.Parameter(values))
        self.in_channels, self.out_channels, self.groups, self.backend = in_channels, out_channels, groups, backend
        self.kernel_size, self.stride, self.padding, self.dilation = options
        self.transposed, self.output_padding = False, (0, 0)
        self._make_parameters(bias, generator)

    def _apply(self, fn: Callable, recurse: bool = True) -> "MaskedConv2d":
        # values are no images: to(memory_format=torch.channels_last), which takes their five dimensions for such ones,
        # meets three
        def of_values(tensor: torch.Tensor) -> torch.Tensor:
            return fn(tensor.flatten(2)).view(tensor.shape) if tensor.dim() == 5 else fn(tensor)

        super()._apply(of_values, recurse)
        return self

    def kernels(self) -> torch.Tensor:
        return self.dense_weight()  # whose gradient, that of every kernel, is that which a scheduler observes

    def _get_name(self) -> str:
        return "G2GConv2d"


def _refuse_padding(mode: str) -> None:
    if mode != "zeros":
        raise ValueError(
            f"padding_mode={mode!r} is not there; pad before it, nn.Sequential(nn.CircularPad2d(…), G2GConv2d(…)), or "
            "leave the layer as it is"
        )


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The padding of both sides together for which an output is as large as its image, of rows and of columns."""
    return [each * (size - 1) for each, size in zip(dilation, kernel, strict=True)]


def _checked(
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> tuple[Pair, Pair, Pair, Pair]:
    """Kernel size, stride, padding and dilation, each of both axes. Raises ValueError for what cannot be."""
    for name, number in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        COUNT.check(name, number)
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
    kernel, dilation = pair_of("kernel_size", kernel_size, COUNT), pair_of("dilation", dilation, COUNT)
    stride = pair_of("stride", stride, COUNT)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r} is unknown; give 'same', 'valid' or numbers")
        twice = same_padding(kernel, dilation) if padding == "same" else [0, 0]
        if padding == "same" and (stride != (1, 1) or any(each % 2 for each in twice)):
            raise ValueError(
                f"padding='same' of a kernel {kernel} with stride {stride} differs between both sides; pad before it, "
                "nn.ZeroPad2d(…), and give padding=0"
            )
        padding = [each // 2 for each in twice]
    return kernel, stride, pair_of("padding", padding, WHOLE), dilation
