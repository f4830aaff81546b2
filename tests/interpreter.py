"""Make Triton's interpreter compute as a GPU does: call correct() before the first launch.

As shipped (3.4 to 3.9, not every fault in each) it truncates float32 to bfloat16, adds and
multiplies the bit patterns of bfloat16, gives tf32 dots the precision of float32, rounds elements
of a dot by their place in the tile as its BLAS likes, rounds tl.fma twice, lets NaN through
tl.maximum and tl.max, takes a scalar comparison for a number when it is broadcast, and fails on
constants in bfloat16 and on scalars with numpy >= 2.4.

Limits: exp2, log2 and division stay numpy's, more accurate than a GPU's; tl.fma and tl.dot round
through float64, which differs from one rounding about once in 2**29; tl.sum adds in numpy's order.
"""

import functools
import inspect
from types import SimpleNamespace

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
)

from fastkd import _backend

TRUNCATE = triton_interpreter._ir.ROUNDING_MODE.RTZ
FUSED_ALREADY = hasattr(triton_interpreter._interpreter, "fma_fp32")  # triton 3.9
IGNORING_NAN = {
    np.max: np.fmax.reduce,
    np.min: np.fmin.reduce,
    np.nanmax: np.fmax.reduce,
    np.nanmin: np.fmin.reduce,
}

original = {
    name: getattr(InterpreterBuilder, name)
    for name in (
        "cast_impl",
        "create_fp_to_fp",
        "binary_op",
        "unary_op",
        "create_fma",
        "create_dot",
    )
}
original_min_max = ReduceOps.min_max
original_patch_lang = triton_interpreter._patch_lang
original_patch_lang_tensor = triton_interpreter._patch_lang_tensor
original_broadcast = TritonSemantic.broadcast_impl_value
original_block_type = tl.block_type.__init__
dtype_of_scalars = functools.cache(triton_interpreter._get_np_dtype)


def widen(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bits, exactly."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits nearest to float32 values, ties to even; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Cut float32 to 10 bits of mantissa: triton does not round, tensor cores truncate."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def narrowed(values: np.ndarray) -> TensorHandle:
    return TensorHandle(narrow(values), tl.bfloat16)


def convert(method: str, builder, source, target, *rounding):
    """Cast values: bfloat16 goes through float32 on its way in and out."""
    to_bfloat16 = target.scalar == tl.bfloat16
    if is_bfloat16(source) and not to_bfloat16:
        source = widened(source)
        if target.scalar == tl.float32:
            return source
    elif to_bfloat16 and not is_bfloat16(source) and rounding != (TRUNCATE,):
        if not source.dtype.scalar.is_fp8():
            return narrowed(source.data)
    return original[method](builder, source, target, *rounding)


def cast_impl(self, source, target):
    return convert("cast_impl", self, source, target)


def create_fp_to_fp(self, source, target, rounding):
    return convert("create_fp_to_fp", self, source, target, rounding)


def binary_op(self, left, right, operator):
    if not is_bfloat16(left):
        result = original["binary_op"](self, left, right, operator)
        if result.data.dtype == bool:  # a comparison of scalars would be broadcast as a number
            result.dtype = tl.int1
        return result
    result = operator(widen(left.data), widen(right.data))
    return TensorHandle(result, tl.int1) if result.dtype == bool else narrowed(result)


def unary_op(self, argument, operator):
    if not is_bfloat16(argument):
        return original["unary_op"](self, argument, operator)
    return narrowed(operator(widen(argument.data)))


def create_fma(self, x, y, z):
    kind = z.dtype.scalar
    if kind == tl.float64 or (FUSED_ALREADY and kind != tl.bfloat16):
        return original["create_fma"](self, x, y, z)
    x, y, wide = widened(x), widened(y), widened(z)
    total = x.data.astype(np.float64) * y.data + wide.data  # a product of float32 fits in float64
    return narrowed(total) if is_bfloat16(z) else TensorHandle(total.astype(z.data.dtype), kind)


def create_dot(self, left, right, accumulator, precision, *rest):
    both_float32 = left.dtype.scalar == right.dtype.scalar == tl.float32
    left, right = widened(left), widened(right)
    if both_float32 and precision == triton_interpreter._ir.INPUT_PRECISION.TF32:
        left, right = (TensorHandle(to_tf32(side.data), tl.float32) for side in (left, right))
    kind = accumulator.dtype.scalar
    if kind != tl.float32 or left.data.dtype.kind != "f":  # float8 comes as its bits
        return original["create_dot"](self, left, right, accumulator, precision, *rest)
    # a GPU adds up all elements in the same order, so that x_i y_j is y_j x_i to the last bit
    wide = [TensorHandle(x.data.astype(np.float64), tl.float64) for x in (left, right, accumulator)]
    total = original["create_dot"](self, *wide, precision, *rest).data
    return TensorHandle(total.astype(np.float32), kind)


def min_max(self, values, val_reduce_op, idx_reduce_op=None):
    if idx_reduce_op is None:  # with indices a GPU compares, and NaN compares false
        val_reduce_op = IGNORING_NAN[val_reduce_op]
    return original_min_max(self, values, val_reduce_op, idx_reduce_op)


def patch_lang_tensor(tensor, *scope):
    """Let triton <= 3.6 make an int of an array of one element, which numpy >= 2.4 refuses."""

    def index(self):
        return int(self.handle.data.item())

    original_patch_lang_tensor(tensor, *scope)
    if scope:
        scope[0].set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index


# ------------------------------------------------------------- the same as shipped, in less time


@functools.cache
def builtins_of(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package, builder, *scope):
    """Patch without the search of all that a package has."""
    for name in builtins_of(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # not patched already
            triton_interpreter._patch_attr(package, name, member, builder, *scope)


def patch_lang(function):
    """Patch all that a kernel and its device functions see, once for each launch."""
    return original_patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


def call_device_function(self, *arguments, **named):
    """Call a device function for which the launch has patched everything."""
    return self.rewrite()(*arguments, **named)


def get_np_dtype(kind):
    """Return NumPy's dtype without a new table of them at every call."""
    is_pointer = isinstance(kind.scalar, tl.pointer_type)
    return np.dtype(np.uint64) if is_pointer else dtype_of_scalars(kind.scalar)


_described: dict[tuple, dict] = {}


def block_type(self, element_ty, shape):
    """Describe a type of blocks once: its size is checked, and its name written out."""
    space = getattr(element_ty, "address_space", 0)
    known = _described.get(key := (element_ty.name, space, *shape))
    if known is None:
        original_block_type(self, element_ty, shape)
        _described[key] = {**vars(self)}
    else:
        vars(self).update(known, element_ty=element_ty)


def broadcast_impl_value(self, left, right):
    """Leave blocks of one shape as they are."""
    if left.type.is_block() and right.type.is_block() and left.type.shape == right.type.shape:
        return left, right
    return original_broadcast(self, left, right)


def correct() -> None:
    """Install the corrections; calling it again changes nothing."""
    for method in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma, create_dot):
        setattr(InterpreterBuilder, method.__name__, method)
    InterpreterBuilder.get_bf16 = lambda self, value: narrowed(np.array([value]))
    # Without propagate_nan a GPU returns the operand that is a number.
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    ReduceOps.min_max = min_max
    triton_interpreter._patch_lang_tensor = patch_lang_tensor
    triton_interpreter._patch_builtin = patch_builtin
    triton_interpreter._patch_lang = patch_lang
    triton_interpreter._get_np_dtype = get_np_dtype
    InterpretedFunction.__call__ = call_device_function
    tl.block_type.__init__ = block_type
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    _backend.interpreter_knows_bfloat16 = True
