"""Unsupported derivatives of operators are refused by name.

Without a rule, PyTorch silently gives an operator a tangent of zero and a second derivative of zero.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

_NEURONS = "spiking neurons over time (lif, synaptic, adlif, g2g_stack)"
_REMEDY = (
    "lif_step, synaptic_step and adlif_step in a loop over time are plain PyTorch operations, which are differentiated "
    "any number of times and in forward mode; g2g_linear is, too"
)


def has_tangent(tensors: Iterable[torch.Tensor | None]) -> bool:
    """True if one of them carries a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0 and not torch.compiler.is_compiling():  # which keeps a level of its own
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_forward_mode(tensors: Iterable[torch.Tensor | None]) -> None:
    """Raises NotImplementedError if a tensor that neurons receive carries a tangent."""
    if has_tangent(tensors):
        raise NotImplementedError(f"{_NEURONS} have no forward-mode derivative (jvp, jacfwd); {_REMEDY}")


def refuse_backward(ctx: Any, *grads: Any) -> NoReturn:
    """For ``torch.library.register_autograd`` of the operators that compute the gradients of neurons."""
    raise NotImplementedError(f"{_NEURONS} have no second derivative; {_REMEDY}")


def refuse_compiled_backward(ctx: Any, *grads: Any) -> NoReturn:
    """For ``torch.library.register_autograd`` of the operators that compute the gradients of ``g2g_linear``."""
    raise NotImplementedError(
        "g2g_linear has no second derivative inside torch.compile; differentiate it twice outside of what is compiled"
    )


Results = Sequence[torch.Tensor | None]


def for_each(backward: Callable[..., Results]) -> Callable[..., Results]:
    """Decorates a ``backward(ctx, *grads)`` that takes one gradient at a time: of a batch it computes one by one.

    A batch comes from ``is_grads_batched`` and ``jacobian(vectorize=True)``, and from a ``vmap`` over
    ``torch.autograd.grad``.
    """

    @functools.wraps(backward)
    def each(ctx: Any, *grads: Any) -> Results:
        if torch.compiler.is_compiling():  # which sees no batches
            return backward(ctx, *grads)
        of_one = functools.partial(backward, ctx)
        if torch._C._are_functorch_transforms_active():
            return _packed(lambda tensors: _ForEach.apply(tensors, *grads), of_one)
        return of_one(*grads) if not _is_old_batch(grads) else _of_old_batch(of_one, grads)

    return each


def for_each_of_old(backward: Callable[..., Results]) -> Callable[..., Results]:
    """As :func:`for_each`, for the ``backward`` of a Function that has a rule for ``vmap``, which PyTorch ignores in
    ``is_grads_batched`` and ``jacobian(vectorize=True)``."""

    @functools.wraps(backward)
    def each(ctx: Any, *grads: Any) -> Results:
        if torch.compiler.is_compiling() or not _is_old_batch(grads):
            return backward(ctx, *grads)
        return _of_old_batch(functools.partial(backward, ctx), grads)

    return each


def _packed(call: Callable[[Callable[..., Results]], Results], function: Callable[..., Results]) -> Results:
    """``call(function)`` where ``call`` knows no result None."""
    given: list[bool] = []

    def tensors(*arguments: Any) -> Results:
        results = function(*arguments)
        given[:] = [result is not None for result in results]
        return tuple(result for result in results if result is not None)

    results = iter(call(tensors))
    return tuple(next(results) if is_given else None for is_given in given)


def _is_old_batch(grads: Sequence[Any]) -> bool:
    """Whether one of them is a batch in the form that autograd makes itself, which is older than ``torch.func``."""
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def _of_old_batch(backward: Callable[..., Results], grads: Sequence[Any]) -> Results:
    level = max(torch._C._vmapmode_increment_nesting() - 1, 1)
    torch._C._vmapmode_decrement_nesting()
    # the size is only asked for by gradients that are not batched
    opened = [None if grad is None else torch._remove_batch_dim(grad, level, 1, 0) for grad in grads]
    if _is_old_batch(opened):
        raise NotImplementedError("a batch of batches of gradients (is_grads_batched inside another); use torch.func")
    size = max(len(grad) for grad in opened if grad is not None)
    opened = [None if grad is None else grad.expand(size, *grad.shape[1:]) for grad in opened]

    def of_all(tensors: Callable[..., Results]) -> Results:
        each = zip(*(itertools.repeat(None, size) if grad is None else grad for grad in opened), strict=True)
        results = [tensors(*of_one) for of_one in each]
        return [torch._add_batch_dim(torch.stack(stacked), 0, level) for stacked in zip(*results, strict=True)]

    return _packed(of_all, backward)


class _ForEach(torch.autograd.Function):
    """Calls a function of tensors, which returns tensors, for each element of a ``vmap``."""

    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(refuse_backward)

    @staticmethod
    def vmap(info, dims, function, *tensors):
        results = [
            _ForEach.apply(
                function,
                *(
                    tensor if dim is None else tensor.select(dim, index)
                    for tensor, dim in zip(tensors, dims[1:], strict=True)
                ),
            )
            for index in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)


class _Root(torch.autograd.Function):
    """An empty tensor that keeps the graph edge of a tensor, but not its data."""

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
    generate_vmap_rule = True

    @staticmethod
    def forward(result, *sources):
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(refuse_backward)
