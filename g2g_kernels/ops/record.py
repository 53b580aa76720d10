"""Operators of ``torch.library`` that take one record instead of a list of arguments.

A record is a NamedTuple with two more methods: ``flat()`` gives the arguments in the order of the operator's schema,
and ``of_flat(*arguments)`` makes the record of them again. Autograd saves what is flat, and names gradients as the
schema names arguments.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from g2g_kernels.ops.derivatives import for_each

_library = torch.library.Library("g2g", "FRAGMENT")


class Record(Protocol):
    """What an operator takes."""

    def flat(self) -> tuple[Any, ...]: ...

    @classmethod
    def of_flat(cls, *arguments: Any) -> Any: ...


class RecordOperator:
    """An operator that is called with a record.

    Attributes:
        overload: the operator in ``torch.ops.g2g``.
        record: the type of the record.
    """

    def __init__(self, overload: Any, record: type[Record]) -> None:
        self.overload, self.record = overload, record

    def __call__(self, record: Record) -> Any:
        return self.overload(*record.flat())

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
    return RecordOperator(getattr(torch.ops.g2g, name).default, record)


def refuse_derivative(operator: RecordOperator, refuse: Callable) -> None:
    """Registers a function that raises when the derivative of an operator is requested."""
    torch.library.register_autograd(operator.overload.name(), refuse, lib=_library)


class Gradients(NamedTuple):
    """The input of a backward pass.

    Attributes:
        record: the record of the forward pass.
        kept: its outputs that only the backward pass needs.
        grads: the gradients of its other outputs, contiguous; None for one that was not used.
        needed: for each argument of the schema, whether its gradient is needed; a list for a list.
    """

    record: Any
    kept: tuple[Any, ...]
    grads: tuple[Any, ...]
    needed: dict[str, Any]


def differentiate(operator: RecordOperator, outputs: int, backward: Callable[[Gradients], dict[str, Any]]) -> None:
    """Registers the autograd formula of an operator.

    Args:
        operator: what :func:`define` returned.
        outputs: the number of outputs that are results; the others are kept for the backward pass.
        backward: returns gradients by the names of arguments; where all of ``grads`` are None it is not called.
    """
    names = [argument.name for argument in operator.overload._schema.arguments]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        kept = output[outputs:] if isinstance(output, (list, tuple)) else ()
        ctx.values = _Saved(ctx, (*inputs, *kept))

    def apply(ctx, *grads):
        nothing = ctx.values.nothing()[: len(names)]
        if all(grad is None for grad in grads[:outputs]):
            return tuple(nothing)
        flat = iter(gradients(ctx, *grads[:outputs]))
        return tuple([next(flat) for _ in none] if isinstance(none, list) else next(flat) for none in nothing)

    @for_each
    def gradients(ctx, *grads):
        """Those of all arguments, the tensors of lists one by one."""
        values = ctx.values.of(ctx)
        by_name = backward(
            Gradients(
                operator.record.of_flat(*values[: len(names)]),
                tuple(values[len(names) :]),
                tuple(None if grad is None else grad.contiguous() for grad in grads),
                dict(zip(names, ctx.needs_input_grad, strict=True)),
            )
        )
        flat: list[torch.Tensor | None] = []
        for name, none in zip(names, ctx.values.nothing(), strict=False):
            value = by_name.get(name, none)
            flat += value if isinstance(none, list) else [value]
        return flat

    torch.library.register_autograd(operator.overload.name(), apply, setup_context=setup_context, lib=_library)


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
