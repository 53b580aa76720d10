"""Derivatives that no kernel computes (second ones, forward mode, ``vmap``) are those of plain PyTorch operations.

One rule for every operator. Inside ``torch.func`` transforms and ``torch.jit.trace``, and where a tensor carries a
tangent, plain operations run from the start. In a backward pass whose result is to be differentiated again, or that has
a batch of gradients, they run in place of the kernels: forward once more, and backward by autograd.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch

from g2g_kernels.tracing import autocast_of, is_transformed


def needs_plain_operations(grads: Iterable[Any]) -> bool:
    """Whether no kernel computes a backward pass with these incoming gradients. (A batch is that of
    ``is_grads_batched`` and ``jacobian(vectorize=True)``, which are older than ``torch.func``.)"""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or is_transformed(grads)
        or any([grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads])
    )


def gradients_of(
    function: Callable[..., Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> list[torch.Tensor | None]:
    """The gradients of the ``needed`` of ``tensors`` by running ``function`` of them again, under the
    ``autocast`` of the forward pass; its results have the gradients ``grads``. Differentiable where gradients are
    enabled."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), autocast():
        # the gradient of each argument by itself, even if one of them was computed from another
        inputs = [
            tensor if tensor is None else tensor.view_as(tensor) if need else tensor.detach()
            for tensor, need in zip(tensors, needed)  # noqa: B905
        ]
        results = function(*inputs)
        # outputs of a frozen layer have no gradient
        reached = [(y, grad) for y, grad in zip(results, grads, strict=True) if grad is not None and y.requires_grad]
        if not reached:
            return [None] * len(inputs)
        wanted = [tensor for tensor, need in zip(inputs, needed) if need and tensor is not None]  # noqa: B905
        outputs, outputs_grads = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, outputs_grads, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


class Recomputed(torch.autograd.Function):
    """The results of ``first``, a function of ``tensors``. Their gradients are those of ``again``, which gives the same
    results and runs in the backward pass. PyTorch refuses it if one of the tensors, or of ``more``, which have no
    gradient, has changed in place until then."""

    @staticmethod
    def forward(
        ctx: Any, first: Callable, again: Callable, more: Sequence[torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.again, ctx.count, ctx.autocast = again, len(tensors), autocast_of(tensors[0])
        ctx.save_for_backward(*tensors, *more)
        ctx.set_materialize_grads(False)
        return tuple(first(*tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        tensors = ctx.saved_tensors[: ctx.count]
        return None, None, None, *gradients_of(ctx.again, tensors, grads, ctx.needs_input_grad[3:], ctx.autocast)


def refuse_backward(ctx: Any, *grads: Any) -> NoReturn:
    """For ``torch.library.register_autograd`` of operators that compute gradients, which only compiled code meets."""
    raise NotImplementedError(
        "the operators of g2g have no second derivative inside torch.compile; differentiate twice outside of what is "
        "compiled"
    )
