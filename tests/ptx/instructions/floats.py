"""Floating-point numbers: float32, float64 and pairs of float32.

What is approximate on a GPU (ex2, lg2, rcp, rsqrt, sqrt, div.full) is computed exactly and rounded
once, so that its error there, of one or two units in the last place, is not seen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from ..forms import Form, computes, flush, instruction
from .conversions import from_bfloat16

F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64
Array = Any


@computes("add[.rn][.ftz].f32", "d, s, s")
@computes("add[.rn].f64", "d, s, s")
def add(form: Form, x: Array, y: Array) -> Array:
    return x + y


@computes("sub[.rn][.ftz].f32", "d, s, s")
@computes("sub[.rn].f64", "d, s, s")
def subtract(form: Form, x: Array, y: Array) -> Array:
    return x - y


@computes("mul[.rn][.ftz].f32", "d, s, s")
@computes("mul[.rn].f64", "d, s, s")
def multiply(form: Form, x: Array, y: Array) -> Array:
    return x * y


@computes("fma.rn[.ftz].f32", "d, s, s, s")
@computes("fma.rn.f64", "d, s, s, s")
def multiply_add(form: Form, x: Array, y: Array, z: Array) -> Array:
    """Return x y + z, rounded once."""
    return fused_32(x, y, z) if form.type == "f32" else fused_64(x, y, z)


@computes("div(.rn|.full)[.ftz].f32", "d, s, s")
@computes("div.rn.f64", "d, s, s")
def divide(form: Form, x: Array, y: Array) -> Array:
    return x / y


@computes("neg[.ftz].f32", "d, s")
@computes("neg.f64", "d, s")
def negative(form: Form, x: Array) -> Array:
    return -x


@computes("abs[.ftz].f32", "d, s")
@computes("abs.f64", "d, s")
def absolute(form: Form, x: Array) -> Array:
    return np.abs(x)


@computes("copysign(.f32|.f64)", "d, s, s")
def copy_sign(form: Form, sign: Array, x: Array) -> Array:
    return np.copysign(x, sign)


@computes("max[.ftz][.NaN][.xorsign.abs].f32", "d, s, s")
@computes("max.f64", "d, s, s")
@computes("max[.ftz][.NaN].f32", "d, s, s, s")
def maximum(form: Form, x: Array, *others: Array) -> Array:
    return extreme(form, (x, *others), np.maximum if form.has("NaN") else np.fmax, np.add)


@computes("min[.ftz][.NaN][.xorsign.abs].f32", "d, s, s")
@computes("min.f64", "d, s, s")
@computes("min[.ftz][.NaN].f32", "d, s, s, s")
def minimum(form: Form, x: Array, *others: Array) -> Array:
    def of_zeros(x: Array, y: Array) -> Array:  # -0 is the lesser one
        return -(-x - y)

    return extreme(form, (x, *others), np.minimum if form.has("NaN") else np.fmin, of_zeros)


def extreme(form: Form, numbers: tuple, choose: Callable, of_zeros: Callable) -> Array:
    """Return the chosen number: of two zeros by their signs; `.xorsign` multiplies the signs."""
    if form.has("xorsign"):
        x, y = numbers
        sign = np.where(np.signbit(x) != np.signbit(y), F32(-1), F32(1))
        return np.copysign(choose(np.abs(x), np.abs(y)), sign)
    result = numbers[0]
    for x in numbers[1:]:
        result = np.where((result == 0) & (x == 0), of_zeros(result, x), choose(result, x))
    return result


@computes("sqrt(.rn|.approx)[.ftz].f32", "d, s")
@computes("sqrt.rn.f64", "d, s")
def square_root(form: Form, x: Array) -> Array:
    return np.sqrt(x)


@computes("rcp(.rn|.approx)[.ftz].f32", "d, s")
@computes("rcp.rn.f64", "d, s")
def reciprocal(form: Form, x: Array) -> Array:
    return x.dtype.type(1) / x


@computes("rcp.approx.ftz.f64", "d, s")
def coarse_reciprocal(form: Form, x: Array) -> Array:
    """Return 1 / x of the upper half of the bits of x, and the upper half of the bits of that."""
    return upper_half(F64(1) / flush_64(upper_half(x)))


@computes("rsqrt.approx.ftz.f64", "d, s")
def coarse_reciprocal_root(form: Form, x: Array) -> Array:
    return upper_half(F64(1) / np.sqrt(flush_64(upper_half(x))))


def upper_half(x: Array) -> Array:
    return (np.asarray(x).view(U64) & U64(0xFFFFFFFF00000000)).view(F64)


def flush_64(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(F64).smallest_normal, np.copysign(F64(0), x), x)


@computes("rsqrt.approx[.ftz].f32", "d, s")
def reciprocal_root(form: Form, x: Array) -> Array:
    return (1 / np.sqrt(wide(x))).astype(F32)


@computes("ex2.approx[.ftz].f32", "d, s")
def power_of_two(form: Form, x: Array) -> Array:
    return np.exp2(wide(x)).astype(F32)


@computes("lg2.approx[.ftz].f32", "d, s")
def logarithm(form: Form, x: Array) -> Array:
    return np.log2(wide(x)).astype(F32)


def wide(x: Array) -> Array:
    return np.asarray(x).astype(F64)


@computes("testp(.finite|.infinite|.number|.notanumber)(.f32|.f64)", "d:pred, s")
def test(form: Form, x: Array) -> Array:
    nan = np.isnan(x)
    return {"finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~nan, "notanumber": nan}[
        form.words[1]
    ]


# ------------------------------------------------------------------------------ float32 with halves


@computes("add[.rn].f32(.f16|.bf16)", "d:0, s:1, s:0")
def add_to_half(form: Form, x: Array, y: Array) -> Array:
    return widened(form, x) + y


@computes("sub[.rn].f32(.f16|.bf16)", "d:0, s:1, s:0")
def subtract_from_half(form: Form, x: Array, y: Array) -> Array:
    return widened(form, x) - y


@computes("fma.rn.f32(.f16|.bf16)", "d:0, s:1, s:1, s:0")
def multiply_halves_add(form: Form, x: Array, y: Array, z: Array) -> Array:
    return fused_32(widened(form, x), widened(form, y), z)


def widened(form: Form, x: Array) -> Array:
    return from_bfloat16(x) if form.type == "bf16" else np.asarray(x).astype(F32)


# -------------------------------------------------------------------------------------------- pairs

PAIRS = {"add": add, "sub": subtract, "mul": multiply, "fma": multiply_add}


@instruction("(add|sub|mul)[.rn][.ftz].f32x2", "d, s, s")
@instruction("fma.rn[.ftz].f32x2", "d, s, s, s")
def of_pairs(form: Form, destination: Any, *sources: Any) -> Any:
    """Compute each half of 64 bits as a float32."""
    function = PAIRS[form.words[0]]
    single = Form(form.text, (*form.words[:-1], "f32"))
    flushes = flush if form.has("ftz") else lambda x: x

    def execute(machine: Any) -> None:
        values = [machine.spread(source(machine)) for source in sources]
        halves = [flushes(np.ascontiguousarray(x).view(F32)) for x in values]
        destination(machine, flushes(function(single, *halves)).view(U64))

    return execute


# -------------------------------------------------------------------------------- rounded only once


def fused_32(x: Array, y: Array, z: Array) -> Array:
    """Return x y + z: the product is exact in float64, and the sum is rounded to float32 once.

    Rounding it to float64 first matters where that is a tie between two float32, or is subnormal;
    there it is rounded to odd.
    """
    product, z = wide(x) * y, wide(z)
    total = product + z
    bits = np.asarray(total).view(U64)
    risky = (bits & U64(0x1FFFFFFF) == U64(0x10000000)) | (np.abs(total) < 2.0**-125)
    if risky.any():
        total = np.where(risky, odd_sum(product, z), total)
    return total.astype(F32)


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the rounded sum and its error, both exact."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def two_product(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the rounded product and its error, both exact unless numbers are huge or tiny."""

    def halves(x: Array) -> tuple[Array, Array]:
        scaled = F64(2**27 + 1) * x
        high = scaled - (scaled - x)
        return high, x - high

    product = x * y
    (x1, x2), (y1, y2) = halves(x), halves(y)
    return product, x2 * y2 - (((product - x1 * y1) - x2 * y1) - x1 * y2)


