"""Records of tensors, and operators of ``torch.library`` that take one.

A record is a NamedTuple of tensors, numbers, names, None, masks, and of records and tuples of these. Its declaration is
the only list of its fields; an operator's arguments, saved tensors and gradients follow from it: :func:`opened` takes a
record apart, :func:`built` makes one of the same form from other tensors.

PyTorch's dispatcher takes longer than a small network. An operator goes through it only where something may observe
operators (:func:`g2g_kernels.tracing.is_observed`); elsewhere its function is called directly, with the same autograd
formula.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from g2g_kernels.mask.unit_grid import MaskTensors
from g2g_kernels.ops.derivatives import gradients_of, needs_plain_operations, refuse_backward
from g2g_kernels.tracing import autocast_of, is_observed

_library = torch.library.Library("g2g", "FRAGMENT")

#: the place of a tensor in a form
TENSOR = object()
#: a record's structure in postfix order: values, masks, TENSOR, and (name, length) after the parts of a record
Form = list[Any]
#: the types of records that operators take, by name
TYPES: dict[str, type] = {"tuple": tuple, "list": list}
_KIND = attrgetter("dtype", "shape")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MASK = len(MaskTensors._fields)


def opened(record: Any) -> tuple[list[Any], Form]:
    """The tensors of a record in order, and its form. A mask is represented by its first index, which changes whenever
    another one does."""
    tensors: list[Any] = []
    form: Form = []
    left = [record]
    while left:
        part = left.pop()
        if part is None or isinstance(part, (str, int, float)):  # most of them
            form.append(part)
        elif isinstance(part, torch.Tensor):
            tensors.append(part)
            form.append(TENSOR)
        elif isinstance(part, MaskTensors):
            tensors.append(part.unit_row)
            form.append(part)
        elif isinstance(part, (tuple, list)):
            kind = type(part)  # (torch.compile of PyTorch 2.6 and 2.8 knows no name of a built-in type)
            name = "tuple" if kind is tuple else "list" if kind is list else kind.__name__
            form.append((name, len(part)))
            left.extend(part)
        else:
            form.append(part)
    return tensors[::-1], form[::-1]


def built(form: Form, tensors: Sequence[Any]) -> Any:
    """The record of this form with these tensors, or other values in their place; masks stay."""
    given = iter(tensors)
    parts: list[Any] = []
    for part in form:
        if part is TENSOR:
            parts.append(next(given))
        elif isinstance(part, MaskTensors):
            next(given)
            parts.append(part)
        elif isinstance(part, tuple):
            kind, length = TYPES[part[0]], part[1]
            begin = len(parts) - length
            inside = parts[begin:]
            parts[begin:] = [kind(inside) if kind in (tuple, list) else kind(*inside)]
        else:
            parts.append(part)
    return parts[0]


def _has_tensor(part: Any) -> bool:
    return part is TENSOR or isinstance(part, MaskTensors)


# --- the arguments of an operator ---------------------------------------------------------------------------------

_ARGUMENTS = "Tensor[] tensors, Tensor[] masks, str[] names, float[] numbers, int[] form"
_OF_TENSOR, _OF_MASK, _OF_NONE, _OF_RECORD, _OF_NAME, _OF_NUMBER, _OF_INT, _OF_FLAG, _OF_DTYPE = range(9)


def arguments(tensors: Sequence[torch.Tensor], form: Form) -> tuple[Any, ...]:
    """What an operator takes."""
    masks: list[torch.Tensor] = []
    names: list[str] = []
    numbers: list[float] = []
    codes: list[Any] = []
    for part in form:
        if part is TENSOR:
            codes.append(_OF_TENSOR)
        elif part is None:
            codes.append(_OF_NONE)
        elif isinstance(part, MaskTensors):
            codes.append(_OF_MASK)
            masks.extend(part)
        elif isinstance(part, tuple):
            codes.extend((_OF_RECORD, part[1]))
            names.append(part[0])
        elif isinstance(part, str):
            codes.append(_OF_NAME)
            names.append(part)
        elif isinstance(part, bool):
            codes.extend((_OF_FLAG, int(part)))
        elif isinstance(part, torch.dtype):
            codes.extend((_OF_DTYPE, _DTYPES.index(part)))
        elif isinstance(part, (int, torch.SymInt)):
            codes.extend((_OF_INT, part))
        else:
            codes.append(_OF_NUMBER)
            numbers.append(part)
    return list(tensors), masks, names, numbers, codes


def of_arguments(tensors: Sequence[Any], masks: Any, names: Any, numbers: Any, codes: Any) -> Any:
    """The record of an operator's arguments."""
    form: Form = []
    indices, named, numbered, given = iter(masks), iter(names), iter(numbers), iter(codes)
    for code in given:
        if code == _OF_TENSOR:
            form.append(TENSOR)
        elif code == _OF_NONE:
            form.append(None)
        elif code == _OF_MASK:
            form.append(MaskTensors(*[next(indices) for _ in range(_MASK)]))
        elif code == _OF_RECORD:
            form.append((next(named), next(given)))
        elif code == _OF_NAME:
            form.append(next(named))
        elif code == _OF_FLAG:
            form.append(bool(next(given)))
        elif code == _OF_DTYPE:
            form.append(_DTYPES[next(given)])
        else:
            form.append(next(given) if code == _OF_INT else next(numbered))
    return built(form, tensors)


