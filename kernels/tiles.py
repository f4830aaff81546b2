"""Device code that all kernels share: scalars, logarithms, rows and their 16-byte vectors."""

import triton
import triton.language as tl

from fastkd.kernels.device import Strided

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def number(value, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr):
    """Return a number that the launcher passed by value or, ON_DEVICE, as a pointer."""
    return tl.load(value).to(DTYPE) if ON_DEVICE else tl.full([], value, DTYPE)


@triton.jit
def log2_units(temperature, DTYPE: tl.constexpr):
    """Return c = log2(e) / temperature, so that exp(z / temperature) = exp2(c · z)."""
    log2e = tl.full([], LOG2E, DTYPE)
    if DTYPE == tl.float32:
        return tl.div_rn(log2e, temperature)  # because `/` is approximate and c scales every logit
    return log2e / temperature


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Compute log2 in one instruction where the target has it; tl.log2 takes 27."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def row_offset(row, inner, view):
    """Return where a row of a `device.Strided` starts, in elements, as a 64-bit number.

    Two strides describe logits shifted by one token, [:, :-1], so that they need no copy.
    """
    outer = row // inner
    outer_offset = outer.to(tl.int64) * view.outer_stride
    return outer_offset + (row - outer * inner).to(tl.int64) * view.inner_stride


@triton.jit
def head_of(row_ptr, n_cols, WIDTH: tl.constexpr):
    """Return how many elements precede the row's vectors, which are WIDTH aligned elements each."""
    size: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
    place = (row_ptr.to(tl.int64) // size % WIDTH).to(tl.int32)
    return tl.minimum((WIDTH - place) % WIDTH, n_cols)


@triton.jit
def at_boundary(pointer, offset, ALIGNED: tl.constexpr):
    """Return pointer + offset; if ALIGNED, the compiler may read 16 bytes at a time from there."""
    moved = pointer + offset
    return tl.multiple_of(moved, 16) if ALIGNED else moved


@triton.jit
def rows_of_each(networks, rows, inner, offset, ALIGNMENT: tl.constexpr):
    """Return a tuple of pointers to the same rows of several `device.Strided`, moved by an offset.

    The compiler is told that ALIGNMENT, a number of elements, divides where they start, without an
    offset; 0 tells that they lie on a boundary of 16 bytes, and −1 nothing.
    """
    found = ()
    for k in tl.static_range(len(networks)):
        # by places, because the names of members in a tuple are lost in older versions of Triton
        network = Strided(networks[k][0], networks[k][1], networks[k][2])
        start = row_offset(rows, inner, network)
        if ALIGNMENT > 0:
            found += (network.ptr + start // ALIGNMENT * ALIGNMENT,)
        else:
            found += (at_boundary(network.ptr, start + offset, ALIGNMENT == 0),)
    return found
