"""The device code that all kernels share: scalars, logarithms, rows and their 16-byte vectors."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def number(value, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr):
    """A number that the caller passed by value or, ON_DEVICE, as a pointer."""
    return tl.load(value).to(DTYPE) if ON_DEVICE else tl.full([], value, DTYPE)


@triton.jit
def log2_units(temperature, DTYPE: tl.constexpr):
    """log2(e) / temperature: exp(z / temperature) = exp2(z · this)."""
    log2e = tl.full([], LOG2E, DTYPE)
    if DTYPE == tl.float32:
        return tl.div_rn(log2e, temperature)  # it scales every logit, and `/` is approximate
    return log2e / temperature


@triton.jit
def log2(x, FAST: tl.constexpr):
    """One instruction where the target has it; tl.log2 is 27."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where row `row` of a tensor [outer, inner, columns] starts: shifted logits are not copied."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@triton.jit
def head_of(row_ptr, n_cols, WIDTH: tl.constexpr):
    """How many elements a row has before its first vector, WIDTH elements on their boundary."""
    size: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    place = (row_ptr.to(tl.int64) // size % WIDTH).to(tl.int32)
    return tl.minimum((WIDTH - place) % WIDTH, n_cols)


@triton.jit
def at_boundary(pointer, offset, ALIGNED: tl.constexpr):
    """pointer + offset, which the compiler is told may be read 16 bytes at a time."""
    moved = pointer + offset
    return tl.multiple_of(moved, 16) if ALIGNED else moved