# --- operators ----------------------------------------------------------------------------------------------------


#: what kernels take for granted of the tensors of a call: of each its name, the tensor or None, its shape and dtype
Expected = Iterator[tuple[str, torch.Tensor | None, tuple[int, ...], torch.dtype]]


#: in the shape of an output: as many as there are
ANY_LENGTH = -1


class Output(NamedTuple):
    """A tensor that an operator returns."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def made(self, like: torch.Tensor) -> torch.Tensor:
        """It, uninitialised, on the device of another tensor."""
        shape = [torch.library.get_ctx().new_dynamic_size() if each == ANY_LENGTH else each for each in self.shape]
        return like.new_empty(shape, dtype=self.dtype)


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all([want in (ANY_LENGTH, size) for size, want in zip(shape, expected)])  # noqa: B905


class RecordOperator:
    """An operator that takes a record: ``overload`` in ``torch.ops.g2g``, whose implementation is ``function``.

    Calls of ``overload`` may be put together by hand, so they are checked: :meth:`check` alone keeps kernels from
    reading and writing outside of tensors. The record's ``expected()`` gives what they take for granted.
    """

    #: arguments of its schema besides those of the record
    _more = ""

    def __init__(
        self, name: str, results: str, function: Callable, fake: Callable, keys: Sequence[str] = ("CPU",)
    ) -> None:
        """Defines it, with the ``results`` of its schema, ``"(Tensor, Tensor[])"``, for the dispatch ``keys``. Where a
        list that ``function`` or ``fake`` returns has None, the dispatcher gets an empty tensor."""
        _library.define(f"{name}({_ARGUMENTS}{self._more}) -> {results}")
        for key in keys:
            _library.impl(name, _of_arguments(function, self.check), key)
        torch.library.register_fake(f"g2g::{name}", _of_arguments(fake), lib=_library)
        self.overload = getattr(torch.ops.g2g, name).default
        self.function = function
        #: whether its kernels are compiled C, which takes dtypes for granted, too; Triton reads them off the tensors
        self.in_c = "CUDA" not in keys

    def __call__(self, record: Any) -> Any:
        return self.run(record, opened(record)[0])

    def run(self, record: Any, tensors: Sequence[torch.Tensor]) -> Any:
        """The results for a record whose tensors, in any order, are known: opening it takes time."""
        if is_observed(tensors):
            return self.overload(*arguments(*opened(record)))
        with torch._C._AutoDispatchBelowAutograd():
            return self.function(record)

    def expected(self, record: Any) -> Expected:
        """What the kernels take for granted of a record's tensors; ValueError for numbers that they cannot have."""
        return record.expected()

    def check(self, record: Any) -> None:
        """Raises ValueError, naming the tensor, for one that a kernel would read or write outside of."""
        for name, tensor, shape, dtype in self.expected(record):
            if tensor is not None and (not _fits(tensor.shape, shape) or (self.in_c and tensor.dtype != dtype)):
                given = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} must be {dtype if self.in_c else ''} {list(shape)}, not {given}")

    def opcheck(self, record: Any, *more: Any) -> None:
        """Checks schema, fake and autograd formula on this record (``torch.library.opcheck``)."""
        torch.library.opcheck(self.overload, (*arguments(*opened(record)), *more))


