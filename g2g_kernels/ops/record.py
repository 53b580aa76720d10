"""Operators of ``torch.library`` that take one record instead of a list of arguments.

A record is a NamedTuple with three more methods: ``flat()`` gives the arguments in the order of the operator's schema,
``of_flat(*arguments)`` makes the record of them again, and ``inputs()`` lists what may need a gradient.

The dispatcher takes longer than a small network. An operator goes through it only where something looks at operators
(:func:`g2g_kernels.tracing.is_observed`); otherwise its implementation is called, with the same autograd formula.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from g2g_kernels.ops.derivatives import for_each
from g2g_kernels.tracing import is_observed

_library = torch.library.Library("g2g", "FRAGMENT")


class Record(Protocol):
    """What an operator takes."""

    def flat(self) -> tuple[Any, ...]: ...

    @classmethod
    def of_flat(cls, *arguments: Any) -> Any: ...

    def inputs(self) -> Sequence[torch.Tensor | None]: ...


class RecordOperator:
    """An operator that is called with a record.

    Attributes:
        overload: the operator in ``torch.ops.g2g``.
        record: the type of the record.
        function: its implementation.
        differentiated: the same as ``function(record)``, part of the graph of autograd.
    """

    def __init__(self, overload: Any, record: type[Record], function: Callable[[Any], Any]) -> None:
        self.overload, self.record, self.function = overload, record, function
        self.differentiated: Callable[..., Any] = self.dispatched

    def dispatched(self, record: Record, *_: Any) -> Any:
        """The call through PyTorch's dispatcher."""
        return self.overload(*record.flat())

    def __call__(self, record: Record) -> Any:
        inputs = record.inputs()
        if is_observed(inputs):
            return self.dispatched(record)
        if torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in inputs]):
            return self.differentiated(record, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.function(record)

    def opcheck(self, record: Record) -> None:
        """Checks schema, fake and autograd formula on this record (``torch.library.opcheck``)."""
        torch.library.opcheck(self.overload, record.flat())


def define(
    schema: str, record: type[Record], function: Callable, fake: Callable, keys: Sequence[str] = ("CPU",)
) -> RecordOperator:
    """Registers an operator.

    Args:
        schema: ``"name(Tensor x, int steps) -> (Tensor, Tensor[])"``, as ``record.flat()`` has its arguments.
        record: the type of its argument.
        function, fake: implementation and fake implementation; both take the record.
        keys: the dispatch keys that ``function`` serves.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in keys:
        _library.impl(name, lambda *arguments: function(record.of_flat(*arguments)), key)
    torch.library.register_fake(f"g2g::{name}", lambda *arguments: fake(record.of_flat(*arguments)), lib=_library)
    return RecordOperator(getattr(torch.ops.g2g, name).default, record, function)


def refuse_derivative(operator: RecordOperator, refuse: Callable) -> None:
    """Registers a function that raises when the derivative of an operator is requested."""
    torch.library.register_autograd(operator.overload.name(), refuse, lib=_library)


class Gradients(NamedTuple):
    """The input of a backward pass.

    Attributes:
        record: the record of the forward pass.
        kept: its outputs that only the backward pass needs.
        grads: the gradients of its other outputs, contiguous; None for one that was not used.
        needed: whether the gradient of each of ``record.inputs()`` is needed.
    """

    record: Any
    kept: tuple[Any, ...]
    grads: tuple[Any, ...]
    needed: tuple[bool, ...]


def differentiate(
    operator: RecordOperator,
    inputs: Sequence[str],
    outputs: int,
    backward: Callable[[Gradients], Sequence[torch.Tensor | None]],
) -> None:
    """Gives an operator its autograd formula.

    Args:
        operator: what :func:`define` returned.
        inputs: the arguments of the schema that ``record.inputs()`` has, in that order.
        outputs: the number of outputs that are results; the others are kept for the backward pass.
        backward: the gradients of ``record.inputs()``, any for one that is not needed; it is not called where all of
            ``grads`` are None.
    """
    names = [argument.name for argument in operator.overload._schema.arguments]

    def save(ctx: Any, flat: Sequence[Any], results: Any) -> None:
        ctx.set_materialize_grads(False)
        kept = results[outputs:] if isinstance(results, (list, tuple)) else ()
        ctx.values = _Saved(ctx, (*flat, *kept))

    @for_each
    def gradients(ctx, *grads):
        """Those of all inputs, one by one."""
        if all(grad is None for grad in grads):
            return [None] * len(ctx.needed)
        values = ctx.values.of(ctx)
        found = backward(
            Gradients(
                operator.record.of_flat(*values[: len(names)]),
                tuple(values[len(names) :]),
                tuple([None if grad is None else grad.contiguous() for grad in grads]),
                ctx.needed,
            )
        )
        return [grad if need else None for grad, need in zip(found, ctx.needed, strict=True)]

    def setup_context(ctx, inputs, output):
        save(ctx, inputs, output)

    def by_arguments(ctx, *grads):
        needed = dict(zip(names, ctx.needs_input_grad, strict=True))
        ctx.needed = tuple(itertools.chain.from_iterable(map(_as_list, (needed[name] for name in inputs))))
        flat = iter(gradients(ctx, *grads[:outputs]))
        of = {name: [next(flat) for _ in needed[name]] if isinstance(needed[name], Sequence) else next(flat) for name in inputs}
        return tuple([of.get(name, none) for name, none in zip(names, ctx.values.nothing(), strict=False)])

    torch.library.register_autograd(operator.overload.name(), by_arguments, setup_context=setup_context, lib=_library)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, record, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                results = operator.function(record)
            save(ctx, record.flat(), results)
            return results

        @staticmethod
        def backward(ctx, *grads):
            ctx.needed = ctx.needs_input_grad[1:]
            return None, *gradients(ctx, *grads[:outputs])

    operator.differentiated = Differentiated.apply


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else (value,)


class _Saved:
    """Values of a call: autograd saves the tensors, one by one and of lists; everything else is stored here."""

    def __init__(self, ctx: Any, values: Iterable[Any]) -> None:
        self._values: list[Any] = []  # in place of a tensor its type, of a list of tensors their number as a tuple
        tensors: list[torch.Tensor] = []
        for value in values:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                value = torch.Tensor
            elif isinstance(value, (list, tuple)) and all([isinstance(each, torch.Tensor) for each in value]):
                tensors += value
                value = (len(value),)
            self._values.append(value)
        ctx.save_for_backward(*tensors)

    def of(self, ctx: Any) -> list[Any]:
        """The values."""
        tensors = iter(ctx.saved_tensors)
        return [
            next(tensors)
            if value is torch.Tensor
            else [next(tensors) for _ in range(value[0])]
            if isinstance(value, tuple)
            else value
            for value in self._values
        ]

    def nothing(self) -> list[Any]:
        """None for each value, as a list for a list of tensors."""
        return [[None] * value[0] if isinstance(value, tuple) else None for value in self._values]
