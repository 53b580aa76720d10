"""Triton's interpreter without work that comes to nothing: the same values in less than a third of the time.

It looks through the language's modules anew at every call of a device function, builds a table for every cast, a type
for every operand and a shape for every result, and computes whether each integer operation overflows only to drop the
answer (device assertions are off). Above all it goes through ten functions for each addition of two arrays.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter


def quicken() -> None:
    """Changes the interpreter of this process, once; leaves it as it is where its insides are not as expected."""
    names = ("GridExecutor", "_get_np_dtype", "_patch_lang", "interpreter_builder", "interpreter_semantic")
    if not all(hasattr(interpreter, name) for name in names) or interpreter.interpreter_builder.options.debug:
        return
    _drop_unused_overflow_checks()
    _look_up_number_formats()
    _patch_the_language_once_a_launch()
    _broadcast_only_what_differs()
    _make_shapes_once()
    _compute_at_once()


def _drop_unused_overflow_checks() -> None:
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_up_number_formats() -> None:
    by_name: dict = {}
    original = interpreter._get_np_dtype

    @functools.wraps(original)
    def look_up(dtype):
        name = dtype.scalar.name
        if name not in by_name:
            by_name[name] = original(dtype)
        return by_name[name]

    interpreter._get_np_dtype = look_up


def _patch_the_language_once_a_launch() -> None:
    """A launch patches the language and restores it; device functions called in between find it patched."""
    patched: set[int] = set()  # the globals of functions for which it is, in this launch
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @functools.wraps(patch)
    def patch_once(function):
        seen = id(function.__globals__) in patched
        patched.add(id(function.__globals__))
        return None if seen else patch(function)

    @functools.wraps(launch)
    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


def _broadcast_only_what_differs() -> None:
    """Operands of one shape stay as they are; types of blocks, which are costly to make, are made once."""
    semantic, block = type(interpreter.interpreter_semantic), interpreter.tl.core.block_type
    broadcast, with_element = semantic.broadcast_impl_value, block.with_element_ty
    made: dict = {}

    @functools.wraps(broadcast)
    def broadcast_if_needed(self, left, right):
        if left.type.is_block() and right.type.is_block() and [*left.type.shape] == [*right.type.shape]:
            return left, right
        return broadcast(self, left, right)

    @functools.wraps(with_element)
    def with_element_once(self, element):
        key = self.name, element.name
        if key not in made:
            made[key] = with_element(self, element)
        return made[key]

    semantic.broadcast_impl_value = broadcast_if_needed
    block.with_element_ty = with_element_once


def _make_shapes_once() -> None:
    """Blocks of one shape and number format have equal types, and tensors of one type have equal shapes."""
    core = interpreter.tl.core
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict = {}
    shapes: dict = {}

    @functools.wraps(make_type)
    def make_type_once(self, element_ty, shape):
        key = element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = vars(self).copy()
        vars(self).update(types[key])

    @functools.wraps(make_tensor)
    def make_tensor_with_its_shape(self, handle, type):
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    core.block_type.__init__ = make_type_once
    core.tensor.__init__ = make_tensor_with_its_shape


#: number formats whose arrays are NumPy's own
FLOATS, INTEGERS = ("fp16", "fp32", "fp64"), ("int32", "int64")
NUMBERS = (*FLOATS, *INTEGERS)
AT_ONCE = {
    "__add__": (np.add, NUMBERS),
    "__sub__": (np.subtract, NUMBERS),
    "__mul__": (np.multiply, NUMBERS),
    "__lt__": (np.less, NUMBERS),
    "__le__": (np.less_equal, NUMBERS),
    "__gt__": (np.greater, NUMBERS),
    "__ge__": (np.greater_equal, NUMBERS),
    "__and__": (np.bitwise_and, ("int1", *INTEGERS)),
    "__or__": (np.bitwise_or, ("int1", *INTEGERS)),
}


def _compute_at_once() -> None:
    """Arithmetic of two tensors of one number format, or of a tensor and a number, goes straight to NumPy, which
    broadcasts blocks of as many dimensions as Triton does; so do offsets of pointers. All else takes the interpreter's
    own way."""
    core, patch, builder = interpreter.tl.core, interpreter._patch_lang, interpreter.interpreter_builder

    def result(handle, shape):
        return core.tensor(handle, core.block_type(handle.dtype, [*handle.data.shape]) if shape else handle.dtype)

    def operand(left, other, formats):
        """The array or number that NumPy may combine with a tensor, or None."""
        name = left.dtype.name
        if name not in formats:
            return None
        if type(other) is core.tensor:
            alike = other.dtype.name == name and len(other.shape) == len(left.shape)
            return other.handle.data if alike else None
        number = other.value if type(other) is core.constexpr else other
        whole = type(number) is int and -(2**31) <= number < 2**31 and name != "int1"
        return left.handle.data.dtype.type(number) if whole or (type(number) is float and name in FLOATS) else None

    def offset(left, other):
        """Whether elements of a pointer or block of pointers are added."""
        both = type(left.dtype) is core.pointer_type and type(other) is core.tensor
        return both and other.dtype.name in INTEGERS and len(other.shape) == len(left.shape)

    def at_once(operation, compute, formats):
        def computed(self, other, **options):
            right = operand(self, other, formats)
            if right is not None:
                data = compute(self.handle.data, right)
                dtype = core.int1 if data.dtype == np.bool_ else self.dtype
                return result(interpreter.TensorHandle(data, dtype), self.shape)
            if compute is np.add and offset(self, other):
                return result(builder.create_addptr(self.handle, other.handle), self.shape)
            return operation(self, other, **options)

        return computed

    @functools.wraps(patch)
    def patch_and_compute(function):
        scope = patch(function)
        for name, (compute, formats) in AT_ONCE.items() if scope else ():
            operation = getattr(core.tensor, name)
            if operation.__name__ != "computed":
                scope.set_attr(core.tensor, name, at_once(operation, compute, formats))
        return scope

    interpreter._patch_lang = patch_and_compute


@contextlib.contextmanager
def tensor_core_products() -> Iterator[None]:
    """Inside, sums of float32 products are those of a GPU's tensor cores: 16 products at a time are added exactly to
    what there is, and the bits beyond float32 are cut off (Fasi et al. 2021), which draws long sums towards zero.

    The interpreter itself takes a product of two tiles from NumPy and adds it as a whole: sums of many samples come out
    more exact than on any card.
    """
    builder = type(interpreter.interpreter_builder)
    original = builder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype != np.float32:
            return original(self, a, b, d, *options)
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
        for k in range(0, a.data.shape[-1], 16):
            exact = total + left[:, k : k + 16] @ right[k : k + 16]
            total = exact.astype(np.float32)
            total = np.where(abs(total) > abs(exact), np.nextafter(total, np.float32(0)), total)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    builder.create_dot = create_dot
    try:
        yield
    finally:
        builder.create_dot = original