def _of_arguments(function: Callable, check: Callable[[Any], None] = lambda record: None) -> Callable:
    """A function of a record as one of the operator's arguments."""

    def called(tensors: Any, masks: Any, names: Any, numbers: Any, form: Any, *more: Any) -> Any:
        # where zeros were only noted, the dispatcher has made them of one element
        tensors, masks = ([tensor.contiguous() for tensor in each] for each in (tensors, masks))
        record = of_arguments(tensors, masks, names, numbers, form)
        check(record)
        results = function(record, *more)
        if isinstance(results, list):
            return [tensors[0].new_empty(0) if result is None else result for result in results]
        return results

    return called


class Backward(NamedTuple):
    """What a backward pass takes: the record ``call`` of the forward pass, and the outputs ``kept`` for this one; the
    contiguous ``grads`` of its results, None for an unused one; lists' tensors one by one in both; and which tensors of
    ``call`` a gradient is ``needed`` for."""

    call: Any
    kept: tuple[torch.Tensor, ...]
    grads: tuple[torch.Tensor | None, ...]
    needed: tuple[bool, ...]

    @classmethod
    def of(
        cls, call: Any, kept: Sequence[Any], grads: Sequence[Any], needed: Sequence[bool] | None = None
    ) -> "Backward":
        """The record with these outputs and gradients, single ones or lists; None: every gradient is needed."""
        if needed is None:
            needed = [tensor.is_floating_point() for tensor in opened(call)[0]]
        return cls(call, tuple(_each(kept)), tuple(_each(grads)), tuple(needed))

    def empty(self) -> list[Any]:
        """Uninitialised gradients as an operator returns them, None for tensors that need none."""
        tensors, _ = opened(self.call)
        return [torch.empty_like(tensor) if need else None for tensor, need in zip(tensors, self.needed, strict=True)]

    def made(self, like: Callable[[Sequence[Any], Sequence[bool]], list[Any]]) -> tuple[list[Any], Any]:
        """Gradients that ``like`` makes for the ``needed`` tensors of ``call``, None for the others: as an operator
        returns them, and as a record of the form of ``call``."""
        tensors, form = opened(self.call)
        grads = like(tensors, self.needed)
        return grads, built([TENSOR if isinstance(part, MaskTensors) else part for part in form], grads)

    def aligned(self, record: Any) -> list[torch.Tensor | None]:
        """The gradients in a record of the form of ``call`` as an operator returns them."""
        _, form = opened(self.call)
        tensors, theirs = opened(record)
        given = iter(tensors)
        grads = [
            next(given) if _has_tensor(there) else None
            for here, there in zip(form, theirs, strict=True)
            if _has_tensor(here)
        ]
        return [grad if need else None for grad, need in zip(grads, self.needed, strict=True)]


TYPES["Backward"] = Backward


