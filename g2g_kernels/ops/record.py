"""Operators of ``torch.library`` that take one record instead of a list of arguments.

How it works: a record is a NamedTuple whose fields are annotated with a tensor, an option (int, float, bool, str,
torch.dtype), a tuple of either, another record, or a tuple of records. ``torch.library`` needs flat arguments, and the
annotations say how to convert: :func:`_flatten` lists the fields of a record and of the records inside it one after the
other, :func:`_unflatten` rebuilds the record. A record of only tensors inside another becomes one list. Every field of
a tuple of records becomes one list (the values of all layers, say). If that field is itself a tuple of tensors, the
tensors of all records follow one another and a list of integers gives the number in each; a None tensor becomes an
empty one. The schema, the call of implementation and fake, what autograd saves and the order of gradients all follow
from that one list of leaves.
"""

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from g2g_kernels.ops.derivatives import for_each

_library = torch.library.Library("g2g", "FRAGMENT")

_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    tuple[torch.Tensor, ...]: "Tensor[]",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[bool, ...]: "bool[]",
}


class _Field(NamedTuple):
    """A field of a record.

    Attributes:
        name: of the field.
        type: in the schema; of a record ``"record"``, of one of nothing but tensors ``"tensors"``, of a tuple of
            records ``"records"``.
        record: the record inside, or None.
    """

    name: str
    type: str
    record: Any = None


class _Leaf(NamedTuple):
    """One flat argument.

    Attributes:
        name, type: as of a field; ``type`` is that of one record's field where ``inner`` is given.
        path: the places of the field in the record, in the record inside of that, and so on.
        inner: None, or the path inside each record of the tuple of records at ``path``.
        record: of ``type`` ``"tensors"``, else None.
    """

    name: str
    type: str
    path: tuple[int, ...]
    inner: tuple[int, ...] | None = None
    record: Any = None

    @property
    def schema(self) -> list[str]:
        if self.type == "tensors":
            return [f"Tensor[] {self.name}"]
        if self.inner is None:
            return [f"{self.type} {self.name}"]
        if self.type == "Tensor[]":
            return [f"Tensor[] {self.name}", f"int[] {self.name}_counts"]
        return [f"{self.type.rstrip('?')}[] {self.name}"]


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "_fields")


@functools.cache
def _fields(record: Any) -> tuple[_Field, ...]:
    fields = []
    for name, annotation in typing.get_type_hints(record).items():
        inside = typing.get_args(annotation)
        if _is_record(annotation):
            plain = all(field.type in ("Tensor", "tensors") for field in _fields(annotation))
            fields.append(_Field(name, "tensors" if plain else "record", annotation))
        elif inside and _is_record(inside[0]):
            fields.append(_Field(name, "records", inside[0]))
        else:
            fields.append(_Field(name, _TYPES[annotation]))
    return tuple(fields)


@functools.cache
def _leaves(record: Any) -> tuple[_Leaf, ...]:
    leaves: list[_Leaf] = []
    for place, field in enumerate(_fields(record)):
        if field.type == "record":
            nested = _leaves(field.record)
            leaves += [leaf._replace(name=f"{field.name}_{leaf.name}", path=(place, *leaf.path)) for leaf in nested]
        elif field.type == "records":
            nested = _leaves(field.record)
            leaves += [
                leaf._replace(name=f"{field.name}_{leaf.name}", path=(place,), inner=leaf.path) for leaf in nested
            ]
        else:
            leaves.append(_Leaf(field.name, field.type, (place,), record=field.record))
    return tuple(leaves)


def _at(value: Any, path: tuple[int, ...]) -> Any:
    for place in path:
        value = value[place]
    return value


def _tensors(record: Any) -> list[torch.Tensor]:
    """The tensors of a record of only tensors."""
    tensors = []
    for field in record:
        if isinstance(field, torch.Tensor):
            tensors.append(field)
        else:
            tensors += _tensors(field)
    return tensors


def _flatten(record: Any, leaves: Sequence[_Leaf]) -> list[Any]:
    """The flat arguments of a record. (torch.compile traces this: plain loops.)"""
    arguments: list[Any] = []
    for leaf in leaves:
        value = _at(record, leaf.path)
        if leaf.inner is None:
            if leaf.type == "tensors":
                value = _tensors(value)
            arguments.append(list(value) if isinstance(value, tuple) else value)
            continue
        column = [_at(each, leaf.inner) for each in value]
        if leaf.type == "tensors":
            column = [tensor for each in column for tensor in _tensors(each)]
        elif leaf.type == "Tensor[]":
            arguments.append([tensor for tensors in column for tensor in tensors])
            column = [len(tensors) for tensors in column]
        elif leaf.type == "Tensor?":
            # the first field of such a record is a tensor, on the device where the empty one has to be
            column = [each[0].new_empty(0) if x is None else x for each, x in zip(value, column)]  # noqa: B905
        arguments.append(column)
    return arguments


def _unflatten(record: type, arguments: Sequence[Any]) -> Any:
    """The record of these flat arguments."""
    return _build(record, iter(arguments))


def _build(record: type, arguments: Iterator[Any]) -> Any:
    values: list[Any] = []
    for _, kind, inside in _fields(record):
        if kind == "record":
            values.append(_build(inside, arguments))
        elif kind == "records":
            values.append(_build_all(inside, arguments))
        else:
            value = next(arguments)
            if kind == "tensors":
                value = _from_tensors(inside, iter(value))
            values.append(tuple(value) if isinstance(value, list) else value)
    return record(*values)


