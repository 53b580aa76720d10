"""Unsupported derivatives of operators are refused by name.

Without a rule, PyTorch silently gives an operator a tangent of zero and a second derivative of zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

_NEURONS = "spiking neurons over time (lif, synaptic, g2g_stack)"
_REMEDY = (
    "lif_step and synaptic_step in a loop over time are plain PyTorch operations, which are differentiated any number "
    "of times and in forward mode; g2g_linear is, too"
)


def has_tangent(*tensors: torch.Tensor | None) -> bool:
    """True if one of them carries a tangent of forward-mode differentiation."""
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_forward_mode(*tensors: torch.Tensor | None) -> None:
    """Raises NotImplementedError if a tensor that neurons receive carries a tangent."""
    if has_tangent(*tensors):
        raise NotImplementedError(f"{_NEURONS} have no forward-mode derivative (jvp, jacfwd); {_REMEDY}")


def refuse_backward(ctx: Any, *grads: Any) -> NoReturn:
    """For ``torch.library.register_autograd`` of the operators that compute the gradients of neurons."""
    raise NotImplementedError(f"{_NEURONS} have no second derivative; {_REMEDY}")


def refuse_compiled_backward(ctx: Any, *grads: Any) -> NoReturn:
    """For ``torch.library.register_autograd`` of the operators that compute the gradients of ``g2g_linear``."""
    raise NotImplementedError(
        "g2g_linear has no second derivative inside torch.compile; differentiate it twice outside of what is compiled"
    )


class _Root(torch.autograd.Function):
    """Nothing, but part of the graph of a tensor that is not kept."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.set_materialize_grads(False)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        return None


root = _Root.apply


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the ``backward`` of neurons that are an ``autograd.Function``: it has no derivative of its own.

    Everything whose second derivative may be requested must be among the incoming gradients and the saved tensors, at
    least by its :data:`root`.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # none can be requested
            return results
        return tuple(None if result is None else _Once.apply(result, *grads, *ctx.saved_tensors) for result in results)

    return once


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, *sources):
        return result.view_as(result)

    backward = staticmethod(refuse_backward)
