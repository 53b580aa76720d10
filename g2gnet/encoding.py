"""From real-valued samples to the first layer's input at each time step."""

from typing import Any, NamedTuple

import numpy as np
import torch

from g2g_kernels.choices import check_choice
from g2g_kernels.tracing import is_traced

ENCODINGS = ("current", "rate")
#: the kinds of samples by dtype; int64 could be images or counts
KINDS = {
    "uint8": "uint8", **dict.fromkeys(("int16", "int8", "int32"), "counts"),
    **dict.fromkeys(("float32", "float16", "bfloat16", "float64"), "floats"),
}  # fmt: skip
#: what samples of each kind are
CONTENT = {"uint8": "numbers from 0 to 255", "counts": "counts of events", "floats": "floats scaled as those"}


class SampleForm(NamedTuple):
    """The shape of one sample of a data set, and the kind: ``"uint8"``, ``"counts"`` (int8, int16, int32) or
    ``"floats"`` of any dtype."""

    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, samples: torch.Tensor | np.ndarray) -> "SampleForm":
        """The form of samples [N, …]. Raises TypeError where :func:`as_samples` does."""
        kind = KINDS[_dtype_of(samples)]  # first, since a list has no shape
        return cls(tuple(samples.shape[1:]), kind)

    def check(self, samples: torch.Tensor | np.ndarray) -> None:
        """Raises TypeError for samples of another kind, ValueError for another shape, unless they are flattened. Axes
        of size 1 do not count."""
        given, dtype = SampleForm.of(samples), _dtype_of(samples)
        if given.kind != self.kind:
            least, most = float(samples.min()), float(samples.max())
            wanted = next(name for name, kind in KINDS.items() if kind == self.kind)
            how = f"x.to(torch.{wanted})" if isinstance(samples, torch.Tensor) else f"x.astype(np.{wanted})"
            if (given.kind, self.kind) == ("floats", "uint8"):
                how = f"{how} of them, times 255 before if they are from 0 to 1"
            raise TypeError(
                f"samples are {dtype} from {least:g} to {most:g}; the network was trained on {self.kind} "
                f"{list(self.shape)}: give {CONTENT[self.kind]}, by {how}"
            )
        sizes, own = ([size for size in shape if size != 1] for shape in (given.shape, self.shape))
        if len(given.shape) > 1 and sizes != own:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(
                f"samples are {list(samples.shape)}; the network was trained on [N, {wanted}]: give that shape, or "
                "flatten samples of it"
            )


def as_samples(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 images [B, ...] as float32 samples [B, D] from 0 to 1; floats, and counts of events in int8, int16 or
    int32, as they are. Raises TypeError for anything else.

    Example:
        >>> as_samples(torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8))
        tensor([[0.0000, 1.0000, 0.2000, 0.4000]])
    """
    _dtype_of(images)
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.require(images, images.dtype.newbyteorder("="), ["C", "W", "E"]))
    samples = images.reshape(len(images), -1)
    return samples.float() / 255 if samples.dtype == torch.uint8 else samples.float()


def _dtype_of(images: Any) -> str:
    """The name in :data:`KINDS` of the dtype of samples. Raises TypeError for any other dtype."""
    if not isinstance(images, torch.Tensor | np.ndarray):
        raise TypeError(f"samples are a {type(images).__name__}; give an array or a tensor")
    if isinstance(images, np.ma.MaskedArray):
        raise TypeError("samples are a masked array; give samples without missing numbers, or x.filled(NUMBER)")
    if isinstance(images, torch.Tensor) and images.layout is not torch.strided:
        raise TypeError(f"samples are a tensor of layout {images.layout}; give x.to_dense()")
    dtype = images.dtype.name if isinstance(images, np.ndarray) else str(images.dtype).removeprefix("torch.")
    if dtype not in KINDS:
        raise TypeError(f"samples are {dtype}; give uint8 images, floats, or counts of events in int8, int16 or int32")
    return dtype


def encode(
    x: torch.Tensor,
    enc: str,
    steps: int,
    scale: float = 1.0,
    bias: float = 0.0,
    generator: torch.Generator | None = None,
    part: slice | None = None,
) -> torch.Tensor:
    """Encodes samples x [B, D], or sequences [steps, B, D], as input currents, with x' = scale·x + bias.

    ``"current"``: x' itself, [B, D] held at every step, or [steps, B, D]. ``"rate"``: spikes [steps, B, D], Bernoulli
    with probability clamp(x', 0, 1), drawn at each step from ``generator`` (PyTorch's global one if None; its device
    may differ from x's). With ``part``, only these samples are encoded, as in the whole batch: the generator skips the
    random numbers of the others. Raises ValueError for an unknown encoding, TypeError for samples that are not floats.
    """
    if enc not in ENCODINGS:
        check_choice("enc", enc, ENCODINGS)
    if not x.is_floating_point():
        check_samples(x)
    shape = x.shape[-2:]
    if part is not None:
        x = x[..., part, :]
    x = x * scale + bias
    if enc == "current":
        return x
    part = part or slice(None)
    if x.dim() == 2:
        x = x.expand(steps, *x.shape)
    device = generator.device if generator is not None else x.device
    if device.type == x.device.type == "cpu" and not is_traced():
        # the random numbers of one step fit in the caches; drawn step by step, they are the same
        spikes, draws = x.new_empty(x.shape), x.new_empty(shape)
        for spikes_t, x_t in zip(spikes, x, strict=True):
            torch.rand(shape, generator=generator, out=draws)
            torch.lt(draws[part], x_t, out=spikes_t)
        return spikes
    source: dict[str, Any] = {} if generator is None else {"generator": generator}  # torch.export refuses None
    draws = torch.rand((len(x), *shape), **source, device=device, dtype=x.dtype)
    return (draws[:, part].to(x.device) < x).to(x.dtype)


def check_samples(x: torch.Tensor) -> None:
    """Raises TypeError for samples that are not floats."""
    if isinstance(x, torch.Tensor) and not x.is_floating_point():
        raise TypeError(f"samples are {x.dtype}, not floats; g2gnet.data.as_samples(images) converts uint8 images")
