"""Delays: what a connection receives is what its source sent some whole steps before, S̃_j[t] = S_j[t − d_j].

A learned delay is a float d̂_j, rounded to d_j after it is clamped. Its gradient sees σ steps on either side:

    ∂L/∂d̂_j = −1/(σ(σ + 1)) Σ_{t,b} ∂L/∂S̃_j[t] · Σ_{k=1..σ} (S_j[t − d_j + k] − S_j[t − d_j − k])

with S = 0 after the run, and before it what the run continues; for σ = 1 it is the central difference. It is the
derivative of what spikes do if each is spread over a triangle of area 1 and half width √(σ(σ + 1)) steps around its
arrival. It passes the clamp unchanged.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.numbers import Number
from g2g_kernels.ops.neurons.models import MODELS
from g2g_kernels.ops.record import TYPES
from g2g_kernels.tracing import is_transformed, replaced


class Delay(NamedTuple):
    """By how many steps what a connection receives is later than what its source sends.

    Attributes:
        least, most: the bounds of all delays.
        steps: int64 [N], one for each neuron of the source; None: ``least`` for all.
        learned: float [N] that ``steps`` are rounded from, or None; it has the gradient.
        width: σ, how many steps on either side that gradient sees; 1 or more.
    """

    least: int
    most: int
    steps: torch.Tensor | None = None
    learned: torch.Tensor | None = None
    width: int = 1

    def of_each(self, size: int, device: torch.device) -> "Delay":
        """The same with steps of each of ``size`` neurons."""
        steps = torch.full((size,), self.least, device=device) if self.steps is None else self.steps.contiguous()
        return replaced(self, steps=steps)


def seen_ahead(delay: Delay) -> int:
    """By how many steps more than the delay a gradient sees, on either side. No property of the class: PyTorch 2.8
    does not compile one of a named tuple."""
    return 0 if delay.learned is None else delay.width


TYPES["Delay"] = Delay
#: σ, in steps
WIDTH = Number(1, (1 << 16) - 1, whole=True)


class Train:
    """What a source sends in a run, block after block. A step is ``like`` [B, N]; ``before`` are the D steps before the
    run, [D, B, N] (None: it sent nothing)."""

    def __init__(self, like: torch.Tensor, before: torch.Tensor | None) -> None:
        self._like = like
        self._blocks: list[torch.Tensor] = []
        self._starts = [0]
        if before is not None and len(before):
            self._blocks.append(before)
            self._starts = [-len(before), 0]

    @property
    def length(self) -> int:
        """The number of steps so far."""
        return self._starts[-1]

    @property
    def begin(self) -> int:
        """The first step that is known, 0 or below."""
        return self._starts[0]

    def append(self, block: torch.Tensor) -> None:
        """Adds the next steps, [n, B, N]."""
        self._blocks.append(block)
        self._starts.append(self.length + len(block))

    def window(self, first: int, last: int) -> torch.Tensor:
        """[last − first, B, N], the steps from ``first`` to before ``last``; 0 where nothing is known."""
        pieces: list[torch.Tensor] = []
        if last > self.length:
            pieces.append(self._zeros(last - max(first, self.length)))
            last = max(first, self.length)
        number = len(self._blocks)
        while first < last and last > self.begin:
            number -= 1
            start, block = self._starts[number], self._blocks[number]
            if start >= last:
                continue
            begin = max(first, start)
            pieces.append(block if last - begin == len(block) else block[begin - start : last - start])
            last = begin
        if first < last:
            pieces.append(self._zeros(last - first))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1])

    def nothing(self) -> torch.Tensor:
        """A step in which nothing is sent, zeros [B, N]."""
        return torch.zeros_like(self._blocks[-1][0] if self._blocks else self._like)

    def _zeros(self, count: int) -> torch.Tensor:
        return self.nothing().expand(count, *self._like.shape)


class LateSpikes:
    """Spikes of a source as they arrive: it sends ``spikes`` [T, B, N] (or [B, N] held for ``steps``, or an object
    whose ``dense()`` is that), and has sent ``before`` [D, B, N] in the D steps before (None: nothing)."""

    def __init__(self, spikes: Any, delay: Delay, before: torch.Tensor | None, steps: int | None = None) -> None:
        self._spikes, self._delay, self._before, self._steps = spikes, delay, before, steps

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that it reads."""
        return [each for each in (self._spikes, self._before, self._delay.steps) if isinstance(each, torch.Tensor)]

    def dense(self) -> torch.Tensor:
        """[T, B, N], without gradient."""
        spikes = self._spikes.to_dense() if isinstance(self._spikes, torch.Tensor) else self._spikes.dense()
        spikes = spikes.detach() if self._steps is None else spikes.detach().expand(self._steps, *spikes.shape)
        train = Train(spikes[0], None if self._before is None else self._before.detach().to(spikes.dtype))
        train.append(spikes)
        received = arrived(train, self._delay._replace(learned=None), 0, len(spikes))
        return torch.zeros_like(spikes) if received is None else received


