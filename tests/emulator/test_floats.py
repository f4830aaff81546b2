"""Arithmetic of floats, against fractions rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.forms import TYPES

from .samples import F32, F64, assert_bits, chance, floats, flushed, once
from .snippets import compute

FLOATS = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "div.rn": lambda x, y: x / y,
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64"])
def test_floats(name, kind):
    flush = "ftz" in kind
    type_ = kind.removeprefix("ftz.")
    x, y = floats(type_, 2)
    found = compute(f"{name}.{kind} %0, %1, %2", type_, (type_, x), (type_, y))
    with np.errstate(all="ignore"):
        if flush:
            x, y = flushed(x), flushed(y)
        expected = FLOATS[name](x, y)
        assert_bits(found, flushed(expected) if flush else expected)


@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64"])
def test_fma_rounds_once(kind):
    type_ = kind.removeprefix("ftz.")
    x, y, z = floats(type_, 3)
    with np.errstate(all="ignore"):
        z[500:1500] = -(x * y)[500:1500]  # what is left is the error of the product
        near = slice(1500, 1800)  # the sum is near a tie of float32
        z[near] = ((x * y) * TYPES[type_](2.0**-24) * (1 + 2.0**-20))[near]
    found = compute(f"fma.rn.{kind} %0, %1, %2, %3", type_, *((type_, v) for v in (x, y, z)))
    with np.errstate(all="ignore"):
        if "ftz" in kind:
            x, y, z = map(flushed, (x, y, z))
        expected = x.astype(F64) * y + z
    for i, numbers in enumerate(zip(x, y, z, strict=True)):
        if all(map(math.isfinite, numbers)):
            a, b, c = (Fraction(float(v)) for v in numbers)
            if a * b + c:
                expected[i] = once(a * b + c, type_)
    assert_bits(found, flushed(expected) if "ftz" in kind else expected.astype(TYPES[type_]))


@pytest.mark.parametrize("low", [-1074, -1060, -1020, -960])
def test_fma_of_tiny_and_huge_doubles(low):
    n = 200
    x = chance.standard_normal(n) * 2.0 ** (low // 2)
    y = chance.standard_normal(n) * 2.0 ** (low - low // 2)
    z = chance.standard_normal(n) * np.ldexp(1.0, chance.integers(low - 3, low + 60, n))
    z[:20], x[20:40] = 1e308, 1e308
    found = compute("fma.rn.f64 %0, %1, %2, %3", "f64", *(("f64", v) for v in (x, y, z)))
    for result, *numbers in zip(found, x, y, z, strict=True):
        a, b, c = (Fraction(float(v)) for v in numbers)
        assert result == once(a * b + c, "f64")


def test_fma_of_zeros_and_infinities_beside_huge_doubles():
    x, y, z = np.array([
        [0.0, -1e300, -0.0], [-0.0, 1e300, -0.0], [0.0, 1e300, -0.0], [1e300, 1e300, -math.inf],
        [1e300, -1e300, math.inf], [math.inf, 0.0, 1.0], [math.inf, 1.0, -math.inf],
        [1e300, 1e10, -1e308],
    ]).T  # fmt: skip
    found = compute("fma.rn.f64 %0, %1, %2, %3", "f64", *(("f64", v) for v in (x, y, z)))
    nan, inf = math.nan, math.inf
    assert_bits(found, [-0.0, -0.0, 0.0, -inf, inf, nan, nan, inf])


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_of_floats(name, kind):
    """Return the number beside a NaN; -0 is less than 0."""
    x, y = floats(kind, 2)
    found = compute(f"{name}.{kind} %0, %1, %2", kind, (kind, x), (kind, y))
    key = {"max": max, "min": min}[name]
    expected = [
        b if math.isnan(a) else a if math.isnan(b)
        else key((a, b), key=lambda v: (v, math.copysign(1, v)))
        for a, b in zip(x, y, strict=True)
    ]  # fmt: skip
    assert_bits(found, expected)


def test_extremes_with_modifiers():
    x, y = floats("f32", 2)
    operands = ("f32", x), ("f32", y)
    nan = np.isnan(x) | np.isnan(y)
    found = compute("max.NaN.f32 %0, %1, %2", "f32", *operands)
    assert (np.isnan(found) == nan).all()
    found = compute("min.xorsign.abs.f32 %0, %1, %2", "f32", *operands)
    magnitude = np.fmin(np.abs(x), np.abs(y))
    expected = np.where(np.signbit(x) ^ np.signbit(y), -magnitude, magnitude)
    assert_bits(found[~nan], expected[~nan])
    found = compute("max.ftz.f32 %0, %1, %2", "f32", *operands)
    assert_bits(
        found[~nan],
        compute("max.f32 %0, %1, %2", "f32", ("f32", flushed(x)), ("f32", flushed(y)))[~nan],
    )
    z = floats("f32", 1)[0][: len(x)]
    x, y, z = (v[: len(z)] for v in (x, y, z))
    found = compute("max.f32 %0, %1, %2, %3", "f32", ("f32", x), ("f32", y), ("f32", z))
    np.testing.assert_array_equal(found, np.fmax(np.fmax(x, y), z))


UNARY = {
    "neg.f32": np.negative, "abs.f32": np.abs, "abs.ftz.f32": lambda x: np.abs(flushed(x)),
    "sqrt.rn.f32": np.sqrt, "sqrt.approx.ftz.f32": lambda x: flushed(np.sqrt(flushed(x))),
    "rcp.rn.f32": lambda x: 1 / x, "rcp.approx.ftz.f32": lambda x: flushed(1 / flushed(x)),
    "ex2.approx.f32": lambda x: np.exp2(x.astype(F64)),
    "ex2.approx.ftz.f32": lambda x: flushed(np.exp2(flushed(x).astype(F64)).astype(F32)),
    "lg2.approx.ftz.f32": lambda x: np.log2(flushed(x).astype(F64)),
    "rsqrt.approx.ftz.f32": lambda x: flushed(1 / np.sqrt(flushed(x).astype(F64))),
    "neg.f64": np.negative, "abs.f64": np.abs, "sqrt.rn.f64": np.sqrt,
    "rcp.rn.f64": lambda x: 1 / x,
    "cvt.rzi.f32.f32": np.trunc, "cvt.rni.f32.f32": np.rint, "cvt.rmi.f64.f64": np.floor,
    "cvt.rpi.f64.f64": np.ceil,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_functions(name):
    kind = name.split(".")[-1]
    (x,) = floats(kind, 1)
    found = compute(f"{name} %0, %1", kind, (kind, x))
    with np.errstate(all="ignore"):
        assert_bits(found, UNARY[name](x).astype(TYPES[kind]))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_half_and_floats(kind):
    """Where a float32 and halves meet, the halves are widened first."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b = torch.randn(2, 500).to(dtype)
    bits = [v.view(torch.int16).numpy().view(np.uint16) for v in (a, b)]
    a, b, c = a.float().numpy(), b.float().numpy(), floats("f32", 1)[0][100:600]
    halves = [(kind.replace("f16", "b16").replace("bb", "b"), v) for v in bits]
    assert_bits(compute(f"add.rn.f32.{kind} %0, %1, %2", "f32", halves[0], ("f32", c)), a + c)
    assert_bits(compute(f"sub.rn.f32.{kind} %0, %1, %2", "f32", halves[0], ("f32", c)), a - c)
    text = f"fma.rn.f32.{kind} %0, %1, %2, %3"
    found = compute(text, "f32", *halves, ("f32", c))
    expected = compute("fma.rn.f32 %0, %1, %2, %3", "f32", ("f32", a), ("f32", b), ("f32", c))
    assert_bits(found, expected)
    for word in ("lt", "neu"):
        text = f"setp.{word}.{kind} %0, %1, %2"
        found = compute(text, "pred", *halves)
        assert (found == (a < b if word == "lt" else a != b)).all()


def test_the_coarse_reciprocal_has_half_the_bits():
    x = np.array([3.0, -7.0, 1e-310, 0.0, math.inf, 1.2345678901234567])
    found = compute("rcp.approx.ftz.f64 %0, %1", "f64", ("f64", x))
    assert not (found.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
    np.testing.assert_allclose(found, [1 / 3, -1 / 7, math.inf, math.inf, 0, 1 / x[-1]], rtol=2e-6)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn"])
def test_pairs_are_two_floats(name):
    n = 3 if name == "fma.rn" else 2
    numbers = [x[:2000] for x in floats("f32", n)]
    operands = [("f32x2", x.view(np.uint64)) for x in numbers]
    places = ", ".join(f"%{i}" for i in range(n + 1))
    found = compute(f"{name}.f32x2 {places}", "f32x2", *operands).view(F32)
    assert_bits(found, compute(f"{name}.f32 {places}", "f32", *(("f32", x) for x in numbers)))
