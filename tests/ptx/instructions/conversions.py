"""Conversions, comparisons and selections."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..forms import BITS, TYPES, Form, computes, flush, instruction

Array = Any
U16, U32, F16, F32, F64 = np.uint16, np.uint32, np.float16, np.float32, np.float64
INTEGERS = "(.u8|.s8|.u16|.s16|.u32|.s32|.u64|.s64)"


def from_bfloat16(bits: Array) -> Array:
    return (np.asarray(bits).astype(U32) << U32(16)).view(F32)


def to_bfloat16(x: Array) -> Array:
    """Return the bits of float32 numbers rounded to the nearest bfloat16, to even in a tie."""
    bits = np.ascontiguousarray(x).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def to_half(x: Array) -> Array:
    bits = np.asarray(x).astype(F16).view(U16)
    return np.where(np.isnan(x), U16(0x7FFF), bits)


def to_tf32(x: Array) -> Array:
    """Return the bits of float32 numbers rounded to 11 digits, a tie away from zero."""
    bits = np.ascontiguousarray(x).view(U32)
    rounded = (bits + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits & U32(0xFFFFE000))


def number_of(form: Form, x: Array, kind: str) -> Array:
    """Return numbers of a type in one that numpy computes with."""
    if kind == "bf16":
        return from_bfloat16(x)
    return flush(x) if kind == "f32" and form.has("ftz") else x


@computes("cvt" + INTEGERS * 2, "d:0, s:1")
def between_integers(form: Form, x: Array) -> Array:
    """Convert an integer, which keeps its lowest bits or is extended by its sign."""
    return np.asarray(x).astype(TYPES[form.types[0]])


@computes("cvt.rn(.f16|.f32|.f64)" + INTEGERS, "d:0, s:1")
def from_integer(form: Form, x: Array) -> Array:
    return np.asarray(x).astype(TYPES[form.types[0]])


@computes(
    "cvt(.rzi|.rni|.rmi|.rpi)[.ftz](.s16|.u16|.s32|.u32|.s64|.u64)(.f16|.f32|.f64)", "d:0, s:1"
)
def to_integer(form: Form, x: Array) -> Array:
    """Convert a number, which is clamped to those of the integer; NaN is 0, or the highest bit."""
    target, source = form.types
    dtype = TYPES[target]
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[form.words[1]]
    exact = np.asarray(rounding(number_of(form, x, source))).astype(F64)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    low, high = exact <= F64(least), exact >= F64(most)
    inside = np.where(low | high | np.isnan(exact), F64(0), exact).astype(dtype)
    result = np.where(low, dtype(least), np.where(high, dtype(most), inside))
    of_nan = 0
    if "f64" == source or "64" in target:
        of_nan = least if least else 1 << (8 * np.dtype(dtype).itemsize - 1)
    return np.where(np.isnan(exact), dtype(of_nan), result)


@computes("cvt[.ftz].f32(.f16|.bf16)", "d:0, s:1")
@computes("cvt.f64(.f16|.bf16|.f32)", "d:0, s:1")
def to_wider(form: Form, x: Array) -> Array:
    return number_of(form, x, form.types[1]).astype(TYPES[form.types[0]])


@computes("cvt.rn[.ftz].f32.f64", "d:0, s:1")
@computes("cvt.rn.f16.f64", "d:0, s:1")
def to_narrower(form: Form, x: Array) -> Array:
    return np.asarray(x).astype(TYPES[form.types[0]])


@computes("cvt.rn[.relu](.f16|.bf16).f32", "d:0, s:1")
def to_half_precision(form: Form, x: Array) -> Array:
    if form.has("relu"):
        x = np.where(np.isnan(x), x, np.maximum(x, F32(0)))
    return to_bfloat16(x) if form.types[0] == "bf16" else to_half(x)


@computes("cvt.rn.bf16.f64", "d:0, s:1")
def to_bfloat16_at_once(form: Form, x: Array) -> Array:
    """Round once: float32 in between is rounded to odd, so that it makes no tie."""
    single = np.asarray(x).astype(F32)
    error = x - single.astype(F64)
    bits = single.view(np.int32)
    inexact = (error != 0) & np.isfinite(single) & (bits & 1 == 0)
    step = np.where((error > 0) == (x > 0), np.int32(1), np.int32(-1))
    return to_bfloat16(np.where(inexact, bits + step, bits).view(F32))


@computes("cvt.rz(.f16|.bf16).f32", "d:0, s:1")
def truncated(form: Form, x: Array) -> Array:
    """Round towards zero, so that what is finite stays it."""
    if form.types[0] == "bf16":
        cut = (np.ascontiguousarray(x).view(U32) >> U32(16)).astype(U16)
        return np.where(np.isnan(x), U16(0x7FFF), cut)
    half = np.asarray(x).astype(F16)
    beyond = np.abs(half.astype(F32)) > np.abs(x)
    return np.where(
        np.isnan(x), U16(0x7FFF), np.where(beyond, half.view(U16) - U16(1), half.view(U16))
    )


@computes("cvt.rn[.relu](.f16x2|.bf16x2).f32", "d:0, s:f32, s:f32")
def to_two_halves(form: Form, upper: Array, lower: Array) -> Array:
    single = Form(form.text, tuple(word.removesuffix("x2") for word in form.words))
    upper, lower = (to_half_precision(single, x).astype(U32) for x in (upper, lower))
    return upper << U32(16) | lower


@computes("cvt.rna.tf32.f32", "d:b32, s:f32")
def to_tf32_register(form: Form, x: Array) -> Array:
    return to_tf32(x)


@computes("cvt(.rzi|.rni|.rmi|.rpi)[.ftz].f32.f32", "d:0, s:1")
@computes("cvt(.rzi|.rni|.rmi|.rpi).f64.f64", "d:0, s:1")
def to_whole_number(form: Form, x: Array) -> Array:
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[form.words[1]]
    return rounding(x)


# -------------------------------------------------------------------------------------- comparisons

ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def compare(form: Form, x: Array, y: Array) -> Array:
    """Compare; with a NaN an ordered comparison is false, and an unordered one (equ, ltu) true."""
    word = form.words[1]
    if form.type == "bf16":
        x, y = from_bfloat16(x), from_bfloat16(y)
    elif form.type[0] != "f":
        return ORDERED[word](x, y)
    nan = np.isnan(x) | np.isnan(y)
    if word in ("num", "nan"):
        return nan if word == "nan" else ~nan
    if word in ORDERED:
        return ORDERED[word](x, y) & ~nan
    return ORDERED[word[:2]](x, y) | nan


OF_NUMBERS = "(.eq|.ne|.lt|.le|.gt|.ge|.equ|.neu|.ltu|.leu|.gtu|.geu|.num|.nan)"
FORMS = [
    "setp(.eq|.ne){}(.b16|.b32|.b64)",
    "setp(.eq|.ne|.lt|.le|.gt|.ge|.lo|.ls|.hi|.hs){}(.u16|.u32|.u64)",
    "setp(.eq|.ne|.lt|.le|.gt|.ge){}(.s16|.s32|.s64)",
    f"setp{OF_NUMBERS}{{}}[.ftz].f32",
    f"setp{OF_NUMBERS}{{}}(.f64|.f16|.bf16)",
]


def comparison(form: Form, x: Array, y: Array, *further: Array) -> Array:
    """Compare, and join the result with a predicate where there is one."""
    result = compare(form, x, y)
    if not further:
        return result
    word = next(word for word in form.words if word in ("and", "or", "xor"))
    joined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    return joined[word](result, further[0])


for pattern in FORMS:
    computes(pattern.format(""), "d:pred, s, s")(comparison)
    computes(pattern.format("(.and|.or|.xor)"), "d:pred, s, s, p")(comparison)


@computes("selp(.b16|.b32|.b64|.u16|.u32|.u64|.s16|.s32|.s64|.f32|.f64)", "d, s, s, p")
def select(form: Form, x: Array, y: Array, condition: Array) -> Array:
    return np.where(condition, x, y)


@instruction("setp(.eq|.ne|.lt|.le|.gt|.ge)(.bf16x2|.f16x2)", "d|p, s, s")
def compare_halves(form: Form, destinations: list, x: Any, y: Any) -> Any:
    """Compare the lower and the upper halves; each comparison has its own predicate."""
    single = Form(form.text, (form.words[0], form.words[1], "f32"))

    def execute(machine: Any) -> None:
        numbers = [halves_of(machine.spread(operand(machine)), form.type) for operand in (x, y)]
        for i, destination in enumerate(destinations):
            destination(machine, compare(single, *(each[..., i] for each in numbers)))

    return execute


def halves_of(bits: Array, kind: str) -> Array:
    """Return the numbers of registers [n] with two halves each, [n, 2], in float32."""
    halves = np.ascontiguousarray(bits)[..., None].view(U16)
    return from_bfloat16(halves) if kind.startswith("b") else halves.view(F16).astype(F32)


@computes("(abs|neg)(.bf16|.f16|.bf16x2|.f16x2)", "d, s")
def change_sign(form: Form, x: Array) -> Array:
    """Clear the signs, or turn them."""
    bits = np.asarray(x).view(BITS[x.dtype.itemsize])
    signs = bits.dtype.type(0x80008000 if form.type.endswith("x2") else 0x8000)
    return bits & ~signs if form.words[0] == "abs" else bits ^ signs


@computes("slct(.b32|.f32|.s32|.u32|.b64).s32", "d:0, s:0, s:0, s:1")
def select_by_sign(form: Form, x: Array, y: Array, sign: Array) -> Array:
    return np.where(sign >= 0, x, y)
