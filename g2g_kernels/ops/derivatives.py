"""Derivatives that no kernel computes (second ones, forward mode, ``vmap``) are those of plain PyTorch operations.

One rule for every operator. Inside ``torch.func`` transforms and ``torch.jit.trace``, and where a tensor carries a
tangent, plain operations run from the start. In a backward pass whose result is to be differentiated again, or that has
a batch of gradients, they run in place of the kernels: forward once more, and backward by autograd.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad


def has_tangent(tensors: Iterable[torch.Tensor | None]) -> bool:
    """True if one of them carries a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0 and not torch.compiler.is_compiling():  # which keeps a level of its own
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def needs_plain_operations(grads: Iterable[Any]) -> bool:
    """Whether no kernel computes a backward pass with these incoming gradients. (A batch is that of
    ``is_grads_batched`` and ``jacobian(vectorize=True)``, which are older than ``torch.func``.)"""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or has_tangent(grads)
        or any([grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads])
    )


def autocast_of(tensor: torch.Tensor) -> Callable[[], contextlib.AbstractContextManager]:
    """Makes the autocast that is in force where ``tensor`` is, for what runs a forward pass again."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    return functools.partial(
        torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
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


def refuse_backward(ctx: Any, *grads: Any) -> NoReturn:
    """For ``torch.library.register_autograd`` of operators that compute gradients, which only compiled code meets."""
    raise NotImplementedError(
        "the operators of g2g have no second derivative inside torch.compile; differentiate twice outside of what is "
        "compiled"
    )
