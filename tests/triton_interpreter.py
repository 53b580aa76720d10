"""Triton's interpreter without work that comes to nothing: the same values in less than a quarter of the time.

It looks through the modules of the language anew at every call of a device function and makes a shape for every result.
Above all it goes through ten functions for each addition of two arrays.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter


def accept_any_numpy() -> None:
    """Converts tensors of one element to numbers, which before Triton 3.7 it leaves to NumPy, and NumPy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    @functools.wraps(patch)
    def patch_and_convert(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_convert


def quicken() -> None:
    """Changes the interpreter of this process, once; leaves it as it is where its insides are not as expected."""
    names = ("GridExecutor", "_get_np_dtype", "_interpreter", "_patch_attr", "_patch_builtin", "_patch_lang",
             "interpreter_builder", "interpreter_semantic")  # fmt: skip
    if not all(hasattr(interpreter, name) for name in names) or interpreter.interpreter_builder.options.debug:
        return
    _patch_the_language_once_a_launch()
    _make_shapes_once()
    _compute_at_once()
    _find_builtins_once()


def _patch_the_language_once_a_launch() -> None:
    """A launch patches the language and, since Triton 3.6, restores it; device functions called in between find it
    patched."""
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
#: and their types there; a bit is a bool
ARRAYS = {"int32": "int32", "int64": "int64", "uint8": "uint8", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def _divide(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The quotient of integers, rounded towards zero."""
    return (left - np.fmod(left, right)) // right


AT_ONCE = {
    "__add__": (np.add, NUMBERS),
    "__sub__": (np.subtract, NUMBERS),
    "__mul__": (np.multiply, NUMBERS),
    "__floordiv__": (_divide, INTEGERS),
    "__mod__": (np.fmod, INTEGERS),
    "__lt__": (np.less, NUMBERS),
    "__le__": (np.less_equal, NUMBERS),
    "__gt__": (np.greater, NUMBERS),
    "__ge__": (np.greater_equal, NUMBERS),
    "__eq__": (np.equal, NUMBERS),
    "__and__": (np.bitwise_and, ("int1", *INTEGERS)),
    "__or__": (np.bitwise_or, ("int1", *INTEGERS)),
}
#: with the operands the other way round
REVERSED = {f"__r{name[2:]}": AT_ONCE[name] for name in ("__add__", "__mul__", "__sub__", "__floordiv__", "__mod__")}


def _compute_at_once() -> None:
    """Arithmetic of two tensors of one number format, or of a tensor and a number, goes straight to NumPy, which
    broadcasts blocks of as many dimensions, and scalars, as Triton does; so do offsets of pointers, new axes, casts,
    selections and loads under a mask. All else takes the interpreter's own way."""
    core, patch, builder = interpreter.tl.core, interpreter._patch_lang, interpreter.interpreter_builder
    handle, language = interpreter.TensorHandle, interpreter.tl

    def result(data, dtype, scalar):
        return core.tensor(handle(data, dtype), dtype if scalar else core.block_type(dtype, [*data.shape]))

    def broadcasts(left, right):
        """Whether NumPy broadcasts two tensors as Triton does."""
        return len(left.shape) == len(right.shape) or not left.shape or not right.shape

    def operand(left, other, formats):
        """The array or number that NumPy may combine with a tensor, or None."""
        name = left.dtype.name
        if name not in formats:
            return None
        if type(other) is core.tensor:
            return other.handle.data if other.dtype.name == name and broadcasts(left, other) else None
        number = other.value if type(other) is core.constexpr else other
        whole = type(number) is int and -(2**31) <= number < 2**31 and name != "int1"
        return left.handle.data.dtype.type(number) if whole or (type(number) is float and name in FLOATS) else None

    def offset(pointer, other):
        """A pointer or block of pointers that many elements further, or None."""
        if type(pointer.dtype) is not core.pointer_type:
            return None
        if type(other) is core.tensor:
            if other.dtype.name not in INTEGERS or not broadcasts(pointer, other):
                return None
            by, scalar = other.handle, not (pointer.shape or other.shape)
        elif type(other) is int and -(2**31) <= other < 2**31:
            by, scalar = handle(np.array([other], np.int32), core.int32), not pointer.shape
        else:
            return None
        return result(builder.create_addptr(pointer.handle, by).data, pointer.dtype, scalar)

    def at_once(operation, compute, formats, reverse):
        def computed(self, other, **options):
            right = operand(self, other, formats)
            if right is not None:
                data = compute(right, self.handle.data) if reverse else compute(self.handle.data, right)
                scalar = not (self.shape or (type(other) is core.tensor and other.shape))
                return result(data, core.int1 if data.dtype == np.bool_ else self.dtype, scalar)
            further = offset(self, other) if compute is np.add else None
            return operation(self, other, **options) if further is None else further

        return computed

    def to_at_once(operation):
        def computed(self, dtype, *options, **named):
            to = dtype.value if type(dtype) is core.constexpr else dtype
            source, target = self.dtype.name, getattr(to, "name", None)
            if options or named or target not in ARRAYS or not (source in ARRAYS or source == "int1"):
                return operation(self, dtype, *options, **named)
            if source == target:
                return self
            return result(self.handle.data.astype(ARRAYS[target]), to, not self.shape)

        return computed

    def new_axis_at_once(operation):
        def computed(self, slices):
            if type(slices) is tuple and len(slices) == 2 and len(self.shape) == 1:
                for axis in (0, 1):
                    if slices[axis] is None and slices[1 - axis] == slice(None):
                        return result(np.expand_dims(self.handle.data, axis), self.dtype, False)
            return operation(self, slices)

        return computed

    def where_at_once(operation):
        def computed(condition, x, y):
            if type(condition) is type(x) is core.tensor and condition.dtype.name == "int1" and x.shape:
                other = operand(x, y, NUMBERS)
                if other is not None and broadcasts(condition, x):
                    return result(np.where(condition.handle.data, x.handle.data, other), x.dtype, False)
            return operation(condition, x, y)

        return computed

    def load_at_once(operation):
        def computed(pointer, mask=None, other=None, **options):
            given = type(pointer) is type(mask) is core.tensor and len(pointer.shape) == len(mask.shape) > 0
            element = pointer.dtype.element_ty if given and type(pointer.dtype) is core.pointer_type else None
            if element is None or element.name not in ARRAYS or type(other) not in (int, float, type(None)):
                return operation(pointer, mask, other, **options)
            pointers, chosen = np.broadcast_arrays(pointer.handle.data, mask.handle.data)
            kind = np.dtype(ARRAYS[element.name])
            rest = np.full(pointers.shape, other or 0, kind)
            return result(interpreter._interpreter.load(pointers, chosen, rest, kind), element, False)

        return computed

    wrapped = {name: (at_once, *how, False) for name, how in AT_ONCE.items()}
    wrapped |= {name: (at_once, *how, True) for name, how in REVERSED.items()}
    wrapped |= {"to": (to_at_once,), "__getitem__": (new_axis_at_once,)}
    places = [(core.tensor, name, how) for name, how in wrapped.items()]
    places += [(language, "where", (where_at_once,)), (language, "load", (load_at_once,))]

    @functools.wraps(patch)
    def patch_and_compute(function):
        scope = patch(function)
        set_attribute = scope.set_attr if scope else setattr
        for place, name, (wrap, *how) in places:
            operation = getattr(place, name)
            if operation.__name__ != "computed":
                set_attribute(place, name, wrap(operation, *how))
        return scope

    interpreter._patch_lang = patch_and_compute


def _find_builtins_once() -> None:
    """Which functions of a module or class the interpreter has to replace is looked up at the first launch."""
    found: dict = {}
    core = interpreter.tl.core

    def patch_builtin(package, builder, *scope):
        if package not in found:
            found[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in found[package]:
            member = getattr(package, name)
            if core.is_builtin(member):  # not replaced yet in this launch
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin


@contextlib.contextmanager
def tensor_core_products() -> Iterator[None]:
    """Inside, sums of float32 products are those of a GPU's tensor cores: 16 products at a time are added exactly to
    what there is, and the bits beyond float32 are cut off (Fasi et al. 2021), which draws long sums towards zero. The
    interpreter itself takes a product of two tiles from NumPy and adds it as a whole: sums of many samples come out
    more exact than on any card."""
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