class Differentiable(RecordOperator):
    """An operator ``…_forward`` with an autograd formula, and the operator ``…_backward`` of its gradients, which is
    ``backward``. Its functions also take whether to keep what the backward pass needs."""

    _more = ", bool keep"

    def __init__(
        self,
        name: str,
        results: str,
        outputs: int,
        function: Callable,
        backward: Callable[[Backward], list[torch.Tensor | None]],
        shapes: Callable[[Any, bool], Sequence[Output | list[Output]]],
        plain: Callable[[Any], Sequence[torch.Tensor]],
        keys: Sequence[str] = ("CPU",),
        prepared: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous,
    ) -> None:
        """Defines both. The first ``outputs`` are results, the others are kept for ``backward``. That takes a
        :class:`Backward`, with gradients as ``prepared`` gives them, and gives those of the record's tensors; it is not
        called where no result has one. ``shapes`` are those of what ``function`` returns. ``plain`` gives the results
        by plain PyTorch operations, the tensors of lists one by one.
        """
        self._outputs, self._plain, self._prepared, self._shapes = outputs, plain, prepared, shapes
        super().__init__(f"{name}_forward", results, function, self._fake, keys)
        self.backward = _BackwardOperator(f"{name}_backward", "Tensor[]", backward, Backward.empty, keys)
        self.backward.forward = self
        torch.library.register_autograd(
            self.overload.name(), self._formula, setup_context=self._setup_context, lib=_library
        )
        torch.library.register_autograd(self.backward.overload.name(), refuse_backward, lib=_library)
        # the name is that of autograd's node
        methods = {"forward": staticmethod(self._forward), "backward": staticmethod(self._gradients_of_all)}
        function_of_autograd: Any = type(f"{name}_forward", (torch.autograd.Function,), methods)
        self.apply = function_of_autograd.apply

    def _fake(self, record: Any, keep: bool) -> Any:
        """The outputs, uninitialised."""
        like = opened(record)[0][0]
        made = [
            [of.made(like) for of in each] if isinstance(each, list) else each.made(like)
            for each in self._shapes(record, keep)
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def __call__(self, record: Any) -> Any:
        tensors, form = opened(record)
        keep = False
        for tensor in tensors if torch.is_grad_enabled() else ():
            keep = keep or tensor.requires_grad
        if is_observed(tensors):
            return self.overload(*arguments(tensors, form), keep)
        if not keep:
            with torch._C._AutoDispatchBelowAutograd():
                return self.function(record, False)
        # A function of autograd returns tensors alone, one by one. `outputs` brings what `function` returned past it:
        # where results are lists, and what is kept, which has no gradient.
        outputs: list[Any] = []
        results = iter(self.apply(record, form, outputs, *tensors))
        for number, each in enumerate(outputs[: self._outputs]):
            outputs[number] = [*islice(results, len(each))] if isinstance(each, list) else next(results)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _forward(self, ctx: Any, record: Any, form: Form, outputs: list[Any], *tensors: torch.Tensor) -> Any:
        """Appends to ``outputs`` what the function returns. Returns the results, the tensors of lists one by one."""
        with torch._C._AutoDispatchBelowAutograd():
            made = self.function(record, True)
        outputs += [made] if isinstance(made, torch.Tensor) else made
        self._save(ctx, tensors, form, outputs)
        return tuple(_each(outputs[: self._outputs]))

    def _save(self, ctx: Any, tensors: Sequence[torch.Tensor], form: Form, outputs: Sequence[Any]) -> None:
        saved = [*tensors, *_each(outputs[self._outputs :])]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.form, ctx.count, ctx.autocast = form, len(tensors), autocast_of(tensors[0])
        ctx.saved_as = [*map(_KIND, saved)]

    def _gradients(self, ctx: Any, grads: Sequence[Any], needed: Sequence[bool]) -> list[torch.Tensor | None]:
        """The gradients of the record's tensors from those of all results, the tensors of lists one by one."""
        if all([grad is None for grad in grads]):
            return [None] * len(needed)
        saved, form = [tensor.contiguous() for tensor in ctx.saved_tensors], ctx.form
        if [*map(_KIND, saved)] != ctx.saved_as:  # kernels would read outside
            raise RuntimeError(
                "a hook on saved tensors gave other sizes or dtypes back than it took; unpack what it packs to the same"
            )
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        if needs_plain_operations(grads):
            return gradients_of(lambda *given: self._plain(built(form, given)), tensors, grads, needed, ctx.autocast)
        given = tuple([None if grad is None else self._prepared(grad) for grad in grads])
        record = Backward(built(form, tensors), tuple(kept), given, tuple(needed))
        found = self.backward.run(record, [*saved, *[grad for grad in given if grad is not None]])
        return [grad if need else None for grad, need in zip(found, needed)]  # noqa: B905

    def _gradients_of_all(self, ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the arguments of :meth:`_forward`; the first three are no tensors."""
        return None, None, None, *self._gradients(ctx, grads, ctx.needs_input_grad[3:])

    def _setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        tensors, masks, *others = inputs
        _, form = opened(of_arguments(tensors, masks, *others[:3]))
        self._save(ctx, tensors, form, [output] if isinstance(output, torch.Tensor) else output)
        # PyTorch wants a list for a list of tensors, and for an empty one of anything
        ctx.others = [None] * len(masks), *[[] if other == [] else None for other in others]

    def _formula(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = self._gradients(ctx, _each(grads[: self._outputs]), ctx.needs_input_grad[0])
        return found, *ctx.others


class _BackwardOperator(RecordOperator):
    """The operator of the gradients of ``forward``."""

    forward: Differentiable

    def expected(self, record: Backward) -> Expected:
        yield from record.call.expected()
        if self.in_c:
            outputs = _each(self.forward._shapes(record.call, True))
            for number, (tensor, of) in enumerate(zip([*record.grads, *record.kept], outputs, strict=True)):
                name = f"gradient {number}" if number < len(record.grads) else f"kept {number - len(record.grads)}"
                yield name, tensor, of.shape, of.dtype


def _each(values: Sequence[Any]) -> list[Any]:
    """The values, those of lists one by one."""
    found: list[Any] = []
    for value in values:
        found.extend(value if type(value) in (list, tuple) else (value,))
    return found