def odd_sum(x: Array, y: Array) -> Array:
    """Return x + y rounded to odd: where it is not exact, to the neighbour whose last bit is 1."""
    total, error = two_sum(x, y)
    if not error.any():
        return total
    bits = np.asarray(total).view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(F64)


def fused_64(x: Array, y: Array, z: Array) -> Array:
    """Return x y + z in float64.

    The sum is that of a rounded total and of what is left, which is rounded too: where both ends of
    its error give the same, that is right. All others are added as fractions.
    """
    x, y, z = np.broadcast_arrays(wide(x), y, z)
    product, low = two_product(x, y)
    total, left = two_sum(product, z)
    left = left + low
    result = np.asarray(total + left * F64(1 - 2.0**-52))
    doubtful = result - (total + left * F64(1 + 2.0**-52)) != 0  # infinities and NaN too
    tiny = np.abs(product) < 2.0**-900
    if tiny.any():
        is_zero = tiny & ((x == 0) | (y == 0))
        result = np.where(is_zero, total, result)
        doubtful |= tiny & ~is_zero
    if doubtful.any():
        doubtful &= ~np.isnan(product) & ~np.isnan(z)  # which result has already
        result[doubtful] = fused_exactly(x[doubtful], y[doubtful], z[doubtful])
    return result


def fused_exactly(x: Array, y: Array, z: Array) -> Array:
    """Return x y + z of float64 by fractions, where it is a number."""
    of_finite = np.isfinite(x) & np.isfinite(y)
    result = np.where(of_finite, z, x * y + z)  # an infinite z stays, whatever the product
    finite = of_finite & np.isfinite(z)
    exact = [[Fraction(float(value)) for value in number[finite]] for number in (x, y, z)]
    result[finite] = [rounded(a * b + c) for a, b, c in zip(*exact, strict=True)]
    return result


def rounded(number: Fraction) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
