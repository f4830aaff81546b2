"""Integers, bits and predicates."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..forms import BITS, TWICE, TYPES, Form, computes

INTEGERS = "(.u16|.s16|.u32|.s32|.u64|.s64)"
WORDS = "(.pred|.b16|.b32|.b64)"
Array = Any


@computes("add" + INTEGERS, "d, s, s")
def add(form: Form, x: Array, y: Array) -> Array:
    return x + y


@computes("sub" + INTEGERS, "d, s, s")
def subtract(form: Form, x: Array, y: Array) -> Array:
    return x - y


@computes("mul.lo" + INTEGERS, "d, s, s")
def multiply(form: Form, x: Array, y: Array) -> Array:
    return x * y


@computes("mul.wide(.u16|.s16|.u32|.s32)", "d:wide, s, s")
def multiply_wide(form: Form, x: Array, y: Array) -> Array:
    wide = TYPES[TWICE[form.type]]
    return wide_of(x, wide) * wide_of(y, wide)


@computes("mul.hi(.u32|.s32)", "d, s, s")
def multiply_high(form: Form, x: Array, y: Array) -> Array:
    product = multiply_wide(form, x, y)
    return (product >> product.dtype.type(32)).astype(TYPES[form.type])


@computes("mul.hi.u64", "d, s, s")
def multiply_high_64(form: Form, x: Array, y: Array) -> Array:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x_high, x_low, y_high, y_low = x >> half, x & low, y >> half, y & low
    middle = x_high * y_low + (x_low * y_low >> half)
    other = x_low * y_high + (middle & low)
    return x_high * y_high + (middle >> half) + (other >> half)


@computes("mad.lo" + INTEGERS, "d, s, s, s")
def multiply_add(form: Form, x: Array, y: Array, z: Array) -> Array:
    return x * y + z


@computes("mad.wide(.u16|.s16|.u32|.s32)", "d:wide, s, s, s:wide")
def multiply_add_wide(form: Form, x: Array, y: Array, z: Array) -> Array:
    return multiply_wide(form, x, y) + z


def wide_of(x: Array, dtype: Any) -> Array:
    return np.asarray(x).astype(dtype)


@computes("div" + INTEGERS, "d, s, s")
def divide(form: Form, x: Array, y: Array) -> Array:
    """Divide towards zero; by zero, as hardware does, all bits are set."""
    quotient, _ = parts(x, y)
    return quotient


@computes("rem" + INTEGERS, "d, s, s")
def remainder(form: Form, x: Array, y: Array) -> Array:
    _, rest = parts(x, y)
    return rest


def parts(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = np.broadcast_arrays(x, y)
    zero, one = y == 0, y.dtype.type(1)
    divisor = np.where(zero, one, y)
    quotient = x // divisor
    rest = x - quotient * divisor
    if x.dtype.kind == "i":  # numpy divides towards minus infinity
        away = (rest != 0) & ((x < 0) != (divisor < 0))
        quotient, rest = quotient + away, rest - away * divisor
    all_bits = BITS[x.dtype.itemsize](2 ** (8 * x.dtype.itemsize) - 1).view(x.dtype)
    return np.where(zero, all_bits, quotient), np.where(zero, x, rest)


@computes("max" + INTEGERS, "d, s, s")
def maximum(form: Form, x: Array, y: Array) -> Array:
    return np.maximum(x, y)


@computes("min" + INTEGERS, "d, s, s")
def minimum(form: Form, x: Array, y: Array) -> Array:
    return np.minimum(x, y)


@computes("neg(.s16|.s32|.s64)", "d, s")
def negative(form: Form, x: Array) -> Array:
    return np.zeros_like(x) - x


@computes("abs(.s16|.s32|.s64)", "d, s")
def absolute(form: Form, x: Array) -> Array:
    return np.abs(x)


# --------------------------------------------------------------------------------------------- bits


@computes("and" + WORDS, "d, s, s")
def conjunction(form: Form, x: Array, y: Array) -> Array:
    return x & y


@computes("or" + WORDS, "d, s, s")
def disjunction(form: Form, x: Array, y: Array) -> Array:
    return x | y


@computes("xor" + WORDS, "d, s, s")
def difference(form: Form, x: Array, y: Array) -> Array:
    return x ^ y


@computes("not" + WORDS, "d, s")
def complement(form: Form, x: Array) -> Array:
    return ~x


@computes("shl(.b16|.b32|.b64)", "d, s, s:u32")
def shift_left(form: Form, x: Array, amount: Array) -> Array:
    width = 8 * x.dtype.itemsize
    moved = x << np.minimum(amount, width - 1).astype(x.dtype)
    return np.where(amount < width, moved, x.dtype.type(0))


@computes("shr(.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64)", "d, s, s:u32")
def shift_right(form: Form, x: Array, amount: Array) -> Array:
    """Shift right; signed numbers keep their sign however far."""
    width = 8 * x.dtype.itemsize
    moved = x >> np.minimum(amount, width - 1).astype(x.dtype)
    return moved if x.dtype.kind == "i" else np.where(amount < width, moved, x.dtype.type(0))


def lowest(n: Array, dtype: Any) -> Array:
    """Return numbers whose lowest n bits are set."""
    all_bits = ~dtype.type(0)
    return np.where(n < 8 * dtype.itemsize, ~shift_left(None, all_bits, n), all_bits)


@computes("bfe(.u32|.s32|.u64|.s64)", "d, s, s:u32, s:u32")
def extract(form: Form, x: Array, start: Array, length: Array) -> Array:
    """Return a field of bits; beyond the highest bit there are zeros, or copies of its sign."""
    bits = np.asarray(x).view(BITS[x.dtype.itemsize])
    dtype, width = bits.dtype, 8 * bits.dtype.itemsize
    start, length = start & np.uint32(255), length & np.uint32(255)
    field = shift_right(form, bits, start) & lowest(length, dtype)
    if form.type.startswith("s"):
        last = np.minimum(start + length - np.uint32(1), np.uint32(width - 1))
        negative = (shift_right(form, bits, last) & dtype.type(1) == 1) & (length > 0)
        inside = np.minimum(width - np.minimum(start, np.uint32(width)), length)
        field = np.where(negative, field | ~lowest(inside, dtype), field)
    return field.view(TYPES[form.type])


@computes("bfi(.b32|.b64)", "d, s, s, s:u32, s:u32")
def insert(form: Form, field: Array, x: Array, start: Array, length: Array) -> Array:
    start, length = start & np.uint32(255), length & np.uint32(255)
    mask = shift_left(form, lowest(length, x.dtype), start)
    return (x & ~mask) | (shift_left(form, field, start) & mask)


@computes("popc(.b32|.b64)", "d:u32, s")
def count_bits(form: Form, x: Array) -> Array:
    return np.bitwise_count(x).astype(np.uint32)


@computes("clz(.b32|.b64)", "d:u32, s")
def leading_zeros(form: Form, x: Array) -> Array:
    width = 8 * x.dtype.itemsize
    found = np.full(np.shape(x), width, np.uint32)
    for i in range(width):  # the highest bit is found last
        found = np.where(x >> x.dtype.type(i) != 0, np.uint32(width - 1 - i), found)
    return found


@computes("prmt.b32", "d, s, s, s")
def permute_bytes(form: Form, x: Array, y: Array, selector: Array) -> Array:
    """Return four bytes of the eight of x and y; the top bit of a selector asks for the sign."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(x, y, selector).shape, np.uint32)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both >> (np.uint64(8) * (chosen & np.uint32(7))) & np.uint64(255)
        signs = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        byte = np.where(chosen >= 8, signs, byte).astype(np.uint32)
        result = result | byte << np.uint32(8 * i)
    return result
