"""Operators of ``torch.library`` that take one record instead of a list of arguments.

PyTorch's dispatcher takes longer than a small network. An operator goes through it only where something may look at
operators (:func:`g2g_kernels.tracing.is_observed`); otherwise its implementation is called, by the same autograd
formula.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from g2g_kernels.ops.derivatives import for_each
from g2g_kernels.tracing import is_observed

_library = torch.library.Library("g2g", "FRAGMENT")


class Record(Protocol):
    """What an operator takes: a NamedTuple that has another form, the arguments of the operator's schema."""

    def flat(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        ...

    @classmethod
    def of_flat(cls, *arguments: Any) -> Any:
        """The record of these arguments."""
        ...

    def tensors(self) -> Sequence[torch.Tensor | None]:
        """All that may need a gradient, and more."""
        ...


class DifferentiableRecord(Record, Protocol):
    """What an operator with an autograd formula takes.

    Its :meth:`tensors` are what autograd saves. Of a mask it is the first index, which changes whenever another does.
    """

    def with_tensors(self, tensors: Sequence[Any]) -> Any:
        """The record with these tensors in place of :meth:`tensors`; masks stay."""
        ...


class RecordOperator:
    """An operator that is called with a record.

    Attributes:
        overload: the operator in ``torch.ops.g2g``.
        record: the type of the record.
        function: its implementation.
        differentiated: what to call with a record and its tensors where a gradient may be requested.
    """

    def __init__(self, overload: Any, record: type[Record], function: Callable[[Any], Any]) -> None:
        self.overload, self.record, self.function = overload, record, function
        self.differentiated: Callable[..., Any] = lambda record, *_: self.overload(*record.flat())

    def __call__(self, record: Record) -> Any:
        tensors = record.tensors()
        if is_observed(tensors):
            return self.overload(*record.flat())
        if torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors]):
            return self.differentiated(record, *tensors)
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
        function, fake: implementation and fake implementation; both take the record. A list that they return may have
            None for a tensor that there is none of, which the dispatcher gets as an empty one.
        keys: the dispatch keys that ``function`` serves.
    """
    name = schema.partition("(")[0]
    _library.define(schema)

    def implementation(function: Callable) -> Callable:
        def flat(*arguments: Any) -> Any:
            # where zeros were only noted, the dispatcher has made them of one element
            results = function(record.of_flat(*[_contiguous(argument) for argument in arguments]))
            if isinstance(results, list):
                like = next(tensor for tensor in results if tensor is not None)
                return [like.new_empty(0) if tensor is None else tensor for tensor in results]
            return results

        return flat

    for key in keys:
        _library.impl(name, implementation(function), key)
    torch.library.register_fake(f"g2g::{name}", implementation(fake), lib=_library)
    return RecordOperator(getattr(torch.ops.g2g, name).default, record, function)


def _contiguous(argument: Any) -> Any:
    """An operator's argument with its tensor, or the tensors of its list, contiguous."""
    if isinstance(argument, torch.Tensor):
        return argument.contiguous()
    return [_contiguous(each) for each in argument] if isinstance(argument, list) else argument


def refuse_derivative(operator: RecordOperator, refuse: Callable) -> None:
    """Registers a function that raises when the derivative of an operator is requested."""
    torch.library.register_autograd(operator.overload.name(), refuse, lib=_library)


class Gradients(NamedTuple):
    """The input of a backward pass.

    Attributes:
        record: the record of the forward pass.
        kept: its outputs that only the backward pass needs, the tensors of lists one by one.
        grads: the gradients of its other outputs, contiguous, the tensors of lists one by one; None for one that was
            not used.
        needed: whether the gradient of each of ``record.tensors()`` is needed.
    """

    record: Any
    kept: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor | None, ...]
    needed: Sequence[bool]