def _build_all(record: type, arguments: Iterator[Any]) -> tuple[Any, ...]:
    columns: list[list[Any]] = []
    for leaf in _leaves(record):
        column = next(arguments)
        if leaf.type == "tensors":
            number = _number(leaf.record)
            column = [column[first : first + number] for first in range(0, len(column), number)]
        elif leaf.type == "Tensor[]":
            tensors = iter(column)
            column = [tuple([next(tensors) for _ in range(count)]) for count in next(arguments)]
        elif leaf.type == "Tensor?":
            column = [tensor if tensor.numel() else None for tensor in column]
        columns.append(column)
    return tuple([_build(record, iter(row)) for row in zip(*columns, strict=True)])


def _from_tensors(record: Any, tensors: Iterator[torch.Tensor]) -> Any:
    inner = [field.record for field in _fields(record)]
    return record(*[next(tensors) if inside is None else _from_tensors(inside, tensors) for inside in inner])


@functools.cache
def _number(record: Any) -> int:
    """The number of tensors in a record of only tensors."""
    return sum(1 if field.record is None else _number(field.record) for field in _fields(record))


class RecordOperator:
    """An operator ``g2g::name`` called with a record.

    Attributes:
        record: the type of the record.
        leaves: its flat arguments.
    """

    def __init__(self, name: str, record: type) -> None:
        self.name = name
        self.record = record
        self.leaves = _leaves(record)

    def __call__(self, record: Any) -> Any:
        return getattr(torch.ops.g2g, self.name)(*_flatten(record, self.leaves))

    def unflatten(self, arguments: Sequence[Any]) -> Any:
        """The record of a call with these flat arguments."""
        return _unflatten(self.record, arguments)

    def opcheck(self, record: Any) -> None:
        """Checks schema, fake and autograd formula on this record (``torch.library.opcheck``)."""
        torch.library.opcheck(getattr(torch.ops.g2g, self.name).default, tuple(_flatten(record, self.leaves)))


def define(
    name: str, record: type, returns: str, function: Callable, fake: Callable, keys: Sequence[str] = ("CPU",)
) -> RecordOperator:
    """Registers an operator.

    Args:
        name: its name in ``torch.ops.g2g``.
        record: the type of its argument.
        returns: its result types, as in a schema: ``"(Tensor, Tensor[])"``.
        function, fake: implementation and fake implementation; both take the record.
        keys: the dispatch keys that ``function`` serves.
    """
    operator = RecordOperator(name, record)
    schema = ", ".join(argument for leaf in operator.leaves for argument in leaf.schema)
    _library.define(f"{name}({schema}) -> {returns}")
    for key in keys:
        _library.impl(name, lambda *arguments: function(_unflatten(record, arguments)), key)
    torch.library.register_fake(f"g2g::{name}", lambda *arguments: fake(_unflatten(record, arguments)), lib=_library)
    return operator


def refuse_derivative(operator: RecordOperator, refuse: Callable) -> None:
    """Registers a function that raises when the derivative of an operator is requested."""
    torch.library.register_autograd(f"g2g::{operator.name}", refuse, lib=_library)


class Gradients(NamedTuple):
    """The input of a backward pass.

    Attributes:
        record: the record of the forward pass.
        kept: its outputs that only the backward pass needs.
        grads: the gradients of its other outputs, contiguous; None for one that was not used.
        needed: for each flat argument by name, whether its gradient is needed; a list for a list.
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
        backward: returns gradients by the names of flat arguments; where all of ``grads`` are None it is not called.
    """
    names = [argument.split()[1] for leaf in operator.leaves for argument in leaf.schema]

    def setup_context(ctx, inputs, output):
        values = list(inputs) + list(output[outputs:] if isinstance(output, (list, tuple)) else ())
        ctx.set_materialize_grads(False)
        # autograd saves the tensors; everything else, and the lengths of lists, is stored on ctx
        tensors: list[torch.Tensor] = []
        ctx.notes = []
        for value in values:
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                ctx.notes.append((1, None))
            elif isinstance(value, (list, tuple)) and all(isinstance(each, torch.Tensor) for each in value):
                tensors += value
                ctx.notes.append((len(value), list))
            else:
                ctx.notes.append((0, value))
        ctx.save_for_backward(*tensors)

    def apply(ctx, *grads):
        nothing = [[None] * note[0] if note[1] is list else None for note in ctx.notes[: len(names)]]
        if all(grad is None for grad in grads[:outputs]):
            return tuple(nothing)
        ctx.nothing = nothing
        flat = iter(gradients(ctx, *grads[:outputs]))
        return tuple([next(flat) for _ in none] if isinstance(none, list) else next(flat) for none in nothing)

    @for_each
    def gradients(ctx, *grads):
        """Those of all flat arguments, the tensors of lists one by one."""
        tensors = iter(ctx.saved_tensors)
        values = [
            [next(tensors) for _ in range(count)] if note is list else next(tensors) if count else note
            for count, note in ctx.notes
        ]
        by_name = backward(
            Gradients(
                _unflatten(operator.record, values[: len(names)]),
                tuple(values[len(names) :]),
                tuple(None if grad is None else grad.contiguous() for grad in grads),
                dict(zip(names, ctx.needs_input_grad, strict=True)),
            )
        )
        flat: list[torch.Tensor | None] = []
        for name, none in zip(names, ctx.nothing, strict=True):
            value = by_name.get(name, none)
            flat += value if isinstance(none, list) else [value]
        return flat

    torch.library.register_autograd(f"g2g::{operator.name}", apply, setup_context=setup_context, lib=_library)