def arrived(train: Train, delay: Delay | None, first: int, last: int) -> torch.Tensor | None:
    """What arrives at the steps from ``first`` to before ``last``, [n, B, N]; None: nothing was sent yet."""
    if delay is None:
        return train.window(first, last)
    # a learned delay has a gradient by the spikes of later steps, too
    if last - delay.least + seen_ahead(delay) <= train.begin:
        return None
    if delay.steps is None:
        return train.window(first - delay.least, last - delay.least)
    window = train.window(first - delay.most, last - delay.least)
    if delay.learned is None or not (torch.is_grad_enabled() and delay.learned.requires_grad):
        return _gathered(window, delay.steps, delay.most, last - first)
    if is_transformed():
        raise NotImplementedError(
            "learned delays have no gradient in torch.func (vmap, grad, …) and torch.jit.trace; call under "
            "torch.no_grad(), or after requires_grad_(False) of these delays"
        )
    return _Learned.apply(window, delay.learned, delay, train, first, last)


def _gathered(window: torch.Tensor, steps: torch.Tensor, most: int, count: int) -> torch.Tensor:
    """Of each source neuron the ``count`` rows that begin ``most − steps`` rows after the first."""
    rows = torch.arange(most, most + count, device=steps.device)[:, None] - steps
    return window.gather(0, rows[:, None].expand(count, *window.shape[1:]))


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, window: torch.Tensor, learned: torch.Tensor, delay: Delay, train: Train, *steps: int) -> Any:
        assert delay.steps is not None
        ctx.delay, ctx.train, ctx.steps, ctx.rows = delay._replace(learned=None), train, steps, len(window)
        return _gathered(window, delay.steps, delay.most, steps[1] - steps[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        delay, (first, last) = ctx.delay, ctx.steps
        of_window = of_learned = None
        if ctx.needs_input_grad[0]:
            rows = torch.arange(delay.most, delay.most + last - first, device=grad.device)[:, None] - delay.steps
            of_window = grad.new_zeros(ctx.rows, *grad.shape[1:])
            of_window.scatter_(0, rows[:, None].expand(grad.shape), grad)
        if ctx.needs_input_grad[1]:
            # by now the whole run is known, what was sent after `last`, too
            width = delay.width
            around = ctx.train.window(first - delay.most - width, last - delay.least + width).detach()
            sums = _sums(around, width)
            early = _gathered(sums, delay.steps, delay.most, last - first)
            late = _gathered(sums[width + 1 :], delay.steps, delay.most, last - first)
            dtype = torch.promote_types(grad.dtype, torch.float32)
            of_learned = (grad * (early - late)).sum((0, 1), dtype=dtype) / (width * (width + 1))
        return of_window, of_learned, None, None, None, None


def _sums(x: torch.Tensor, width: int) -> torch.Tensor:
    """The sums of each ``width`` rows of x that follow one another, [len(x) − width + 1, ...], from sums of 1, 2, 4, …
    rows."""
    count, begin, total = len(x) - width + 1, 0, None
    for bit in range(width.bit_length()):
        if bit:
            x = x[: -(1 << bit - 1)] + x[1 << bit - 1 :]
        if width >> bit & 1:
            rows = x[begin : begin + count]
            total, begin = rows if total is None else total + rows, begin + (1 << bit)
    assert total is not None
    return total


def check_delay(suffix: str, delay: Any, size: int) -> None:
    """Raises ValueError unless these are delays of a source of ``size`` neurons."""
    if not isinstance(delay, Delay) or not 0 <= delay.least <= delay.most:
        raise ValueError(f"the delay{suffix} is {delay!r}; give Delay(least, most), 0 ≤ least ≤ most")
    for name, tensor in (("steps", delay.steps), ("learned", delay.learned)):
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != (size,)):
            raise ValueError(f"{name} of the delay{suffix} must be a tensor [{size}], one of each source neuron")
    if delay.steps is None and (delay.learned is not None or delay.least != delay.most):
        raise ValueError(f"the delay{suffix} has no steps, but differs between neurons; give them, int64 [{size}]")
    if delay.steps is not None and delay.steps.dtype != torch.int64:
        raise ValueError(f"steps of the delay{suffix} are {delay.steps.dtype}; give int64")
    WIDTH.check(f"the width of the delay{suffix}", delay.width)


def reaches_of(connections: Iterable[tuple[int, Delay | None]], models: Sequence[str | None]) -> list[int]:
    """How many steps before a run delays read of each population, whose neurons have these ``models``, and at the end
    of the inputs, from the source and the delay of each connection. Where delays are at most one step it is 0 if the
    spikes of the last step follow from the neurons' states.
    """
    reaches = [0] * (len(models) + 1)
    for source, delay in connections:
        if delay is not None:
            reaches[source] = max(reaches[source], delay.most + seen_ahead(delay))
    for number, model in enumerate(models):
        if reaches[number] == 1 and (model not in MODELS or MODELS[model].compared is None):
            reaches[number] = 0
    return reaches


def late_of(models: Sequence[str | None]) -> tuple[int, ...]:
    """The numbers of the populations, whose neurons have these ``models``, in which what arrives in a step acts on the
    spikes of later ones."""
    return tuple([n for n, model in enumerate(models) if model in MODELS and MODELS[model].at_once])