def differentiate(
    operator: RecordOperator,
    inputs: Sequence[str],
    outputs: int,
    backward: Callable[[Gradients], Sequence[torch.Tensor | None]],
) -> None:
    """Gives an operator its autograd formula.

    Args:
        operator: what :func:`define` returned.
        inputs: the arguments of the schema that may need a gradient, in the order of ``record.tensors()``.
        outputs: the number of outputs that are results; the others are kept for the backward pass.
        backward: the gradients of ``inputs``, the tensors of lists one by one; of any content where none is needed. It
            is not called where all of ``grads`` are None.
    """
    arguments = operator.overload._schema.arguments
    names = [argument.name for argument in arguments]
    lists = [str(argument.type) == "List[Tensor]" for argument in arguments]
    nothing = itertools.repeat(None)

    def save(ctx: Any, record: DifferentiableRecord, results: Any) -> None:
        tensors = record.tensors()
        kept = _each(results[outputs:]) if isinstance(results, (list, tuple)) else ()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        ctx.record, ctx.count = record.with_tensors([None] * len(tensors)), len(tensors)

    @for_each
    def gradients(ctx: Any, *grads: Any) -> Sequence[torch.Tensor | None]:
        """Those of ``inputs``, from those of all results, the tensors of lists one by one."""
        if all([grad is None for grad in grads]):
            return [None] * len(ctx.needed)
        saved = ctx.saved_tensors
        found = backward(
            Gradients(
                ctx.record.with_tensors(saved[: ctx.count]),
                saved[ctx.count :],
                tuple([None if grad is None else grad.contiguous() for grad in grads]),
                ctx.needed,
            )
        )
        return [grad if need else None for grad, need in zip(found, ctx.needed)]  # noqa: B905

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, operator.record.of_flat(*inputs), output)
        ctx.lengths = [len(value) if is_list else None for value, is_list in zip(inputs, lists, strict=True)]

    def of_arguments(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needed = dict(zip(names, ctx.needs_input_grad, strict=True))
        ctx.needed = _each([needed[name] for name in inputs])
        found = iter(gradients(ctx, *_each(grads[:outputs])))
        lengths = dict(zip(names, ctx.lengths, strict=True))
        of = {name: _next(found, lengths[name]) for name in inputs}
        return tuple([of[name] if name in of else _next(nothing, lengths[name]) for name in names])

    torch.library.register_autograd(operator.overload.name(), of_arguments, setup_context=setup_context, lib=_library)

    def forward(ctx: Any, record: DifferentiableRecord, *_: torch.Tensor | None) -> tuple[Any, ...]:
        """The results, the tensors of lists one by one; then all outputs as the implementation gave them."""
        with torch._C._AutoDispatchBelowAutograd():
            made = operator.function(record)
        save(ctx, record, made)
        return (made, made) if isinstance(made, torch.Tensor) else (*_each(made[:outputs]), made)

    def backward_of_all(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        _, *ctx.needed = ctx.needs_input_grad
        found = gradients(ctx, *grads[:-1])
        return None, *found, *[None] * (ctx.count - len(found))

    # the name is that of the node in the graph
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    function: Any = type(operator.overload.overloadpacket.__name__, (torch.autograd.Function,), methods)

    def differentiated(record: DifferentiableRecord, *tensors: torch.Tensor | None) -> Any:
        *results, made = function.apply(record, *tensors)
        if isinstance(made, torch.Tensor):
            return results[0]
        each = iter(results)
        of = [_next(each, len(value) if isinstance(value, list) else None) for value in made[:outputs]]
        return *of, *made[outputs:]

    operator.differentiated = differentiated


def _each(values: Iterable[Any]) -> list[Any]:
    """The values, those of lists one by one."""
    lists = [value if isinstance(value, (list, tuple)) else (value,) for value in values]
    return list(itertools.chain.from_iterable(lists))


def _next(values: Iterator[Any], length: int | None) -> Any:
    """The next value, or a list of the next ones."""
    return next(values) if length is None else list(itertools.islice(values, length))
